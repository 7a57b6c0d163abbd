"""Graders: from a model's response to a reward, and never from a grader's own failure to a zero."""

from policy_split_jax.rewards.grading import Grade, GradeItem
from policy_split_jax.rewards.pool import GraderPool

__all__ = ["Grade", "GradeItem", "GraderPool"]
