import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.rewards.grading import GradeItem
from policy_split_jax.rewards.letter import answered, canonical, score
from policy_split_jax.rewards.pool import GraderPool


@pytest.mark.parametrize(
    "box",
    [
        "B",
        "b",
        " B ",
        "(B)",
        "( b )",
        "B.",
        "B)",
        "B) a red dwarf",
        "B. a red dwarf,\nor two",
        "(B) a red dwarf",
        "(B) both (a) and (c)",
        "B. orange and red",
        r"\text{B}",
        r"\textbf{(B)}",
        r"\mathrm{b}",
        r"\text{B. a red dwarf}",
    ],
)
def test_ways_to_box_a_letter(box):
    assert answered(f"Hence \\boxed{{{box}}}.", "") == "B"
    assert score(f"Hence \\boxed{{{box}}}.", "B") == 1.0
    assert score(f"Hence \\boxed{{{box}}}.", "C") == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "B",
        "The answer is B.",
        r"\boxed{}",
        r"\boxed{BC}",
        r"\boxed{B, C}",
        r"\boxed{B red dwarf}",
        r"\boxed{(B) and (C)}",
        r"\boxed{B) or C)}",
        r"\boxed{B. or maybe C}",
        r"\boxed{(B) (C) (D)}",
        r"\boxed{B. C. D.}",
        r"\boxed{B. C}",
        r"\boxed{Because}",
        r"\boxed{B.C}",
        r"\boxed{(B}",
        r"\boxed{2}",
        r"\boxed{В}",  # Cyrillic
        r"\boxed{B",
        r"<think>\boxed{B}</think> none",
        r"\boxed{B} or rather \boxed{none}",
    ],
)
def test_nothing_else_is_an_answer(response):
    assert answered(response, "B") is None
    assert canonical(response, "B") is None


def test_the_last_box_after_the_thought_counts():
    assert answered(r"<think>\boxed{A}</think> \boxed{B}, no, \boxed{C}", "A") == "C"
    assert canonical(r"\boxed{c}", "c") == "C"


def test_a_ground_truth_that_is_no_letter_is_an_error():
    with pytest.raises(ValueError, match="the ground truth 'red dwarf' is no letter"):
        score(r"\boxed{A}", "red dwarf")


def test_the_pool_grades_letters():
    with GraderPool("letter") as pool:
        grades = pool.grade([GradeItem(r"\boxed{B}", "B"), GradeItem(r"\boxed{c}", "B"), GradeItem("?", "")])
    assert [(grade.score, grade.answer) for grade in grades] == [(1.0, "B"), (0.0, "C"), (None, None)]


@pytest.mark.parametrize(
    "text", ["{" * 10**6, r"\boxed{" * 10**5, r"\text{" * 10**5, r"\boxed{(" + " " * 10**6, "B" * 10**6]
)
def test_hostile_text_takes_linear_time(text):
    started = time.perf_counter()
    boxed = r"\boxed{" + text.replace("{", "").replace("\\", "\\text{}") + "}"
    assert answered(text, "B") is None
    answered(boxed, "B")
    # It takes less than a second; anything quadratic would take hours.
    assert time.perf_counter() - started < 20


@settings(deadline=None)
@given(st.text(alphabet="abB().{}\\ textboxd\n"))
def test_arbitrary_text_never_raises(text):
    assert score(r"\boxed{" + text + "}", "B") in (0.0, 1.0)
