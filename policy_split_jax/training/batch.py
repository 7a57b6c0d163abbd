"""The rollouts of one step, as the update reads them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from policy_split_jax.padding import bucket, lengths, pad_left, pad_right
from policy_split_jax.sampler.rollout import Rollout


class Batch(NamedTuple):
    """P questions, G rollouts of each from both modes, T response tokens; every array begins with P.

    Every rollout is paired with both prompts of its question by token ids, as they were sampled. Which mode
    sampled it is the column `modes`: nothing depends on the order of a question's rollouts.
    """

    prompts: Int[Array, "P 2 S"] | Int[np.ndarray, "P 2 S"]
    """The question's prompt in each mode, padded on the left."""
    prompt_lengths: Int[Array, "P 2"] | Int[np.ndarray, "P 2"]
    responses: Int[Array, "P G T"] | Int[np.ndarray, "P G T"]
    """Sampled tokens, the stop token included; padded on the right."""
    response_lengths: Int[Array, "P G"] | Int[np.ndarray, "P G"]
    modes: Int[Array, "P G"] | Int[np.ndarray, "P G"]
    """The mode that sampled each rollout."""
    truncated: Bool[Array, "P G"] | Bool[np.ndarray, "P G"]
    """Ended by the length limit, not by a stop token."""
    rewards: Float[Array, "P G"] | Float[np.ndarray, "P G"]
    graded: Bool[Array, "P G"] | Bool[np.ndarray, "P G"]
    """False where the grader failed: such a rollout counts nowhere."""
    sampler_logprobs: Float[Array, "P G T"] | Float[np.ndarray, "P G T"]
    """What the sampler computed while sampling (nats)."""


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
    return Batch(
        prompts=np.stack([pad_left(pair, width) for pair in prompts]),
        prompt_lengths=np.stack([lengths(pair) for pair in prompts]),
        responses=np.stack([pad_right([rollout.tokens for rollout in group], length) for group in rollouts]),
        response_lengths=np.stack([lengths([rollout.tokens for rollout in group]) for group in rollouts]),
        modes=np.array(modes, np.int32),
        truncated=np.array([[rollout.finish_reason == "length" for rollout in group] for group in rollouts]),
        rewards=np.array(values, np.float32),
        graded=graded,
        sampler_logprobs=logprobs,
    )
