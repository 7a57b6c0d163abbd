"""Sampling against NumPy float64, transformers' logits warpers and the binomial law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from policy_split_jax.sampler.sampling import SamplingSettings, allowed_tokens, sample, token_keys

VOCAB = 23
# (top_k, top_p); 0 and 1 are off.
TRUNCATIONS = [(0, 1.0), (1, 1.0), (5, 1.0), (VOCAB, 1.0), (VOCAB + 9, 1.0), (0, 0.9), (0, 0.3), (0, 1e-6),
               (8, 0.7), (3, 0.99), (20, 0.95)]  # fmt: skip
draw = jax.jit(sample)
allowed = jax.jit(allowed_tokens)


def columns(rows, temperature=1.0, top_k=0, top_p=1.0):
    return SamplingSettings(
        jnp.broadcast_to(jnp.float32(temperature), (rows,)),
        jnp.broadcast_to(jnp.int32(top_k), (rows,)),
        jnp.broadcast_to(jnp.float32(top_p), (rows,)),
    )


def random_logits(rows, vocabulary=VOCAB, seed=0):
    return np.random.default_rng(seed).normal(0, 2, (rows, vocabulary)).astype(np.float32)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def survivors(logits, top_k, top_p):
    """Token by token from the likeliest: top-k, then top-p of what is left, in float64."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if top_k:
        order = order[:top_k]
    weights = np.exp(np.array([logits[token] for token in order], np.float64) - logits[order[0]])
    kept, mass = [], 0.0
    for token, probability in zip(order, weights / weights.sum(), strict=True):
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += probability
    return set(kept)


def as_set(mask):
    return set(np.flatnonzero(np.asarray(mask)).tolist())


@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_truncation_equals_a_plain_loop(top_k, top_p):
    logits = random_logits(40)
    mask = allowed(logits, jnp.full(40, top_k), jnp.full(40, top_p))
    for row in range(40):
        assert as_set(mask[row]) == survivors(logits[row], top_k, top_p)


@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_truncation_equals_transformers(top_k, top_p):
    logits = random_logits(40, seed=1)
    scores = torch.from_numpy(logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    mask = allowed(logits, jnp.full(40, top_k), jnp.full(40, top_p))
    np.testing.assert_array_equal(mask, torch.isfinite(scores).numpy())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), top_k=st.integers(0, VOCAB + 2), top_p=st.floats(0, 1, width=32))
def test_each_row_is_truncated_by_its_own_settings(seed, top_k, top_p):
    logits = random_logits(3, seed=seed)
    mask = allowed(logits, jnp.array([0, top_k, 2]), jnp.array([1.0, top_p, 0.5], jnp.float32))
    assert mask[0].all()
    assert as_set(mask[2]) == survivors(logits[2], 2, 0.5)
    # A sum within rounding (1e-6) of top_p may fall on either side.
    between = [survivors(logits[1], top_k, top_p - 1e-6), survivors(logits[1], top_k, top_p + 1e-6)]
    assert between[0] <= as_set(mask[1]) <= between[1]


def test_equally_likely_tokens_stay_together():
    logits = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    assert as_set(allowed(logits, jnp.array([2]), jnp.array([1.0]))[0]) == {0, 1, 2}
    assert as_set(allowed(logits, jnp.array([0]), jnp.array([0.5]))[0]) == {0, 1, 2}


def test_the_likeliest_token_always_stays():
    logits = random_logits(5)
    mask = allowed(logits, jnp.zeros(5, jnp.int32), jnp.zeros(5))
    np.testing.assert_array_equal(np.argmax(mask, -1), logits.argmax(-1))
    np.testing.assert_array_equal(np.sum(mask, -1), 1)


def test_top_p_of_one_cuts_nothing_of_a_large_vocabulary():
    # The running sum of 150,000 float32 probabilities passes 1 by rounding.
    logits = random_logits(1, 150_000)
    assert allowed(logits, jnp.array([0]), jnp.array([1.0])).all()


def test_greedy_takes_the_likeliest_whatever_the_key():
    logits = random_logits(6)
    for seed in range(5):
        tokens, logprobs = draw(logits, jax.random.split(jax.random.key(seed), 6), columns(6, 0.0, 3, 0.5))
        np.testing.assert_array_equal(tokens, logits.argmax(-1))
        # Float32 log-softmax of numbers below 10: a few roundings of 1e-6.
        np.testing.assert_allclose(logprobs, log_softmax(logits).max(-1), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.6)])
def test_logprob_is_of_the_whole_distribution_at_the_temperature(temperature, top_k, top_p):
    logits = random_logits(64)
    keys = jax.random.split(jax.random.key(3), 64)
    tokens, logprobs = draw(logits, keys, columns(64, temperature, top_k, top_p))
    expected = log_softmax(logits / temperature)[np.arange(64), tokens]
    # Logits of up to 30 after division by 0.3: float32 rounding of 2e-6, a few times.
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (0.6, 5, 0.95)]
)
def test_frequencies_match_the_probabilities(temperature, top_k, top_p):
    draws, logits = 20_000, np.array([1.0, 0.0, -0.5, 2.0, 0.3, -2.0, 1.5], np.float32)
    batch = jnp.broadcast_to(logits, (draws, 7))
    tokens, _ = draw(batch, jax.random.split(jax.random.key(0), draws), columns(draws, temperature, top_k, top_p))
    counts = np.bincount(tokens, minlength=7)
    kept = sorted(survivors(logits / temperature, top_k, top_p))
    assert counts.sum() == counts[kept].sum()
    expected = draws * np.exp(log_softmax((logits / temperature)[kept]))
    statistic = np.sum((counts[kept] - expected) ** 2 / expected)
    # One correct sampler in a million fails this; the seed is fixed.
    assert statistic < chi2.isf(1e-6, len(kept) - 1)


def test_a_truncated_slot_does_not_truncate_its_neighbours():
    logits = jnp.zeros((2000, VOCAB))
    top_k = jnp.where(jnp.arange(2000) < 1000, 0, 1)
    tokens, _ = draw(
        logits.at[:, 7].set(0.1),
        jax.random.split(jax.random.key(0), 2000),
        SamplingSettings(jnp.ones(2000), top_k, jnp.ones(2000)),
    )
    assert set(np.asarray(tokens[1000:]).tolist()) == {7}
    assert set(np.asarray(tokens[:1000]).tolist()) == set(range(VOCAB))


def test_a_slot_with_truncation_off_draws_the_same_beside_a_truncated_one():
    logits = random_logits(2)
    keys = jax.random.split(jax.random.key(5), 2)
    alone, _ = draw(logits, keys, columns(2))
    beside, _ = draw(logits, keys, SamplingSettings(jnp.ones(2), jnp.array([0, 1]), jnp.ones(2)))
    assert alone[0] == beside[0]


def test_noise_depends_on_key_and_index_alone():
    slots = 12
    keys = jax.random.split(jax.random.key(1), slots)
    index = jnp.arange(slots) % 5
    logits = random_logits(slots)
    order = np.random.default_rng(0).permutation(slots)
    here, _ = draw(logits, token_keys(keys, index), columns(slots))
    there, _ = draw(logits[order], token_keys(keys[order], index[order]), columns(slots))
    np.testing.assert_array_equal(here[order], there)
    for slot in range(slots):
        own, _ = draw(logits[slot][None], token_keys(keys[slot][None], index[slot][None]), columns(1))
        assert own[0] == here[slot]


def test_noise_is_fresh_for_each_index_and_each_key():
    draws = 5000
    flat = jnp.zeros((draws, 50))
    key = jax.random.key(2)
    same = jnp.broadcast_to(key, (draws,))
    by_index, _ = draw(flat, token_keys(same, jnp.arange(draws)), columns(draws))
    keys = jax.random.split(key, draws)
    by_key, _ = draw(flat, token_keys(keys, jnp.zeros(draws, jnp.int32)), columns(draws))
    for tokens in (np.asarray(by_index), np.asarray(by_key)):
        # Neighbours agree by chance 1 in 50: 100 of 5000, standard deviation 10; five of them.
        assert abs(np.sum(tokens[1:] == tokens[:-1]) - draws / 50) < 50
        statistic = np.sum((np.bincount(tokens, minlength=50) - 100) ** 2 / 100)
        assert statistic < chi2.isf(1e-6, 49)
