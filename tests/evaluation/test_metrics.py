"""Oracles: enumeration of every subset or every tie-break, cases worked by hand, and invariances."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.evaluation import metrics

NAN = float("nan")
# Both sides are ratios of small integers in float64; only the order of a few additions differs.
TOLERANCE = 1e-12

# A shared machine may pause any example for longer than the default deadline.
unhurried = settings(deadline=None)

grades = st.sampled_from([0.0, 1.0, NAN])


def matrices(samples: int, questions: int = 4):
    rows = st.lists(grades, min_size=samples, max_size=samples)
    return st.lists(rows, min_size=1, max_size=questions).map(lambda rows: np.array(rows, dtype=np.float64))


def graded(row: np.ndarray) -> list[float]:
    return [value for value in row.tolist() if not math.isnan(value)]


def mean_or_nan(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN


def same(actual: float, expected: float) -> bool:
    return actual == pytest.approx(expected, abs=TOLERANCE, nan_ok=True)


def enumerated_pass(rows: np.ndarray, k: int) -> float:
    """pass@k by looking at every subset of k graded samples."""
    solved = []
    for row in rows:
        subsets = list(itertools.combinations(graded(row), k))
        if subsets:
            solved.append(mean_or_nan([max(subset) for subset in subsets]))
    return mean_or_nan(solved)


@given(matrices(6), st.integers(1, 6))
@unhurried
def test_pass_at_k_is_the_mean_over_every_subset(correct, k):
    assert same(metrics.pass_at_k(correct, k), enumerated_pass(correct, k))


@given(matrices(4, 1), matrices(5, 1), st.sampled_from([2, 4, 6, 8]))
@unhurried
def test_split_pass_at_k_is_the_mean_over_every_pair_of_subsets(normal, high_entropy, k):
    pairs = itertools.product(
        itertools.combinations(graded(normal[0]), k // 2),
        itertools.combinations(graded(high_entropy[0]), k // 2),
    )
    expected = mean_or_nan([max(first + second) for first, second in pairs])
    assert same(metrics.pass_at_k_split(normal, high_entropy, k), expected)


def test_pass_at_k_by_hand():
    correct = np.array([[True, False, False, False], [False] * 4, [True] * 4])
    # one right of four, two drawn: 1 − C(3,2)/C(4,2) = 1 − 3/6
    np.testing.assert_allclose(metrics.pass_at_k_per_question(correct, 2), [0.5, 0.0, 1.0], atol=TOLERANCE)
    assert metrics.pass_at_k(correct, 2) == pytest.approx(0.5)
    assert metrics.pass_at_k(correct, 1) == pytest.approx(metrics.average_at_k(correct))


def test_pass_at_k_stays_exact_with_many_samples():
    correct = np.zeros((1, 2000), dtype=bool)
    correct[0, 0] = True
    # one right of n is among k draws with probability k/n; C(2000, 1000) itself overflows a float
    assert metrics.pass_at_k(correct, 1000) == pytest.approx(0.5, abs=TOLERANCE)


def test_split_takes_half_of_the_samples_from_each_mode():
    normal = np.array([[1.0, 0.0, 0.0, 0.0]])
    high_entropy = np.array([[1.0, 1.0, 0.0, 0.0]])
    # misses: normal C(3,2)/C(4,2) = 1/2, high entropy C(2,2)/C(4,2) = 1/6
    assert metrics.pass_at_k_split(normal, high_entropy, 4) == pytest.approx(1 - 1 / 12, abs=TOLERANCE)


def test_a_question_with_too_few_graded_samples_is_left_out_and_counted():
    correct = np.array([[1.0, NAN, NAN], [1.0, 0.0, NAN], [0.0, 0.0, 0.0]])
    values = metrics.pass_at_k_per_question(correct, 2)
    np.testing.assert_array_equal(np.isnan(values), [True, False, False])
    assert metrics.left_out(values) == 1
    assert metrics.pass_at_k(correct, 2) == pytest.approx(0.5)
    split = metrics.pass_at_k_split_per_question(correct, correct, 4)
    np.testing.assert_array_equal(np.isnan(split), [True, False, False])


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match="draws no sample"):
        metrics.pass_at_k(np.ones((1, 2), dtype=bool), k)


def test_an_odd_k_cannot_be_split():
    with pytest.raises(ValueError, match="even k"):
        metrics.pass_at_k_split(np.ones((1, 4)), np.ones((1, 4)), 3)


def test_a_reward_between_zero_and_one_is_not_taken_for_correctness():
    with pytest.raises(ValueError, match="threshold"):
        metrics.average_at_k(np.array([[0.5, 1.0]]))


def test_rewards_may_be_any_numbers_and_failed_grades_count_nowhere():
    rewards = np.array([[0.25, NAN, -2.0, 1.0], [0.5, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]])
    assert metrics.mean_reward(rewards) == pytest.approx((-0.25 + 0.5) / 2)


def test_average_weighs_questions_alike_and_skips_failed_grades():
    correct = np.array([[1.0, NAN, NAN, NAN], [1.0, 0.0, 0.0, 0.0], [NAN, NAN, NAN, NAN]])
    assert metrics.average_at_k(correct) == pytest.approx((1.0 + 0.25) / 2)
    assert metrics.left_out(metrics.average_at_k_per_question(correct)) == 1


def test_nothing_graded_gives_nan_everywhere():
    nothing = np.full((2, 3), NAN)
    answers = [["a", "b", None]] * 2
    values = [
        metrics.average_at_k(nothing),
        metrics.mean_reward(nothing),
        metrics.pass_at_k(nothing, 1),
        metrics.majority_at_k(answers, nothing),
        metrics.best_of_k(nothing),
        metrics.distinct_correct(answers, nothing),
        metrics.only_second_solved(nothing, nothing),
        *metrics.bootstrap_interval(np.full(2, NAN)),
    ]
    assert all(math.isnan(value) for value in values)


def test_no_questions_at_all_gives_nan():
    assert math.isnan(metrics.pass_at_k(np.zeros((0, 4)), 2))
    assert math.isnan(metrics.majority_at_k([], np.zeros((0, 4))))


def test_majority_by_hand():
    answers = [
        ["7", "7", "8", None],  # 7 wins, right
        ["1", "1", "2", "2"],  # a tie of right and wrong
        ["1", "2", "3", "4"],  # a tie of four, one right
        [None, None, None, None],  # nobody votes
        ["5", "5", "6", None],  # 5 wins, wrong
    ]
    right = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=bool)
    values = metrics.majority_at_k_per_question(answers, right)
    np.testing.assert_allclose(values, [1.0, 0.5, 0.25, 0.0, 0.0], atol=TOLERANCE)
    assert metrics.majority_at_k(answers, right) == pytest.approx(1.75 / 5)


def test_a_failed_grade_casts_no_vote():
    # without the third sample's vote the two answers tie
    values = metrics.majority_at_k_per_question([["a", "b", "b"]], np.array([[1.0, 0.0, NAN]]))
    np.testing.assert_allclose(values, [0.5], atol=TOLERANCE)


def test_majority_is_solved_at_least_once_where_wrong_answers_are_none():
    answers = [[None, None, "x"], [None, None, None]]
    assert metrics.majority_at_k(answers, np.array([[0, 0, 1], [0, 0, 0]], dtype=bool)) == pytest.approx(0.5)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.sampled_from(["a", "b", "c"]))
@unhurried
def test_majority_is_the_mean_over_tie_breaks(answers, truth):
    votes = {answer: answers.count(answer) for answer in answers if answer is not None}
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    expected = mean_or_nan([float(winner == truth) for winner in winners]) if winners else 0.0
    correct = np.array([[answer == truth for answer in answers]])
    assert same(metrics.majority_at_k([answers], correct), expected)


def test_answers_may_be_any_hashable_key():
    answers = [[(1, 2), frozenset({3}), (1, 2)]]
    assert metrics.majority_at_k(answers, np.array([[True, False, True]])) == 1.0


def test_answers_must_match_the_grades():
    with pytest.raises(ValueError, match="2 lists of 2"):
        metrics.majority_at_k([["a", "b"], ["a"]], np.ones((2, 2), dtype=bool))


def test_best_of_k_by_hand():
    rewards = np.array([[0.25, NAN, 0.75], [-1.0, -2.0, NAN], [NAN, NAN, NAN]])
    assert metrics.best_of_k(rewards) == pytest.approx((0.75 - 1.0) / 2)
    assert metrics.left_out(metrics.best_of_k_per_question(rewards)) == 1


def test_distinct_correct_by_hand():
    answers = [["a", "a", "b", "c"], ["a", "b", "c", None], ["a", "b", "c", "d"]]
    correct = np.array([[1.0, 1.0, 1.0, 0.0], [NAN, 0.0, 0.0, 1.0], [NAN] * 4])
    np.testing.assert_array_equal(metrics.distinct_correct_per_question(answers, correct), [2.0, 0.0, NAN])
    assert metrics.distinct_correct(answers, correct) == pytest.approx(1.0)


def test_only_second_solved_by_hand():
    first = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [NAN, NAN]])
    second = np.array([[1.0, 0.0, NAN], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    values = metrics.only_second_solved_per_question(first, second)
    np.testing.assert_array_equal(values, [1.0, 0.0, 0.0, NAN])
    assert metrics.only_second_solved(first, second) == pytest.approx(1 / 3)
    assert metrics.only_second_solved(second, first) == 0.0


@given(matrices(5), st.randoms(use_true_random=False), st.integers(1, 5))
@unhurried
def test_the_order_of_questions_and_samples_does_not_matter(correct, random, k):
    rows, columns = list(range(len(correct))), list(range(5))
    random.shuffle(rows)
    random.shuffle(columns)
    answers = [[f"{int(grade == 1)}{i % 2}" for i, grade in enumerate(row)] for row in correct]
    mixed = correct[np.ix_(rows, columns)]
    mixed_answers = [[answers[row][column] for column in columns] for row in rows]
    for metric in (metrics.average_at_k, metrics.best_of_k, lambda c: metrics.pass_at_k(c, k)):
        assert same(metric(mixed), metric(correct))
    for metric in (metrics.majority_at_k, metrics.distinct_correct):
        assert same(metric(mixed_answers, mixed), metric(answers, correct))


@given(matrices(4), st.integers(1, 4))
@unhurried
def test_failed_grades_are_as_good_as_absent(correct, k):
    padded = np.concatenate([np.full((len(correct), 3), NAN), correct], axis=1)
    answers = [["a" if grade == 1 else "b" for grade in row] for row in correct]
    padded_answers = [["z"] * 3 + row for row in answers]
    assert same(metrics.pass_at_k(padded, k), metrics.pass_at_k(correct, k))
    assert same(metrics.pass_at_k_split(padded, correct, 2), metrics.pass_at_k_split(correct, correct, 2))
    assert same(metrics.majority_at_k(padded_answers, padded), metrics.majority_at_k(answers, correct))
    assert same(metrics.best_of_k(padded), metrics.best_of_k(correct))


@given(matrices(5))
@unhurried
def test_pass_at_k_rises_with_k_from_the_average_to_the_best(correct):
    whole = correct[~np.isnan(correct).any(axis=1)]
    if len(whole):
        curve = [metrics.pass_at_k(whole, k) for k in range(1, 6)]
        assert curve == sorted(curve)
        assert same(curve[0], metrics.average_at_k(whole))
        assert same(curve[-1], metrics.best_of_k(whole))


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [metrics.bootstrap_interval(rng.normal(size=60), level=0.8, draws=300) for _ in range(200)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    # 200 trials of probability 0.8 have standard deviation 0.028: three of them, and 0.01 of bias
    assert abs(covered - 0.8) < 0.095


def test_bootstrap_matches_the_normal_approximation():
    values = np.random.default_rng(2).normal(3.0, 2.0, size=4000)
    low, high = metrics.bootstrap_interval(values, level=0.95)
    half = 1.96 * values.std() / math.sqrt(values.size)
    # 2000 draws place a 2.5 % quantile to about 5 % of the half-width
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_repeats_with_its_seed_and_ignores_nan():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    with_nan = np.array([0.0, NAN, 1.0, 1.0, 0.0, NAN, 1.0])
    assert metrics.bootstrap_interval(values, seed=3) == metrics.bootstrap_interval(with_nan, seed=3)
    wide, narrow = (metrics.bootstrap_interval(values, level=level) for level in (0.99, 0.5))
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]


@pytest.mark.parametrize("bad", [{"level": 0.0}, {"level": 95.0}, {"draws": 0}])
def test_bootstrap_refuses_settings_without_a_meaning(bad):
    with pytest.raises(ValueError, match=r"level|draws"):
        metrics.bootstrap_interval(np.ones(3), **bad)


def test_stratified_bootstrap_matches_the_normal_approximation():
    """A mean of two means has half of each stratum's standard error, whatever the sizes of the strata."""
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=100), rng.normal(size=900, loc=3)
    low, high = metrics.stratified_interval([small, large])
    error = 0.5 * math.sqrt(small.var() / small.size + large.var() / large.size)
    # 2000 draws give a quantile to about 5 % of the interval's half width.
    assert (low + high) / 2 == pytest.approx((small.mean() + large.mean()) / 2, abs=0.1 * error)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert metrics.stratified_interval([small]) == metrics.bootstrap_interval(small)
    assert all(math.isnan(end) for end in metrics.stratified_interval([small, np.full(2, NAN)]))
