"""Prefill, insert and generate over slots, against the whole-sequence forward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.model import qwen3
from policy_split_jax.padding import lengths, pad_right
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.sampling import SamplingSettings, sample, token_keys

PROMPTS = [[5, 6, 7], [9], [11, 3, 60, 2, 31, 8], [1, 2]]
SLOTS, WIDTH, NEW = 4, 8, 6
# Float32, two layers, logits below 20: a few roundings of 1e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}
# Ids outside the vocabulary, so that nothing stops.
NEVER = jnp.array([900, 901], jnp.int32)


def request(slots, temperature=1.0, limits=NEW, top_k=0):
    """Settings of `slots` insertions; key i is that of rollout i."""

    def column(value, dtype):
        return np.broadcast_to(np.array(value, dtype), (slots,)).copy()

    settings = SamplingSettings(column(temperature, np.float32), column(top_k, np.int32), np.ones(slots, np.float32))
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(slots))
    return engine.SlotRequest(keys, settings, column(limits, np.int32))


def compute(params, tokens, config, dtype=jnp.float32):
    """The prefix of PROMPTS, which share nothing."""
    shared = engine.no_prefix(config, dtype)
    weights = qwen3.sampling_weights(params, config=config, dtype=dtype)
    return engine.prefill(weights, tokens, lengths(PROMPTS), shared, config=config)


@pytest.fixture(scope="module")
def start(config, params):
    """A function that returns slots filled with the prompts: state is donated, so each test has its own."""
    prefix = compute(params, pad_right(PROMPTS, WIDTH), config)

    def filled(order=range(SLOTS), garbage=0.0, **settings):
        state = engine.init_state(config, SLOTS, WIDTH + NEW, NEW, jnp.float32)
        state = state._replace(cache=jax.tree.map(lambda array: array + garbage, state.cache))
        slots = np.array(list(order), np.int32)
        return engine.insert(prefix, state, np.arange(SLOTS, dtype=np.int32), slots, request(SLOTS, **settings))

    return filled


@pytest.fixture(scope="module")
def run(config, params):
    def generate(state, steps=NEW, stop_ids=NEVER):
        weights = qwen3.sampling_weights(params, config=config)
        return jax.device_get(engine.generate(weights, state, stop_ids, steps=steps, config=config))

    return generate


@pytest.fixture(scope="module")
def plain(start, run):
    """The sampled tokens and logprobs of all slots, nothing stopped."""
    return run(start())


def test_decoding_equals_the_whole_forward_pass(config, params, plain):
    """The key/value cache, positions and the shift: the sampled tokens, forced through `qwen3.forward`."""
    for slot, prompt in enumerate(PROMPTS):
        sequence = jnp.array([prompt + plain.tokens[slot].tolist()])
        hidden = qwen3.forward(params, sequence, config=config, valid=jnp.ones(sequence.shape, bool))
        logits = np.asarray(qwen3.logits(params, hidden, config), np.float64)[0]
        before = logits[len(prompt) - 1 : -1]
        logp = before - np.log(np.exp(before).sum(-1, keepdims=True))
        expected = logp[np.arange(NEW), plain.tokens[slot]]
        np.testing.assert_allclose(plain.logprobs[slot], expected, **CLOSE)
        assert np.abs(expected).max() > 1


def test_tokens_are_drawn_with_the_slots_key_and_the_token_index(config, params, plain):
    """The tokens again, from full logits and `sample` outside the engine."""
    requested = request(SLOTS)
    for slot, prompt in enumerate(PROMPTS):
        sequence = jnp.array([prompt + plain.tokens[slot].tolist()])
        hidden = qwen3.forward(params, sequence, config=config, valid=jnp.ones(sequence.shape, bool))
        before = qwen3.logits(params, hidden, config)[0, len(prompt) - 1 : -1]
        own = jnp.broadcast_to(requested.keys[slot], (NEW,))
        settings = SamplingSettings(jnp.ones(NEW), jnp.zeros(NEW, jnp.int32), jnp.ones(NEW))
        tokens, _ = sample(before, token_keys(own, jnp.arange(NEW)), settings)
        np.testing.assert_array_equal(plain.tokens[slot], tokens)


def test_a_rollout_does_not_depend_on_its_slot(start, run, plain):
    order = [2, 0, 3, 1]
    moved = run(start(order))
    np.testing.assert_array_equal(moved.tokens[order], plain.tokens)
    np.testing.assert_allclose(moved.logprobs[order], plain.logprobs, **CLOSE)


def test_what_a_slot_held_before_is_never_seen(start, run, plain):
    dirty = run(start(garbage=50.0))
    np.testing.assert_array_equal(dirty.tokens, plain.tokens)
    np.testing.assert_allclose(dirty.logprobs, plain.logprobs, **CLOSE)


def test_prompt_padding_is_never_seen(config, params, start, run, plain):
    tokens = pad_right(PROMPTS, WIDTH)
    beyond = np.arange(WIDTH) >= lengths(PROMPTS)[:, None]
    prefix = compute(params, np.where(beyond, 66, tokens), config)
    state = engine.init_state(config, SLOTS, WIDTH + NEW, NEW, jnp.float32)
    places = np.arange(SLOTS, dtype=np.int32)
    state = run(engine.insert(prefix, state, places, places, request(SLOTS)))
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    np.testing.assert_allclose(state.logprobs, plain.logprobs, **CLOSE)


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_a_call_change_nothing(start, run, plain, steps):
    state = start()
    for _ in range(-(-NEW // steps)):
        state = run(state, steps)
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    np.testing.assert_allclose(state.logprobs, plain.logprobs, **CLOSE)
    assert not state.live.any()


def test_generate_makes_no_more_steps_than_asked(start, run, plain):
    state = run(start(), 4)
    np.testing.assert_array_equal(state.lengths, [4] * SLOTS)
    np.testing.assert_array_equal(state.tokens[:, :4], plain.tokens[:, :4])
    assert not state.tokens[:, 4:].any()
    assert state.live.all()


def test_each_slot_ends_at_its_own_limit(start, run, plain):
    limits = [1, 6, 3, 0]
    state = run(start(limits=limits))
    np.testing.assert_array_equal(state.lengths, limits)
    assert not state.live.any()
    assert not state.stopped.any()
    for slot, limit in enumerate(limits):
        np.testing.assert_array_equal(state.tokens[slot, :limit], plain.tokens[slot, :limit])
        assert not state.tokens[slot, limit:].any()
        assert not state.logprobs[slot, limit:].any()


def test_ended_slots_stay_as_they_are(start, run):
    """Further steps, made for a slot that still runs, touch nothing of the slots that have ended."""
    first = run(start(limits=[2, 2, 6, 2]), 4)
    second = run(first, 4)
    ended = [0, 1, 3]
    for name in ("tokens", "logprobs", "lengths", "positions", "last_tokens", "stopped", "live"):
        np.testing.assert_array_equal(getattr(second, name)[ended], getattr(first, name)[ended], err_msg=name)
    assert (first.lengths[2], second.lengths[2]) == (4, 6)


def test_nothing_is_computed_once_all_have_ended(start, run):
    ended = run(start(limits=2))
    again = run(ended, 4)
    for before, after in zip(jax.tree.leaves(ended.cache), jax.tree.leaves(again.cache), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(ended.positions, again.positions)


def test_stop_tokens_end_their_slot_alone(start, run, plain):
    """Two stop ids: slot 0 stops at its third token, slot 2 at its first; both tokens are kept."""
    stop_ids = [int(plain.tokens[0, 2]), int(plain.tokens[2, 0])]
    expected = [
        next((at + 1 for at, token in enumerate(row) if token in stop_ids), NEW) for row in plain.tokens.tolist()
    ]
    state = run(start(), stop_ids=jnp.array(stop_ids, jnp.int32))
    np.testing.assert_array_equal(state.lengths, expected)
    assert expected[2] == 1
    assert expected[0] <= 3
    assert max(expected) == NEW
    for slot, length in enumerate(expected):
        np.testing.assert_array_equal(state.tokens[slot, :length], plain.tokens[slot, :length])
        assert state.stopped[slot] == (plain.tokens[slot, length - 1] in stop_ids)


def test_slots_have_settings_of_their_own(config, params, start, run, plain):
    """A greedy slot and a top-1 slot beside sampled ones, which do not notice."""
    state = run(start(temperature=[1.0, 0.0, 1.0, 1.0], top_k=[0, 0, 0, 1]))
    np.testing.assert_array_equal(state.tokens[[0, 2]], plain.tokens[[0, 2]])
    for slot in (1, 3):
        sequence = jnp.array([PROMPTS[slot] + state.tokens[slot].tolist()])
        hidden = qwen3.forward(params, sequence, config=config, valid=jnp.ones(sequence.shape, bool))
        likeliest = np.argmax(qwen3.logits(params, hidden, config)[0], -1)
        np.testing.assert_array_equal(state.tokens[slot], likeliest[len(PROMPTS[slot]) - 1 : -1])


def test_one_prompt_fills_several_slots_and_unused_insertions_are_dropped(config, params, start, run, plain):
    """Row 2 into slots 3 and 1; the other two insertions name a slot out of range."""
    prefix = compute(params, pad_right(PROMPTS, WIDTH), config)
    before = jax.device_get(start())
    rows, slots = np.array([2, 2, 0, 0], np.int32), np.array([3, 1, SLOTS, SLOTS], np.int32)
    asked = request(SLOTS)
    asked = asked._replace(keys=asked.keys[np.array([2, 0, 1, 1])])
    state = engine.insert(prefix, start(), rows, slots, asked)
    np.testing.assert_array_equal(state.positions, [2, 5, 5, 5])
    np.testing.assert_array_equal(state.last_tokens, [7, 8, 8, 8])
    for layer, old in zip(jax.device_get(state.cache), before.cache, strict=True):
        np.testing.assert_array_equal(layer.keys[[0, 2]], old.keys[[0, 2]])
        np.testing.assert_array_equal(layer.values[1], layer.values[2])
    state = run(state)
    # Slots 2 and 3 hold the same prompt and key; slot 1 the same prompt with another key; slot 0 is untouched.
    np.testing.assert_array_equal(state.tokens[[0, 2, 3]], plain.tokens[[0, 2, 2]])
    assert (state.tokens[1] != plain.tokens[2]).any()


def test_a_refilled_slot_starts_afresh(config, params, start, run, plain):
    """A slot that has ended by a stop token is filled again: length, flags and tokens are the new rollout's."""
    stopped = run(start(), stop_ids=jnp.array(plain.tokens[:, 0].tolist()[:2], jnp.int32))
    assert stopped.stopped[1]
    prefix = compute(params, pad_right(PROMPTS, WIDTH), config)
    slots = np.array([SLOTS, 1, SLOTS, SLOTS], np.int32)
    refilled = engine.insert(prefix, stopped, np.array([0, 1, 0, 0], np.int32), slots, request(SLOTS))
    assert (refilled.live[1], refilled.stopped[1], refilled.lengths[1]) == (True, False, 0)
    state = run(refilled)
    np.testing.assert_array_equal(state.tokens[1], plain.tokens[1])
    np.testing.assert_allclose(state.logprobs[1], plain.logprobs[1], **CLOSE)
    assert not state.stopped[1]


def test_bfloat16_cache_and_weights_sample_close_to_float32(config, params, plain):
    """Types end to end: cache in bfloat16, logprobs in float32; the values to bfloat16's accuracy."""
    prefix = compute(params, pad_right(PROMPTS, WIDTH), config, jnp.bfloat16)
    state = engine.init_state(config, SLOTS, WIDTH + NEW, NEW, jnp.bfloat16)
    places = np.arange(SLOTS, dtype=np.int32)
    state = engine.insert(prefix, state, places, places, request(SLOTS))
    weights = qwen3.sampling_weights(params, config=config, dtype=jnp.bfloat16)
    state = engine.generate(weights, state, NEVER, steps=1, config=config)
    assert {array.dtype for array in jax.tree.leaves(state.cache)} == {jnp.dtype(jnp.bfloat16)}
    assert state.logprobs.dtype == jnp.float32
    same = np.asarray(state.tokens[:, 0]) == plain.tokens[:, 0]
    assert same.any()
    # Eight bits of mantissa on logits of up to 10, through two layers: about 0.1.
    np.testing.assert_allclose(state.logprobs[same, 0], plain.logprobs[same, 0], atol=0.2)


def test_prompts_that_continue_a_shared_beginning_equal_whole_prompts(config, params):
    """Keys and values of every real position, true lengths and last tokens."""
    beginning = [60, 61, 62, 7, 60]
    whole = [beginning + prompt for prompt in PROMPTS]
    nothing = engine.no_prefix(config, jnp.float32)
    weights = qwen3.sampling_weights(params, config=config)
    expected = engine.prefill(weights, pad_right(whole, 16), lengths(whole), nothing, config=config)
    first = engine.prefill(weights, np.array([beginning]), np.array([len(beginning)]), nothing, config=config)
    shared = engine.shared_prefix(first)
    prefix = engine.prefill(weights, pad_right(PROMPTS, WIDTH), lengths(PROMPTS), shared, config=config)
    np.testing.assert_array_equal(prefix.true_lengths, lengths(whole))
    np.testing.assert_array_equal(prefix.last_tokens, expected.last_tokens)
    for row, prompt in enumerate(whole):
        for ours, theirs in zip(*map(jax.tree.leaves, (prefix.kv, expected.kv)), strict=True):
            np.testing.assert_allclose(ours[row, : len(prompt)], theirs[row, : len(prompt)], **CLOSE)


def resized(state, length):
    return state._replace(cache=tuple(engine.resize(layer, length) for layer in state.cache))


def test_the_length_of_the_cache_changes_nothing(start, run, plain):
    """Two steps on a short cache, two on a longer one, the rest on one cut to what is needed."""
    state = resized(start(), WIDTH)
    state = run(state, 2)
    longer = resized(state, 40)
    np.testing.assert_array_equal(longer.cache[1].keys[..., :WIDTH], state.cache[1].keys)
    assert longer.cache[0].values.shape[2] == 40
    state = run(longer, 2)
    state = run(resized(state, WIDTH + NEW - 2), 2)
    np.testing.assert_array_equal(state.tokens, plain.tokens)
    np.testing.assert_allclose(state.logprobs, plain.logprobs, **CLOSE)


def test_a_prefix_padded_beyond_the_cache_is_inserted(config, params, run, plain):
    prefix = compute(params, pad_right(PROMPTS, 64), config)
    state = engine.init_state(config, SLOTS, WIDTH + NEW, NEW, jnp.float32)
    places = np.arange(SLOTS, dtype=np.int32)
    state = run(engine.insert(prefix, state, places, places, request(SLOTS)))
    np.testing.assert_array_equal(state.tokens, plain.tokens)


def test_released_slots_end_as_they_are(start, run, plain):
    state = engine.release(run(start(), 2), np.array([1, 3, SLOTS], np.int32))
    np.testing.assert_array_equal(state.live, [True, False, True, False])
    state = run(state)
    np.testing.assert_array_equal(state.lengths, [NEW, 2, NEW, 2])
    np.testing.assert_array_equal(state.tokens[[0, 2]], plain.tokens[[0, 2]])
    assert not state.tokens[[1, 3], 2:].any()
