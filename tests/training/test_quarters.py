"""A step's sequences in the order of the released trainer: by hand, and its updates against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.training.batch import Batch, SharedView
from policy_split_jax.training.quarters import in_quarters, quarter_order
from policy_split_jax.training.update import UpdateConfig

SETTINGS = {"advantage": AdvantageConfig(alpha=0.3, kappa=1.0), "clip_low": 0.02, "clip_high": 0.01, "score_chunk": 3}


def settings(updates=4, **changes):
    return UpdateConfig(**{**SETTINGS, "update_order": "quarters", "updates_per_step": updates, **changes})


# ---------------------------------------------------------------------------------------------- by hand


def hand_batch(shared):
    """Two questions with two rollouts each; ids say what they are: of question 1, rollout 0, in the normal mode, …"""
    view = SharedView(
        prompts=np.array([[[0, 901], [910, 911]], [[0, 951], [0, 961]]], np.int32),
        prompt_lengths=np.array([[1, 2], [1, 1]], np.int32),
        responses=np.array([[[71, 0], [72, 73]], [[74, 0], [75, 76]]], np.int32),
        response_lengths=np.array([[1, 2], [1, 2]], np.int32),
    )
    batch = Batch(
        prompts=np.array([[[0, 101], [110, 111]], [[150, 151], [0, 161]]], np.int32),
        prompt_lengths=np.array([[1, 2], [2, 1]], np.int32),
        responses=np.array([[[11, 12], [13, 0]], [[14, 15], [16, 17]]], np.int32),
        response_lengths=np.array([[2, 1], [2, 2]], np.int32),
        modes=np.array([[HIGH_ENTROPY, NORMAL], [NORMAL, HIGH_ENTROPY]], np.int32),
        truncated=np.zeros((2, 2), bool),
        rewards=np.zeros((2, 2), np.float32),
        graded=np.array([[True, True], [True, False]]),
        sampler_logprobs=np.zeros((2, 2, 2), np.float32),
        shared=view if shared else None,
    )
    return jax.tree.map(jnp.asarray, batch)


# (training mode, question, rollout): the normal mode's own, the other's own, what each has of the other.
ORDER = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


def tokens_of(shape):
    """[2, P, G, T] numbers that name their place."""
    mode, question, rollout, token = np.indices(shape)
    return jnp.asarray(1000.0 * mode + 100 * question + 10 * rollout + token, jnp.float32)


@pytest.mark.parametrize("shared", [False, True], ids=["as sampled", "another view"])
def test_the_order_by_hand(shared):
    batch = hand_batch(shared)
    old, advantages = tokens_of((2, 2, 2, 2)), -tokens_of((2, 2, 2, 2))
    found = in_quarters(batch, old, advantages)
    assert quarter_order(batch).tolist() == [4 * mode + 2 * p + i for mode, p, i in ORDER]
    assert found.modes.tolist() == [[0], [0], [1], [1], [0], [0], [1], [1]]
    names = [[1000.0 * mode + 100 * p + 10 * i + t for t in (0, 1)] for mode, p, i in ORDER]
    assert found.old_logprobs[:, 0].tolist() == names
    assert found.advantages[:, 0].tolist() == [[-name for name in pair] for pair in names]
    own = [([0, 101], 1), ([150, 151], 2), ([110, 111], 2), ([0, 161], 1)]
    other = [([0, 901], 1), ([0, 951], 1), ([910, 911], 2), ([0, 961], 1)]
    expected = own + (other if shared else [own[0], own[1], own[2], own[3]])
    assert list(zip(found.prompts[:, 0].tolist(), found.prompt_lengths[:, 0].tolist(), strict=True)) == expected
    own = [([13, 0], 1), ([14, 15], 2), ([11, 12], 2), ([16, 17], 2)]
    other = [([71, 0], 1), ([75, 76], 2), ([72, 73], 2), ([74, 0], 1)]
    expected = own + (other if shared else [own[2], own[3], own[0], own[1]])
    assert list(zip(found.responses[:, 0].tolist(), found.response_lengths[:, 0].tolist(), strict=True)) == expected
    # The second question's second rollout was not graded.
    lengths = [1, 2, 2, 0, 1, 0, 2, 1] if shared else [1, 2, 2, 0, 2, 0, 1, 2]
    assert found.mask[:, 0].tolist() == [[length > 0, length > 1] for length in lengths]


@pytest.mark.parametrize("modes", [[[0, 0, 0, 1], [1, 1, 0, 1]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
def test_blocks_may_have_any_size(modes):
    """Neither a question nor a step needs as many rollouts of one mode as of the other."""
    modes = np.array(modes, np.int32)
    batch = hand_batch(False)._replace(modes=jnp.asarray(modes))
    every = [(m, p, i) for m in (0, 1) for p in (0, 1) for i in range(4)]
    blocks = [[x for x in every if x[0] == m and (modes[x[1:]] == m) == own] for own in (True, False) for m in (0, 1)]
    assert quarter_order(batch).tolist() == [every.index(x) for block in blocks for x in block]


# ----------------------------------------------------------------------------------- updates, against PyTorch


def quarters_of(twin, batch):
    """The sequences that count of each of the four blocks, which are as long as each other in these batches."""
    blocks = [
        [x for x in twin.everyone(batch) if x[0] == mode and (batch.modes[x[1], x[2]] == mode) == own]
        for own in (True, False)
        for mode in (NORMAL, HIGH_ENTROPY)
    ]
    # One normal rollout was not graded: it is missing in two of them.
    assert [len(block) for block in blocks] == [7, 8, 8, 7]
    return blocks


def assert_close(first, second, atol):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=atol, rtol=0), first, second)


@pytest.mark.parametrize("policy", ["bag", "params"])
def test_four_updates_are_those_of_pytorch(twin, request, sgd_step, model, batches, policy):
    """Each on one block, with the log-probabilities and advantages of the start."""
    params = request.getfixturevalue(policy)
    found, metrics = sgd_step(model, params, batches[0], settings(), rate=0.3)
    oracle = twin.make(params)
    theirs = twin.split_step(oracle, batches[0], settings(), quarters_of(twin, batches[0]), rate=0.3)
    assert metrics["loss"] == pytest.approx(
        np.mean(theirs.losses), rel=1e-5, abs=1e-6
    )  # float32 means of some 30 tokens
    assert min(map(abs, theirs.losses)) > 1e-3
    # Four steps of gradients of size 0.1, of two float32 backward passes.
    assert_close(found, twin.parameters(oracle), atol=1e-5)
    found = [metrics[f"clip_fraction/{name}"] for name in MODE_NAMES]
    assert found == pytest.approx(theirs.clipped, abs=1e-6)  # counts over counts
    assert theirs.clipped[NORMAL] != theirs.clipped[HIGH_ENTROPY]
    assert min(theirs.clipped) > 0


def test_two_updates_have_two_blocks_each(twin, bag, sgd_step, model, batches):
    first, second, third, fourth = quarters_of(twin, batches[0])
    found, metrics = sgd_step(model, bag, batches[0], settings(2), rate=0.3)
    oracle = twin.make(bag)
    theirs = twin.split_step(oracle, batches[0], settings(), [first + second, third + fourth], rate=0.3)
    assert metrics["loss"] == pytest.approx(np.mean(theirs.losses), rel=1e-5, abs=1e-6)
    assert_close(found, twin.parameters(oracle), atol=1e-5)


# ------------------------------------------------------------------------------- against an ordinary update


@pytest.mark.parametrize("microbatch", [0, 1])
def test_one_update_is_an_ordinary_one(bag, sgd_step, model, batches, microbatch):
    """The order means nothing where all are in one update."""
    (found, metrics), (expected, others) = (
        sgd_step(model, bag, batches[0], config)
        for config in (settings(1, microbatch_questions=microbatch), UpdateConfig(**SETTINGS))
    )
    assert metrics == pytest.approx(others, rel=1e-5, abs=1e-5)  # the same float32 sums in another order
    assert_close(found, expected, atol=1e-5)
    assert float(jnp.max(jnp.abs(found["table"] - bag["table"]))) > 0.01


@pytest.mark.parametrize("aggregate", ["sequence_mean_token_sum", "sequence_mean_token_mean", "constant"])
def test_one_update_is_an_ordinary_one_however_tokens_are_weighed(bag, sgd_step, model, batches, aggregate):
    chosen = {"aggregate": aggregate, "max_new_tokens": 9}
    (found, metrics), (expected, others) = (
        sgd_step(model, bag, batches[0], config)
        for config in (settings(1, **chosen), UpdateConfig(**SETTINGS, **chosen))
    )
    assert metrics["loss"] == pytest.approx(others["loss"], rel=1e-5, abs=1e-6)
    assert_close(found, expected, atol=1e-5)


def test_four_updates_are_others_than_of_whole_questions(bag, sgd_step, model, batches):
    """But what is measured of them has the same names, and what is of the start the same values."""
    (found, metrics), (other, others) = (
        sgd_step(model, bag, batches[0], config, rate=0.3)
        for config in (settings(4), UpdateConfig(**SETTINGS, updates_per_step=4))
    )
    assert metrics.keys() == others.keys()
    assert float(jnp.max(jnp.abs(found["table"] - other["table"]))) > 1e-3
    # Before the first update nothing has moved: those of one update are the same.
    _, start = sgd_step(model, bag, batches[0], UpdateConfig(**SETTINGS))
    changes = {"loss", "grad_norm", "clip_fraction/normal", "clip_fraction/high_entropy"}
    for name in start.keys() - changes:
        assert metrics[name] == pytest.approx(start[name], rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("updates", [2, 4])
def test_microbatches_change_nothing(bag, sgd_step, model, batches, updates):
    """Of P / updates questions' worth of sequences."""
    (found, metrics), (other, others) = (
        sgd_step(model, bag, batches[0], settings(updates, microbatch_questions=size), rate=0.3) for size in (0, 1)
    )
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert_close(found, other, atol=1e-5)


def test_padding_changes_nothing(bag, sgd_step, model, batches):
    batch = batches[0]
    wide = batch._replace(
        prompts=np.pad(batch.prompts, [(0, 0), (0, 0), (5, 0)], constant_values=5),
        responses=np.pad(batch.responses, [(0, 0), (0, 0), (0, 4)], constant_values=9),
        sampler_logprobs=np.pad(batch.sampler_logprobs, [(0, 0), (0, 0), (0, 4)], constant_values=-30),
    )
    (found, metrics), (other, others) = (sgd_step(model, bag, each, settings(), rate=0.3) for each in (batch, wide))
    assert others == pytest.approx(metrics, rel=1e-5, abs=1e-5)
    assert_close(found, other, atol=1e-5)
