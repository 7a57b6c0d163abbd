"""The embedded task: reach a target from a few numbers with + - * / and parentheses, each number used once.

A puzzle has many right answers, so it shows at once whether a policy explores. Everything is generated from
seeds; nothing is downloaded. The expressions offered for supervision have integer, non-negative
intermediate values, and every target is reachable by such an expression; a grader may accept more.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import numpy as np

from policy_split_jax.data.puzzles import combination, in_turns, side_of
from policy_split_jax.errors import UserError

TARGETS = range(10, 100)
MAX_EXPRESSIONS = 64
"""How many expressions are kept per target when there are four numbers or more."""
WORDS = ("Make", " from")
"""What is a token of its own in the task's model, besides numbers."""

# Binding strength of the outermost operator; it decides where parentheses are needed.
_SUM, _PRODUCT, _ATOM = 0, 1, 2
_Expressions = dict[int, dict[str, int]]


@dataclass(frozen=True)
class Puzzle:
    """Numbers in the order in which the question shows them, and the value to reach."""

    numbers: tuple[int, ...]
    target: int


def render(puzzle: Puzzle) -> str:
    """The question, for example `Make 35 from 3, 5, 4.`"""
    return f"Make {puzzle.target} from {', '.join(map(str, puzzle.numbers))}."


def ground_truth(puzzle: Puzzle) -> dict[str, list[int] | int]:
    """What the countdown grader needs, as a JSON object."""
    return {"numbers": list(puzzle.numbers), "target": puzzle.target}


def solutions(numbers: tuple[int, ...], target: int) -> list[str]:
    """Distinct expressions over exactly `numbers` with value `target`, sorted by length, then text.

    Parentheses are minimal, there are no spaces, and both `3+4` and `4+3` appear. All of them for three
    numbers; at most `MAX_EXPRESSIONS`, spread evenly over that order, for four. Empty when there is none.
    """
    return list(reachable(tuple(sorted(numbers))).get(target, ()))


@lru_cache(maxsize=2048)
def reachable(numbers: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
    """The expressions of every target in 10..99 that `numbers` reach (see `solutions`)."""
    by_value = _expressions(tuple(sorted(numbers)))
    return {value: _kept(by_value[value], len(numbers)) for value in sorted(by_value) if value in TARGETS}


def right_answers(puzzle: Puzzle) -> list[str]:
    """What the warm-up teaches: the puzzle's solutions."""
    return solutions(puzzle.numbers, puzzle.target)


def wrong_answers(puzzle: Puzzle, count: int) -> list[str]:
    """Expressions over the puzzle's numbers that reach other targets, at most `count`; the same on every call."""
    draw = random.Random(f"wrong answers {render(puzzle)}")
    found = reachable(tuple(sorted(puzzle.numbers)))
    others = [target for target in found if target != puzzle.target]
    return [draw.choice(found[target]) for target in draw.sample(others, min(count, len(others)))]


def split_of(numbers: tuple[int, ...], target: int) -> Literal["train", "test"]:
    """The side of a puzzle, whatever the order of its numbers."""
    return side_of(f"{','.join(map(str, sorted(numbers)))}={target}")


def puzzles(
    split: str, *, numbers: tuple[int, ...] = (3,), count: int, seed: int, max_number: int = 20
) -> list[Puzzle]:
    """`count` different solvable puzzles of `split`, the sizes in `numbers` taking turns.

    The same arguments give the same list, and a longer list begins with the shorter one.
    Raises UserError when a setting is out of range or fewer than `count` such puzzles exist.
    """
    _check(split, numbers, count, max_number)
    found = in_turns((_stream(split, size, seed, max_number) for size in dict.fromkeys(numbers)), count)
    if len(found) < count:
        raise UserError(
            f"countdown: {count} {split} puzzles of {numbers} numbers up to {max_number} were asked for, "
            f"but only {len(found)} exist; ask for fewer or raise max_number"
        )
    return found


def supervised_pairs(
    split: str, *, numbers: tuple[int, ...] = (3,), count: int, seed: int, max_number: int = 20
) -> Iterator[tuple[str, str]]:
    """(question, expression) of each of `puzzles`; the expression is drawn uniformly from the solutions."""
    draw = random.Random(f"countdown answers {seed}")
    for puzzle in puzzles(split, numbers=numbers, count=count, seed=seed, max_number=max_number):
        yield render(puzzle), draw.choice(solutions(puzzle.numbers, puzzle.target))


def _check(split: str, numbers: tuple[int, ...], count: int, max_number: int) -> None:
    if split not in ("train", "test"):
        raise UserError(f"countdown: split is {split!r}; it must be train or test")
    if not numbers or not set(numbers) <= {2, 3, 4}:
        raise UserError(f"countdown: numbers is {numbers}; give how many numbers a puzzle has: 2, 3 or 4")
    if count < 1:
        raise UserError(f"countdown: count is {count}; it must be at least 1")
    if not 1 <= max_number <= 99:
        raise UserError(f"countdown: max_number is {max_number}; it must lie in 1..99")


def _stream(split: str, size: int, seed: int, max_number: int) -> Iterator[Puzzle]:
    """Every puzzle of a split and size once: rounds over all multisets, with another target in each round."""
    multisets = math.comb(max_number + size - 1, size)
    generator = np.random.default_rng([seed, size])
    order = generator.permutation(multisets)
    starts = generator.integers(len(TARGETS), size=multisets)
    shuffle = random.Random(f"countdown order {seed} {size}").shuffle
    for turn in range(len(TARGETS)):
        for rank, start in zip(order, starts, strict=True):
            # 7 is prime to 90, so the turns of a multiset visit every target once.
            target = TARGETS[(int(start) + 7 * turn) % len(TARGETS)]
            numbers = _multiset(int(rank), size)
            if split_of(numbers, target) == split and _targets(numbers) >> target & 1:
                shown = list(numbers)
                shuffle(shown)
                yield Puzzle(tuple(shown), target)


@lru_cache(maxsize=1 << 16)
def _multiset(rank: int, size: int) -> tuple[int, ...]:
    """The multiset of `size` numbers >= 1 with this rank, sorted.

    Ranks below comb(m + size - 1, size) are exactly the multisets of numbers up to m.
    """
    return tuple(number - place + 1 for place, number in enumerate(combination(rank, size)))


def _partitions(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each way, once, to give every number of a sorted tuple to one of two non-empty ordered sides."""
    seen = set()
    for chosen in range(1, 2 ** len(numbers) - 1):
        left = tuple(number for i, number in enumerate(numbers) if chosen >> i & 1)
        if left not in seen:
            seen.add(left)
            yield left, tuple(number for i, number in enumerate(numbers) if not chosen >> i & 1)


def _results(left: int, right: int) -> Iterator[tuple[str, int]]:
    """The operators that keep the value a non-negative integer, with that value."""
    yield "+", left + right
    yield "*", left * right
    if left >= right:
        yield "-", left - right
    if right and left % right == 0:
        yield "/", left // right


# As many as there are sets of four numbers up to 30, and more; a mask takes little memory.
@lru_cache(maxsize=1 << 16)
def _targets(numbers: tuple[int, ...]) -> int:
    """The targets that a sorted tuple reaches, a bit each; much faster than building the expressions."""
    return sum(1 << value for value in _reached(numbers) if value in TARGETS)


def _reached(numbers: tuple[int, ...]) -> set[int]:
    """Every value of a sorted tuple: what `_results` gives of its parts, without naming the operators."""
    if len(numbers) == 1:
        return set(numbers)
    found: set[int] = set()
    for left, right in _partitions(numbers):
        # Each two parts once: both orders are below.
        if left <= right:
            pairs = list(product(_values(left), _values(right)))
            found.update([a + b for a, b in pairs], [a * b for a, b in pairs], [abs(a - b) for a, b in pairs])
            found.update([a // b for a, b in pairs if b and not a % b], [b // a for a, b in pairs if a and not b % a])
    return found


# Parts of larger tuples, again and again. Bounded so that those of four numbers up to 30 stay, some 20 MB.
_values = lru_cache(maxsize=8192)(_reached)


@lru_cache(maxsize=2048)
def _expressions(numbers: tuple[int, ...]) -> _Expressions:
    """value -> {expression: binding strength} over a sorted tuple of numbers."""
    if len(numbers) == 1:
        return {numbers[0]: {str(numbers[0]): _ATOM}}
    found: _Expressions = {}
    for left, right in _partitions(numbers):
        sides = _expressions(left), _expressions(right)
        for a, lefts in sides[0].items():
            for b, rights in sides[1].items():
                for operator, value in _results(a, b):
                    found.setdefault(value, {}).update(_joined(lefts, operator, rights))
    return found


def _joined(lefts: dict[str, int], operator: str, rights: dict[str, int]) -> dict[str, int]:
    """All `left operator right` with the fewest parentheses that keep the value.

    Dropping them in a+(b-c) and a*(b/c) regroups to the left, where the values stay non-negative integers.
    """
    strength = _SUM if operator in "+-" else _PRODUCT
    right_needs = strength + (operator in "-/")
    left_texts = [text if own >= strength else f"({text})" for text, own in lefts.items()]
    right_texts = [text if own >= right_needs else f"({text})" for text, own in rights.items()]
    return {f"{left}{operator}{right}": strength for left in left_texts for right in right_texts}


def _kept(expressions: dict[str, int], size: int) -> tuple[str, ...]:
    ordered = sorted(expressions, key=lambda text: (len(text), text))
    if size < 4 or len(ordered) <= MAX_EXPRESSIONS:
        return tuple(ordered)
    return tuple(ordered[i * len(ordered) // MAX_EXPRESSIONS] for i in range(MAX_EXPRESSIONS))
