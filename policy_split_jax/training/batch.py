"""The rollouts of one step, as the update reads them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.objective.scorer import Places
from policy_split_jax.training.accumulate import Microbatches


class SharedView(NamedTuple):
    """What a mode trains on of the rollouts that the other mode sampled; arrays begin with P."""

    prompts: Int[Array, "P 2 S"]
    """By the mode that is trained."""
    prompt_lengths: Int[Array, "P 2"]
    responses: Int[Array, "P G T"]
    response_lengths: Int[Array, "P G"]


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
    shared: SharedView | None = None
    """Only where shared rollouts are not trained on as they were sampled, under the prompts above."""


def token_mask(batch: Batch) -> Bool[Array, "P G T"]:
    """The sampled tokens of graded rollouts."""
    filled = jnp.arange(batch.responses.shape[-1]) < batch.response_lengths[..., None]
    return filled & batch.graded[..., None]


def training_mask(batch: Batch) -> Bool[Array, "#M P G T"]:
    """The tokens that each mode trains on; one row where those are the same for all modes."""
    own = token_mask(batch)
    if batch.shared is None:
        return own[None]
    return jnp.where(own_rollouts(batch), own, token_mask(batch._replace(**batch.shared._asdict())))


def own_rollouts(batch: Batch) -> Bool[Array, "2 P G 1"]:
    """Which rollouts each mode sampled itself."""
    return (batch.modes == jnp.array([NORMAL, HIGH_ENTROPY])[:, None, None])[..., None]


class Packing(NamedTuple):
    """How a batch is packed into rows without padding between; a leading axis [U] has one entry an update."""

    microbatches: Microbatches
    """Indices among the questions of the update."""
    places: Places
    """Of every rollout in its microbatch's rows."""
