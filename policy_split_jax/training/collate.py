"""From the sampler's rollouts to the batch that the update reads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from policy_split_jax.padding import TokenRow, bucket, lengths, pad_left, pad_right
from policy_split_jax.sampler.batcher import Rollout
from policy_split_jax.training.batch import Batch, SharedView


class SharedGroup(NamedTuple):
    """What a question's modes train on of each other's rollouts, where that is not what was sampled."""

    prompts: Sequence[Sequence[int]]
    """By mode."""
    responses: Sequence[TokenRow]


def make_batch(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    rollouts: Sequence[Sequence[Rollout]],
    modes: Sequence[Sequence[int]],
    rewards: Sequence[Sequence[float | None]],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    shared: Sequence[SharedGroup] | None = None,
) -> Batch:
    """Pads and stacks one step; the lists run over questions, then over a question's rollouts.

    A reward of None says that grading failed. Widths are buckets, so that few shapes are ever compiled.
    """
    pairs = [*prompts, *(group.prompts for group in shared or ())]
    rows = [rollout.tokens for group in rollouts for rollout in group]
    rows += [tokens for group in shared or () for tokens in group.responses]
    width = bucket(max(len(tokens) for pair in pairs for tokens in pair), max_prompt_tokens)
    length = bucket(max(map(len, rows)), max_new_tokens)
    graded = np.array([[reward is not None for reward in group] for group in rewards])
    values = [[0.0 if reward is None else reward for reward in group] for group in rewards]
    logprobs = np.zeros((len(rollouts), len(rollouts[0]), length), np.float32)
    for at, group in enumerate(rollouts):
        for index, rollout in enumerate(group):
            logprobs[at, index, : len(rollout.logprobs)] = rollout.logprobs
    # Arrays of the host: the update puts them on whatever devices it runs on.
    arrays: dict[str, Any] = {
        "prompts": np.stack([pad_left(pair, width) for pair in prompts]),
        "prompt_lengths": np.stack([lengths(pair) for pair in prompts]),
        "responses": np.stack([pad_right([rollout.tokens for rollout in group], length) for group in rollouts]),
        "response_lengths": np.stack([lengths([rollout.tokens for rollout in group]) for group in rollouts]),
        "modes": np.array(modes, np.int32),
        "truncated": np.array([[rollout.finish_reason == "length" for rollout in group] for group in rollouts]),
        "rewards": np.array(values, np.float32),
        "graded": graded,
        "sampler_logprobs": logprobs,
    }
    return Batch(**arrays, shared=None if shared is None else _shared_view(shared, width, length))


def _shared_view(shared: Sequence[SharedGroup], width: int, length: int) -> SharedView:
    arrays: Any = (
        np.stack([pad_left(group.prompts, width) for group in shared]),
        np.stack([lengths(group.prompts) for group in shared]),
        np.stack([pad_right(group.responses, length) for group in shared]),
        np.stack([lengths(group.responses) for group in shared]),
    )
    return SharedView(*arrays)
