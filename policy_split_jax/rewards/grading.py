"""What is graded, what a grade is, and the one function that turns the first into the second."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from policy_split_jax.rewards import custom, exact

BUILT_IN = {
    "countdown": "policy_split_jax.rewards.countdown",
    "exact": "policy_split_jax.rewards.exact",
    "letter": "policy_split_jax.rewards.letter",
    "math": "policy_split_jax.rewards.maths",
    "prm800k": "policy_split_jax.rewards.prm800k",
    "released": "policy_split_jax.rewards.released",
    "walk": "policy_split_jax.rewards.walk",
}


@dataclass(frozen=True)
class GradeItem:
    """One response to grade; ground truth and extra information must be JSON-able."""

    response: str
    ground_truth: Any
    data_source: str = ""
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """The score, or the error that explains in one line why there is none.

    `answer` is what was answered, right or wrong, for votes and for counting solutions: equal for equal
    answers, None where the response holds none.
    """

    score: float | None
    answer: str | None = None
    error: str | None = None


def load_grader(reward: str) -> Callable[[GradeItem], Grade]:
    """A grader that never raises an Exception: what fails becomes a grade without a score.

    Raises:
        UserError: a custom reward that does not load.
    """
    if reward in BUILT_IN:
        return _built_in(import_module(BUILT_IN[reward]))
    return _custom(*custom.load(reward))


def _built_in(reward: Any) -> Callable[[GradeItem], Grade]:
    """`reward` is a module with `canonical`, the form of a right answer, and `answered`, that of any."""

    def grade(item: GradeItem) -> Grade:
        try:
            right = reward.canonical(item.response, item.ground_truth)
            return Grade(float(right is not None), right or reward.answered(item.response, item.ground_truth))
        except Exception as error:
            return Grade(None, error=custom.describe(error))

    return grade


def _custom(function: Callable[..., Any], source: str) -> Callable[[GradeItem], Grade]:
    def grade(item: GradeItem) -> Grade:
        values = (item.data_source, item.response, item.ground_truth, item.extra_info)
        try:
            result = function(**dict(zip(custom.ARGUMENTS, values, strict=True)))
        except (Exception, SystemExit) as error:
            return Grade(None, error=custom.describe(error, source))
        try:
            return Grade(custom.checked_score(result), exact.answered(item.response, ""))
        except ValueError as error:
            return Grade(None, error=f"{error} ({custom.place(function, source)})")

    return grade
