"""The chunked scorer against full logits, NumPy float64 and the memory it must not take."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.model import qwen3
from policy_split_jax.objective import scorer
from policy_split_jax.objective.scorer import join_rows, responses_per_row, score_hidden, score_rollouts

CONTEXTS, BATCH, LENGTH, WIDTH, VOCAB = 2, 3, 7, 8, 31
# Float32 against float64 on logits below 20 and 31 tokens: a few roundings of 1e-6.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
score = jax.jit(score_hidden, static_argnames=("temperature", "chunk", "with_kl"))


@pytest.fixture(scope="module")
def case():
    """Head, hidden states and targets; logits have a standard deviation of about 3."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    hidden = rng.normal(size=(CONTEXTS, BATCH, LENGTH, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    return head, hidden, targets


def in_float64(head, hidden, targets, temperature=1.0):
    """Logprobs, entropy and both divergences, from the definitions."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64) / temperature
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.broadcast_to(targets[..., None], (*logp.shape[:-1], 1)), -1)[..., 0]
    p = np.exp(logp)
    entropy = -(p * logp).sum(-1)
    kl = np.stack([(p[m] * (logp[m] - logp[1 - m])).sum(-1) for m in range(2)]) if len(p) == 2 else None
    return chosen, entropy, kl


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_scores_equal_float64(case, temperature):
    scores = score(*case, temperature=temperature, with_kl=True)
    for got, expected in zip(scores, in_float64(*case, temperature), strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 3, LENGTH, LENGTH + 1, 256])
def test_chunk_size_changes_nothing(case, chunk):
    scores = score(*case, chunk=chunk, with_kl=True)
    for got, expected in zip(scores, in_float64(*case), strict=True):
        assert got.shape == (CONTEXTS, BATCH, LENGTH)
        np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_kl_is_none_unless_asked_for(case):
    assert score(*case).kl is None


def test_kl_of_equal_contexts_is_zero_and_of_others_never_negative(case):
    head, hidden, targets = case
    # Exact: the two log-probabilities are the same numbers.
    assert not score(head, np.stack([hidden[0], hidden[0]]), targets, with_kl=True).kl.any()
    # Nearly equal contexts, where rounding (31 terms of at most 1e-7 each) could push it below 0.
    close = np.stack([hidden[0], hidden[0] + np.float32(1e-4)])
    assert score(head, close, targets, with_kl=True).kl.min() > -1e-6
    assert score(*case, with_kl=True).kl.min() > 0.01


def test_entropy_of_known_distributions():
    targets = jnp.zeros((1, 2), jnp.int32)
    head = jnp.zeros((WIDTH, VOCAB)).at[0, 3].set(1.0)
    hidden = jnp.zeros((1, 1, 2, WIDTH)).at[0, 0, 1, 0].set(1e4)
    scores = score(head, hidden, targets)
    # Uniform, then all mass on token 3: ln 31, then 0 (never NaN from 0 * log 0).
    np.testing.assert_allclose(scores.entropy[0, 0], [np.log(VOCAB), 0], atol=1e-6)
    np.testing.assert_allclose(scores.logprobs[0, 0], [-np.log(VOCAB), -1e4], rtol=1e-6)


def weighted_sum(scores):
    """A scalar of every part of the scores, each entry weighted differently."""
    weights = np.random.default_rng(1).normal(size=(3, CONTEXTS, BATCH, LENGTH)).astype(np.float32)
    return sum(jnp.sum(weight * part) for weight, part in zip(weights, scores, strict=True))


def unchunked(head, hidden, targets, temperature):
    logp = jax.nn.log_softmax(hidden @ head / temperature, axis=-1)
    chosen = jnp.take_along_axis(logp, jnp.broadcast_to(targets[..., None], (*logp.shape[:-1], 1)), -1)[..., 0]
    p = jnp.exp(logp)
    return chosen, -jnp.sum(p * logp, -1), jnp.sum(p * (logp - logp[::-1]), -1)


@pytest.mark.parametrize("chunk", [2, LENGTH])
def test_gradients_equal_those_of_the_unchunked_scores(case, chunk):
    head, hidden, targets = case
    ours = jax.grad(
        lambda head, hidden: weighted_sum(score(head, hidden, targets, temperature=0.7, chunk=chunk, with_kl=True)),
        argnums=(0, 1),
    )(head, hidden)
    plain = jax.grad(lambda head, hidden: weighted_sum(unchunked(head, hidden, targets, 0.7)), argnums=(0, 1))(
        head, hidden
    )
    for got, expected in zip(ours, plain, strict=True):
        # The head's gradient sums 42 terms of order 10: absolute rounding of about 1e-5.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert np.abs(expected).max() > 1


def test_gradient_equals_finite_differences(case):
    head, hidden, targets = case
    gradient = jax.grad(lambda hidden: jnp.sum(score(head, hidden, targets, chunk=3).logprobs))(hidden)
    step = 1e-6
    for index in [(0, 0, 0, 0), (1, 2, 6, 7), (0, 1, 3, 4)]:
        up, down = np.array(hidden, np.float64), np.array(hidden, np.float64)
        up[index] += step
        down[index] -= step
        slope = (in_float64(head, up, targets)[0].sum() - in_float64(head, down, targets)[0].sum()) / (2 * step)
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-4, atol=1e-5)


def test_bfloat16_hidden_states_are_scored_in_float32(case):
    head, hidden, targets = case
    narrow = jnp.asarray(hidden, jnp.bfloat16)
    scores = score(head, narrow, targets)
    assert {part.dtype for part in scores if part is not None} == {jnp.dtype("float32")}
    # Exact products of bfloat16 values, summed in float32: no error beyond the rounding of the inputs.
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float64)
    expected = in_float64(rounded, np.asarray(narrow, np.float64), targets)
    np.testing.assert_allclose(scores.logprobs, expected[0], **TOLERANCE)


def test_memory_stays_far_below_the_full_logits():
    batch, length, vocabulary, width = 2, 512, 151_936, 64
    full = batch * length * vocabulary * 4
    arguments = (
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((1, batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )

    def temporary_bytes(logprobs):
        def total(head, hidden, targets):
            return jnp.sum(logprobs(head, hidden, targets))

        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temporary_bytes(lambda *args: score_hidden(*args, chunk=16).logprobs)
    naive = temporary_bytes(lambda *args: unchunked(*args, 1.0)[0])
    # A chunk's logits are 1/32 of the whole and the head's gradient 1/16; XLA holds a few of each.
    assert chunked < full / 3
    assert naive > full


# Whole rollouts through a model.

PROMPTS = [[[5, 6, 7], [1, 2, 5, 6, 7]], [[9], [1, 2, 9]]]  # [question][context]
RESPONSES = [[[3, 4, 30], [8]], [[10, 11, 12, 13, 14], [2, 2]]]  # [question][rollout]


@pytest.fixture(scope="module")
def model():
    config = qwen3.Qwen3Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, rope_theta=1e4, tie_embeddings=False,
    )  # fmt: skip
    params = qwen3.init_params(config, jax.random.key(0))
    params["final_norm"]["scale"] *= 2.0
    return config, params


def batch(width=5, length=5, fill=0):
    """The four arrays of `score_rollouts`; padding holds `fill`."""
    prompts = np.full((2, 2, width), fill, np.int32)
    responses = np.full((2, 2, length), fill, np.int32)
    for at in np.ndindex(2, 2):
        prompt, response = PROMPTS[at[0]][at[1]], RESPONSES[at[0]][at[1]]
        prompts[*at, width - len(prompt) :] = prompt
        responses[*at, : len(response)] = response
    prompt_lengths = np.array([[len(prompt) for prompt in pair] for pair in PROMPTS], np.int32)
    response_lengths = np.array([[len(response) for response in group] for group in RESPONSES], np.int32)
    return prompts, prompt_lengths, responses, response_lengths


scored = jax.jit(score_rollouts, static_argnames=("config", "dtype", "remat", "temperature", "chunk", "with_kl"))


def real_tokens(scores):
    """The scores of response tokens, without padding: {name: [values in order]}."""
    mask = np.arange(scores.logprobs.shape[-1]) < batch()[3][..., None]
    return {name: np.asarray(part)[:, mask] for name, part in scores._asdict().items() if part is not None}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_are_scored_as_one_by_one(model, temperature):
    """Against one unpadded sequence at a time: forward, full logits, float64 log-softmax, shift by one."""
    config, params = model
    scores = scored(params, *batch(), config=config, temperature=temperature, chunk=2, with_kl=True)
    assert scores.logprobs.shape == (2, 2, 2, 5)
    for p, i in np.ndindex(2, 2):
        response = RESPONSES[p][i]
        logits = []
        for m in range(2):
            tokens = jnp.array([PROMPTS[p][m] + response])
            hidden = qwen3.forward(params, tokens, config=config, valid=jnp.ones(tokens.shape, bool))
            start = len(PROMPTS[p][m]) - 1
            logits.append(np.asarray(qwen3.logits(params, hidden, config))[0, start : start + len(response)])
        expected = in_float64(np.eye(VOCAB), np.stack(logits)[:, None], np.array([response]), temperature)
        for got, values in zip(scores, expected, strict=True):
            np.testing.assert_allclose(got[:, p, i, : len(response)], values[:, 0], **TOLERANCE)


@pytest.mark.parametrize("shape", [{"width": 9}, {"length": 11}, {"fill": VOCAB - 1}, {"width": 8, "fill": 5}])
def test_padding_changes_no_score_and_no_gradient(model, shape):
    config, params = model
    weights = np.random.default_rng(2).normal(size=(3, 2, 11)).astype(np.float32)

    def loss(params, arrays):
        scores = scored(params, *arrays, config=config, with_kl=True, chunk=4)
        mask = np.arange(scores.logprobs.shape[-1]) < arrays[3][..., None]
        where = np.flatnonzero(mask)
        parts = [part.reshape(2, -1)[:, where] for part in scores]
        return sum(jnp.sum(weight * part) for weight, part in zip(weights, parts, strict=True)), scores

    gradient_of = jax.grad(loss, has_aux=True)
    plain_gradient, plain = gradient_of(params, batch())
    gradient, scores = gradient_of(params, batch(**shape))
    assert all(np.isfinite(part).all() for part in scores)
    for name, values in real_tokens(plain).items():
        np.testing.assert_allclose(real_tokens(scores)[name], values, **TOLERANCE)
    # Gradients of order 10, summed in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, plain_gradient)


def test_contexts_and_rollouts_keep_their_places(model):
    """Swapping the contexts, the questions or the rollouts swaps the scores, and nothing else."""
    config, params = model
    prompts, prompt_lengths, responses, response_lengths = batch()
    plain = scored(params, *batch(), config=config, with_kl=True)
    by_context = scored(
        params, prompts[:, ::-1], prompt_lengths[:, ::-1], responses, response_lengths, config=config, with_kl=True
    )
    by_question = scored(
        params, prompts[::-1], prompt_lengths[::-1], responses[::-1], response_lengths[::-1], config=config,
        with_kl=True,
    )  # fmt: skip
    by_rollout = scored(
        params, prompts, prompt_lengths, responses[:, ::-1], response_lengths[:, ::-1], config=config, with_kl=True
    )
    for at, part in enumerate(plain):
        np.testing.assert_allclose(by_context[at], part[::-1], **TOLERANCE)
        np.testing.assert_allclose(by_question[at], part[:, ::-1], **TOLERANCE)
        np.testing.assert_allclose(by_rollout[at], part[:, :, ::-1], **TOLERANCE)


ONE_QUESTION = (
    jnp.array([[[0, 1], [2, 3]]]),
    jnp.array([[1, 2]]),
    jnp.array([[[4, 5], [6, 0]]]),
    jnp.array([[2, 1]]),
)


def test_rows_of_one_response_by_hand():
    rows = join_rows(*ONE_QUESTION, per_row=1)
    np.testing.assert_array_equal(rows.tokens, [[[0, 1, 4, 5], [0, 1, 6, 0]], [[2, 3, 4, 5], [2, 3, 6, 0]]])
    np.testing.assert_array_equal(rows.valid, [[[0, 1, 1, 1], [0, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]]])


def test_rows_of_two_responses_by_hand():
    rows = join_rows(*ONE_QUESTION, per_row=2)
    np.testing.assert_array_equal(rows.tokens, [[[0, 1, 4, 5, 6, 0]], [[2, 3, 4, 5, 6, 0]]])
    np.testing.assert_array_equal(rows.valid, [[[0, 1, 1, 1, 1, 0]], [[1, 1, 1, 1, 1, 0]]])


def test_sharing_a_prompt_changes_no_score(model, monkeypatch):
    config, params = model
    arrays = [jnp.asarray(array) for array in batch()]
    group = arrays[2].shape[1]
    monkeypatch.setattr(scorer, "responses_per_row", lambda *shape: 1)
    alone = score_rollouts(params, *arrays, config=config, with_kl=True)
    for per_row in (size for size in range(2, group + 1) if group % size == 0):
        monkeypatch.setattr(scorer, "responses_per_row", lambda *shape, per_row=per_row: per_row)
        shared = score_rollouts(params, *arrays, config=config, with_kl=True)
        for name, values in real_tokens(alone).items():
            np.testing.assert_allclose(real_tokens(shared)[name], values, **TOLERANCE)


def test_contexts_one_after_the_other_change_no_score(model, monkeypatch):
    """As with cuDNN's attention."""
    config, params = model
    arrays = [jnp.asarray(array) for array in batch()]
    together = score_rollouts(params, *arrays, config=config, with_kl=True)
    monkeypatch.setattr(scorer, "implementation", lambda *unused: "cudnn")
    apart = score_rollouts(params, *arrays, config=config, with_kl=True)
    for name, values in real_tokens(together).items():
        np.testing.assert_allclose(real_tokens(apart)[name], values, **TOLERANCE)


def test_prompts_are_shared_as_far_as_devices_have_rows():
    assert responses_per_row(questions=1, group=8, shards=1) == 8
    assert responses_per_row(questions=1, group=1, shards=1) == 1
    assert responses_per_row(questions=1, group=8, shards=4) == 2
    assert responses_per_row(questions=2, group=8, shards=4) == 4
    assert responses_per_row(questions=3, group=8, shards=4) == 2
    assert responses_per_row(questions=1, group=8, shards=16) == 1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_score(model, remat):
    config, params = model
    plain = scored(params, *batch(), config=config)
    other = scored(params, *batch(), config=config, remat=remat)
    np.testing.assert_allclose(real_tokens(plain)["logprobs"], real_tokens(other)["logprobs"], **TOLERANCE)
