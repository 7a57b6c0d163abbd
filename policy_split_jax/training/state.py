"""Everything that training changes and a checkpoint keeps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from policy_split_jax.model import qwen3
from policy_split_jax.objective.eta import EtaState, init_eta


class TrainState(NamedTuple):
    """Parameters, optimizer, step, randomness and the η controller."""

    params: qwen3.Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    """The run's key; a step's randomness is `fold_in(key, step)`."""
    eta: EtaState


def init_state(params: qwen3.Params, optimizer: optax.GradientTransformation, seed: int, eta: float) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(seed), init_eta(eta))
