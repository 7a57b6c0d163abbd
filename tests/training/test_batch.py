"""From ragged rollouts to the rectangular batch, by hand."""

import numpy as np
import pytest

from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.sampler.batcher import Rollout
from policy_split_jax.training.batch import Batch, SharedView
from policy_split_jax.training.collate import SharedGroup, make_batch


def rollout(tokens, reason="stop"):
    return Rollout(np.array(tokens, np.int32), np.array(tokens, np.float32) / -10, reason)


PROMPTS = [([1, 2], [3, 4, 5]), ([6], [7, 8])]
ROLLOUTS = [
    [rollout([11, 12, 13]), rollout([14])],
    [rollout([15, 16], "length"), rollout([17, 18, 19, 20])],
]
MODES = [[NORMAL, HIGH_ENTROPY], [HIGH_ENTROPY, NORMAL]]
REWARDS = [[1.0, None], [0.25, 0.0]]


def batch_of(rewards=REWARDS, rollouts=ROLLOUTS, prompts=PROMPTS, **limits):
    limits = {"max_prompt_tokens": 4, "max_new_tokens": 6} | limits
    return make_batch(prompts, rollouts, MODES, rewards, **limits)


def test_a_batch_by_hand():
    batch = batch_of()
    expected = Batch(
        prompts=[[[0, 0, 1, 2], [0, 3, 4, 5]], [[0, 0, 0, 6], [0, 0, 7, 8]]],
        prompt_lengths=[[2, 3], [1, 2]],
        responses=[
            [[11, 12, 13, 0, 0, 0], [14, 0, 0, 0, 0, 0]],
            [[15, 16, 0, 0, 0, 0], [17, 18, 19, 20, 0, 0]],
        ],
        response_lengths=[[3, 1], [2, 4]],
        modes=[[0, 1], [1, 0]],
        truncated=[[False, False], [True, False]],
        rewards=[[1.0, 0.0], [0.25, 0.0]],
        graded=[[True, False], [True, True]],
        sampler_logprobs=[
            [[-1.1, -1.2, -1.3, 0, 0, 0], [-1.4, 0, 0, 0, 0, 0]],
            [[-1.5, -1.6, 0, 0, 0, 0], [-1.7, -1.8, -1.9, -2.0, 0, 0]],
        ],
    )
    assert batch.shared is None
    for name in set(Batch._fields) - {"shared"}:
        # Tenths are rounded to float32; the rest is exact.
        np.testing.assert_allclose(getattr(batch, name), getattr(expected, name), rtol=1e-6, err_msg=name)


SHARED = [
    SharedGroup(([1, 2], [3, 4, 5, 6]), [[11, 12], np.array([14, 15], np.int32)]),
    SharedGroup(([6], [9]), [[], [17]]),
]


def test_shared_rollouts_by_hand():
    """The same widths serve both; of what was sampled nothing changes."""
    batch = batch_of(shared=SHARED)
    expected = SharedView(
        prompts=[[[0, 0, 1, 2], [3, 4, 5, 6]], [[0, 0, 0, 6], [0, 0, 0, 9]]],
        prompt_lengths=[[2, 4], [1, 1]],
        responses=[[[11, 12, 0, 0, 0, 0], [14, 15, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 0], [17, 0, 0, 0, 0, 0]]],
        response_lengths=[[2, 2], [0, 1]],
    )
    for name in SharedView._fields:
        found = getattr(batch.shared, name)
        np.testing.assert_array_equal(found, getattr(expected, name), err_msg=name)
        assert found.dtype == np.int32
    for name in set(Batch._fields) - {"shared"}:
        np.testing.assert_array_equal(getattr(batch, name), getattr(batch_of(), name), err_msg=name)


@pytest.mark.parametrize("sampled", [3, 20])
def test_a_width_is_that_of_the_longest_whoever_trains_on_it(sampled):
    """20 tokens need 32 columns, whether they were sampled or are shared."""
    prompts, rollouts = list(range(sampled)), [[rollout(range(sampled)), rollout([1])], ROLLOUTS[1]]
    other = list(range(23 - sampled))
    shared = [SharedGroup((other, [1]), [other, [1]]), SHARED[1]]
    batch = batch_of(
        rollouts=rollouts, prompts=[(prompts, [1]), PROMPTS[1]], shared=shared, max_prompt_tokens=64, max_new_tokens=64
    )
    assert batch.prompts.shape == batch.shared.prompts.shape == (2, 2, 32)
    assert batch.responses.shape == batch.shared.responses.shape == batch.sampler_logprobs.shape == (2, 2, 32)
    assert batch.shared.responses[0, 0, : 23 - sampled].tolist() == other


def test_types_are_those_that_the_update_is_compiled_for():
    kinds = {name: values.dtype for name, values in batch_of()._asdict().items() if name != "shared"}
    assert kinds == {
        "prompts": np.int32,
        "prompt_lengths": np.int32,
        "responses": np.int32,
        "response_lengths": np.int32,
        "modes": np.int32,
        "truncated": np.bool_,
        "rewards": np.float32,
        "graded": np.bool_,
        "sampler_logprobs": np.float32,
    }


def test_a_failed_grade_is_masked_and_a_zero_is_not():
    batch = batch_of(rewards=[[None, None], [0.0, 0.0]])
    assert batch.graded.tolist() == [[False, False], [True, True]]
    assert batch.rewards.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("longest", "limit", "width"), [(4, 100, 16), (16, 100, 16), (17, 100, 32), (33, 100, 64), (70, 100, 100)]
)
def test_widths_are_few(longest, limit, width):
    rollouts = [[rollout(range(longest)), rollout([1])], ROLLOUTS[1]]
    prompts = [(list(range(longest)), [1]), ([2], [3])]
    batch = batch_of(rollouts=rollouts, prompts=prompts, max_prompt_tokens=limit, max_new_tokens=limit)
    assert batch.responses.shape == batch.sampler_logprobs.shape == (2, 2, width)
    assert batch.prompts.shape == (2, 2, width)
    assert batch.response_lengths[0].tolist() == [longest, 1]
    assert batch.responses[0, 0, :longest].tolist() == list(range(longest))
    assert batch.prompts[0, 0, width - longest :].tolist() == list(range(longest))
