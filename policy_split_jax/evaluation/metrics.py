"""What an evaluation counts, as functions of NumPy arrays: Q questions, n samples of each.

Everywhere `correct` holds 1 (or True) for a right sample, 0 (or False) for a wrong one and NaN where the
grader failed. A failed grade counts nowhere: not as wrong, and not as a sample. So questions may have
different numbers of graded samples, and padding with NaN is how to pass ragged data.

Each metric comes twice: `*_per_question` gives one value a question, NaN where the question is left out
(what `bootstrap_interval` and `left_out` want), and the plain name gives the mean over the questions that
count, NaN where none does. To measure both modes together, concatenate their samples on the second axis.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

Grades: TypeAlias = Bool[np.ndarray, "Q n"] | Float[np.ndarray, "Q n"]
OtherGrades: TypeAlias = Bool[np.ndarray, "Q m"] | Float[np.ndarray, "Q m"]


def mean_over_questions(values: Float[np.ndarray, "Q"]) -> float:
    """Mean of the questions that count (not NaN); NaN where none does."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if counted.size else math.nan


def left_out(values: Float[np.ndarray, "Q"]) -> int:
    """How many questions a `*_per_question` metric left out."""
    return int(np.isnan(values).sum())


def average_at_k_per_question(correct: Grades) -> Float[np.ndarray, "Q"]:
    """Share of right samples among the graded ones; a question with none graded is left out."""
    return _mean_of_graded(_as_float(correct))


def average_at_k(correct: Grades) -> float:
    """Mean accuracy of the samples, each question weighing the same (avg@k: arXiv 2604.11510 has k = 8)."""
    return mean_over_questions(average_at_k_per_question(correct))


def pass_at_k_per_question(correct: Grades, k: int) -> Float[np.ndarray, "Q"]:
    """Chance that k of the n graded samples hold one of the c right ones: 1 − C(n−c, k)/C(n, k).

    Unbiased for any n ≥ k (Chen et al. 2021, https://arxiv.org/abs/2107.03374, equation 1). With fewer than
    k graded samples there is no unbiased estimate, so such a question is left out; `left_out` counts them.
    """
    return 1.0 - _miss(correct, k)


def pass_at_k(correct: Grades, k: int) -> float:
    """Unbiased pass@k, mean over the questions with at least k graded samples."""
    return mean_over_questions(pass_at_k_per_question(correct, k))


def pass_at_k_split_per_question(normal: Grades, high_entropy: OtherGrades, k: int) -> Float[np.ndarray, "Q"]:
    """Chance that k/2 samples of each mode hold a right one: one mode's pass@k at equal cost.

    The draws are independent, so the chance of a miss is the product of the modes' (each as in Chen et al.
    2021). A question with fewer than k/2 graded samples in either mode is left out. `k` must be even.
    """
    if k % 2:
        raise ValueError(f"k = {k} cannot be split evenly between two modes; give an even k")
    return 1.0 - _miss(normal, k // 2) * _miss(high_entropy, k // 2)


def pass_at_k_split(normal: Grades, high_entropy: OtherGrades, k: int) -> float:
    """pass@k with k/2 samples of each mode, mean over questions (see `pass_at_k_split_per_question`)."""
    return mean_over_questions(pass_at_k_split_per_question(normal, high_entropy, k))


def majority_at_k_per_question(
    canonical: Sequence[Sequence[Hashable | None]], correct: Grades
) -> Float[np.ndarray, "Q"]:
    """Expected accuracy of the most frequent answer (self-consistency, Wang et al. 2023, arXiv 2203.11171).

    `canonical` names each sample's answer by any hashable key; equal keys are one answer. None casts no
    vote, and neither does a failed grade. Ties are broken uniformly at random in expectation: m tied
    answers share the question. Should samples of one answer be graded differently, the answer counts with
    their mean. A question where nobody votes scores 0; one with no graded sample is left out.

    Where a task gives None to every wrong answer, wrong answers never vote, and the result is merely
    "solved at least once": such a task has no meaningful majority vote.
    """
    rows = zip(_as_float(correct), _matching(canonical, correct), strict=True)
    return np.array([_plurality(answers, row) for row, answers in rows], dtype=np.float64)


def majority_at_k(canonical: Sequence[Sequence[Hashable | None]], correct: Grades) -> float:
    """maj@k, mean over questions (see `majority_at_k_per_question`)."""
    return mean_over_questions(majority_at_k_per_question(canonical, correct))


def mean_reward(rewards: Float[np.ndarray, "Q n"]) -> float:
    """Mean reward of the graded samples, which may be any number, each question weighing the same."""
    return mean_over_questions(_mean_of_graded(rewards))


def best_of_k_per_question(rewards: Float[np.ndarray, "Q n"]) -> Float[np.ndarray, "Q"]:
    """Highest reward of each question; NaN counts nowhere, a question of only NaN is left out."""
    highest = np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1, initial=-np.inf)
    return np.where(np.isneginf(highest), np.nan, highest).astype(np.float64)


def best_of_k(rewards: Float[np.ndarray, "Q n"]) -> float:
    """Mean over questions of the highest reward (best-of-k with a perfect judge)."""
    return mean_over_questions(best_of_k_per_question(rewards))


def distinct_correct_per_question(
    canonical: Sequence[Sequence[Hashable | None]], correct: Grades
) -> Float[np.ndarray, "Q"]:
    """Number of different right answers found; a right sample without a canonical form (None) is not counted.

    A question with no graded sample is left out; one with only wrong answers counts 0.
    """
    rows = zip(_as_float(correct), _matching(canonical, correct), strict=True)
    return np.array([_distinct(answers, row) for row, answers in rows], dtype=np.float64)


def distinct_correct(canonical: Sequence[Sequence[Hashable | None]], correct: Grades) -> float:
    """Mean over questions of the number of different right answers (see `distinct_correct_per_question`)."""
    return mean_over_questions(distinct_correct_per_question(canonical, correct))


def only_second_solved_per_question(first: Grades, second: OtherGrades) -> Float[np.ndarray, "Q"]:
    """1 where some sample of `second` is right and none of `first`; left out where one has no grade."""
    (graded_first, right_first), (graded_second, right_second) = _counts(first), _counts(second)
    only = (right_first == 0) & (right_second > 0)
    return np.where((graded_first > 0) & (graded_second > 0), only.astype(np.float64), np.nan)


def only_second_solved(first: Grades, second: OtherGrades) -> float:
    """Fraction of the questions that the second mode solved at least once and the first never."""
    return mean_over_questions(only_second_solved_per_question(first, second))


def bootstrap_interval(
    values: Float[np.ndarray, "Q"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over questions (Efron and Tibshirani 1993, chapter 13).

    Questions are drawn with replacement; NaN questions are left out first. (NaN, NaN) where no question
    counts.
    """
    return stratified_interval([values], None, level, draws, seed)


def stratified_interval(
    strata: Sequence[Float[np.ndarray, "_"]],
    weights: Sequence[Float[np.ndarray, "_"]] | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """`bootstrap_interval` of the mean over strata of their means: each stratum's questions are drawn by themselves.

    `weights` are those of the questions in their stratum's mean, all the same without. (NaN, NaN) where no question
    of some stratum counts.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level} is not between 0 and 1")
    if draws < 1:
        raise ValueError(f"draws = {draws} is not a positive number of resamples")
    weights = [np.ones_like(values) for values in strata] if weights is None else weights
    counted = [(values[~np.isnan(values)], own[~np.isnan(values)]) for values, own in zip(strata, weights, strict=True)]
    if not all(values.size for values, _ in counted):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)

    def drawn_mean(values: Float[np.ndarray, "_"], own: Float[np.ndarray, "_"]) -> float:
        places = rng.integers(values.size, size=values.size)
        return float(np.average(values[places], weights=own[places]))

    means = [[drawn_mean(*each) for each in counted] for _ in range(draws)]
    low, high = np.quantile(np.mean(means, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _as_float(correct: Grades) -> Float[np.ndarray, "Q n"]:
    values = correct.astype(np.float64)
    if not np.all(np.isnan(values) | (values == 0) | (values == 1)):
        raise ValueError("`correct` may hold 0, 1 and NaN only; compare rewards with a threshold first")
    return values


def _mean_of_graded(values: Float[np.ndarray, "Q n"]) -> Float[np.ndarray, "Q"]:
    graded = (~np.isnan(values)).sum(axis=1)
    return np.where(graded > 0, np.nansum(values, axis=1) / np.maximum(graded, 1), np.nan)


def _counts(correct: Grades) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:
    values = _as_float(correct)
    return (~np.isnan(values)).sum(axis=1), (values == 1).sum(axis=1)


def _miss(correct: Grades, k: int) -> Float[np.ndarray, "Q"]:
    """C(n−c, k)/C(n, k) of each question, exact in integers; NaN with fewer than k graded samples."""
    if k < 1:
        raise ValueError(f"k = {k} draws no sample; give k ≥ 1")
    pairs = zip(*(counts.tolist() for counts in _counts(correct)), strict=True)
    chances = [math.comb(n - c, k) / math.comb(n, k) if n >= k else math.nan for n, c in pairs]
    return np.array(chances, dtype=np.float64)


def _matching(
    canonical: Sequence[Sequence[Hashable | None]], correct: np.ndarray
) -> Sequence[Sequence[Hashable | None]]:
    questions, samples = correct.shape
    if len(canonical) != questions or any(len(answers) != samples for answers in canonical):
        raise ValueError(f"`canonical` must hold {questions} lists of {samples} answers, as `correct` does")
    return canonical


def _plurality(answers: Sequence[Hashable | None], correct: Float[np.ndarray, "n"]) -> float:
    grades = correct.tolist()
    if all(math.isnan(grade) for grade in grades):
        return math.nan
    ballots = [(a, g) for a, g in zip(answers, grades, strict=True) if a is not None and not math.isnan(g)]
    if not ballots:
        return 0.0
    votes = Counter(answer for answer, _ in ballots)
    most = max(votes.values())
    # Tied answers have `most` votes each, so the mean of their grades is the mean over all their ballots.
    elected = [grade for answer, grade in ballots if votes[answer] == most]
    return sum(elected) / len(elected)


def _distinct(answers: Sequence[Hashable | None], correct: Float[np.ndarray, "n"]) -> float:
    if np.isnan(correct).all():
        return math.nan
    grades = zip(answers, correct.tolist(), strict=True)
    return float(len({answer for answer, grade in grades if grade == 1 and answer is not None}))
