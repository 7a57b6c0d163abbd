"""Rollouts over slots: they depend on prompt, key and settings alone, and the trainer's scorer agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.objective.scorer import score_rollouts
from policy_split_jax.padding import lengths, pad_left, pad_right
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.batcher import EngineConfig, Prompt, Rollout, Sampling
from policy_split_jax.sampler.rollout import Sampler, rollout_keys

TEXTS = [[5, 6, 7], [9], [11, 3, 60, 2, 31, 8, 9, 4], [1, 2], [50] * 16]
COUNT, LIMIT, NEW = 3, 40, 10
# Ids outside the vocabulary, as many as the tests' stop ids, so that nothing stops and nothing recompiles.
NEVER = [900, 901, 902]
# Float32, two layers, logits below 20: a few roundings of 1e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_prompts(texts=TEXTS, count=COUNT, seed=0):
    keys = rollout_keys(jax.random.key(seed), np.arange(len(texts)), np.zeros(len(texts), np.int32), count)
    return [Prompt(text, keys[at]) for at, text in enumerate(texts)]


@pytest.fixture(scope="module")
def make(config):
    def sampler(stop_ids=NEVER, slots=8, max_prompt_tokens=LIMIT, decode_steps=4):
        return Sampler(EngineConfig(config, tuple(stop_ids), slots, decode_steps), max_prompt_tokens)

    return sampler


@pytest.fixture(scope="module")
def free(make, params):
    """Rollouts that nothing stops, more of them than slots."""
    return make()(params, make_prompts(), Sampling(NEW))


def assert_same(results, expected):
    assert [len(group) for group in results] == [len(group) for group in expected]
    for group, others in zip(results, expected, strict=True):
        for rollout, other in zip(group, others, strict=True):
            np.testing.assert_array_equal(rollout.tokens, other.tokens)
            np.testing.assert_allclose(rollout.logprobs, other.logprobs, **CLOSE)
            assert rollout.finish_reason == other.finish_reason


def cut(rollout, stop_ids):
    """A free rollout as the stop ids end it."""
    for at, token in enumerate(rollout.tokens.tolist()):
        if token in stop_ids:
            return Rollout(rollout.tokens[: at + 1], rollout.logprobs[: at + 1], "stop")
    return rollout


def every(results):
    return [rollout for group in results for rollout in group]


def test_free_rollouts_run_to_the_limit_and_differ(free):
    assert {rollout.finish_reason for rollout in every(free)} == {"length"}
    assert {len(rollout.tokens) for rollout in every(free)} == {NEW}
    assert len({tuple(rollout.tokens.tolist()) for rollout in every(free)}) == len(TEXTS) * COUNT


@pytest.mark.parametrize(
    "settings",
    [{"slots": 1}, {"slots": 3}, {"slots": 40}, {"decode_steps": 1}, {"decode_steps": 7}, {"decode_steps": 50},
     {"max_prompt_tokens": 16}, {"slots": 5, "decode_steps": 3}],
    ids=str,
)  # fmt: skip
def test_rollouts_do_not_depend_on_slots_or_steps(make, params, free, settings):
    assert_same(make(**settings)(params, make_prompts(), Sampling(NEW)), free)


def test_rollouts_do_not_depend_on_order_or_company(make, params, free):
    prompts = make_prompts()
    order = [3, 0, 4, 2, 1]
    assert_same(make()(params, [prompts[at] for at in order], Sampling(NEW)), [free[at] for at in order])
    for at in range(len(prompts)):
        assert_same(make()(params, prompts[at : at + 1], Sampling(NEW)), free[at : at + 1])


@pytest.mark.parametrize("extra", [17, 40])
def test_rollouts_do_not_depend_on_the_bucket(make, params, free, extra):
    """A long prompt beside them makes the cache longer (a bucket of 32, and one cut to the limit of 40)."""
    prompts = make_prompts([*TEXTS, list(range(1, extra + 1))])
    assert_same(make()(params, prompts, Sampling(NEW))[:-1], free)


def test_rollout_i_is_the_same_for_any_number_of_rollouts(make, params, free):
    for count in (1, 2, 5):
        results = make()(params, make_prompts(count=count), Sampling(NEW))
        kept = min(count, COUNT)
        assert_same([group[:kept] for group in results], [group[:kept] for group in free])


def test_rollout_keys_are_all_different_and_independent_of_the_count():
    key, questions, modes = jax.random.key(1), np.repeat(np.arange(6), 2), np.tile([NORMAL, HIGH_ENTROPY], 6)
    few, many = (rollout_keys(key, questions, modes, count) for count in (2, 9))
    data = np.asarray(jax.random.key_data(many))
    np.testing.assert_array_equal(jax.random.key_data(few), data[:, :2])
    assert len({tuple(words) for words in data.reshape(-1, data.shape[-1]).tolist()}) == 12 * 9
    # A question's keys do not depend on which others are asked.
    alone = rollout_keys(key, questions[7:8], modes[7:8], 9)
    np.testing.assert_array_equal(jax.random.key_data(alone)[0], data[7])
    other = rollout_keys(jax.random.key(2), questions, modes, 9)
    assert (np.asarray(jax.random.key_data(other)) != data).any(-1).all()


def test_a_reused_slot_shows_nothing_of_the_longer_rollout_before(make, params):
    """One slot: the longest prompt with its rollout first, then a short one; and the short one fresh."""
    prompts = make_prompts([TEXTS[4], TEXTS[1]], count=1)
    after = make(slots=1)(params, prompts, Sampling(NEW))[1:]
    assert_same(after, make(slots=1)(params, prompts[1:], Sampling(NEW)))


# Stopping


def test_every_stop_id_ends_a_rollout(make, params, free):
    """Three stop ids, taken from three rollouts; all others are as they were, up to any stop token of theirs."""
    stop_ids = [int(free[0][0].tokens[4]), int(free[2][1].tokens[7]), int(free[4][2].tokens[1])]
    expected = [[cut(rollout, stop_ids) for rollout in group] for group in free]
    results = make(stop_ids)(params, make_prompts(), Sampling(NEW))
    assert_same(results, expected)
    ends = {int(rollout.tokens[-1]) for rollout in every(results) if rollout.finish_reason == "stop"}
    assert ends == set(stop_ids)
    assert {rollout.finish_reason for rollout in every(results)} == {"stop", "length"}


def test_a_stop_token_at_once_is_a_rollout_of_one(make, params, free):
    stop_ids = [int(free[1][0].tokens[0]), *NEVER[1:]]
    rollout = make(stop_ids)(params, make_prompts(), Sampling(NEW))[1][0]
    assert rollout.tokens.tolist() == stop_ids[:1]
    assert rollout.finish_reason == "stop"
    np.testing.assert_allclose(rollout.logprobs, free[1][0].logprobs[:1], **CLOSE)


def test_a_stop_token_exactly_at_the_limit_is_a_stop(make, params, free):
    at, index = next(
        (at, index)
        for at, group in enumerate(free)
        for index, rollout in enumerate(group)
        if rollout.tokens[-1] not in rollout.tokens[:-1]
    )
    stop_ids = [int(free[at][index].tokens[-1]), *NEVER[1:]]
    rollout = make(stop_ids)(params, make_prompts(), Sampling(NEW))[at][index]
    np.testing.assert_array_equal(rollout.tokens, free[at][index].tokens)
    assert rollout.finish_reason == "stop"


@pytest.mark.parametrize("limit", [1, 4])
def test_a_smaller_limit_cuts_and_changes_nothing_else(make, params, free, limit):
    expected = [
        [Rollout(rollout.tokens[:limit], rollout.logprobs[:limit], "length") for rollout in group] for group in free
    ]
    assert_same(make()(params, make_prompts(), Sampling(limit)), expected)


# Agreement with the model, the scorer and transformers


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_whole_forward_pass(config, params, make, temperature):
    results = make()(params, make_prompts(), Sampling(NEW, temperature=temperature))
    rows = [[*text, *rollout.tokens.tolist()] for text, group in zip(TEXTS, results, strict=True) for rollout in group]
    width = max(map(len, rows))
    valid = np.arange(width) < lengths(rows)[:, None]
    hidden = qwen3.forward(params, jnp.array(pad_right(rows, width)), config=config, valid=jnp.array(valid))
    logits = np.asarray(qwen3.logits(params, hidden, config), np.float64) / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, ids, rollout in zip(logp, rows, every(results), strict=True):
        before = len(ids) - NEW - 1
        expected = row[np.arange(before, before + NEW), rollout.tokens]
        np.testing.assert_allclose(rollout.logprobs, expected, **CLOSE)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (0.7, 9, 0.9)])
def test_both_modes_in_one_generate_agree_with_the_scorer(config, params, make, free, temperature, top_k, top_p):
    """Both modes' rollouts from one call, ragged by stop tokens, scored under both prompts."""
    systems = [[], [60, 61, 62]]  # what the high-entropy prompt has before the question
    questions = np.repeat(np.arange(len(TEXTS)), 2)
    modes = np.tile([NORMAL, HIGH_ENTROPY], len(TEXTS))
    keys = rollout_keys(jax.random.key(3), questions, modes, COUNT)
    prompts = [
        Prompt(systems[mode] + TEXTS[question], keys[at])
        for at, (question, mode) in enumerate(zip(questions, modes, strict=True))
    ]
    stop_ids = [int(token) for token in free[0][0].tokens[:3]]
    sampling = Sampling(NEW, temperature=temperature, top_k=top_k, top_p=top_p)
    sampler = make(stop_ids)
    results = sampler(params, prompts, sampling)
    # Together or each mode alone: the same.
    for mode in (NORMAL, HIGH_ENTROPY):
        assert_same(sampler(params, prompts[mode::2], sampling), results[mode::2])

    groups = [results[2 * p] + results[2 * p + 1] for p in range(len(TEXTS))]
    sizes = np.stack([lengths([rollout.tokens.tolist() for rollout in group]) for group in groups])
    assert sizes.min() < NEW
    scores = jax.jit(score_rollouts, static_argnames=("config", "temperature", "chunk"))(
        params,
        np.stack([pad_left([system + text for system in systems], 20) for text in TEXTS]),
        np.stack([lengths([system + text for system in systems]) for text in TEXTS]),
        np.stack([pad_right([rollout.tokens.tolist() for rollout in group], 12) for group in groups]),
        sizes,
        config=config,
        temperature=temperature,
        chunk=5,
    )
    for p, group in enumerate(groups):
        for i, rollout in enumerate(group):
            own, other = (NORMAL, HIGH_ENTROPY) if i < COUNT else (HIGH_ENTROPY, NORMAL)
            size = sizes[p, i]
            np.testing.assert_allclose(rollout.logprobs, scores.logprobs[own, p, i, :size], **CLOSE)
            assert np.abs(rollout.logprobs - scores.logprobs[other, p, i, :size]).max() > 1e-3


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """A random Qwen3 of transformers with weights of some size, and the folder it is saved in."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=67,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(float("norm" in name) + spread * torch.randn(weight.shape))
    folder = tmp_path_factory.mktemp("greedy_oracle")
    model.save_pretrained(folder)
    return model.eval(), folder


def test_greedy_equals_transformers_generate(oracle):
    model, folder = oracle

    def reference(text, stop_ids):
        ids = torch.tensor([text])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=stop_ids,
            pad_token_id=0,
        )
        return output[0, len(text) :].tolist()

    free = [reference(text, [900]) for text in TEXTS]
    # The fourth greedy token of the first prompt stops, and so does a token of the third.
    stop_ids = [free[0][3], free[2][6]]
    expected = [reference(text, stop_ids) for text in TEXTS]
    assert len({len(tokens) for tokens in expected}) > 1
    sampler = Sampler(EngineConfig(huggingface.load_config(folder), tuple(stop_ids), 3, 4), max_prompt_tokens=16)
    params = huggingface.load_params(folder)
    results = sampler(params, make_prompts(count=1), Sampling(NEW, temperature=0.0))
    assert [group[0].tokens.tolist() for group in results] == expected
    reasons = ["stop" if tokens[-1] in stop_ids else "length" for tokens in expected]
    assert [group[0].finish_reason for group in results] == reasons


# The host loop


def test_more_prompts_than_slots_complete_in_order(config, params, make):
    """40 prompts of ragged rollouts through 4 slots, each compared with itself alone."""
    texts = [[1 + at, 2, 3 + at % 7][: 1 + at % 3] for at in range(40)]
    prompts = make_prompts(texts, count=2)
    sampler = make([3, 17, 44], slots=4)
    counts = []
    results = sampler(params, prompts, Sampling(NEW), counts.append)
    assert sum(counts) == 80
    assert len({len(rollout.tokens) for rollout in every(results)}) > 3
    for at in (0, 13, 39):
        assert_same(sampler(params, prompts[at : at + 1], Sampling(NEW)), results[at : at + 1])


def test_each_prompt_is_prefilled_once(params, make, monkeypatch):
    seen = []
    prefill = engine.prefill

    def counted(weights, tokens, true_lengths, shared, **settings):
        seen.extend(tuple(row[:size].tolist()) for row, size in zip(tokens, true_lengths, strict=True))
        return prefill(weights, tokens, true_lengths, shared, **settings)

    monkeypatch.setattr(engine, "prefill", counted)
    texts = [*TEXTS, list(range(1, 21)), *([at, at] for at in range(20, 40))]
    make(slots=3)(params, make_prompts(texts, count=4), Sampling(2))
    assert sorted(row for row in seen if row != (0,)) == sorted(map(tuple, texts))


def test_one_compilation_a_bucket(params, make):
    """Prompts of every length from 1 to 32, in separate calls: two buckets, two programs of each kind."""
    sampler = make([3, 17], slots=2, max_prompt_tokens=64, decode_steps=2)
    functions = (engine.prefill, engine.insert, engine.generate)

    def compiled():
        return np.array([function._cache_size() for function in functions])

    before = compiled()
    for length in [1, 2, 3, 7, 11, 15, 16]:
        sampler(params, make_prompts([[5] * length], count=length % 4 + 1), Sampling(3))
    # `prefill` of this width may have been compiled by another test.
    assert (compiled() - before <= [1, 1, 1]).all()
    assert (compiled() - before)[2] == 1
    for length in [17, 20, 31, 32]:
        sampler(params, make_prompts([[5] * length, [5] * 4]), Sampling(3))
    # The second bucket's program, and the short prompts' insertion into the longer cache.
    assert (compiled() - before <= [2, 3, 2]).all()
    settled = compiled()
    for temperature, top_k in [(0.0, 0), (0.5, 0), (1.0, 5)]:
        sampler(params, make_prompts([[5] * 9]), Sampling(3, temperature=temperature, top_k=top_k))
    np.testing.assert_array_equal(compiled(), settled)


@pytest.mark.parametrize("shared", [17, 30])
def test_rollouts_do_not_depend_on_a_shared_beginning(params, make, monkeypatch, shared):
    """Two long beginnings, told as shared or not; one of the prompts is nothing but its beginning."""
    beginnings = [[60, 3, 61] * 10, [7, 8, 9] * 10]
    texts = [beginning[:shared] + text for beginning in beginnings for text in [*TEXTS[:3], []]]
    prompts = make_prompts(texts)
    expected = make()(params, prompts, Sampling(NEW))
    widths = []
    prefill = engine.prefill

    def seen(weights, tokens, true_lengths, shared, **settings):
        widths.append((tokens.shape[1], shared[0].keys.shape[0]))
        return prefill(weights, tokens, true_lengths, shared, **settings)

    monkeypatch.setattr(engine, "prefill", seen)
    sampler = make()
    assert_same(sampler(params, [prompt._replace(shared=shared) for prompt in prompts], Sampling(NEW)), expected)
    # Each beginning is computed once, alone, and the prompts from where it ends.
    assert widths.count((shared, 0)) == 2
    assert (16, shared) in widths
    # A new call may bring new weights: nothing is kept.
    widths.clear()
    sampler(params, [prompt._replace(shared=shared) for prompt in prompts], Sampling(1))
    assert widths.count((shared, 0)) == 2


def test_each_prompt_has_its_own_settings(params, make, free):
    """Limits and temperatures by prompt, beside each other."""
    limits = [1, 10, 4, 7, 2]
    each = [Sampling(limit) for limit in limits]
    expected = [
        [Rollout(rollout.tokens[:limit], rollout.logprobs[:limit], "length") for rollout in group]
        for limit, group in zip(limits, free, strict=True)
    ]
    assert_same(make(slots=3)(params, make_prompts(), each), expected)
    each[2] = Sampling(NEW, temperature=0.0)
    greedy = make()(params, make_prompts()[2:3], Sampling(NEW, temperature=0.0))
    assert_same(make()(params, make_prompts(), each)[2:3], greedy)


@pytest.mark.slow
def test_decoding_reads_no_more_cache_than_the_longest_live_rollout_needs(config, params, make, monkeypatch):
    """One rollout of 1,000 tokens beside short ones: the cache grows with it, and rollouts stay the same."""
    limits = [1000, 5, 5, 5]
    prompts = make_prompts(TEXTS[:4], count=1)
    sampler = make(slots=2, decode_steps=40)
    alone = [sampler(params, [prompt], Sampling(5))[0] for prompt in prompts]
    read = []
    generate = engine.generate

    def seen(weights, state, stop_ids, **settings):
        read.append((state.cache[0].length, int(jnp.max(jnp.where(state.live, state.positions, 0)))))
        return generate(weights, state, stop_ids, **settings)

    monkeypatch.setattr(engine, "generate", seen)
    results = sampler(params, prompts, [Sampling(limit) for limit in limits])
    assert_same(results[1:], alone[1:])
    np.testing.assert_array_equal(results[0][0].tokens[:5], alone[0][0].tokens)
    assert len(results[0][0].tokens) == 1000
    # Lengths 64 (at least), 128, 256, 512 and the largest; never less than what the next 40 steps fill.
    assert [length for length, _ in read] == sorted(length for length, _ in read)
    assert {length for length, _ in read} == {64, 128, 256, 512, 1016}
    for length, position in read:
        assert position + 40 <= length or length == 1016
        assert length < 2 * (position + 41) or length == 64


@pytest.mark.parametrize("length", [0, LIMIT + 1])
def test_a_prompt_of_a_wrong_length_is_a_user_error(params, make, length):
    prompts = make_prompts([[1, 2], [7] * length])
    with pytest.raises(UserError, match=rf"^prompt 1 has {length} tokens, the limit is {LIMIT}; .*max_prompt_tokens"):
        make()(params, prompts, Sampling(NEW))


def test_the_longest_prompt_allowed_works(params, make):
    (group,) = make()(params, make_prompts([[7] * LIMIT], count=1), Sampling(NEW))
    assert len(group[0].tokens) == NEW


def test_no_prompts_give_no_rollouts(params, make):
    assert make()(params, [], Sampling(NEW)) == []


def test_a_prompt_without_keys_has_no_rollouts(params, make, free):
    none = Prompt([5, 6], jax.random.split(jax.random.key(0), 3)[:0])
    results = make()(params, [none, *make_prompts(), none], Sampling(NEW))
    assert_same(results, [[], *free, []])
    assert make()(params, [none], Sampling(NEW)) == [[]]


def test_results_are_of_the_declared_types(free):
    for rollout in every(free):
        assert (type(rollout.tokens), rollout.tokens.dtype) == (np.ndarray, np.int32)
        assert (type(rollout.logprobs), rollout.logprobs.dtype) == (np.ndarray, np.float32)
        # A copy of its own: nothing keeps the whole decode state alive.
        assert rollout.tokens.base is None


def test_progress_counts_every_rollout_once(params, make):
    counts = []
    make(slots=4)(params, make_prompts(), Sampling(NEW), counts.append)
    assert sum(counts) == len(TEXTS) * COUNT
    assert max(counts) <= 4


def test_sampling_is_on_by_default_as_trained(params, make, free):
    """The defaults: temperature 1, no truncation."""
    assert Sampling(NEW) == Sampling(NEW, temperature=1.0, top_k=0, top_p=1.0)
    results = make()(params, make_prompts(), Sampling(max_new_tokens=NEW, temperature=1.0, top_k=0, top_p=1.0))
    assert_same(results, free)
