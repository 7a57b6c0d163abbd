"""What the generators of the embedded tasks share: their split, and the order of their puzzles."""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

import numpy as np

TEST_PERCENT = 5
_ROUNDS = 4

PuzzleT = TypeVar("PuzzleT")


def side_of(text: str) -> Literal["train", "test"]:
    """The side of the puzzle that `text` names, from its hash: the same in every run."""
    digest = hashlib.sha256(text.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


def in_turns(streams: Iterable[Iterator[PuzzleT]], count: int) -> list[PuzzleT]:
    """The first `count` of what the streams give when they take turns; fewer where all of them end."""
    turns = deque(streams)
    found: list[PuzzleT] = []
    while turns and len(found) < count:
        try:
            found.append(next(turns[0]))
        except StopIteration:
            turns.popleft()
        else:
            turns.rotate(-1)
    return found


def combination(rank: int, size: int) -> tuple[int, ...]:
    """The set of `size` numbers >= 0 with this rank (combinatorial number system), sorted.

    Ranks below comb(n, size) are exactly the sets of numbers below n.
    """
    numbers = []
    for place in range(size, 0, -1):
        top = place - 1
        while math.comb(top + 1, place) <= rank:
            top += 1
        rank -= math.comb(top, place)
        numbers.append(top)
    return tuple(reversed(numbers))


def shuffled(count: int, seed: list[int]) -> Iterator[int]:
    """Every number below `count` once, in an order of the seed's own.

    A Feistel network over pairs of numbers up to sqrt(count): the memory is that of such numbers, not of `count`.
    """
    half = math.isqrt(count - 1) + 1
    tables = np.random.default_rng(seed).integers(half, size=(_ROUNDS, half)).tolist()
    for place in range(half * half):
        left, right = divmod(place, half)
        for table in tables:
            left, right = right, (left + table[right]) % half
        if left * half + right < count:
            yield left * half + right
