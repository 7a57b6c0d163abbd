"""The training step in JAX against the one in PyTorch, for every preset and baseline, on a small random Qwen3."""

import json

import pytest

from policy_split_jax.cli import main
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.parity import torch_step
from policy_split_jax.parity.inputs import random_model, sampled_groups
from policy_split_jax.parity.step import VARIANTS, Difference, compare

OF_TOKENS = ["logits", "logprobs", "entropy", "advantages"]
AFTER = ["parameters after 1 step", "parameters after 2 steps"]


@pytest.fixture(scope="module")
def inputs():
    policy, params = random_model()
    return policy, params, sampled_groups(policy, params, (NORMAL, HIGH_ENTROPY), questions=4, rollouts=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees(inputs, variant):
    found = compare(*inputs, variant, "float32", steps=2)
    bonus = ["bonus"] if variant in ("paper", "released") else []
    assert list(dict.fromkeys(each.name for each in found.differences)) == [
        *OF_TOKENS[:3], *bonus, *OF_TOKENS[3:], "loss", "gradient norm (relative)", "ratio", *AFTER,
    ]  # fmt: skip
    parts = [each.part for each in found.differences if each.name == AFTER[1]]
    assert len(parts) == len(set(parts)) == 13
    assert [each for each in found.differences if not each.passes] == []


@pytest.mark.parametrize("variant", ["paper", pytest.param("clip_higher", marks=pytest.mark.slow)])
def test_bfloat16_agrees(inputs, variant):
    found = compare(*inputs, variant, "bfloat16", steps=2)
    assert [each for each in found.differences if not each.passes] == []
    largest = {each.name: each.largest for each in found.differences}
    # It is bfloat16: float32 differs by a thousandth of this.
    assert largest["logits"] > 0.01


def test_another_equation_is_seen(inputs, monkeypatch):
    monkeypatch.setattr(torch_step, "_EPS", 0.01)
    found = compare(*inputs, "grpo", "float32", steps=1)
    assert not found.passes
    failed = {each.name for each in found.differences if not each.passes}
    assert "advantages" in failed
    assert not failed & {"logits", "logprobs", "entropy"}


@pytest.mark.parametrize(("largest", "passes"), [(0.5, True), (0.6, False), (float("inf"), False)])
def test_what_passes(largest, passes):
    assert Difference("loss", largest, 0.0, tolerance=0.5).passes is passes


def test_the_command(tmp_path, capsys):
    path = tmp_path / "found.json"
    options = ["--variant", "grpo", "--dtype", "float32", "--steps", "1", "--output", str(path)]
    assert main(["compare", "step", *options]) == 0
    printed = capsys.readouterr().out
    assert "grpo, float32" in printed
    assert "all 1 agree" in printed
    (found,) = json.loads(path.read_text())
    assert (found["variant"], found["dtype"], found["passes"]) == ("grpo", "float32", True)
    assert {each["name"] for each in found["differences"]} >= {*OF_TOKENS, AFTER[0]}


def test_the_command_fails_where_something_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch_step, "_EPS", 0.01)
    path = tmp_path / "found.json"
    options = ["--variant", "grpo", "--dtype", "float32", "--steps", "1", "--output", str(path)]
    assert main(["compare", "step", *options]) == 1
    assert "1 of 1 differ: grpo in float32" in capsys.readouterr().out
    assert json.loads(path.read_text())[0]["passes"] is False


def test_a_variant_that_there_is_not(capsys):
    assert main(["compare", "step", "--variant", "ppo"]) == 2
    assert "--variant ppo: there is none of that name; known are paper, released, grpo" in capsys.readouterr().err


def test_pytorch_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr("policy_split_jax.parity.commands.find_spec", lambda name: None)
    assert main(["compare", "step"]) == 2
    assert "install 'policy-split-jax[torch]'" in capsys.readouterr().err
