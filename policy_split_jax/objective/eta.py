"""The size of the high-entropy bonus over training: constant, or steered towards a target divergence.

The split feeds itself: the further the modes lie apart, the larger the bonus that parts them. With a
constant η the divergence first does nothing and then runs away. `target_kl` measures KL(HE ‖ normal) each
step and moves η so that it settles (docs/decisions.md).
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

_SMALLEST_KL = 1e-6
_ERROR_RANGE = (-3.0, 2.0)


@dataclass(frozen=True)
class EtaConfig:
    """How η moves; it starts at `advantage.eta`."""

    schedule: Literal["constant", "target_kl"] = "constant"
    target_kl: float = 0.2
    """KL(HE ‖ normal) to hold, nats per token."""
    gain: float = 0.02
    """Change of η a step for each unit of log(target / measured), as a share of `largest`."""
    damping: float = 0.5
    """Change of η against each unit by which log(measured) moved since the last step, as a share of `largest`."""
    smoothing: float = 0.5
    """Weight of the past in the running mean of the measured divergence."""
    smallest: float = 0.0
    """η never falls below this: with none at all the high-entropy mode sharpens like the normal one."""
    largest: float = 1.0
    """η never rises above this."""

    def __post_init__(self) -> None:
        checks = {
            "schedule must be constant or target_kl": self.schedule in ("constant", "target_kl"),
            "target_kl must be above 0": self.target_kl > 0,
            "gain must be above 0": self.gain > 0,
            "damping must be at least 0": self.damping >= 0,
            "smoothing must lie in [0, 1)": 0 <= self.smoothing < 1,
            "largest must be above 0": self.largest > 0,
            "smallest must be at least 0 and at most largest": 0 <= self.smallest <= self.largest,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(f"EtaConfig: {message}")


class EtaState(NamedTuple):
    """The controller's memory; part of the checkpoint."""

    eta: Float[Array, ""]
    kl: Float[Array, ""]
    """Running mean of the measured divergence (nats per token); negative before the first step."""
    limit: Float[Array, ""]
    """η never rises above this either; infinite until `lowered`."""


def init_eta(eta: float) -> EtaState:
    """Starts at the configured η, with nothing measured."""
    return EtaState(jnp.float32(eta), jnp.float32(-1.0), jnp.float32(jnp.inf))


def lowered(state: EtaState) -> EtaState:
    """Half of η, for good: what the modes did at the old one was too much."""
    half = state.eta / 2
    # Two arrays: an update is given both to keep.
    return state._replace(eta=half, limit=jnp.copy(half))


def next_eta(state: EtaState, measured: Float[Array, ""], config: EtaConfig) -> EtaState:
    """η after a step that measured KL(HE ‖ normal) = `measured` nats per token.

    A proportional-integral controller in velocity form on the error log(target / KL): the integral part closes
    the error, the damping part answers how fast the divergence moves, and since η itself is the state and is
    kept within its bounds, nothing winds up while it sits at one of them. The error is clipped, more tightly
    where the divergence is small: there its logarithm is mostly noise.
    """
    first = state.kl < 0
    kl = jnp.where(first, measured, config.smoothing * state.kl + (1 - config.smoothing) * measured)
    if config.schedule == "constant":
        return state._replace(kl=kl)
    error = _error(kl, config.target_kl)
    change = jnp.where(first, 0.0, error - _error(state.kl, config.target_kl))
    eta = state.eta + config.largest * (config.gain * error + config.damping * change)
    eta = jnp.minimum(jnp.clip(eta, config.smallest, config.largest), state.limit)
    return EtaState(eta, kl, state.limit)


def _error(kl: Float[Array, ""], target: float) -> Float[Array, ""]:
    return jnp.clip(jnp.log(target / jnp.maximum(kl, _SMALLEST_KL)), *_ERROR_RANGE)
