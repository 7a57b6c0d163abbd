import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.rewards import Grade, GradeItem, GraderPool
from policy_split_jax.rewards.prm800k import (
    MAX_DEPTH,
    _expression,
    _math_text,
    _plain,
    answered,
    canonical,
    equal,
    score,
)

MATH_TEXT = [
    ("18", "18"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"18\text{ dollars}", "18"),
    (r"5\text{ cm}^2", "5"),
    (r"\left(1,\, 2\right)", r"(1,\, 2)"),
    (r"90^{\circ}", "90"),
    (r"90^\circ", "90"),
    (r"\frac12", r"\frac{1}{2}"),
    (r"\dfrac{1}{72}", r"\tfrac1{72}"),
    (r"\frac{72}5", r"\frac{72}{5}"),
    (r"2\sqrt3", r"2\sqrt{3}"),
    (r"\sqrt 3", r"\sqrt{3}"),
    (".5", "0.5"),
    (r"\frac{.5}{x}", r"\frac{0.5}{x}"),
    ("x = 5", "5"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\frac12"),
    (r"\$5", "5"),
    ("x\n+1", "x+1"),
    (r"\\frac{1}{2}", r"\frac{1}{2}"),
    (r"5\%", "5"),
    (r"10{,}\!000", "10{,}000"),
    ("9" * 100_000, "9" * 100_000),
]

PLAIN_TEXT = [
    ("1,234,567,890", "1234567890"),
    (r"10,\!000", "10000"),
    (r"10\,000", "10000"),
    ("5 million", r"5 \times 10^6"),
    ("2 billion", r"2\cdot 10^9"),
    ("18%", "18"),
    ("$18$", "18"),
    ("12 inches", "12 feet"),
    ("3 hours", "3"),
    ("90 degrees", "90"),
    ("18.0", "18"),
    ("1.8e1", "18"),
    ("+18", "18"),
    ("17.99999999", "18"),
    ("018.", "18"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\mathrm{B}", "b"),
    ("{18}", "18"),
    ("1 or 2", "1, 2"),
    (r"\{1, 2\}", "1 and 2"),
    (r"7\frac{3}{4}", "7 3/4"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"\frac{1}{2x}", "1/(2x)"),
    (r"\frac{\frac{a}{b}}{\frac{c}{d}}", "a/b/(c/d)"),
    (r"\frac\pi2", "π/2"),
    (r"\\dfrac12xyz", r"1/2xyz"),
    (r"\frac{\sqrt{2}}2xyz", "sqrt(2)/2xyz"),
    (r"90^{ \circ }", "90"),
    (r"a/\frac{b}{c}", "a/(b/c)"),
    (r"a\div b", "a/b"),
    (r"\frac{{a}}{\{b\}}", "a/b"),
    (r"(\theta)", "(θ)"),
    (r"x^\frac12", "x^{1/2}"),
    (r"\sqrt[3]{xyz}", "(xyz)^{1/3}"),
    ("√12+y+z+w", r"\sqrt{12}+y+z+w"),
    (r"(-\infty, 3]", "(-∞,3]"),
    ("2π r h", r"2\pi rh"),
    (r"\displaystyle 2\pi rh", r"2\pi rh"),
    (r"\begin{pmatrix} \frac12 & a \\ 3 & b \end{pmatrix}", r"\begin{bmatrix}1/2&a\\3&b\end{bmatrix}"),
    (r"\\begin{pmatrix} 1/2 \\\\ \\pi \\end{pmatrix}", r"\begin{matrix}1/2\\\pi\end{matrix}"),
]

PARTS = [
    ("0.25", r"\frac{1}{4}"),
    ("31/4", "7 3/4"),
    (r"-7\frac{3}{4}", "-7.75"),
    (r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt\frac12", r"\sqrt{0.5}"),
    (r"\frac12\frac13x", r"\frac{x}{6}"),
    (r"2\frac{x}{3}", r"\frac{2x}{3}"),
    (r"x^2\frac{3}{4}", r"\frac{3x^2}{4}"),
    (r"0.5\frac{1}{2}x", r"\frac{x}{4}"),
    (r"\frac{3\pi}{4}", r"0.75\pi"),
    ("2(x+1)", "2x+2"),
    ("x(x+1)(x-1)", "x^3-x"),
    ("yx", "xy"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    ("x**2", "xx"),
    ("x^{-1}", "1/x"),
    ("2^{-3}x", r"\frac{x}{8}"),
    ("4^{0.5}x", "2x"),
    ("1.5e-1", "0.15"),
    (r"2\ln(2)", r"\ln(4)"),
    (r"2\ln 2", r"\ln 4"),
    ("sqrt2", r"\sqrt{2}"),
    (r"2\theta+1", r"1+\theta\cdot 2"),
    ("(0.5, 2x)", r"(\frac{1}{2},x+x)"),
    (r"\left[\frac{1}{\sqrt{4}},\infty\right)", r"[0.5,\infty)"),
    ("(2.0, 3)", "(2, 3)"),
    ("(5)", "5"),
    ("(B)", "B"),
]


@pytest.mark.parametrize(("answer", "truth"), MATH_TEXT)
def test_equal_as_the_math_data_set_compares(answer: str, truth: str):
    assert _math_text(answer) == _math_text(truth)
    assert score(rf"<think>\boxed{{0}}</think> \boxed{{{answer}}}", truth) == 1.0


def test_what_the_math_data_set_leaves_as_it_is():
    assert _math_text("y=2=3") == "y=2=3"
    assert _math_text("total=5") == "total=5"
    assert _math_text(r"3\text{ h} 5\text{ min}") == r"3\text{h}5\text{min}"
    assert _math_text("01/2") == "01/2"
    assert _math_text("1,000") == "1,000"


@pytest.mark.parametrize(("answer", "truth"), PLAIN_TEXT)
def test_equal_as_plain_text(answer: str, truth: str):
    assert _plain(answer) == _plain(truth)
    assert score(rf"\boxed{{{answer}}}", truth) == 1.0


@pytest.mark.parametrize(("answer", "truth"), PARTS)
def test_equal_part_by_part(answer: str, truth: str):
    assert _plain(answer) != _plain(truth)
    assert score(rf"\boxed{{{answer}}}", truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("19", "18"),
        ("-18", "18"),
        ("18.5", "18"),
        ("Bob", "Evelyn"),
        ("18 dollars", "18"),  # no unit of the rule's
        (r"3\text{ hours} 5\text{ minutes}", "3"),
        ("y=2x+1=3", "3"),
        ("total=5", "5"),
        ("5 million", "5000000"),
        ("1,80", "180"),
        ("0.333333", r"\frac{1}{3}"),
        ("2/4", r"\frac{1}{2}"),  # not reduced
        (r"\frac{6x}{4}", r"\frac{3x}{2}"),
        ("(2/4, 1)", "(1/2, 1)"),
        ("18/1", "18"),  # no integer as it is written
        (r"\sqrt{4}", "2"),
        ("(4/2, 1)", "(2, 1)"),
        ("2", r"\sqrt{4}"),
        ("(1,2)", "[1,2)"),
        ("(1,2)", "(1,2]"),
        ("(2,1)", "(1,2)"),
        ("(1,2,3)", "(1,2)"),
        ("1,2", "(1,2)"),
        ("5", "(5, 5)"),
        ("(1,2),(3,4)", "(1,2)"),
        ("x+1", "x+2"),
        ("(x+15", "(x+16"),
        (r"\frac{x+1}{2}", "x+1/2"),
        (r"\sqrt[3]{4}", r"\sqrt{4}"),
        (r"\ln 6", r"2\ln 3"),
        (r"\ln x", r"\ln(x)+0"),
        ("x+y+z", "z+y+x"),  # three unknown letters
        ("2^{10}x", "1024x"),  # a forbidden power
        ("2**10x", "1024x"),
        ("x+10^{-12}", "x"),
        (r"\%", r"\$"),
        ("x^{n+1}", "x^nx"),
        ("x^2^3", "x^8"),
        (r"\frac{1}{0}", "18"),
        ("0^{-x}+0", "0^{-x}"),  # infinite for some x
        (r"(\ln(0))^n+0", r"(\ln(0))^n"),
        (r"\begin{pmatrix}12\\3\end{pmatrix}", r"\begin{pmatrix}1\\23\end{pmatrix}"),
        (r"\begin{pmatrix}x\\y\end{pmatrix}", r"\begin{pmatrix}xy\end{pmatrix}"),
        (r"x^2\frac{3}{4}", r"x^2+\frac{3}{4}"),
        ("1/0", "2/0"),
        ("0/0", "x"),
        ("1.2.3x", "0.36x"),
        ("degrees", "meters"),  # nothing is left of either
        (r"\text{ }", "5"),
        ("garbage(((", "18"),
    ],
)
def test_other_answers_score_zero(answer: str, truth: str):
    assert score(rf"\boxed{{{answer}}}", truth) == 0.0


@pytest.mark.parametrize("response", ["18", "", r"\boxed{}", r"\boxed{18", r"<think>\boxed{18}</think> 18", "#### 18"])
def test_an_answer_outside_a_box_scores_zero(response: str):
    assert score(response, "18") == 0.0


def test_the_last_box_is_the_answer_and_the_ground_truth_may_be_marked():
    assert score(r"\boxed{19} no, \boxed{18} {so}", "18") == 1.0
    assert score(r"\boxed{18} no, \boxed{19}", "18") == 0.0
    assert score(r"\boxed{18}", "9 + 9\n#### 18") == score(r"\boxed{18}", r"so \boxed{18}") == 1.0
    assert score(r"\boxed{18}", 18) == score(r"\boxed{18.5}", 18.5) == 1.0


def test_all_correct_answers_have_one_form():
    assert canonical(r"\boxed{0.25}", r"\frac14") == canonical(r"\boxed{1/4}", r"\frac14") == r"\frac14"
    assert canonical(r"\boxed{2}", r"\frac14") is None
    assert answered(r"so \boxed{2/8}", r"\frac14") == "2/8"
    assert answered("2/8", r"\frac14") is None


@pytest.mark.parametrize("truth", ["", " ", "####", r"\boxed{}"])
def test_an_empty_ground_truth_is_an_error_and_not_a_zero(truth: str):
    with pytest.raises(ValueError, match="ground truth holds no answer"):
        score("no box", truth)


HOSTILE = [
    "9^9^9",
    "9**9**9",
    "9^{9^{9^{9}}}",
    "9^-9^9",
    "2^x^9^x",
    "((((9^9)^9)^9)^9)^9",
    "((((x+1)^9+1)^9+1)^9+1)^9",
    "1e99^99",
    "2^99999.5",
    "1e999999999",
    "9" * 100_000,
    "sqrt(" + "9" * 480 + ")",
    "(" * 100_000 + ")" * 100_000,
    "sqrt(" * 90 + "2" + ")" * 90,
    "-" * 490 + "1",
    r"\frac{" * 90 + "1" + "}{2}" * 90,
    r"\frac" * 50_000,
    r"\sqrt" * 50_000,
    r"\text{ " * 20_000 + "}" * 20_000,
    "1" + " " * 100_000 + "x",
    "^" + " " * 100_000,
    # These two would keep simplify busy for many seconds.
    "1/(" + "+".join(f"(x+{n}y)^9" for n in range(2, 9)) + ")-1/(" + "+".join(f"(x+{n})^9" for n in range(2, 9)) + ")",
    "1/(" + "+".join(f"sqrt({prime})" for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)) + ")",
    "exec('raise SystemExit')",
    "().__class__.__base__",
    "x.y",
    "lambda:0",
    "٣+x",
    "\x00",
]


@pytest.mark.parametrize("grader", ["prm800k", "released"])
def test_hostile_answers_are_wrong_and_neither_run_nor_hang_nor_crash(grader: str, tmp_path: Path):
    file = tmp_path / "executed"
    attack = f"__import__('os').system('touch {file}')"
    truths = ("18", "x+1", r"(1, \sqrt{2})")
    items = [
        GradeItem(rf"</think> \boxed{{{text}}}", truth)
        for text in [*HOSTILE, attack, f"x+{attack}"]
        for truth in truths
    ]
    with GraderPool(grader, workers=1, time_limit=5.0, memory_limit_mb=1024) as pool:
        pid = pool._workers[0].process.pid
        grades = pool.grade(items)
        assert pool._workers[0].process.pid == pid  # none was killed
    assert [(grade.score, grade.error) for grade in grades] == [(0.0, None)] * len(items)
    assert not file.exists()


@pytest.mark.parametrize("grader", ["prm800k", "released"])
def test_the_pool_grades_in_workers(grader: str):
    with GraderPool(grader, workers=1) as pool:
        assert len(pool._workers) == 1
        grades = pool.grade(
            [
                GradeItem(r"</think> \boxed{0.25}", r"\frac{1}{4}"),
                GradeItem(r"</think> \boxed{2}", r"\frac{1}{4}"),
                GradeItem(r"</think> 2", r"\frac{1}{4}"),
                GradeItem(r"</think> \boxed{2}", ""),
            ]
        )
    assert grades[:3] == [Grade(1.0, r"\frac{1}{4}"), Grade(0.0, "2"), Grade(0.0, None)]
    assert grades[3].score is None
    assert "ground truth holds no answer" in (grades[3].error or "")


@pytest.mark.parametrize("grader", ["prm800k", "released"])
def test_a_worker_has_imported_sympy_before_its_first_answer(grader: str):
    code = (
        "import sys; from policy_split_jax.rewards.worker import _warm_up; before = 'sympy' in sys.modules; "
        f"_warm_up({grader!r}); print(before, 'sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "text", ["", "x.y", "x,y", "x=y", "x y", "2(", "sqrt*2", "pi(", "lnx", "[x]", "x!", "x//2", "0x1F", "²", "x_y"]
)
def test_what_is_no_arithmetic_is_refused(text: str):
    with pytest.raises((ValueError, SyntaxError)):
        _expression(text)


def test_powers_and_depth_are_bounded():
    assert _expression("((2^9)^9)") == 2**81
    with pytest.raises(ValueError, match="powers too high"):
        _expression("((2^9)^9)^9")
    with pytest.raises(ValueError, match="powers too high"):
        _expression("2^x^2")
    assert _expression("-" * (MAX_DEPTH - 2) + "1") == 1
    with pytest.raises(ValueError, match=f"deeper than {MAX_DEPTH}"):
        _expression("-" * MAX_DEPTH + "1")


@settings(deadline=None)
@given(st.text() | st.text(alphabet=r"0123456789.,+-*/^(){}[]=xyπ√ \fracsqtei%$"))
def test_arbitrary_text_never_raises(text: str):
    assert score(r"\boxed{" + text + "}", "a certain answer") in (0.0, 1.0)
    assert equal(text, "x+1") in (False, True)
    assert equal(text, text) == equal(text, text + " ")


TREES = st.recursive(
    st.integers(0, 3).map(str) | st.sampled_from("xy"),
    lambda trees: st.tuples(st.sampled_from(["+", "-", "*", r"\cdot ", ""]), trees, trees),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(TREES, TREES)
def test_polynomials_are_equal_where_their_values_are(one: object, other: object):
    """A polynomial of degree 5 in each letter is fixed by 6 values of each; `x+` keeps integers from being texts."""
    grid = [(x, y) for x in range(6) for y in range(6)]
    same = all(_value(one, *point) == _value(other, *point) for point in grid)
    assert equal(f"x+{_text(one)}", f"x+{_text(other)}") == same


def _text(tree) -> str:
    if isinstance(tree, str):
        return f"({tree})"
    operator, left, right = tree
    return rf"\left({_text(left)}{operator}{_text(right)}\right)"


def _value(tree, x: int, y: int) -> int:
    if isinstance(tree, str):
        return {"x": x, "y": y}[tree] if tree in "xy" else int(tree)
    operator, left, right = tree
    a, b = _value(left, x, y), _value(right, x, y)
    return a + b if operator == "+" else a - b if operator == "-" else a * b
