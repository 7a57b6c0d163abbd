"""A step's sequences one by one, in the order of the released trainer.

There the pairs (training mode, rollout) are four blocks, one behind another: normal rollouts under the normal mode,
high-entropy ones under theirs, high-entropy rollouts under the normal mode, normal ones under the high-entropy mode.
Updates take them unshuffled, so that each sees a part of the blocks only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from policy_split_jax.modes import HIGH_ENTROPY, NORMAL
from policy_split_jax.training.batch import Batch, own_rollouts, training_mask

QUARTERS = ((NORMAL, NORMAL), (HIGH_ENTROPY, HIGH_ENTROPY), (NORMAL, HIGH_ENTROPY), (HIGH_ENTROPY, NORMAL))
"""(mode that is trained, mode that sampled) of each block."""


class Sequences(NamedTuple):
    """Rollouts, each under one mode; arrays begin with N, and have an axis of one mode or rollout."""

    prompts: Int[Array, "N 1 S"]
    prompt_lengths: Int[Array, "N 1"]
    responses: Int[Array, "N 1 T"]
    response_lengths: Int[Array, "N 1"]
    modes: Int[Array, "N 1"]
    """The mode that is trained."""
    mask: Bool[Array, "N 1 T"]
    old_logprobs: Float[Array, "N 1 T"]
    advantages: Float[Array, "N 1 T"]


def in_quarters(batch: Batch, old_logprobs: Float[Array, "2 P G T"], advantages: Float[Array, "2 P G T"]) -> Sequences:
    """All 2·P·G sequences of a step, block by block, questions and their rollouts in their order within a block."""
    mine = own_rollouts(batch)
    view = batch if batch.shared is None else batch.shared
    groups = batch.modes.shape[1]

    def of_prompts(own: Array, other: Array) -> Array:
        """[P, 2, …] of own and of shared rollouts to [2, P, G, …]."""
        own, other = (jnp.repeat(jnp.moveaxis(part, 1, 0)[:, :, None], groups, axis=2) for part in (own, other))
        return jnp.where(mine.reshape(*mine.shape[:3], *[1] * (own.ndim - 3)), own, other)

    def of_responses(own: Array, other: Array) -> Array:
        return jnp.where(mine.reshape(*mine.shape[:3], *[1] * (own.ndim - 2)), own[None], other[None])

    each = Sequences(
        of_prompts(batch.prompts, view.prompts),
        of_prompts(batch.prompt_lengths, view.prompt_lengths),
        of_responses(batch.responses, view.responses),
        of_responses(batch.response_lengths, view.response_lengths),
        jnp.broadcast_to(jnp.arange(2)[:, None, None], mine.shape[:3]),
        jnp.broadcast_to(training_mask(batch), old_logprobs.shape),
        old_logprobs,
        advantages,
    )
    order = quarter_order(batch)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, 1, *leaf.shape[3:])[order], each)


def quarter_order(batch: Batch) -> Int[Array, "N"]:
    """Which of the sequences [2, P, G], counted through, come first."""
    number = jnp.array([[QUARTERS.index((trained, sampled)) for sampled in (0, 1)] for trained in (0, 1)])
    return jnp.argsort(number[:, batch.modes].reshape(-1), stable=True)
