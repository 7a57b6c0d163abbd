import ast
import operator
from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_split_jax.data import countdown
from policy_split_jax.errors import UserError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def walk(text):
    """(value, values of all nodes, leaves) of an expression, by Python's own parser and Fractions."""
    values, leaves = [], []

    def visit(node):
        if isinstance(node, ast.Constant):
            leaves.append(node.value)
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        value = OPERATORS[type(node.op)](visit(node.left), visit(node.right))
        values.append(value)
        return value

    return visit(ast.parse(text, mode="eval").body), values, leaves


def brute_force(numbers):
    """Every fully parenthesised expression over every order of the numbers, re-printed minimally by ast."""

    def trees(sequence):
        if len(sequence) == 1:
            yield str(sequence[0])
        for cut in range(1, len(sequence)):
            for left in trees(sequence[:cut]):
                for right in trees(sequence[cut:]):
                    for symbol in "+-*/":
                        yield f"({left}{symbol}{right})"

    found = {}
    for order in set(permutations(numbers)):
        for text in trees(order):
            try:
                value, intermediate, _ = walk(text)
            except ZeroDivisionError:
                continue
            if value in countdown.TARGETS and all(v >= 0 and v.denominator == 1 for v in intermediate):
                found.setdefault(int(value), set()).add(regrouped(text))
    return found


def regrouped(text):
    """`text` without each pair of parentheses whose removal keeps the value and the operators' legality."""
    changed = True
    while changed:
        changed = False
        for start, character in enumerate(text):
            if character == "(":
                depth = 0
                for end in range(start, len(text)):
                    depth += (text[end] == "(") - (text[end] == ")")
                    if depth == 0:
                        break
                shorter = text[:start] + text[start + 1 : end] + text[end + 1 :]
                if symbolic(shorter) == symbolic(text):
                    text, changed = shorter, True
                    break
    return text


@cache
def symbolic(text):
    """The exact value with a large prime for each leaf: equal only for equal rational functions."""
    primes = iter((1009, 2003, 3001, 4001))
    tree = ast.parse(text, mode="eval")
    constants = sorted((n for n in ast.walk(tree) if isinstance(n, ast.Constant)), key=lambda n: n.col_offset)
    for constant in constants:
        constant.value = next(primes)

    def visit(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        return OPERATORS[type(node.op)](visit(node.left), visit(node.right))

    return visit(tree.body)


def identity(puzzle):
    return tuple(sorted(puzzle.numbers)), puzzle.target


@pytest.mark.parametrize("numbers", [(3, 5, 8), (2, 2, 6), (7, 7, 7), (4, 12, 20), (1, 1, 13)])
def test_solutions_of_three_numbers_are_those_of_brute_force(numbers):
    expected = brute_force(numbers)
    actual = {target: set(texts) for target, texts in countdown.reachable(numbers).items()}
    assert actual == expected


@pytest.mark.parametrize("numbers", [(1, 3, 4, 6), (1, 2, 2, 6)])
def test_four_numbers_reach_the_targets_of_brute_force(numbers):
    expected = brute_force(numbers)
    actual = countdown.reachable(numbers)
    assert actual.keys() == expected.keys()
    for target, texts in actual.items():
        assert set(texts) <= expected[target]
        assert len(set(texts)) == len(texts) == min(countdown.MAX_EXPRESSIONS, len(expected[target]))
    assert any(len(texts) > countdown.MAX_EXPRESSIONS for texts in expected.values())


@given(st.lists(st.integers(1, 99), min_size=1, max_size=4))
def test_the_targets_are_those_that_some_expression_reaches(numbers):
    """The values alone are computed without the expressions, and each two parts in one order."""
    numbers = tuple(sorted(numbers))
    found = countdown._targets(numbers)
    assert {target for target in range(100) if found >> target & 1} == countdown.reachable(numbers).keys()


def test_solutions_are_right_and_use_each_number_once():
    for puzzle in countdown.puzzles("train", numbers=(3, 4), count=100, seed=5):
        found = countdown.solutions(puzzle.numbers, puzzle.target)
        assert found
        for text in found:
            value, intermediate, leaves = walk(text)
            assert value == puzzle.target
            assert all(v >= 0 and v.denominator == 1 for v in intermediate)
            assert Counter(leaves) == Counter(puzzle.numbers)


def test_solutions_written_out():
    # 3, 4, 5 make 35 in four ways: the order of the sum times the order of the product.
    assert countdown.solutions((5, 3, 4), 35) == ["(3+4)*5", "(4+3)*5", "5*(3+4)", "5*(4+3)"]
    assert countdown.solutions((2, 9, 10), 45) == ["10*9/2", "10/2*9", "9*10/2"]
    assert countdown.solutions((1, 1, 1), 99) == []


def test_puzzles_are_unique_solvable_and_deterministic():
    puzzles = countdown.puzzles("train", numbers=(3, 4), count=200, seed=3)
    assert puzzles == countdown.puzzles("train", numbers=(3, 4), count=200, seed=3)
    assert puzzles[:50] == countdown.puzzles("train", numbers=(3, 4), count=50, seed=3)
    others = countdown.puzzles("train", numbers=(3, 4), count=200, seed=4)
    assert {identity(p) for p in puzzles} != {identity(p) for p in others}
    assert len({identity(p) for p in puzzles}) == 200
    assert Counter(len(p.numbers) for p in puzzles) == {3: 100, 4: 100}
    assert all(1 <= n <= 20 for p in puzzles for n in p.numbers)
    assert any(p.numbers != tuple(sorted(p.numbers)) for p in puzzles)


def test_puzzles_exhaust_exactly_what_exists():
    sizes = {"train": 0, "test": 0}
    for numbers in [(a, b, c) for a in range(1, 7) for b in range(a, 7) for c in range(b, 7)]:
        for target in countdown.reachable(numbers):
            sizes[countdown.split_of(numbers, target)] += 1
    for split, size in sizes.items():
        puzzles = countdown.puzzles(split, numbers=(3,), count=size, seed=1, max_number=6)
        assert len({identity(p) for p in puzzles}) == size
        with pytest.raises(UserError, match=f"only {size} exist"):
            countdown.puzzles(split, numbers=(3,), count=size + 1, seed=1, max_number=6)


def test_an_exhausted_size_leaves_its_turns_to_the_others():
    # (1, 1), (1, 2), (2, 2) reach no target of two digits; with three numbers up to 4 several are reached.
    puzzles = countdown.puzzles("train", numbers=(2, 3), count=5, seed=0, max_number=4)
    pairs = [p for p in puzzles if len(p.numbers) == 2]
    assert {identity(p) for p in pairs} <= {((3, 4), 12), ((4, 4), 16)}
    assert len(puzzles) == 5


def test_splits_are_disjoint_and_the_test_share_is_five_percent():
    train = countdown.puzzles("train", count=11_000, seed=0)
    test = countdown.puzzles("test", count=550, seed=0)
    assert not {identity(puzzle) for puzzle in train} & {identity(puzzle) for puzzle in test}
    pairs = [(a, b) for a in range(1, 21) for b in range(a, 21)]
    everything = [((*pair, 20), target) for pair in pairs for target in countdown.TARGETS]
    share = sum(countdown.split_of(*puzzle) == "test" for puzzle in everything) / len(everything)
    assert share == pytest.approx(0.05, abs=0.005)  # 18,900 draws: three standard deviations


def test_split_never_changes():
    # First 16 hexadecimal digits of `printf 3,4,5=35 | sha256sum` and of 3,4,6=72, modulo 100: 38 and 1.
    # A changed rule would put old test puzzles into the training set of an older checkpoint.
    assert countdown.split_of((3, 4, 5), 35) == "train"
    assert countdown.split_of((3, 4, 6), 72) == "test"
    assert countdown.split_of((6, 3, 4), 72) == "test"  # whatever the order shown


def test_question_and_ground_truth():
    puzzle = countdown.Puzzle((3, 8, 5), 24)
    assert countdown.render(puzzle) == "Make 24 from 3, 8, 5."
    assert countdown.ground_truth(puzzle) == {"numbers": [3, 8, 5], "target": 24}


def test_supervised_pairs_draw_uniformly_from_the_solutions():
    pairs = list(countdown.supervised_pairs("train", count=2000, seed=9))
    assert pairs[:20] == list(countdown.supervised_pairs("train", count=20, seed=9))
    places = Counter()
    puzzles = countdown.puzzles("train", count=2000, seed=9)
    for (question, answer), puzzle in zip(pairs, puzzles, strict=True):
        assert question == countdown.render(puzzle)
        found = countdown.solutions(puzzle.numbers, puzzle.target)
        places[len(found), found.index(answer)] += 1
    four = [places[4, index] for index in range(4)]
    assert sum(four) > 100
    # Each place is binomial(n, 1/4); five standard deviations.
    assert max(four) - sum(four) / 4 < 5 * (sum(four) * 3 / 16) ** 0.5
    assert sum(four) / 4 - min(four) < 5 * (sum(four) * 3 / 16) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, "split is 'validation'"),
        ({"numbers": ()}, r"numbers is \(\)"),
        ({"numbers": (5,)}, r"numbers is \(5,\)"),
        ({"count": 0}, "count is 0"),
        ({"max_number": 100}, "max_number is 100"),
    ],
)
def test_bad_settings_are_named(settings, message):
    defaults = {"split": "train", "numbers": (3,), "count": 1, "seed": 0, "max_number": 20}
    with pytest.raises(UserError, match=message):
        countdown.puzzles(**(defaults | settings))
