"""The paper's baselines against plain float64 loops, hand-computed numbers and properties."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.objective import baselines
from policy_split_jax.objective.baselines import (
    BaselineConfig,
    ClipCov,
    EntropyAdvantage,
    EntropyRegularization,
    ForkingTokens,
    KlCov,
    baseline_terms,
    selection_noise,
)

OBJECTIVES = (
    "grpo",
    "forking_tokens",
    "clip_cov",
    "kl_cov",
    "entropy_driven_advantage",
    "entropy_regularization",
    "entropy_advantage",
)
SHAPE = (3, 4, 6)  # questions, rollouts, tokens
# Float32 against float64: means of up to 72 numbers below 10, and products of two of them.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e30, 7.0], np.float32)
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None, derandomize=True)


def random_case(seed, shape=SHAPE):
    """Ragged responses, some of them empty, with garbage at the padding.

    Outcomes of each rollout, log-probabilities, entropies, noise and the mask.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, shape[-1] + 1, shape[:-1])
    lengths[:, 0] = shape[-1]
    mask = np.arange(shape[-1]) < lengths[..., None]
    outcome = rng.normal(0.0, 1.5, shape[:-1])
    logprobs, entropy, noise = -rng.gamma(1.0, 2.0, shape), rng.gamma(1.0, 1.0, shape), rng.random(shape)
    arrays = (np.where(mask, values, rng.choice(GARBAGE, shape)) for values in (logprobs, entropy, noise))
    return outcome.astype(np.float32), *(values.astype(np.float32) for values in arrays), mask


def as_tokens(outcome, mask):
    """Each rollout's advantage at its tokens, and nothing that may be used elsewhere."""
    return np.where(mask, outcome[..., None], np.nan).astype(np.float32)


# ------------------------------------------------------------------------- once more, in loops of float64


def places(mask):
    return [index for index in np.ndindex(mask.shape) if mask[index]]


def chosen(mask, places):
    result = np.zeros(mask.shape, bool)
    for index in places:
        result[index] = True
    return result


def number(mask, share):
    return max(math.floor(share * len(places(mask))), 1)


def covariances(logprobs, advantages, mask):
    """{token: (log p − mean) (A − mean)}, means over all tokens."""
    tokens = places(mask)
    mean_logprob = sum(float(logprobs[index]) for index in tokens) / len(tokens)
    mean_advantage = sum(float(advantages[index]) for index in tokens) / len(tokens)
    return {
        index: (float(logprobs[index]) - mean_logprob) * (float(advantages[index]) - mean_advantage) for index in tokens
    }


def forking_tokens(entropy, mask, share):
    """The tokens at and above the quantile, between two of the ordered entropies where it falls there."""
    ordered = sorted(float(entropy[index]) for index in places(mask))
    at = (1 - share) * (len(ordered) - 1)
    below = min(math.floor(at), len(ordered) - 2)
    threshold = ordered[below] + (at - below) * (ordered[below + 1] - ordered[below])
    return chosen(mask, [index for index in places(mask) if float(entropy[index]) >= threshold])


def clip_cov(logprobs, advantages, mask, config, noise):
    found = covariances(logprobs, advantages, mask)
    band = sorted((index for index in found if config.low < found[index] < config.high), key=lambda at: noise[at])
    return mask & ~chosen(mask, band[: number(mask, config.share)])


def kl_cov(logprobs, advantages, mask, share):
    found = covariances(logprobs, advantages, mask)
    return chosen(mask, sorted(found, key=found.__getitem__, reverse=True)[: number(mask, share)])


def entropy_driven(outcome, entropy, mask):
    """A_i · mean_j(H_j) / H_i, of the rollouts that have tokens."""
    result = np.zeros(outcome.shape)
    for p in range(len(outcome)):
        means = {i: np.mean(entropy[p, i][mask[p, i]], dtype=np.float64) for i in range(SHAPE[1]) if mask[p, i].any()}
        for i, own in means.items():
            result[p, i] = outcome[p, i] * (sum(means.values()) / len(means)) / own
    return result


# ----------------------------------------------------------------------------- agreement with the formulas


@few
@given(seed=seeds, share=st.sampled_from([0.05, 0.2, 0.5, 0.93, 1.0]))
def test_forking_tokens_are_those_above_the_quantile(seed, share):
    _, _, entropy, _, mask = random_case(seed)
    kept = baselines.forking_tokens(jnp.asarray(entropy), jnp.asarray(mask), ForkingTokens(share))
    np.testing.assert_array_equal(kept, forking_tokens(entropy, mask, share))


@few
@given(seed=seeds)
def test_the_covariance_is_of_all_tokens(seed):
    outcome, logprobs, _, _, mask = random_case(seed)
    advantages = as_tokens(outcome, mask)
    found = np.asarray(baselines.covariance(jnp.asarray(logprobs), jnp.asarray(advantages), jnp.asarray(mask)))
    expected = covariances(logprobs, advantages, mask)
    np.testing.assert_allclose([found[index] for index in expected], list(expected.values()), **TOLERANCE)


@few
@given(seed=seeds, share=st.sampled_from([2e-4, 0.05, 0.1, 1.0]), low=st.floats(-1, 1), width=st.floats(0.5, 4))
def test_clip_cov_drops_tokens_of_the_band(seed, share, low, width):
    outcome, logprobs, _, noise, mask = random_case(seed)
    config = ClipCov(share, low, low + width)
    arrays = (logprobs, as_tokens(outcome, mask), mask)
    kept = baselines.clip_cov(*map(jnp.asarray, arrays), config, jnp.asarray(noise))
    np.testing.assert_array_equal(kept, clip_cov(*arrays, config, noise))


@few
@given(seed=seeds, share=st.sampled_from([2e-4, 0.05, 0.1, 1.0]))
def test_kl_cov_takes_the_highest(seed, share):
    outcome, logprobs, _, _, mask = random_case(seed)
    arrays = (logprobs, as_tokens(outcome, mask), mask)
    penalised = baselines.kl_cov(*map(jnp.asarray, arrays), KlCov(share))
    np.testing.assert_array_equal(penalised, kl_cov(*arrays, share))


@few
@given(seed=seeds)
def test_the_entropy_driven_advantage_is_over_the_responses_share_of_entropy(seed):
    outcome, _, entropy, _, mask = random_case(seed)
    found = baselines.entropy_driven_advantage(jnp.asarray(outcome), jnp.asarray(entropy), jnp.asarray(mask))
    some = mask.any(axis=-1)
    # 1e-6 beside a mean entropy, of which some are as small as 0.05.
    expected = entropy_driven(outcome, entropy, mask)[some]
    np.testing.assert_allclose(np.asarray(found)[some], expected, rtol=1e-4, atol=1e-5)


@few
@given(seed=seeds, alpha=st.floats(0, 2), kappa=st.floats(1, 4))
def test_the_entropy_advantage_adds_the_smaller_one(seed, alpha, kappa):
    outcome, _, entropy, _, mask = random_case(seed)
    advantages = as_tokens(outcome, mask)
    found = baselines.entropy_advantage(*map(jnp.asarray, (advantages, entropy)), EntropyAdvantage(alpha, kappa))
    for index in places(mask):
        plain = float(advantages[index])
        expected = plain + min(alpha * float(entropy[index]), abs(plain) / kappa)
        assert float(found[index]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


# ------------------------------------------------------------------------------------ numbers by hand


def row(*values):
    return jnp.array([[values]], jnp.float32)


ALL = jnp.ones((1, 1, 5), bool)


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        # Five entropies 1 to 5: quantiles 0.8 → 4.2, 0.75 → exactly 4, 0.5 → 3, 0.1 → 1.4.
        (0.2, [5]),
        (0.25, [5, 4]),
        (0.5, [5, 3, 4]),
        (0.9, [5, 3, 2, 4]),
        (1.0, [5, 3, 1, 2, 4]),
    ],
)
def test_forking_tokens_by_hand(share, kept):
    entropy = row(5, 3, 1, 2, 4)
    found = baselines.forking_tokens(entropy, ALL, ForkingTokens(share))
    assert np.asarray(entropy)[np.asarray(found)].tolist() == kept


def test_equal_entropies_are_kept_together():
    found = baselines.forking_tokens(row(2, 2, 1, 2, 0), ALL, ForkingTokens(0.2))
    assert np.asarray(found).ravel().tolist() == [True, True, False, True, False]


# log p = -1 -2 -3 -4 -5 (mean -3: 2 1 0 -1 -2), A = 4 2 0 -1 -5 (mean 0): covariances 8 2 0 1 10.
LOGPROBS, ADVANTAGES = row(-1, -2, -3, -4, -5), row(4, 2, 0, -1, -5)


def test_covariances_by_hand():
    found = baselines.covariance(LOGPROBS, ADVANTAGES, ALL)
    np.testing.assert_allclose(np.asarray(found).ravel(), [8, 2, 0, 1, 10], atol=1e-6)
    # Without the last token: means -2.5 and 1.25.
    some = ALL.at[..., -1].set(False)
    found = baselines.covariance(LOGPROBS, ADVANTAGES, some)[..., :4]
    np.testing.assert_allclose(np.asarray(found).ravel(), [1.5 * 2.75, 0.5 * 0.75, 0.625, 1.5 * 2.25], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "dropped"),
    [
        # Neither 1 nor 10 is inside a band that ends there; 0.02 of five tokens is at least one.
        (ClipCov(0.02, 1.0, 10.0), [1]),
        (ClipCov(0.4, 1.0, 10.0), [0, 1]),
        (ClipCov(1.0, 1.0, 10.0), [0, 1]),
        (ClipCov(0.4, 0.5, 10.5), [1, 4]),
        # 0.79 of five tokens is three of them.
        (ClipCov(0.79, 0.5, 10.5), [1, 3, 4]),
        (ClipCov(1.0, 2.0, 8.0), []),
    ],
)
def test_clip_cov_by_hand(config, dropped):
    """Of those of the band the ones of least noise, not of highest covariance."""
    noise = row(0.9, 0.1, 0.0, 0.6, 0.2)
    kept = baselines.clip_cov(LOGPROBS, ADVANTAGES, ALL, config, noise)
    assert np.flatnonzero(~np.asarray(kept).ravel()).tolist() == dropped


@pytest.mark.parametrize(("share", "penalised"), [(0.01, [4]), (0.2, [4]), (0.59, [0, 4]), (0.6, [0, 1, 4])])
def test_kl_cov_by_hand(share, penalised):
    found = baselines.kl_cov(LOGPROBS, ADVANTAGES, ALL, KlCov(share))
    assert np.flatnonzero(np.asarray(found).ravel()).tolist() == penalised


def test_the_entropy_driven_advantage_by_hand():
    """Mean entropies 1, 3 and 2, of which the mean is 2; the fourth rollout has no tokens and is none of them."""
    entropy = jnp.array([[[0.5, 1.5], [3.0, np.nan], [1.0, 3.0], [9.0, 9.0]]], jnp.float32)
    mask = jnp.array([[[True, True], [True, False], [True, True], [False, False]]])
    found = baselines.entropy_driven_advantage(jnp.array([[1.0, -1.5, 0.0, 0.0]], jnp.float32), entropy, mask)
    np.testing.assert_allclose(found, [[2.0, -1.0, 0.0, 0.0]], rtol=1e-5)


def test_the_entropy_advantage_by_hand():
    """α H = 0.4 0.4 0.8 0.2 against |A|/κ = 0.5 0.5 0.25 0: the sign of A stays."""
    found = baselines.entropy_advantage(row(1, -1, -0.5, 0), row(1, 1, 2, 0.5), EntropyAdvantage())
    np.testing.assert_allclose(np.asarray(found).ravel(), [1.4, -0.6, -0.25, 0.0], rtol=1e-6)


# -------------------------------------------------------------------------------------- all objectives


def terms(objective, case, config=None, key=0):
    outcome, logprobs, entropy, _, mask = case
    arrays = (jnp.asarray(values) for values in (outcome, logprobs, entropy, mask))
    config = BaselineConfig(clip_cov=ClipCov(0.1, -1.0, 3.0), kl_cov=KlCov(0.1)) if config is None else config
    return baseline_terms(objective, *arrays, config, jax.random.key(key))


def test_the_terms_of_each_objective():
    """The advantage of GRPO, but where it is the change; tokens left out or penalised, where those are it."""
    outcome, logprobs, entropy, _, mask = case = random_case(0)
    plain = np.where(mask, outcome[..., None], 0.0)
    noise = np.asarray(selection_noise(jax.random.key(0), mask.shape))
    scaled = np.where(mask, entropy_driven(outcome, entropy, mask)[..., None], 0.0)
    raised = np.array(plain)
    for index in places(mask):
        raised[index] += min(0.4 * entropy[index], abs(plain[index]) / 2)
    everything = {
        "grpo": (plain, None, None),
        "forking_tokens": (plain, forking_tokens(entropy, mask, 0.2), None),
        "clip_cov": (plain, clip_cov(logprobs, plain, mask, ClipCov(0.1, -1.0, 3.0), noise), None),
        "kl_cov": (plain, None, kl_cov(logprobs, plain, mask, 0.1)),
        "entropy_driven_advantage": (scaled, None, None),
        "entropy_regularization": (plain, None, None),
        "entropy_advantage": (raised, None, None),
    }
    assert tuple(everything) == OBJECTIVES
    for objective, (advantages, kept, penalised) in everything.items():
        found = terms(objective, case)
        np.testing.assert_allclose(found.advantages, advantages, rtol=1e-4, atol=1e-5, err_msg=objective)
        for mine, theirs in ((found.kept, kept), (found.penalised, penalised)):
            assert (mine is None) == (theirs is None), objective
            if theirs is not None:
                np.testing.assert_array_equal(mine, theirs, err_msg=objective)
                assert 0 < np.sum(theirs) < np.sum(mask)


def test_the_noise_of_a_rollout_is_its_own_however_long_the_others_are():
    short, long = (np.asarray(selection_noise(jax.random.key(3), (2, 3, length))) for length in (5, 9))
    np.testing.assert_array_equal(short, long[..., :5])
    assert len(np.unique(long)) == long.size
    assert np.all((long >= 0) & (long < 1))


def test_the_key_is_what_clip_cov_chooses_by():
    case = random_case(1)
    assert not np.array_equal(terms("clip_cov", case, key=0).kept, terms("clip_cov", case, key=1).kept)
    np.testing.assert_array_equal(terms("kl_cov", case, key=0).penalised, terms("kl_cov", case, key=1).penalised)


@few
@given(seed=seeds, objective=st.sampled_from(OBJECTIVES))
def test_what_is_at_the_padding_changes_nothing(seed, objective):
    """Not even NaN, or another number of it: the tokens are the same ones."""
    outcome, logprobs, entropy, noise, mask = case = random_case(seed)
    # With all of a band chosen the noise, which is drawn for the whole width, has nothing to say.
    config = BaselineConfig(clip_cov=ClipCov(1.0, -1.0, 3.0), kl_cov=KlCov(0.1))
    wide = [(0, 0), (0, 0), (0, 3)]
    clean = (np.where(mask, values, -0.5).astype(np.float32) for values in (logprobs, entropy, noise))
    padded = (np.pad(values, wide, constant_values=np.nan) for values in (logprobs, entropy, noise))
    expected = terms(objective, case, config)
    assert np.all(np.asarray(expected.advantages)[~mask] == 0)
    for chosen in (expected.kept, expected.penalised):
        assert chosen is None or not np.any(np.asarray(chosen)[~mask])
    for mine, theirs in zip(terms(objective, (outcome, *clean, mask), config), expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(terms(objective, (outcome, *padded, np.pad(mask, wide)), config), expected, strict=True):
        if theirs is not None:
            # Sums over more zeros, in another order.
            np.testing.assert_allclose(np.asarray(mine, np.float32), np.pad(theirs, wide), **TOLERANCE)


@few
@given(seed=seeds, order=st.permutations(range(SHAPE[1])), objective=st.sampled_from(OBJECTIVES))
def test_the_order_of_rollouts_means_nothing(seed, order, objective):
    case = random_case(seed)
    config = BaselineConfig(clip_cov=ClipCov(1.0, -1.0, 3.0), kl_cov=KlCov(0.1))
    shuffled = terms(objective, tuple(values[:, order] for values in case), config)
    for mine, theirs in zip(shuffled, terms(objective, case, config), strict=True):
        if theirs is not None:
            np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs)[:, order], **TOLERANCE)


@few
@given(seed=seeds, order=st.permutations(range(SHAPE[1])))
def test_noise_goes_with_its_token(seed, order):
    outcome, logprobs, _, noise, mask = random_case(seed)
    arrays = (logprobs, as_tokens(outcome, mask), mask, noise)

    def kept(*arrays):
        *rest, noise = map(jnp.asarray, arrays)
        return np.asarray(baselines.clip_cov(*rest, ClipCov(0.1, -1.0, 3.0), noise))

    np.testing.assert_array_equal(kept(*(values[:, order] for values in arrays)), kept(*arrays)[:, order])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_where_nothing_was_graded_nothing_is_chosen(objective):
    outcome, logprobs, entropy, noise, mask = random_case(2)
    found = terms(objective, (np.zeros_like(outcome), logprobs, entropy, noise, np.zeros_like(mask)))
    np.testing.assert_array_equal(found.advantages, np.zeros(SHAPE))
    for chosen in (found.kept, found.penalised):
        assert chosen is None or not np.any(chosen)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_jitted_equals_not_jitted(objective):
    case = random_case(3)
    found = jax.jit(lambda *arrays: terms(objective, arrays))(*case)
    for mine, theirs in zip(found, terms(objective, case), strict=True):
        if theirs is not None:
            np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs, np.float32), **TOLERANCE)


# --------------------------------------------------------------------------------------- configuration


def test_defaults_are_those_of_the_papers_comparison():
    assert dataclasses.asdict(BaselineConfig()) == {
        "forking_tokens": {"share": 0.2},
        "clip_cov": {"share": 2e-4, "low": 1.0, "high": 5.0},
        "kl_cov": {"share": 2e-4, "coefficient": 1.0},
        "entropy_regularization": {"coefficient": 0.003},
        "entropy_advantage": {"alpha": 0.4, "kappa": 2.0},
    }


@pytest.mark.parametrize(
    ("kind", "bad", "words"),
    [
        (ForkingTokens, {"share": 0.0}, "share is 0.0; it must be in (0, 1]"),
        (ForkingTokens, {"share": 1.5}, "share is 1.5; it must be in (0, 1]"),
        (ForkingTokens, {"share": math.nan}, "share is nan; it must be in (0, 1]"),
        (ClipCov, {"share": -0.1}, "share is -0.1; it must be in (0, 1]"),
        (ClipCov, {"low": 5.0}, "low is 5.0; it must be below high, which is 5.0"),
        (ClipCov, {"low": 7.0, "high": 6.0}, "low is 7.0; it must be below high, which is 6.0"),
        (KlCov, {"share": 0.0}, "share is 0.0; it must be in (0, 1]"),
        (KlCov, {"coefficient": -1.0}, "coefficient is -1.0; it must be at least 0"),
        (EntropyRegularization, {"coefficient": -0.003}, "coefficient is -0.003; it must be at least 0"),
        (EntropyAdvantage, {"alpha": -0.4}, "alpha is -0.4; it must be at least 0"),
        (EntropyAdvantage, {"kappa": 0.5}, "kappa is 0.5; it must be at least 1"),
    ],
)
def test_a_bad_setting_is_refused_by_name(kind, bad, words):
    with pytest.raises(ValueError, match=rf"^{re.escape(words)}$"):
        kind(**bad)


@pytest.mark.parametrize(
    "good",
    [
        ForkingTokens(1.0),
        ClipCov(1.0, -1.0, 0.0),
        KlCov(1.0, 0.0),
        EntropyRegularization(0.0),
        EntropyAdvantage(0.0, 1.0),
    ],
)
def test_settings_at_their_limits_are_taken(good):
    assert dataclasses.replace(good) == good
