"""Supervised warm-up of the embedded model: cross-entropy on solutions, with and without the HE prompt."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from policy_split_jax import masked
from policy_split_jax.model import qwen3
from policy_split_jax.objective.losses import token_weights
from policy_split_jax.objective.scorer import score_rollouts
from policy_split_jax.training.accumulate import accumulate_gradients, equal_parts


class SftBatch(NamedTuple):
    """Questions and the responses to learn; one prompt and one response each."""

    prompts: Int[Array, "B 1 S"]
    prompt_lengths: Int[Array, "B 1"]
    responses: Int[Array, "B 1 T"]
    response_lengths: Int[Array, "B 1"]


class SftState(NamedTuple):
    """What an update changes."""

    params: Any
    opt_state: optax.OptState


SftUpdate = Callable[[SftState, SftBatch], tuple[SftState, Float[Array, ""]]]


def make_sft_update(
    config: qwen3.Qwen3Config, optimizer: optax.GradientTransformation, microbatches: int = 1
) -> SftUpdate:
    """A jitted `update(state, batch) -> (state, mean cross-entropy in nats per token)`; the state is donated."""

    def loss(params: qwen3.Params, weighted: tuple[SftBatch, Array]) -> tuple[Float[Array, ""], None]:
        batch, weights = weighted
        scores = score_rollouts(params, *batch, config=config)
        return -masked.total(scores.logprobs[0] * weights, weights > 0), None

    @partial(jax.jit, donate_argnums=0)
    def update(state: SftState, batch: SftBatch) -> tuple[SftState, Float[Array, ""]]:
        mask = jnp.arange(batch.responses.shape[-1]) < batch.response_lengths[..., None]
        weighted = (batch, token_weights(mask, "token_mean"))
        (value, _), gradient = accumulate_gradients(
            loss, state.params, weighted, equal_parts(mask.shape[0], microbatches), lambda *_: None
        )
        changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return SftState(optax.apply_updates(state.params, changes), opt_state), value

    return update
