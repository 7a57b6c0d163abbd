"""Everything that training changes and a checkpoint keeps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import replicated
from policy_split_jax.objective.eta import EtaState, init_eta


class TrainState(NamedTuple):
    """Parameters, optimizer, step, randomness and the η controller."""

    params: qwen3.Params
    opt_state: optax.OptState
    step: Int[Array, ""]
    key: Key[Array, ""]
    """The run's key; a step's randomness is `fold_in(key, step)`."""
    eta: EtaState


def state_shardings(config: qwen3.Qwen3Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where a state lies: the optimizer's moments as their parameters, everything else on every device.

    Raises ValueError where the mesh does not divide the model.
    """
    params = qwen3.param_shardings(config, mesh)
    whole: Any = replicated(mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, qwen3.abstract_params(config)),
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(params, moments, step=whole, key=whole, eta=EtaState(*[whole] * len(EtaState._fields)))


def init_state(params: qwen3.Params, optimizer: optax.GradientTransformation, seed: int, eta: float) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jax.random.key(seed), init_eta(eta))
