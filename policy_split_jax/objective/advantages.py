"""Dual-mode advantages: the correctness of a rollout, and the high-entropy mode's bonus for each token.

Equations 1–4 of Policy Split (https://arxiv.org/abs/2604.11510). Pure functions of arrays.
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import lax, vmap
from jaxtyping import Array, Bool, Float, Int

from policy_split_jax import masked
from policy_split_jax.modes import HIGH_ENTROPY, NORMAL

_EPS = 1e-6


@dataclass(frozen=True)
class AdvantageConfig:
    """Settings of the dual-mode advantages; the defaults are the paper's."""

    alpha: float = 0.5
    """Weight of the entropy part of the bonus against the divergence from the normal mode, 0 to 1."""
    eta: float | Float[Array, ""] = 0.03
    """Size of the high-entropy mode's bonus; a traced scalar where a schedule moves it."""
    eta_normal: float = 0.0
    """Size of the normal mode's own bonus, *added*; the paper's ablation η′, of either sign."""
    kappa: float = 2.0
    """The bonus is clamped to |A|/kappa; at least 1, or 0 for no clamp."""
    normalize: Literal["zscore", "range", "none"] = "zscore"
    """How a group's bonus is normalised: by its deviation, by its extent, or not at all."""
    norm_by_std: bool = True
    """Divide the correctness advantage by the group's standard deviation; false is Dr. GRPO."""
    low_quantile: float = 0.0
    """Tokens whose raw bonus lies below this quantile of their group get none."""
    only_uniform_groups: bool = False
    """Give the bonus only to groups whose rewards are all equal; acts with kappa = 0."""
    clamp: Literal["bonus", "scaled_bonus"] = "bonus"
    """Clamp B and then scale by eta (paper), or clamp eta·B (released code)."""
    bonus_repeats: int = 1
    """How often the bonus is added; 2 in the released code."""
    surprise: Literal["neg_logprob", "entropy"] = "neg_logprob"
    """What the bonus is made of: −log p of the sampled token, or the entropy of the whole distribution."""

    def __post_init__(self) -> None:
        checks = {
            "alpha must lie in [0, 1]": 0 <= self.alpha <= 1,
            "eta must be a finite number, at least 0": not isinstance(self.eta, int | float)
            or (math.isfinite(self.eta) and self.eta >= 0),
            "eta_normal must be finite": math.isfinite(self.eta_normal),
            "kappa must be at least 1, or 0 for no clamp": self.kappa == 0 or self.kappa >= 1,
            "normalize must be zscore, range or none": self.normalize in ("zscore", "range", "none"),
            "low_quantile must lie in [0, 1)": 0 <= self.low_quantile < 1,
            "clamp must be bonus or scaled_bonus": self.clamp in ("bonus", "scaled_bonus"),
            "bonus_repeats must be at least 1": self.bonus_repeats >= 1,
            "surprise must be neg_logprob or entropy": self.surprise in ("neg_logprob", "entropy"),
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(f"AdvantageConfig: {message}")


def correctness_advantages(
    rewards: Float[Array, "P G"], valid: Bool[Array, "P G"], norm_by_std: bool = True
) -> Float[Array, "P G"]:
    """A = (r − mean(r)) / (std(r) + ε) over a question's graded rollouts (equation 1).

    The standard deviation is unbiased. A group of one has mean 0 and deviation 1, so that A = r there.
    """
    alone = masked.count(valid, axis=1, keepdims=True) == 1
    center = jnp.where(alone, 0.0, masked.mean(rewards, valid, axis=1, keepdims=True))
    scale = jnp.where(alone, 1.0, masked.std(rewards, valid, axis=1, keepdims=True))
    centred = masked.where(valid, rewards - center)
    # Rewards that are all equal leave rounding errors of the mean, which 1/ε would magnify.
    centred = jnp.where(masked.extent(rewards, valid, axis=1, keepdims=True) > 0, centred, centred * alone)
    return centred / (scale + _EPS) if norm_by_std else centred


def importance_weights(
    logprobs: Float[Array, "2 P G T"], modes: Int[Array, "P G"], cap: float
) -> Float[Array, "2 P G T"]:
    """min(π_m(o_t) / π_sampled(o_t), cap) of each token under each training mode m, of the mode that sampled it.

    Truncated importance sampling (https://arxiv.org/abs/1802.01561, equation 1), token by token: 1 where a mode
    trains on its own rollouts. The paper has no such correction.
    """
    high_entropy = (modes == HIGH_ENTROPY)[..., None]
    sampled = jnp.where(high_entropy, logprobs[HIGH_ENTROPY], logprobs[NORMAL])
    return jnp.exp(jnp.minimum(logprobs - sampled, math.log(cap)))


def raw_bonus(own: Float[Array, "..."], other: Float[Array, "..."], alpha: float) -> Float[Array, "..."]:
    """b = −α·logp_own − (1−α)·logp_other of each sampled token (equation 2)."""
    return -alpha * own - (1 - alpha) * other


def normalized_bonus(bonus: Float[Array, "P G T"], mask: Bool[Array, "P G T"], normalize: str) -> Float[Array, "P G T"]:
    """B: the bonus against all response tokens of all rollouts of its question (equation 3).

    A group of a single token has no deviation: its B is 0.
    """
    if normalize == "none":
        return masked.where(mask, bonus)
    axes = (1, 2)
    deviation = masked.where(mask, bonus - masked.mean(bonus, mask, axes, keepdims=True))
    scale = (masked.std if normalize == "zscore" else masked.extent)(bonus, mask, axes, keepdims=True)
    # A group whose tokens are all alike gets no bonus, rather than rounding errors over ε.
    spread = masked.extent(bonus, mask, axes, keepdims=True) > 0
    return jnp.where(spread, deviation / (scale + _EPS), 0.0)


def _clamped(
    bonus: Float[Array, "P G T"],
    advantage: Float[Array, "P G 1"],
    eta: float | Float[Array, ""],
    config: AdvantageConfig,
) -> Float[Array, "P G T"]:
    """η·clip(B, ±|A|/κ), or clip(η·B, ±|A|/κ) (equation 4)."""
    if config.kappa == 0:
        return eta * bonus
    limit = jnp.abs(advantage) / config.kappa
    if config.clamp == "bonus":
        return eta * jnp.clip(bonus, -limit, limit)
    return jnp.clip(eta * bonus, -limit, limit)


def _keep(
    bonus: Float[Array, "P G T"],
    rewards: Float[Array, "P G"],
    valid: Bool[Array, "P G"],
    mask: Bool[Array, "P G T"],
    config: AdvantageConfig,
) -> Bool[Array, "P G T"]:
    """The tokens that may get a bonus at all."""
    keep = mask
    if config.low_quantile > 0:
        flat = (bonus.shape[0], -1)
        threshold = vmap(lambda values, on: masked.quantile(values, on, config.low_quantile))(
            bonus.reshape(flat), mask.reshape(flat)
        )
        keep = keep & (bonus >= threshold[:, None, None])
    if config.only_uniform_groups:
        uniform = masked.extent(rewards, valid, axis=1) == 0
        keep = keep & uniform[:, None, None]
    return keep


def dual_mode_advantages(
    logprobs: Float[Array, "2 P G T"],
    rewards: Float[Array, "P G"],
    mask: Bool[Array, "*#modes P G T"],
    config: AdvantageConfig,
    valid: Bool[Array, "*#modes P G"] | None = None,
) -> Float[Array, "2 P G T"]:
    """Advantages of every rollout's tokens for both training modes (equations 1–4).

    P questions, G rollouts each, T response tokens; the leading axis is the training mode, 0 normal and
    1 high-entropy.

    Args:
        logprobs: log-probabilities of every rollout under both modes at the time of sampling (nats), or with
            `surprise` "entropy" the negative entropies.
        rewards: what the grader gave; the two modes see the same rewards.
        mask: true at sampled tokens, the stop token included; of each mode where the modes differ.
        config: settings.
        valid: rollouts that count, of each mode where the modes differ; the others get 0. All, when None.

    Returns:
        Advantages, 0 at masked positions; they carry no gradient.
    """
    every = jnp.broadcast_to(True if valid is None else valid, logprobs.shape[:3])
    # The bonus of a rollout that one mode leaves out still needs both modes' log-probabilities.
    seen = mask & jnp.any(every, axis=0)[..., None]
    logprobs = masked.where(seen, lax.stop_gradient(logprobs))
    mask = jnp.broadcast_to(mask & every[..., None], logprobs.shape)

    def advantages(own: int, other: int, eta: float | Float[Array, ""]) -> Float[Array, "P G T"]:
        correctness = correctness_advantages(rewards, every[own], config.norm_by_std)[:, :, None]
        bonus = raw_bonus(logprobs[own], logprobs[other], config.alpha)
        keep = _keep(bonus, rewards, every[own], mask[own], config)
        extra = _clamped(normalized_bonus(bonus, mask[own], config.normalize), correctness, eta, config)
        return masked.where(mask[own], correctness + config.bonus_repeats * masked.where(keep, extra))

    return jnp.stack(
        [
            advantages(NORMAL, HIGH_ENTROPY, config.eta_normal),
            advantages(HIGH_ENTROPY, NORMAL, config.eta),
        ]
    )
