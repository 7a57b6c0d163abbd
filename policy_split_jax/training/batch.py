"""The rollouts of one step, as the update reads them."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from policy_split_jax.objective.scorer import Places
from policy_split_jax.training.accumulate import Microbatches


class Batch(NamedTuple):
    """P questions, G rollouts of each from both modes, T response tokens; every array begins with P.

    Every rollout is paired with both prompts of its question by token ids, as they were sampled. Which mode
    sampled it is the column `modes`: nothing depends on the order of a question's rollouts.
    """

    prompts: Int[Array, "P 2 S"]
    """The question's prompt in each mode, padded on the left."""
    prompt_lengths: Int[Array, "P 2"]
    responses: Int[Array, "P G T"]
    """Sampled tokens, the stop token included; padded on the right."""
    response_lengths: Int[Array, "P G"]
    modes: Int[Array, "P G"]
    """The mode that sampled each rollout."""
    truncated: Bool[Array, "P G"]
    """Ended by the length limit, not by a stop token."""
    rewards: Float[Array, "P G"]
    graded: Bool[Array, "P G"]
    """False where the grader failed: such a rollout counts nowhere."""
    sampler_logprobs: Float[Array, "P G T"]
    """What the sampler computed while sampling (nats)."""


class Packing(NamedTuple):
    """How a batch is packed into rows without padding between; a leading axis [U] has one entry an update."""

    microbatches: Microbatches
    """Indices among the questions of the update."""
    places: Places
    """Of every rollout in its microbatch's rows."""
