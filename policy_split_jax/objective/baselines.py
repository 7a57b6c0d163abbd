"""The methods that the paper compares with. Each is GRPO on rollouts of the normal mode, with one change.

GRPO itself (https://arxiv.org/abs/2402.03300) is the advantage of `advantages.py` in the loss of `losses.py`; DAPO's
clip-higher (https://arxiv.org/abs/2503.14476) is GRPO with `clip_high` 0.28. Pure functions of arrays; entropies and
log-probabilities are in nats, of the policy at the time of sampling, and carry no gradient unless it says so.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from policy_split_jax import masked
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL

Objective = Literal[
    "policy_split",
    "grpo",
    "forking_tokens",
    "clip_cov",
    "kl_cov",
    "entropy_driven_advantage",
    "entropy_regularization",
    "entropy_advantage",
]
WHOLE_BATCH = ("forking_tokens", "clip_cov", "kl_cov")
"""They choose tokens out of a whole update's, which are therefore scored before any gradient."""
_EPS = 1e-6


def trained_modes(objective: Objective) -> tuple[int, ...]:
    """The modes that sample and train."""
    return (NORMAL, HIGH_ENTROPY) if objective == "policy_split" else (NORMAL,)


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}; it must be in (0, 1]")


def _not_negative(name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{name} is {value}; it must be at least 0")


@dataclass(frozen=True)
class ForkingTokens:
    """Training on the tokens of high entropy alone (https://arxiv.org/abs/2506.01939)."""

    share: float = 0.2
    """Of all tokens of an update, those of highest entropy."""

    def __post_init__(self) -> None:
        _share("share", self.share)


@dataclass(frozen=True)
class ClipCov:
    """No gradient from a few tokens whose covariance lies in a band (https://arxiv.org/abs/2505.22617)."""

    share: float = 2e-4
    """How many, of all tokens of an update; at least one."""
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        _share("share", self.share)
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}; it must be below high, which is {self.high}")


@dataclass(frozen=True)
class KlCov:
    """A penalty on the tokens of highest covariance in place of clipping (https://arxiv.org/abs/2505.22617)."""

    share: float = 2e-4
    """How many, of all tokens of an update; at least one."""
    coefficient: float = 1.0
    """Of |log ρ|."""

    def __post_init__(self) -> None:
        _share("share", self.share)
        _not_negative("coefficient", self.coefficient)


@dataclass(frozen=True)
class EntropyRegularization:
    """The exact entropy of every token, rewarded in the loss."""

    coefficient: float = 0.003

    def __post_init__(self) -> None:
        _not_negative("coefficient", self.coefficient)


@dataclass(frozen=True)
class EntropyAdvantage:
    """A bonus of entropy in the advantage (https://arxiv.org/abs/2506.14758)."""

    alpha: float = 0.4
    kappa: float = 2.0

    def __post_init__(self) -> None:
        _not_negative("alpha", self.alpha)
        if self.kappa < 1:
            raise ValueError(f"kappa is {self.kappa}; it must be at least 1")


@dataclass(frozen=True)
class BaselineConfig:
    """Settings of the methods that have some; the defaults are those of the paper's comparison."""

    forking_tokens: ForkingTokens = field(default_factory=ForkingTokens)
    clip_cov: ClipCov = field(default_factory=ClipCov)
    kl_cov: KlCov = field(default_factory=KlCov)
    entropy_regularization: EntropyRegularization = field(default_factory=EntropyRegularization)
    entropy_advantage: EntropyAdvantage = field(default_factory=EntropyAdvantage)


class Terms(NamedTuple):
    """What an objective makes of an update's tokens before there is any gradient."""

    advantages: Float[Array, "*B"]
    kept: Bool[Array, "*B"] | None = None
    """Tokens that have a gradient; None for all."""
    penalised: Bool[Array, "*B"] | None = None
    """Tokens that pay for moving; None for none."""


def baseline_terms(
    objective: Objective,
    outcome: Float[Array, "P G"],
    logprobs: Float[Array, "P G T"],
    entropy: Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    config: BaselineConfig,
    key: Key[Array, ""],
) -> Terms:
    """The terms of one of the baselines; `outcome` is the correctness advantage of each rollout."""
    if objective == "entropy_driven_advantage":
        outcome = entropy_driven_advantage(outcome, entropy, mask)
    advantages = masked.where(mask, jnp.broadcast_to(outcome[..., None], mask.shape))
    if objective == "entropy_advantage":
        advantages = masked.where(mask, entropy_advantage(advantages, entropy, config.entropy_advantage))
    if objective == "forking_tokens":
        return Terms(advantages, kept=forking_tokens(entropy, mask, config.forking_tokens))
    if objective == "clip_cov":
        noise = selection_noise(key, mask.shape)
        return Terms(advantages, kept=clip_cov(logprobs, advantages, mask, config.clip_cov, noise))
    if objective == "kl_cov":
        return Terms(advantages, penalised=kl_cov(logprobs, advantages, mask, config.kl_cov))
    return Terms(advantages)


def forking_tokens(entropy: Float[Array, "*B"], mask: Bool[Array, "*B"], config: ForkingTokens) -> Bool[Array, "*B"]:
    """The tokens that are trained on: H ≥ the (1 − share)-quantile of H over all tokens (equation 5 there)."""
    threshold = masked.quantile(entropy.reshape(-1), mask.reshape(-1), 1 - config.share)
    return mask & (entropy >= threshold)


def covariance(
    logprobs: Float[Array, "*B"], advantages: Float[Array, "*B"], mask: Bool[Array, "*B"]
) -> Float[Array, "*B"]:
    """(log p − mean log p)(A − mean A) of each token, means over all tokens (equation 10 of 2505.22617)."""
    return (logprobs - masked.mean(logprobs, mask)) * (advantages - masked.mean(advantages, mask))


def clip_cov(
    logprobs: Float[Array, "*B"],
    advantages: Float[Array, "*B"],
    mask: Bool[Array, "*B"],
    config: ClipCov,
    noise: Float[Array, "*B"],
) -> Bool[Array, "*B"]:
    """The tokens that keep their gradient: all but some, chosen by the least noise, whose covariance is in the band."""
    cov = covariance(logprobs, advantages, mask)
    band = mask & (cov > config.low) & (cov < config.high)
    return mask & ~_first(noise, band, _number(mask, config.share))


def kl_cov(
    logprobs: Float[Array, "*B"], advantages: Float[Array, "*B"], mask: Bool[Array, "*B"], config: KlCov
) -> Bool[Array, "*B"]:
    """The tokens that are penalised: those of highest covariance."""
    return _first(-covariance(logprobs, advantages, mask), mask, _number(mask, config.share))


def entropy_driven_advantage(
    advantages: Float[Array, "P G"], entropy: Float[Array, "P G T"], mask: Bool[Array, "P G T"]
) -> Float[Array, "P G"]:
    """A_i / (H_i / mean_j H_j), H_i the mean entropy of a response's tokens (EDGE-GRPO, https://arxiv.org/abs/2507.21848)."""
    own = masked.mean(entropy, mask, axis=-1)
    group = masked.mean(own, jnp.any(mask, axis=-1), axis=-1, keepdims=True)
    return advantages * group / (own + _EPS)


def entropy_advantage(
    advantages: Float[Array, "*B"], entropy: Float[Array, "*B"], config: EntropyAdvantage
) -> Float[Array, "*B"]:
    """A + min(α·H, |A|/κ)."""
    return advantages + jnp.minimum(config.alpha * entropy, jnp.abs(advantages) / config.kappa)


def selection_noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """What `clip_cov` chooses by: of each rollout a sequence of its own, whose length changes nothing before it."""
    *rollouts, length = shape
    keys = jax.random.split(key, math.prod(rollouts))
    return jax.vmap(lambda each: jax.random.uniform(each, (length,)))(keys).reshape(shape)


def _number(mask: Bool[Array, "*B"], share: float) -> Float[Array, ""]:
    """This share of the tokens, rounded down, but at least one."""
    return jnp.maximum(jnp.floor(share * masked.count(mask)), 1.0)


def _first(values: Float[Array, "*B"], among: Bool[Array, "*B"], number: Float[Array, ""]) -> Bool[Array, "*B"]:
    """The `number` smallest values; of equal ones those that come first."""
    order = jnp.argsort(masked.where(among, values, jnp.inf).reshape(-1))
    ranks = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    return among & (ranks.reshape(values.shape) < number)
