"""From the sampler's rollouts to the batch that the update reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from policy_split_jax.padding import bucket, lengths, pad_left, pad_right
from policy_split_jax.sampler.batcher import Rollout
from policy_split_jax.training.batch import Batch


def make_batch(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    rollouts: Sequence[Sequence[Rollout]],
    modes: Sequence[Sequence[int]],
    rewards: Sequence[Sequence[float | None]],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> Batch:
    """Pads and stacks one step; the lists run over questions, then over a question's rollouts.

    A reward of None says that grading failed. Widths are buckets, so that few shapes are ever compiled.
    """
    width = bucket(max(len(tokens) for pair in prompts for tokens in pair), max_prompt_tokens)
    length = bucket(max(len(rollout.tokens) for group in rollouts for rollout in group), max_new_tokens)
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
    return Batch(**arrays)
