"""Dual-mode advantages against plain float64 loops, hand-computed numbers and properties."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.objective import AdvantageConfig, dual_mode_advantages
from policy_split_jax.objective.advantages import importance_weights

NORMAL, HIGH_ENTROPY = 0, 1
# Float32 against float64: the statistics sum about 30 numbers below 10, so a mean is off by about 1e-6 and
# the z-score (std about 2) no more; the last addition of an O(1) advantage adds one rounding of 6e-8.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
QUESTIONS, ROLLOUTS, LENGTH = 4, 4, 6
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30, 7.0], np.float32)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None, derandomize=True)


def random_case(seed, length=LENGTH):
    """Ragged responses with garbage wherever nothing counts.

    The rewards of question 1 are equal, and question 2 has a single graded rollout.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length + 1, (QUESTIONS, ROLLOUTS))
    lengths[:, 0] = np.maximum(lengths[:, 0], 2)
    mask = np.arange(length) < lengths[..., None]
    valid = rng.random((QUESTIONS, ROLLOUTS)) < 0.8
    valid[:, 0] = True
    valid[2, 1:] = False
    rewards = rng.choice(np.array([0.0, 0.5, 1.0], np.float32), (QUESTIONS, ROLLOUTS))
    rewards[1] = 0.1
    rewards[~valid] = np.nan
    logprobs = -rng.gamma(1.0, 2.0, (2, QUESTIONS, ROLLOUTS, length)).astype(np.float32)
    counted = np.broadcast_to(mask & valid[..., None], logprobs.shape)
    return np.where(counted, logprobs, rng.choice(GARBAGE, logprobs.shape)), rewards, mask, valid


def plain_case(seed):
    """Ragged responses, all graded and finite; rewards in eighths that differ within each question."""
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (QUESTIONS, ROLLOUTS))[..., None]
    rewards = rng.integers(0, 9, (QUESTIONS, ROLLOUTS)).astype(np.float32) / 8
    rewards[:, :2] = [0.0, 1.0]
    logprobs = -rng.gamma(1.0, 2.0, (2, QUESTIONS, ROLLOUTS, LENGTH)).astype(np.float32)
    return logprobs, rewards, mask


def compute(logprobs, rewards, mask, config, valid=None):
    valid = None if valid is None else jnp.asarray(valid)
    logprobs, rewards = jnp.asarray(logprobs, jnp.float32), jnp.asarray(rewards, jnp.float32)
    return np.asarray(dual_mode_advantages(logprobs, rewards, jnp.asarray(mask), config, valid))


# ---------------------------------------------------------------- agreement with the equations


def test_a_mode_may_count_other_rollouts_than_the_other(oracle):
    """Then each has what it would have if nobody knew of the rest."""
    config = AdvantageConfig(alpha=0.3, eta=0.5, eta_normal=0.2, kappa=1.0)
    logprobs, rewards, mask, valid = random_case(3)
    own = np.stack([valid & (np.arange(ROLLOUTS) % 2 == mode) for mode in (NORMAL, HIGH_ENTROPY)])
    found = compute(logprobs, rewards, mask, config, own)
    for mode in (NORMAL, HIGH_ENTROPY):
        expected = oracle.dual_mode_advantages(logprobs, rewards, mask, config, own[mode])[mode]
        np.testing.assert_allclose(found[mode], expected, **TOLERANCE)
    assert np.abs(found - compute(logprobs, rewards, mask, config, valid)).max() > 0.1


def test_importance_weights_by_hand():
    """Two rollouts, of the normal and of the high-entropy mode; two tokens each."""
    logprobs = np.log(np.array([[[[0.5, 0.2], [0.4, 0.1]]], [[[0.25, 0.8], [0.1, 0.4]]]], np.float32))
    weights = importance_weights(jnp.asarray(logprobs), jnp.array([[NORMAL, HIGH_ENTROPY]]), 3.0)
    # Float32 logarithms and exponentials of numbers of size 1.
    np.testing.assert_allclose(weights, [[[[1, 1], [3, 0.25]]], [[[0.5, 3], [1, 1]]]], rtol=1e-6)


@pytest.mark.parametrize("low_quantile", [0.0, 0.37])
@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("clamp", ["bonus", "scaled_bonus"])
@pytest.mark.parametrize("normalize", ["zscore", "range", "none"])
def test_agrees_with_plain_loops(oracle, normalize, clamp, kappa, low_quantile):
    for seed, (norm_by_std, only_uniform_groups) in enumerate(itertools.product([True, False], repeat=2)):
        rng = np.random.default_rng(seed)
        config = AdvantageConfig(
            alpha=float(rng.choice([0.0, 0.3, 0.5, 1.0])),
            eta=float(rng.choice([0.03, 0.4, 1.0])),
            eta_normal=float(rng.choice([0.0, 0.2])),
            kappa=kappa,
            normalize=normalize,
            norm_by_std=norm_by_std,
            low_quantile=low_quantile,
            only_uniform_groups=only_uniform_groups,
            clamp=clamp,
            bonus_repeats=int(rng.choice([1, 2])),
        )
        case = random_case(seed)
        expected = oracle.dual_mode_advantages(*case[:3], config, case[3])
        np.testing.assert_allclose(compute(*case[:3], config, case[3]), expected, **TOLERANCE)


@few
@given(seed=seeds, alpha=st.floats(0, 1), eta=st.floats(0, 2), eta_normal=st.floats(0, 2))
def test_agrees_with_plain_loops_for_any_coefficients(oracle, seed, alpha, eta, eta_normal):
    config = AdvantageConfig(alpha=alpha, eta=eta, eta_normal=eta_normal)
    case = random_case(seed)
    expected = oracle.dual_mode_advantages(*case[:3], config, case[3])
    np.testing.assert_allclose(compute(*case[:3], config, case[3]), expected, **TOLERANCE)


@few
@given(seed=seeds, kappa=st.sampled_from([0.0, 1.0]), low_quantile=st.sampled_from([0.0, 0.37]))
def test_modes_may_have_tokens_of_their_own(oracle, seed, kappa, low_quantile):
    """Statistics are of a mode's own tokens; where only one of the two has a token, the other has nothing to add."""
    logprobs, rewards, mask, valid = random_case(seed)
    rng = np.random.default_rng(seed)
    lengths = np.maximum(mask.sum(-1) + rng.integers(-2, 3, mask.shape[:2]), 0)
    masks = np.stack([mask, np.arange(LENGTH) < lengths[..., None]])[rng.permutation(2)]
    logprobs = -rng.gamma(1.0, 2.0, logprobs.shape).astype(np.float32)
    logprobs = np.where(masks & valid[..., None], logprobs, rng.choice(GARBAGE, logprobs.shape))
    config = AdvantageConfig(alpha=0.3, eta=0.5, eta_normal=0.2, kappa=kappa, low_quantile=low_quantile)
    found = compute(logprobs, rewards, masks, config, valid)
    np.testing.assert_allclose(found, oracle.dual_mode_advantages(logprobs, rewards, masks, config, valid), **TOLERANCE)
    np.testing.assert_array_equal(found[~(masks & valid[..., None])], 0.0)


def test_bonuses_by_position_by_hand():
    """α = 1/4; of the second rollout the high-entropy mode has one token more, and of the first one less.

    −logp_N = 1 1 | 3 and −logp_HE = 1 | 3 3. HE mode: b = HE/4 + 3N/4 = 1 | 3 3/4, mean 19/12. Normal mode:
    b' = N/4 + 3HE/4 = 1 1/4 | 3, mean 17/12.
    """
    nan = np.nan
    logprobs = -np.array([[[[1, 1], [3, nan]]], [[[1, nan], [3, 3]]]], np.float32)
    config = AdvantageConfig(alpha=0.25, eta=1.0, eta_normal=1.0, kappa=0.0)
    found = compute(logprobs, [[0.0, 0.0]], ~np.isnan(logprobs), config)
    for mode, bonus, places in ((0, [1, 0.25, 3], [0, 1, 2]), (1, [1, 3, 0.75], [0, 2, 3])):
        expected = (np.array(bonus) - np.mean(bonus)) / np.std(bonus, ddof=1)
        np.testing.assert_allclose(found[mode].ravel()[places], expected, atol=2e-6)
        assert found[mode].ravel()[3 if mode == 0 else 1] == 0


def test_without_valid_every_rollout_counts(oracle):
    case = plain_case(0)
    expected = oracle.dual_mode_advantages(*case, AdvantageConfig())
    np.testing.assert_allclose(compute(*case, AdvantageConfig()), expected, **TOLERANCE)
    everyone = np.ones((QUESTIONS, ROLLOUTS), bool)
    np.testing.assert_array_equal(compute(*case, AdvantageConfig()), compute(*case, AdvantageConfig(), everyone))


def test_float32_sums_hold_at_full_length():
    # Eight responses of up to 12288 tokens, most of them nearly certain. Summed one by one in float32, these
    # 65031 numbers would put B off by 5e-4; summed in pieces they keep the tolerance of short ones.
    rng = np.random.default_rng(0)
    mask = np.arange(12288) < rng.integers(6000, 12288, (1, 8))[..., None]
    logprobs = -rng.gamma(0.1, 3.0, (2, 1, 8, 12288)).astype(np.float32)
    bonus = -logprobs.astype(np.float64).mean(axis=0)
    counted = bonus[mask]
    expected = np.where(mask, (bonus - counted.mean()) / (counted.std(ddof=1) + 1e-6), 0.0)
    advantages = compute(logprobs, np.zeros((1, 8)), mask, AdvantageConfig(eta=1.0, kappa=0.0))
    np.testing.assert_allclose(advantages[HIGH_ENTROPY], expected, **TOLERANCE)


# ---------------------------------------------------------------- numbers worked out by hand

# One question, rollouts (x, y), two tokens each, alpha = 1/4.
#   -logp_N  = x: 1 1   y: 3 7
#   -logp_HE = x: 1 5   y: 3 3
# HE mode:     b  = HE/4 + 3N/4 = 1 2 3 6, mean 3, deviations -2 -1 0 3, std sqrt(14/3),
#              B  = -0.925820 -0.462910 0 1.388730
# normal mode: b' = N/4 + 3HE/4 = 1 4 3 4, mean 3, deviations -2 1 0 1, std sqrt(6/3),
#              B' = -1.414214 0.707107 0 0.707107
# Rewards 1, 0: mean 1/2, unbiased std sqrt(1/2), so A = 0.707107 -0.707107 (0.707106 with eps).
HAND_LOGPROBS = -np.array([[[[1, 1], [3, 7]]], [[[1, 5], [3, 3]]]], np.float32)
A = 0.7071058
HAND_CASES = {
    # |A|/2 = 0.353553 cuts every B but the third; 0.03 of it is 0.010607.
    "paper": ({}, [A, A, -A, -A], [0.696499, 0.696499, -0.707106, -0.696499]),
    # |A|/4 = 0.176777; 1/4 of it, twice, is 0.088388.
    "clip then scale, twice": (
        {"eta": 0.25, "kappa": 4.0, "bonus_repeats": 2},
        [A, A, -A, -A],
        [0.618718, 0.618718, -0.707106, -0.618718],
    ),
    # B/4 = -0.231455 -0.115728 0 0.347183 is cut at 0.176777, then counted twice.
    "scale then clip, twice": (
        {"eta": 0.25, "kappa": 4.0, "bonus_repeats": 2, "clamp": "scaled_bonus"},
        [A, A, -A, -A],
        [0.353553, 0.475651, -0.707106, -0.353553],
    ),
    "no clamp": (
        {"eta": 0.1, "kappa": 0.0},
        [A, A, -A, -A],
        [0.614524, 0.660815, -0.707106, -0.568233],
    ),
    "normal mode too": (
        {"eta": 0.0, "eta_normal": 0.1, "kappa": 0.0},
        [0.565684, 0.777816, -0.707106, -0.636395],
        [A, A, -A, -A],
    ),
    # Deviations over max - min = 5: -0.4 -0.2 0 0.6.
    "range": (
        {"eta": 0.1, "kappa": 0.0, "normalize": "range"},
        [A, A, -A, -A],
        [0.667106, 0.687106, -0.707106, -0.647106],
    ),
    "no normalization": (
        {"eta": 0.1, "kappa": 0.0, "normalize": "none"},
        [A, A, -A, -A],
        [0.807106, 0.907106, -0.407106, -0.107106],
    ),
    # A = 1/2 -1/2.
    "not divided by std": (
        {"eta": 0.1, "kappa": 0.0, "normalize": "none", "norm_by_std": False},
        [0.5, 0.5, -0.5, -0.5],
        [0.6, 0.7, -0.2, 0.1],
    ),
    # The median of 1 2 3 6 is 2.5: the first two tokens lose their bonus.
    "median": (
        {"eta": 0.1, "kappa": 0.0, "low_quantile": 0.5},
        [A, A, -A, -A],
        [0.707106, 0.707106, -0.707106, -0.568233],
    ),
    # The quarter quantile of 1 2 3 6 is 1.75 by linear interpolation.
    "quarter quantile": (
        {"eta": 0.1, "kappa": 0.0, "low_quantile": 0.25},
        [A, A, -A, -A],
        [0.707106, 0.660815, -0.707106, -0.568233],
    ),
    "rewards differ, bonus only in uniform groups": (
        {"eta": 0.1, "kappa": 0.0, "only_uniform_groups": True},
        [A, A, -A, -A],
        [A, A, -A, -A],
    ),
}


@pytest.mark.parametrize("name", HAND_CASES)
def test_hand_computed(oracle, name):
    changes, normal, high_entropy = HAND_CASES[name]
    config = AdvantageConfig(**{"alpha": 0.25} | changes)
    mask = np.ones((1, 2, 2), bool)
    expected = np.array([normal, high_entropy]).reshape(2, 1, 2, 2)
    for function in (compute, oracle.dual_mode_advantages):
        actual = function(HAND_LOGPROBS, np.array([[1.0, 0.0]]), mask, config)
        np.testing.assert_allclose(actual, expected, atol=1.5e-6)  # written with six digits


def test_defaults_are_the_papers():
    assert dataclasses.asdict(AdvantageConfig()) == {
        "alpha": 0.5,
        "eta": 0.03,
        "eta_normal": 0.0,
        "kappa": 2.0,
        "normalize": "zscore",
        "norm_by_std": True,
        "low_quantile": 0.0,
        "only_uniform_groups": False,
        "clamp": "bonus",
        "bonus_repeats": 1,
        "surprise": "neg_logprob",
    }


def test_eps_is_added_to_the_std_of_rewards():
    # Rewards 0 and 2e-6: deviation 1e-6, unbiased std sqrt(2)*1e-6, so A = 1 / (sqrt(2) + 1) = sqrt(2) - 1.
    advantages = compute(np.zeros((2, 1, 2, 1)), [[0.0, 2e-6]], np.ones((1, 2, 1), bool), AdvantageConfig(eta=0.0))
    np.testing.assert_allclose(advantages[NORMAL, 0, :, 0], [1 - math.sqrt(2), math.sqrt(2) - 1], rtol=1e-5)


@pytest.mark.parametrize(("normalize", "size"), [("zscore", math.sqrt(2) - 1), ("range", 1 / 3)])
def test_eps_is_added_to_the_spread_of_the_bonus(normalize, size):
    # b = 0 and 2e-6: the same numbers as for rewards; by range 1e-6 / (2e-6 + 1e-6).
    logprobs = np.broadcast_to(np.array([0.0, -2e-6]).reshape(1, 1, 2, 1), (2, 1, 2, 1))
    config = AdvantageConfig(eta=1.0, kappa=0.0, normalize=normalize)
    advantages = compute(logprobs, [[1.0, 1.0]], np.ones((1, 2, 1), bool), config)
    np.testing.assert_allclose(advantages[HIGH_ENTROPY, 0, :, 0], [-size, size], rtol=1e-5)


@pytest.mark.parametrize(("tokens", "low_quantile"), [(5, 0.5), (6, 0.2), (11, 0.3), (11, 0.7), (21, 0.15), (41, 0.9)])
def test_a_token_exactly_at_the_quantile_keeps_its_bonus(tokens, low_quantile):
    # low_quantile * (tokens - 1) is an integer: that many tokens lie below, and one lies at the quantile.
    rank = round(low_quantile * (tokens - 1))
    bonus = np.linspace(0.1, 9.7, tokens, dtype=np.float32)
    logprobs = np.full((2, 1, 1, 41), np.nan)
    logprobs[..., :tokens] = -np.random.default_rng(0).permutation(bonus)
    mask = (np.arange(41) < tokens)[None, None]
    config = AdvantageConfig(alpha=1.0, eta=1.0, kappa=0.0, normalize="none", low_quantile=low_quantile)
    advantages = compute(logprobs, [[0.0]], mask, config)[HIGH_ENTROPY, 0, 0, :tokens]
    np.testing.assert_allclose(np.sort(advantages), [0.0] * rank + list(bonus[rank:]), rtol=1e-6)


def test_the_quantile_is_of_the_bonus_of_the_mode_at_hand():
    # alpha = 1: HE mode ranks by -logp_HE = 1 2 3, normal mode by -logp_N = 3 2 1; the median stays in both.
    logprobs = -np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]).reshape(2, 1, 1, 3)
    config = AdvantageConfig(alpha=1.0, eta=1.0, eta_normal=1.0, kappa=0.0, normalize="none", low_quantile=0.5)
    advantages = compute(logprobs, [[0.0]], np.ones((1, 1, 3), bool), config)[:, 0, 0]
    np.testing.assert_allclose(advantages, [[3.0, 2.0, 0.0], [0.0, 2.0, 3.0]], rtol=1e-6)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("rollouts", [3, 8])
def test_all_rewards_equal_gives_exactly_zero(rollouts):
    # Exactly: a mean that is off by one rounding would be divided by a std of that size plus 1e-6, not by 1.
    values = np.array([0.0, 1.0, 0.1, 0.7, -0.3, 123.4])
    shape = (len(values), rollouts, 3)
    logprobs = -np.random.default_rng(0).gamma(1.0, 2.0, (2, *shape))
    rewards = np.repeat(values[:, None], rollouts, axis=1)
    advantages = compute(logprobs, rewards, np.ones(shape, bool), AdvantageConfig(eta_normal=0.1))
    np.testing.assert_array_equal(advantages, np.zeros((2, *shape)))


def test_all_rewards_equal_among_the_graded_gives_exactly_zero():
    logprobs = -np.random.default_rng(0).gamma(1.0, 2.0, (2, 1, 4, 3))
    valid = np.array([[True, True, True, False]])
    advantages = compute(logprobs, [[0.7, 0.7, 0.7, 0.2]], np.ones((1, 4, 3), bool), AdvantageConfig(), valid)
    np.testing.assert_array_equal(advantages, np.zeros((2, 1, 4, 3)))


def test_uniform_groups_get_the_bonus_alone_without_clamp(oracle):
    # b = 1 2 3 6 as in the hand-computed cases; A = 0, so 0.1 * B is all there is.
    config = AdvantageConfig(alpha=0.25, eta=0.1, kappa=0.0, only_uniform_groups=True)
    for valid, rewards in ((None, [[1.0, 1.0]]), (np.array([[True, True]]), [[0.0, 0.0]])):
        for function in (compute, oracle.dual_mode_advantages):
            advantages = function(HAND_LOGPROBS, rewards, np.ones((1, 2, 2), bool), config, valid)
            np.testing.assert_allclose(
                advantages[HIGH_ENTROPY].ravel(), [-0.092582, -0.046291, 0.0, 0.138873], atol=1e-6
            )
            np.testing.assert_array_equal(advantages[NORMAL], np.zeros((1, 2, 2)))


def test_an_ungraded_rollout_does_not_make_a_group_mixed():
    config = AdvantageConfig(eta=0.1, kappa=0.0, only_uniform_groups=True)
    logprobs = -np.random.default_rng(0).gamma(1.0, 2.0, (2, 1, 3, 2))
    mask, valid = np.ones((1, 3, 2), bool), np.array([[True, True, False]])
    for ungraded in (0.0, np.nan):
        advantages = compute(logprobs, [[1.0, 1.0, ungraded]], mask, config, valid)[HIGH_ENTROPY, 0]
        assert np.all(np.abs(advantages[:2]) > 1e-4)
        np.testing.assert_array_equal(advantages[2], np.zeros(2))


def test_one_token_in_the_group_has_no_bonus():
    # Its deviation from the mean of itself is 0, whatever it is divided by.
    mask = np.zeros((1, 2, 3), bool)
    mask[0, 0, 1] = True
    logprobs = np.full((2, 1, 2, 3), -1.7)
    for normalize, kappa in itertools.product(("zscore", "range"), (0.0, 2.0)):
        config = AdvantageConfig(eta=1.0, kappa=kappa, normalize=normalize)
        advantages = compute(logprobs, [[1.0, 0.0]], mask, config)
        expected = np.where(mask, A, 0.0)
        np.testing.assert_allclose(advantages, np.stack([expected, expected]), atol=1e-6)


def test_nothing_but_the_stop_token():
    # Each of three responses is one token; b = 1 2 6: mean 3, deviations -2 -1 3, std sqrt(7).
    # Rewards 1 0 0: mean 1/3, deviations 2/3 -1/3 -1/3, std sqrt(1/3): A = 1.154701 -0.577350 -0.577350.
    # Clamp at |A|/2 = 0.577350 0.288675 0.288675 of B = -0.755929 -0.377964 1.133893; eta = 1/2.
    logprobs = np.broadcast_to(-np.array([1.0, 2.0, 6.0]).reshape(1, 1, 3, 1), (2, 1, 3, 1))
    config = AdvantageConfig(eta=0.5)
    advantages = compute(logprobs, [[1.0, 0.0, 0.0]], np.ones((1, 3, 1), bool), config)[..., 0]
    expected = [[[1.154699, -0.577349, -0.577349]], [[0.866024, -0.721687, -0.433012]]]
    np.testing.assert_allclose(advantages, expected, atol=2e-6)


@pytest.mark.parametrize("normalize", ["zscore", "range", "none"])
@pytest.mark.parametrize("low_quantile", [0.0, 0.5])
def test_all_masked_gives_zero_and_leaves_other_groups_alone(normalize, low_quantile):
    logprobs, rewards, mask = plain_case(1)
    config = AdvantageConfig(normalize=normalize, low_quantile=low_quantile, kappa=0.0)
    before = compute(logprobs, rewards, mask, config)
    emptied, garbage = mask.copy(), logprobs.copy()
    emptied[1], garbage[:, 1] = False, np.nan
    after = compute(garbage, rewards, emptied, config)
    np.testing.assert_array_equal(after[:, 1], np.zeros(after[:, 1].shape))
    np.testing.assert_allclose(after[:, [0, 2, 3]], before[:, [0, 2, 3]], rtol=1e-6, atol=1e-6)


def test_a_graded_rollout_without_tokens_counts_among_the_rewards():
    # Rewards 1 0 0 as above, though the last response is empty: A = 1.154701 -0.577350.
    mask = np.array([[[True], [True], [False]]])
    advantages = compute(np.zeros((2, 1, 3, 1)), [[1.0, 0.0, 0.0]], mask, AdvantageConfig(eta=0.0))
    np.testing.assert_allclose(advantages[NORMAL, 0, :, 0], [1.154699, -0.577349, 0.0], atol=2e-6)


def test_kappa_zero_lets_the_bonus_through_whole():
    # B of the last token is 1.388730: with eta = 1 it outweighs A = -0.707106, but only without the clamp.
    arguments = (HAND_LOGPROBS, np.array([[1.0, 0.0]]), np.ones((1, 2, 2), bool))
    unclamped = compute(*arguments, AdvantageConfig(alpha=0.25, eta=1.0, kappa=0.0))
    clamped = compute(*arguments, AdvantageConfig(alpha=0.25, eta=1.0, kappa=1.0))
    np.testing.assert_allclose(unclamped[HIGH_ENTROPY, 0, 1, 1], 1.388730 - A, atol=2e-6)
    np.testing.assert_allclose(clamped[HIGH_ENTROPY, 0, 1, 1], 0.0, atol=1e-6)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_group_of_one(norm_by_std):
    # Mean 0 and std 1, so A = r = 1/2; b = 1 2, B = -+0.707106, cut at |A|/2 = 1/4, 0.03 of which is 0.0075.
    logprobs = np.broadcast_to(np.array([-1.0, -2.0]), (2, 1, 1, 2))
    advantages = compute(logprobs, [[0.5]], np.ones((1, 1, 2), bool), AdvantageConfig(norm_by_std=norm_by_std))
    np.testing.assert_allclose(advantages[:, 0, 0], [[0.5, 0.5], [0.4925, 0.5075]], atol=1e-6)


def test_all_ungraded_but_one_is_a_group_of_one():
    # As above; the others' rewards and log-probabilities are not numbers.
    logprobs = np.full((2, 1, 3, 2), np.nan)
    logprobs[:, 0, 1] = [-1.0, -2.0]
    valid = np.array([[False, True, False]])
    advantages = compute(logprobs, [[np.nan, 0.5, np.inf]], np.ones((1, 3, 2), bool), AdvantageConfig(), valid)
    expected = np.zeros((2, 1, 3, 2))
    expected[:, 0, 1] = [[0.5, 0.5], [0.4925, 0.5075]]
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


@pytest.mark.parametrize("normalize", ["zscore", "range", "none"])
@pytest.mark.parametrize("low_quantile", [0.0, 0.5])
def test_all_ungraded_gives_zero(normalize, low_quantile):
    config = AdvantageConfig(kappa=0.0, eta_normal=0.1, normalize=normalize, low_quantile=low_quantile)
    logprobs, rewards = np.full((2, 1, 3, 2), -np.inf), np.full((1, 3), np.nan)
    advantages = compute(logprobs, rewards, np.ones((1, 3, 2), bool), config, np.zeros((1, 3), bool))
    np.testing.assert_array_equal(advantages, np.zeros((2, 1, 3, 2)))


@pytest.mark.parametrize("normalize", ["zscore", "range"])
def test_equal_tokens_have_no_bonus(normalize):
    # The uniform policy over 151936 tokens, in groups of 2 to 50 tokens. A mean off by its last digit (1e-6)
    # over a std of the same size plus eps would make a bonus of about 0.5 out of nothing.
    counts = np.arange(2, 51)
    mask = (np.arange(50) < counts[:, None])[:, None]
    config = AdvantageConfig(eta=1.0, kappa=0.0, normalize=normalize)
    logprobs = np.full((2, *mask.shape), -math.log(151936))
    advantages = compute(logprobs, np.zeros((len(counts), 1)), mask, config)
    np.testing.assert_allclose(advantages, np.zeros(advantages.shape), atol=1e-6)


# ---------------------------------------------------------------- properties


@few
@given(seed=seeds, shuffle=st.permutations(range(ROLLOUTS)))
def test_permuting_rollouts_permutes_advantages(seed, shuffle):
    logprobs, rewards, mask, valid = random_case(seed)
    config = AdvantageConfig(eta=0.5, eta_normal=0.2, low_quantile=0.37)
    shuffled = (logprobs[:, :, shuffle], rewards[:, shuffle], mask[:, shuffle], config, valid[:, shuffle])
    expected = compute(logprobs, rewards, mask, config, valid)[:, :, shuffle]
    np.testing.assert_allclose(compute(*shuffled), expected, **TOLERANCE)


@few
@given(seed=seeds, shuffle=st.permutations(range(QUESTIONS)))
def test_permuting_questions_permutes_advantages(seed, shuffle):
    logprobs, rewards, mask, valid = random_case(seed)
    config = AdvantageConfig(eta=0.5, eta_normal=0.2, low_quantile=0.37)
    shuffled = (logprobs[:, shuffle], rewards[shuffle], mask[shuffle], config, valid[shuffle])
    expected = compute(logprobs, rewards, mask, config, valid)[:, shuffle]
    np.testing.assert_allclose(compute(*shuffled), expected, **TOLERANCE)


@few
@given(seed=seeds, left=st.integers(0, 5))
def test_extra_padding_changes_nothing(seed, left):
    logprobs, rewards, mask, valid = random_case(seed)
    config = AdvantageConfig(eta=0.5, eta_normal=0.2, low_quantile=0.37)
    width = [(0, 0), (0, 0), (left, 5 - left)]
    padded = np.pad(logprobs, [(0, 0), *width], constant_values=np.nan)
    actual = compute(padded, rewards, np.pad(mask, width), config, valid)
    expected = np.pad(compute(logprobs, rewards, mask, config, valid), [(0, 0), *width])
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@few
@given(seed=seeds, normalize=st.sampled_from(["zscore", "range", "none"]))
def test_garbage_where_nothing_counts_changes_nothing(seed, normalize):
    logprobs, rewards, mask, valid = random_case(seed)
    config = AdvantageConfig(kappa=0.0, eta_normal=0.2, normalize=normalize, low_quantile=0.37)
    clean = np.where(mask & valid[..., None], logprobs, -1.0)
    graded = np.where(valid, rewards, 0.0)
    actual = compute(logprobs, rewards, mask, config, valid)
    np.testing.assert_array_equal(actual, compute(clean, graded, mask, config, valid))
    np.testing.assert_array_equal(actual[:, ~(mask & valid[..., None])], 0.0)


@few
@given(seed=seeds, constant=st.integers(-8, 8), norm_by_std=st.booleans())
def test_adding_a_constant_to_the_rewards_changes_nothing(seed, constant, norm_by_std):
    # Groups of at least two: a group of one has no baseline. Multiples of 1/8 stay exact in float32.
    logprobs, rewards, mask = plain_case(seed)
    config = AdvantageConfig(norm_by_std=norm_by_std, eta=0.5)
    expected = compute(logprobs, rewards, mask, config)
    np.testing.assert_allclose(compute(logprobs, rewards + constant, mask, config), expected, **TOLERANCE)


@few
@given(
    seed=seeds,
    eta=st.floats(0, 0.99),
    kappa=st.floats(1, 4),
    clamp=st.sampled_from(["bonus", "scaled_bonus"]),
)
def test_the_clamp_keeps_the_sign_of_the_advantage(seed, eta, kappa, clamp):
    # Strictly below kappa = eta: at equality the bonus may cancel the advantage (next test). The scaled clamp
    # bounds by |A|/kappa whatever eta is, so there kappa itself must exceed 1.
    kappa = max(kappa, 1.01) if clamp == "scaled_bonus" else kappa
    logprobs, rewards, mask, valid = random_case(seed)
    plain = compute(logprobs, rewards, mask, AdvantageConfig(eta=0.0), valid)
    config = AdvantageConfig(eta=eta, eta_normal=eta, kappa=kappa, clamp=clamp)
    split = compute(logprobs, rewards, mask, config, valid)
    np.testing.assert_array_equal(np.sign(split), np.sign(plain))


@few
@given(seed=seeds, clamp=st.sampled_from(["bonus", "scaled_bonus"]))
def test_at_its_loosest_the_clamp_never_turns_the_sign(seed, clamp):
    logprobs, rewards, mask, valid = random_case(seed)
    plain = compute(logprobs, rewards, mask, AdvantageConfig(eta=0.0), valid)
    split = compute(logprobs, rewards, mask, AdvantageConfig(eta=1.0, kappa=1.0, clamp=clamp), valid)
    assert np.all(split * plain >= 0)


@few
@given(seed=seeds)
def test_normal_mode_has_the_correctness_advantage_alone(oracle, seed):
    # Whatever is done to HE mode: the same number for every token of a rollout, and no trace of eta.
    logprobs, rewards, mask, valid = random_case(seed)
    advantages = compute(logprobs, rewards, mask, AdvantageConfig(eta=1.0, kappa=0.0), valid)[NORMAL]
    without = compute(logprobs, rewards, mask, AdvantageConfig(eta=0.0), valid)
    np.testing.assert_array_equal(advantages, without[NORMAL])
    np.testing.assert_array_equal(without[NORMAL], without[HIGH_ENTROPY])
    expected = oracle.dual_mode_advantages(logprobs, rewards, mask, AdvantageConfig(eta=0.0), valid)[NORMAL]
    np.testing.assert_allclose(advantages, expected, **TOLERANCE)


# ---------------------------------------------------------------- under jax


def test_advantages_carry_no_gradient():
    logprobs, rewards, mask, valid = (jnp.asarray(x) for x in random_case(2))
    config = AdvantageConfig(eta=1.0, eta_normal=1.0, kappa=0.0)
    weights = jax.random.normal(jax.random.key(0), logprobs.shape)

    def weighted(values):
        return jnp.sum(weights * dual_mode_advantages(values, rewards, mask, config, valid))

    value, gradient = jax.value_and_grad(weighted)(logprobs)
    assert abs(float(value)) > 0.1
    np.testing.assert_array_equal(gradient, np.zeros(logprobs.shape))


@pytest.mark.parametrize("normalize", ["zscore", "range", "none"])
def test_jitted_equals_not_jitted(normalize):
    logprobs, rewards, mask, valid = (jnp.asarray(x) for x in random_case(3))
    config = AdvantageConfig(eta=0.5, eta_normal=0.2, normalize=normalize, low_quantile=0.37)
    jitted = jax.jit(dual_mode_advantages, static_argnums=3)
    expected = dual_mode_advantages(logprobs, rewards, mask, config, valid)
    # Fusion reorders sums: a few roundings of numbers below 10.
    np.testing.assert_allclose(jitted(logprobs, rewards, mask, config, valid), expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("clamp", ["bonus", "scaled_bonus"])
def test_eta_may_be_traced(clamp):
    logprobs, rewards, mask, valid = (jnp.asarray(x) for x in random_case(4))
    config = AdvantageConfig(clamp=clamp)

    @jax.jit
    def with_eta(eta):
        return dual_mode_advantages(logprobs, rewards, mask, dataclasses.replace(config, eta=eta), valid)

    for eta in (0.0, 0.03, 0.7):
        expected = compute(logprobs, rewards, mask, dataclasses.replace(config, eta=eta), valid)
        np.testing.assert_allclose(with_eta(jnp.float32(eta)), expected, rtol=1e-5, atol=5e-6)
    assert np.any(np.abs(with_eta(0.7) - with_eta(0.0)) > 0.01)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 1.5),
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("eta", -0.03),
        ("eta", math.nan),
        ("kappa", 0.5),
        ("kappa", -2.0),
        ("kappa", math.nan),
        ("low_quantile", 1.0),
        ("low_quantile", -0.1),
        ("bonus_repeats", 0),
    ],
)
def test_a_bad_setting_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        AdvantageConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("normalize", "softmax"), ("clamp", "advantage"), ("surprise", "logits")])
def test_an_unknown_name_is_refused(field, value):
    # Set past the constructor, where the type checks of the tests would refuse it first.
    config = AdvantageConfig()
    object.__setattr__(config, field, value)
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        config.__post_init__()


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", 0.0), ("alpha", 1.0), ("eta", 0.0), ("kappa", 0.0), ("kappa", 1.0), ("low_quantile", 0.99)],
)
def test_the_ends_of_each_range_are_allowed(field, value):
    assert getattr(AdvantageConfig(**{field: value}), field) == value
