import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.rewards.exact import answered, canonical, score


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("18", 18),
        ("0018.", "18"),
        ("$18", "18"),
        (r"\$1,234.50", "1234.5"),
        ("-0.5", "-.5"),
        ("-0.0", "0"),
        ("+7", "7"),
        ("9" * 5000, "9" * 5000 + ".0"),
        ("1,000,000", "1000000"),
        ("so\n\nParis \n", "Paris"),
        (r"it is \boxed{Paris}, clearly", "Paris"),
        ("work\n#### 72", "5 * 12 + 12\n#### 72"),
        ("<think>no</think>\nyes", "yes"),
        (r"\boxed{42}", r"\boxed{42}"),
    ],
)
def test_equal_answers_score_one(response: str, truth: object):
    assert score(response, truth) == 1.0


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("19", "18"),
        ("18 apples", "18"),
        ("1e1", "10"),
        ("1/2", "0.5"),
        ("1,00", "100"),
        ("10,00,000", "1000000"),
        ("１８", "18"),
        ("paris", "Paris"),
        ("", "18"),
        ("18\nI am sure", "18"),
        (r"18 \boxed{}", "18"),
        ("<think>18</think>", "18"),
        ("-5", "5"),
        (".", "0"),
        ("10", "1"),
        ("9" * 5000, "9" * 4999 + "8"),
    ],
)
def test_other_answers_score_zero(response: str, truth: object):
    assert score(response, truth) == 0.0


def test_canonical_forms():
    assert canonical("18.50", "$18.5") == "18.5" == canonical("18.5", "18.5")
    assert canonical("Paris", "Paris") == "Paris"
    assert canonical("Rome", "Paris") is None
    assert answered("so\n#### 18.0", "19") == answered(r"\boxed{$18}", "19") == "18"
    assert answered("<think>18</think>", "18") is None


def test_an_empty_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="ground truth is empty"):
        score("", " ")


@settings(deadline=None)
@given(st.text())
def test_arbitrary_text_never_raises(text: str):
    assert score(text, "a certain answer") in (0.0, 1.0)


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_any_way_to_write_a_number_is_equal(number):
    assert score(f"${number:,f}", str(number)) == 1.0
    assert score(f"{number:f}00", str(number)) == 1.0
