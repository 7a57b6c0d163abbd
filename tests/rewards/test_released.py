import pytest

from policy_split_jax.rewards import prm800k
from policy_split_jax.rewards.released import answered, canonical, score


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"<think>so</think> \boxed{18}", "18"),
        (r"</think>\boxed{\frac{1}{4}}", "0.25"),
        (r"<think>\boxed{3}</think> It is \boxed{x^{2}}, for sure.", "x^2"),
        (r"<think>a</think> no <think>b</think> \boxed{18}", "18"),
        ("</think> $\\boxed{ 18 }$\n\nas {above}", "18"),
        ("</think> \\boxed{19}\n no:\n\\boxed{18}\n", "18"),
        ("</think> \\boxed{18}\nand \\boxed{19", "18"),
    ],
)
def test_right_answers_score_one(response: str, truth: str):
    assert score(response, truth) == prm800k.score(response, truth) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{18}",
        r"<think>\boxed{18}",
        r"<think>\boxed{18}</think> 18",
        "<think>a</think> 18",
        r"</think> \boxed{18",
        r"</think> \boxed{}",
        r"</think> \boxed {18}",
        r"</think> \boxed{19}",
        "</think> \\boxed{\n18\n}",
        "</think> \\boxed{18}\n\\boxed{}",
        "",
    ],
)
def test_without_thinking_or_a_box_the_score_is_zero(response: str):
    assert score(response, "18") == 0.0


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (r"</think> \boxed{18} or \boxed{18}", r"18} or \boxed{18"),
        (r"</think> \boxed{19} no, \boxed{18}", r"19} no, \boxed{18"),
        (r"</think> \boxed{18} of the {set}", "18} of the {set"),
        ("</think> \\boxed{18}\n\\boxed{18} as {above}", "18} as {above"),
    ],
)
def test_the_box_is_matched_to_the_last_brace_of_the_last_line_with_a_box(response: str, found: str):
    assert answered(response, "18") == found
    assert score(response, "18") == 0.0
    assert prm800k.score(response, "18") == 1.0


def test_a_lone_brace_behind_the_box_is_forgiven_by_the_rule():
    assert answered(r"</think> so $\boxed{18}$ }", "18") == "18}$"
    assert score(r"</think> so $\boxed{18}$ }", "18") == 1.0


def test_forms():
    assert canonical(r"</think>\boxed{0.25}", r"so \boxed{\frac14}") == r"\frac14"
    assert canonical(r"</think>\boxed{2}", r"\frac14") is None
    assert answered(r"</think>\boxed{2}", r"\frac14") == "2"
    assert answered(r"\boxed{2}", r"\frac14") is answered("</think>2", r"\frac14") is None
    assert answered(r"</think>\boxed{ }", r"\frac14") is None


def test_an_empty_ground_truth_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="ground truth holds no answer"):
        score("no thinking", "")
