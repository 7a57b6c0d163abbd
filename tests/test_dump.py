"""Dumped rollouts of both modes and of a baseline; parity/test_rollouts.py reads those of both back."""

from dataclasses import replace

import pytest

from policy_split_jax.dump import dump_rows
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.parity.inputs import random_model, sampled_groups

QUESTIONS, ROLLOUTS = 2, 4


@pytest.fixture(scope="module")
def policy_and_groups():
    policy, params = random_model()
    return policy, sampled_groups(policy, params, (NORMAL, HIGH_ENTROPY), QUESTIONS, ROLLOUTS)


def kinds(rows):
    return [(row["is_he_prompt"], row["is_he_response"]) for row in rows]


def test_both_modes_are_four_quarters(policy_and_groups):
    rows = list(dump_rows(*policy_and_groups, None, step=3))
    each = QUESTIONS * ROLLOUTS // 2
    order = [(False, False), (True, True), (False, True), (True, False)]
    assert kinds(rows) == [kind for kind in order for _ in range(each)]
    names = [f"3-{question}-{mode}" for question in (0, 1) for mode in ("normal", "high_entropy")]
    assert {row["uuids"] for row in rows} == set(names)


def test_a_baseline_is_one_quarter(policy_and_groups):
    policy, groups = policy_and_groups
    sampled = [replace(group, modes=[NORMAL] * ROLLOUTS) for group in groups]
    rows = list(dump_rows(policy, sampled, None, step=3))
    assert kinds(rows) == [(False, False)] * QUESTIONS * ROLLOUTS
    assert {row["uuids"] for row in rows} == {"3-0-normal", "3-1-normal"}
