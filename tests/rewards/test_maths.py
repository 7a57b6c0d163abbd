import json
import re
from pathlib import Path

import pytest

from policy_split_jax.rewards.maths import answered, canonical, score


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"\boxed{18}", "18"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{0.625}", r"\frac{5}{8}"),
        (r"<think>\boxed{3}</think> \boxed{\dfrac{5}{8}}", r"so \boxed{\frac58}"),
        (r"\boxed{1} or \boxed{x^2 + 1}", "1 + x^2"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"\boxed{x=5}", "5"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        ("so 9\n#### 9.", "4 + 5 = 9\n#### 9"),
        (r"\boxed{18}", 18),
    ],
)
def test_equal_answers_score_one(response: str, truth: object):
    assert score(response, truth) == 1.0


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("18", "18"),
        ("", "18"),
        (r"\boxed{}", "18"),
        (r"\boxed{18", "18"),
        (r"\boxed{18} no, \boxed{19}", "18"),
        (r"<think>\boxed{18}</think> I forgot", "18"),
        (r"\boxed{17, 18, 19}", "18"),
        (r"\boxed{17 \text{ or } 18}", "18"),
        (r"\boxed{garbage(((}", "18"),
        (r"\boxed{\frac{1}{0}}", "18"),
        (r"\boxed{(1,2)}", "[1,2)"),
        (r"\boxed{x+1}", "x+2"),
        (r"\boxed{C}", "B"),
    ],
)
def test_other_answers_score_zero(response: str, truth: object):
    assert score(response, truth) == 0.0


def test_all_correct_answers_have_one_form():
    assert canonical(r"\boxed{0.5}", r"\frac12") == canonical(r"\boxed{1/2}", r"\frac12") == r"\frac12"
    assert canonical(r"\boxed{2}", r"\frac12") is None
    assert answered(r"so \boxed{2}", r"\frac12") == "2"
    assert answered("no idea", r"\frac12") is None


@pytest.mark.parametrize(
    "alike",
    [
        ["0.25", r"\frac14", "1/4", "0.250", r"\dfrac{1}{4}", ".25"],
        ["3", "3.0", r"\text{3}", "$3$"],
        ["(1, 2)", "(1,2)", r"\left(1, 2\right)"],
        [r"2\sqrt{3}", r"2 \sqrt 3"],
    ],
)
def test_equal_wrong_answers_have_one_form(alike):
    forms = {answered(rf"\boxed{{{answer}}}", "7") for answer in alike}
    assert len(forms) == 1
    assert answered(r"\boxed{5}", "7") not in forms


@pytest.mark.parametrize("answer", [r"\frac{}", "1" * 5000, "1e99999", r"\text{no solution}"])
def test_what_sympy_does_not_read_votes_as_it_is_written(answer):
    assert answered(rf"\boxed{{{answer}}}", "7") is not None


def test_an_empty_ground_truth_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="no mathematical answer"):
        score(r"\boxed{1}", "")


def test_gsm8k_references_are_right_and_off_by_one_is_wrong(shared: Path):
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()[:100]
    references = [json.loads(line)["answer"] for line in lines]
    for reference in references:
        work, number = re.fullmatch(r"(.*)#### (-?[\d,]+)", reference, re.DOTALL).groups()
        off_by_one = f"{work}#### {int(number.replace(',', '')) + 1}"
        assert score(reference, reference) == 1.0
        assert score(rf"{work} \boxed{{{number}}}", reference) == 1.0
        assert score(off_by_one, reference) == 0.0
