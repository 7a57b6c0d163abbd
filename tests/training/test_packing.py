"""Packed rows: nothing is lost, nothing overlaps, and the update's numbers are those of padded rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.model import qwen3
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.objective.scorer import score_rollouts
from policy_split_jax.training.accumulate import take
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.packing import pack_batch
from policy_split_jax.training.state import init_state
from policy_split_jax.training.update import UpdateConfig, make_update

MODEL = qwen3.Qwen3Config(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)
QUESTIONS, GROUP, WIDTH, LENGTH, LIMIT = 6, 4, 20, 130, 150


def make_batch(prompts, responses, seed=0):
    """Random tokens of these lengths, garbage in the padding, one rollout without a grade."""
    draw = np.random.default_rng(seed)
    questions, group = responses.shape
    graded = np.ones((questions, group), bool)
    graded[-1, 1] = False
    return Batch(
        prompts=draw.integers(0, 48, (questions, 2, WIDTH)).astype(np.int32),
        prompt_lengths=prompts.astype(np.int32),
        responses=draw.integers(0, 48, (questions, group, LENGTH)).astype(np.int32),
        response_lengths=responses.astype(np.int32),
        modes=np.tile(np.array([0, 1], np.int32), (questions, group // 2)),
        truncated=np.zeros((questions, group), bool),
        rewards=draw.choice([0.0, 1.0], (questions, group)).astype(np.float32),
        graded=graded,
        sampler_logprobs=draw.normal(-4.0, 0.5, (questions, group, LENGTH)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def batch():
    """One rollout as long as may be, one of a single token, the others of all sizes."""
    draw = np.random.default_rng(1)
    prompts, responses = draw.integers(1, WIDTH + 1, (QUESTIONS, 2)), draw.integers(1, 60, (QUESTIONS, GROUP))
    prompts[2], responses[2, 1], responses[3, 0] = (5, WIDTH), LENGTH, 1
    return make_batch(prompts, responses)


@pytest.fixture(scope="module")
def params():
    params = qwen3.init_params(MODEL, jax.random.key(0))
    params["final_norm"]["scale"] *= 2.0
    return params


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sequence_has_cells_of_its_own(data):
    updates = data.draw(st.sampled_from([1, 2]))
    shape = (2 * data.draw(st.integers(1, 6)), 2 * data.draw(st.integers(1, 3)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    draw = np.random.default_rng(seed)
    longest = data.draw(st.sampled_from([3, 40, LENGTH]))
    prompts, responses = draw.integers(1, WIDTH + 1, (shape[0], 2)), draw.integers(1, longest + 1, shape)
    rows = shape[1] + data.draw(st.integers(0, 3))
    packing, utilisation = pack_batch(make_batch(prompts, responses), rows=rows, limit=LIMIT, updates=updates)
    places = packing.places
    # No more tokens at once than asked for; rows as long as the longest sequence needs.
    assert places.height * places.width <= rows * LIMIT
    assert places.width >= (prompts.max(1)[:, None] + responses).max()
    cells = 0
    for update in range(updates):
        part = slice(update * shape[0] // updates, (update + 1) * shape[0] // updates)
        members = packing.microbatches.members[update]
        used = int(packing.microbatches.used[update])
        present = members[members < shape[0] // updates]
        assert sorted(present) == list(range(shape[0] // updates))
        assert (members[used:] == shape[0] // updates).all()
        assert (members[:used, 0] < shape[0] // updates).all()
        for microbatch in members[:used]:
            taken = np.zeros((places.height, places.width), int)
            for question in microbatch[microbatch < shape[0] // updates]:
                for rollout in range(shape[1]):
                    row, start = places.rows[update, question, rollout], places.starts[update, question, rollout]
                    before, length = prompts[part][question].max(), responses[part][question, rollout]
                    assert start - before >= 0
                    assert start + length <= places.width
                    taken[row, start - before : start + length] += 1
            assert taken.max() == 1
            cells += taken.size
    tokens = sum(prompts[q].mean() + responses[q, g] for q, g in np.ndindex(*shape))
    assert utilisation == pytest.approx(tokens / cells)


def test_short_sequences_share_rows():
    """64 sequences of 50 tokens in two rows of 1,600 rather than in 64 rows."""
    prompts, responses = np.full((16, 2), 10), np.full((16, 4), 40)
    packing, utilisation = pack_batch(make_batch(prompts, responses), rows=4, limit=1600, updates=1)
    # Rows of 128 hold two each, 12 rows for each of 1,536.
    assert (packing.places.height, packing.places.width) == (48, 128)
    assert int(packing.microbatches.used[0]) == 1
    assert utilisation == pytest.approx(64 * 50 / (48 * 128))


def test_the_row_is_as_long_as_the_longest_sequence_needs():
    prompts, responses = np.full((2, 2), 10), np.full((2, 2), 40)
    responses[1, 1] = 120
    packing, _ = pack_batch(make_batch(prompts, responses), rows=2, limit=LIMIT, updates=1)
    assert packing.places.width == LIMIT
    packing, _ = pack_batch(make_batch(prompts, responses), rows=2, limit=4096, updates=1)
    assert (packing.places.height, packing.places.width) == (32, 256)


def test_too_few_rows_are_refused(batch):
    with pytest.raises(ValueError, match="3 rows cannot hold 4 rollouts"):
        pack_batch(batch, rows=3, limit=LIMIT, updates=1)


def test_scores_are_those_of_padded_rows(batch, params):
    packing, _ = pack_batch(batch, rows=GROUP, limit=LIMIT, updates=1)
    assert int(packing.microbatches.used[0]) > 1
    settings = {"config": MODEL, "chunk": 64, "with_kl": True, "temperature": 0.7}
    score = jax.jit(lambda part, places: score_rollouts(params, *part[:4], places=places, **settings))
    padded = jax.jit(lambda: score_rollouts(params, *map(jnp.asarray, batch[:4]), **settings))()
    mask = np.arange(LENGTH) < batch.response_lengths[..., None]
    for at in range(int(packing.microbatches.used[0])):
        members = packing.microbatches.members[0, at]
        scores = score(*take((batch, jax.tree.map(lambda leaf: leaf[0], packing.places)), jnp.asarray(members)))
        members = members[members < QUESTIONS]
        for name in ("logprobs", "entropy", "kl"):
            found = np.where(mask[members], getattr(scores, name)[:, : len(members)], 0)
            expected = np.where(mask[members], getattr(padded, name)[:, members], 0)
            # The same float32 products, sums over other numbers of zeros.
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)


# Small, so that rounding in the first of two updates is not magnified in the second.
RATE = 0.1


def step(params, batch, packing=None, **chosen):
    optimizer = optax.sgd(RATE)
    config = UpdateConfig(advantage=AdvantageConfig(alpha=0.3, kappa=1.0), score_chunk=64, **chosen)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, 0, 0.5)
    update = make_update(MODEL, config, optimizer)
    return update(state, batch) if packing is None else update(state, batch, packing)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"two_pass": True},
        pytest.param({"updates_per_step": 2}, marks=pytest.mark.slow),
        pytest.param({"objective": "grpo"}, marks=pytest.mark.slow),
    ],
    ids=lambda chosen: str(chosen),
)
def test_loss_gradient_and_metrics_are_those_of_padded_rows(batch, params, chosen):
    """Steps of SGD are the gradients: equal to 1e-5, so the parameters to that times the rate."""
    if chosen.get("objective") == "grpo":
        batch = batch._replace(modes=np.zeros_like(batch.modes))
    packing, _ = pack_batch(batch, rows=GROUP, limit=LIMIT, updates=chosen.get("updates_per_step", 1))
    expected_state, expected = step(params, batch, **chosen)
    state, metrics = step(params, batch, packing, **chosen)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * RATE, rtol=0),
        state.params,
        expected_state.params,
    )
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), state.params, params)
    assert min(jax.tree.leaves(moved)) > 1e-3 * RATE


def test_one_program_serves_every_step(batch, params):
    optimizer = optax.sgd(1.0)
    update = make_update(MODEL, UpdateConfig(score_chunk=64), optimizer)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer, 0, 0.5)
    counts = []
    for divisor in (1, 2, 4):
        lengths = np.where(batch.response_lengths == LENGTH, LENGTH, 1 + batch.response_lengths // divisor)
        changed = batch._replace(response_lengths=lengths.astype(np.int32))
        packing, _ = pack_batch(changed, rows=GROUP, limit=LIMIT, updates=1)
        counts.append(int(packing.microbatches.used[0]))
        state, _ = update(state, changed, packing)
    assert len(set(counts)) > 1
    assert update._cache_size() == 1
