import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.rewards.countdown import MAX_DEPTH, MAX_LENGTH, answered, canonical, evaluate, score

TRUTH = {"numbers": [3, 4, 5], "target": 17}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", Fraction(7)),
        ("2+3*4", Fraction(14)),
        ("(2+3)*4", Fraction(20)),
        ("7/2", Fraction(7, 2)),
        ("1/3*3", Fraction(1)),
        ("8/4/2", Fraction(1)),
        ("10-4-3", Fraction(3)),
        ("-5+8", Fraction(3)),
        ("--5", Fraction(5)),
        ("6×7−4÷2", Fraction(40)),
        (" ( 1\n+ 2 ) ", Fraction(3)),
    ],
)
def test_values_by_hand(expression: str, value: Fraction):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "19e0",
        "1_0",
        "0x10",
        "0b1",
        "1.0",
        ".5",
        "1j",
        "007",
        "２+3",
        "٣+4",
        "2**3",
        "7//2",
        "7%2",
        "3(4)",
        "(3)(4)",
        "+5",
        "~5",
        "1 2",
        "1,2",
        "()",
        "(1,)",
        "1<2",
        "1 if 1 else 2",
        "x",
        "True",
        "__import__('os')",
        "f'{1}'",
        "1;2",
        "1#2",
        "1=1",
        "1/0",
        "1/(2-2)",
        "",
        "   ",
        "(1",
        "1)",
        "1+",
        "1\x002",
        "[1][0]",
    ],
)
def test_everything_else_is_refused(expression: str):
    with pytest.raises(ValueError, match=r"not an|not allowed|division by zero"):
        evaluate(expression)


def test_length_and_depth_are_bounded():
    assert evaluate("1" + " " * (MAX_LENGTH - 1)) == 1
    with pytest.raises(ValueError, match="at most 200"):
        evaluate("1" + " " * MAX_LENGTH)
    assert evaluate("-" * (MAX_DEPTH - 2) + "1") == 1
    with pytest.raises(ValueError, match="deeper"):
        evaluate("-" * MAX_DEPTH + "1")
    assert evaluate("(" * 90 + "1" + ")" * 90) == 1


@pytest.mark.parametrize(
    "response",
    [
        "3*4+5",
        "I try.\n\n 5 + 3×4 \n\n",
        "<think>3+4+5</think>\n3*4+5",
        r"<think>\boxed{3+4+5}</think> so \boxed{(3*4)+5} is it",
        r"\boxed{9} no, \boxed{3*4+5 = 17}",
        "3*4+5=17",
        "--5+3*4",
    ],
)
def test_a_solution_scores_one(response: str):
    assert score(response, TRUTH) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "17",
        "3*4+5 = 18",
        "3*4+5 = 17 = 17",
        "17 = 3*4+5",
        "3*5+4",
        "3*4+5+5-5",
        "12+5",
        "3*4+5*1",
        "4+5+3+5",
        "34-17",
        "3(4)+5",
        "3*4+5e0",
        "3*4+٥",
        "3*4+5\nThat is it.",
        "3*4+5</think>",
        r"3*4+5 \boxed{}",
        r"\boxed{3*4+5} but rather \boxed{3+4+5}",
    ],
)
def test_anything_else_scores_zero(response: str):
    assert score(response, TRUTH) == 0.0


def test_each_number_is_used_as_often_as_it_is_given():
    assert score("4*4-4/4", {"numbers": [4, 4, 4, 4], "target": 15}) == 1.0
    assert score("4*4-4/4", {"numbers": [4, 4, 4], "target": 15}) == 0.0
    assert score("19+1", {"numbers": [19, 1], "target": 20}) == 1.0
    assert score("19+1", {"numbers": [1, 9, 1], "target": 20}) == 0.0
    assert score("1-3=-2", {"numbers": [3, 1], "target": -2}) == 1.0


def test_the_exact_quotient_counts_not_a_rounded_one():
    assert score("6/(1-3/4)", {"numbers": [1, 3, 4, 6], "target": 24}) == 1.0
    assert score("100/3*3-100", {"numbers": [100, 100, 3, 3], "target": 0}) == 1.0
    assert score("7/2", {"numbers": [7, 2], "target": 3}) == 0.0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3*4+5", "5+(4*3)"),
        ("((3*4))+5", "--3*4+5"),
        ("7-(2-3)", "3+7-2"),
        ("8/(4/2)", "2*8/4"),
        ("(5-3)*(2-7)", "(3-5)*(7-2)"),
        ("-(2-9)*3", "3*(9-2)"),
        ("-2*(3-8)", "2*(8-3)"),
        ("9-(2+3)", "9-3-2"),
        ("9*(2+4)/6", "(4+2)/6*9"),
        ("8-3-3+1", "-3+1+(8-3)"),
    ],
)
def test_reordered_solutions_have_one_canonical_form(one: str, other: str):
    assert _form(one) == _form(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2+2", "2*2"),
        ("1+2+3", "1*2*3"),
        ("2*2+4", "2+2+4"),
        ("(3-2)*6", "6/(3-2)"),
        ("8/4/2*1", "8/4-2+1"),
        ("3-(2-1)", "(3+1)/2"),
    ],
)
def test_different_solutions_have_different_forms(one: str, other: str):
    assert None is not _form(one) != _form(other) is not None


def test_the_form_of_a_wrong_answer_is_none():
    assert canonical("3*4+5", TRUTH) == "(3*4+5)"
    assert canonical("3*5+4", TRUTH) is None
    assert canonical("no", TRUTH) is None


def test_what_was_answered_is_the_same_for_equal_wrong_answers():
    assert answered("3*5+4", TRUTH) == answered("so: \n4 + 5*3", TRUTH) == "(3*5+4)"
    assert answered("3*4+5", TRUTH) == canonical("3*4+5", TRUTH)
    assert answered("no", TRUTH) is answered("", TRUTH) is None


def test_a_broken_ground_truth_is_an_error_and_not_a_zero():
    with pytest.raises(KeyError, match="numbers"):
        score("3*4+5", {"target": 17})


@settings(deadline=None)
@given(st.text() | st.text(alphabet="0123456789+-*/()=×÷−. \n_ex"))
def test_arbitrary_text_raises_only_value_errors(text: str):
    try:
        value = evaluate(text)
    except ValueError:
        value = None
    assert value is None or isinstance(value, Fraction)
    assert score(text, TRUTH) in (0.0, 1.0)
    assert score(r"\boxed{" + text, TRUTH) in (0.0, 1.0)


def _operands(trees: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(st.sampled_from("+-*/"), trees, trees) | st.tuples(st.just("neg"), trees)


TREES = st.recursive(st.integers(0, 30), _operands, max_leaves=6)


@settings(deadline=None)
@given(TREES)
def test_values_agree_with_fractions(tree: object):
    expected = _value(tree)
    if expected is None:
        with pytest.raises(ValueError, match="division by zero"):
            evaluate(_text(tree))
    else:
        assert evaluate(_text(tree)) == expected


@settings(deadline=None)
@given(TREES, st.randoms(use_true_random=False))
def test_commuting_keeps_the_form_and_solves_the_same(tree: object, random):
    value, twin = _value(tree), _commuted(tree, random)
    if value is None or value.denominator != 1:
        return
    truth = {"numbers": _leaves(tree), "target": int(value)}
    assert canonical(_text(tree), truth) == canonical(_text(twin), truth) is not None


@settings(deadline=None)
@given(TREES, TREES)
def test_a_form_is_worth_what_its_solution_is(one: object, other: object):
    """The form is itself an expression, so forms of solutions that differ in value or numbers must differ."""
    value = _value(one)
    if value is None or value.denominator != 1:
        return
    form = canonical(_text(one), {"numbers": _leaves(one), "target": int(value)})
    assert form is not None
    assert evaluate(form) == value
    if (_value(other), sorted(_leaves(other))) != (value, sorted(_leaves(one))):
        assert canonical(_text(other), {"numbers": _leaves(one), "target": int(value)}) is None


def _form(expression: str) -> str | None:
    numbers = [int(number) for number in re.findall(r"\d+", expression)]
    return canonical(expression, {"numbers": numbers, "target": int(evaluate(expression))})


def _text(tree) -> str:
    """Every operation in parentheses: the oracle needs no precedence."""
    match tree:
        case ("neg", operand):
            return f"(-{_text(operand)})"
        case (operator, left, right):
            return f"({_text(left)}{operator}{_text(right)})"
    return str(tree)


def _value(tree) -> Fraction | None:
    match tree:
        case ("neg", operand):
            value = _value(operand)
            return None if value is None else -value
        case (operator, left, right):
            a, b = _value(left), _value(right)
            if a is None or b is None or (operator == "/" and b == 0):
                return None
            return {"+": a + b, "-": a - b, "*": a * b}[operator] if operator != "/" else a / b
    return Fraction(tree)


def _leaves(tree) -> list[int]:
    return [leaf for part in tree[1:] for leaf in _leaves(part)] if isinstance(tree, tuple) else [tree]


def _commuted(tree, random):
    match tree:
        case ("neg", operand):
            return ("neg", _commuted(operand, random))
        case ("+" | "*" as operator, left, right):
            parts = [_commuted(left, random), _commuted(right, random)]
            random.shuffle(parts)
            return (operator, *parts)
        case ("-", left, right) if random.random() < 0.5:
            return ("+", ("neg", _commuted(right, random)), _commuted(left, random))
        case (operator, left, right):
            return (operator, _commuted(left, random), _commuted(right, random))
    return tree
