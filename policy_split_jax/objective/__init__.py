"""Advantages, losses and the scorer of both modes."""

from policy_split_jax.objective.advantages import AdvantageConfig, dual_mode_advantages
from policy_split_jax.objective.losses import policy_loss

__all__ = ["AdvantageConfig", "dual_mode_advantages", "policy_loss"]
