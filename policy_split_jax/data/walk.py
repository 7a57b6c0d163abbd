"""The second embedded task: walk over a small grid from one cell to another, around walls.

A cell is named by its row and its column (11 is the upper left one), a move by U, D, L or R. An answer is the moves,
`DDRRD`; it is right when it stays on the grid, off the walls, enters no cell twice, ends at the goal, and is at most
`SLACK` moves longer than the shortest walk. Everything is generated from seeds; nothing is downloaded.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from policy_split_jax.data.puzzles import combination, in_turns, shuffled, side_of
from policy_split_jax.errors import UserError

SIDE = 6
MOVES = {"U": -10, "D": 10, "L": -1, "R": 1}
CELLS = tuple(10 * row + column for row in range(1, SIDE + 1) for column in range(1, SIDE + 1))
MAX_WALLS = 10
DISTANCES = range(4, 8)
"""Moves of the shortest walk."""
SLACK = 2
"""How many moves more are allowed; a walk to the same cell is longer by an even number of moves."""
WORDS = ("Walk", " to", " around")
"""What is a token of its own in the task's model, besides the cells."""
TAUGHT = 16
"""How many right answers to a puzzle the warm-up shows."""


@dataclass(frozen=True)
class Puzzle:
    """Start, goal, and the walls in the order in which the question shows them."""

    start: int
    goal: int
    walls: tuple[int, ...]

    @property
    def most(self) -> int:
        """The moves that a right answer may have."""
        return distances(self.goal, self.walls)[self.start] + SLACK


def render(puzzle: Puzzle) -> str:
    """The question, for example `Walk 11 to 45 around 23, 34, 42.`"""
    around = f" around {', '.join(map(str, puzzle.walls))}" if puzzle.walls else ""
    return f"Walk {puzzle.start} to {puzzle.goal}{around}."


def ground_truth(puzzle: Puzzle) -> dict[str, list[int] | int]:
    """What the walk grader needs, as a JSON object."""
    return {"start": puzzle.start, "goal": puzzle.goal, "walls": list(puzzle.walls), "most": puzzle.most}


def end_of(start: int, walls: tuple[int, ...], moves: str) -> int | None:
    """The cell where the moves end; None where they leave the grid, hit a wall or enter a cell twice."""
    cell, closed = start, {start, *walls}
    for move in moves:
        cell += MOVES[move]
        if cell not in CELLS or cell in closed:
            return None
        closed.add(cell)
    return cell


def distances(goal: int, walls: tuple[int, ...]) -> dict[int, int]:
    """Moves of the shortest walk to the goal, of every cell that reaches it."""
    found = {goal: 0}
    waiting = [goal]
    for cell in waiting:
        for step in MOVES.values():
            near = cell + step
            if near in CELLS and near not in walls and near not in found:
                found[near] = found[cell] + 1
                waiting.append(near)
    return found


def solutions(puzzle: Puzzle) -> list[str]:
    """All right answers, sorted by length, then text."""
    left = distances(puzzle.goal, puzzle.walls)
    found: list[str] = []

    def extend(moves: str, cell: int, entered: tuple[int, ...]) -> None:
        if cell == puzzle.goal:
            found.append(moves)
            return
        for move, step in MOVES.items():
            near = cell + step
            if near not in entered and len(moves) + 1 + left.get(near, most) <= most:
                extend(moves + move, near, (*entered, near))

    most = left[puzzle.start] + SLACK
    extend("", puzzle.start, (puzzle.start,))
    return sorted(found, key=lambda moves: (len(moves), moves))


def right_answers(puzzle: Puzzle) -> list[str]:
    """What the warm-up teaches: some right answers, at most `TAUGHT`; the same on every call."""
    found = solutions(puzzle)
    draw = random.Random(f"right answers {render(puzzle)}")
    return draw.sample(found, min(TAUGHT, len(found)))


def wrong_answers(puzzle: Puzzle, count: int) -> list[str]:
    """`count` right answers with one move changed, which leads elsewhere; the same on every call."""
    draw = random.Random(f"wrong answers {render(puzzle)}")
    found = []
    for moves in draw.choices(right_answers(puzzle), k=count):
        at = draw.randrange(len(moves))
        found.append(moves[:at] + draw.choice([move for move in MOVES if move != moves[at]]) + moves[at + 1 :])
    return found


def split_of(puzzle: Puzzle) -> Literal["train", "test"]:
    """The side of a puzzle, whatever the order of its walls."""
    return side_of(f"{puzzle.start},{puzzle.goal},{','.join(map(str, sorted(puzzle.walls)))}")


def puzzles(split: str, *, walls: tuple[int, ...] = (3,), count: int, seed: int) -> list[Puzzle]:
    """`count` different solvable puzzles of `split`, the numbers of walls in `walls` taking turns.

    The same arguments give the same list, and a longer list begins with the shorter one.
    Raises UserError when a setting is out of range or fewer than `count` such puzzles exist.
    """
    _check(split, walls, count)
    found = in_turns((_stream(split, number, seed) for number in dict.fromkeys(walls)), count)
    if len(found) < count:
        raise UserError(
            f"walk: {count} {split} puzzles with {walls} walls were asked for, "
            f"but only {len(found)} exist; ask for fewer or add another number of walls"
        )
    return found


def _check(split: str, walls: tuple[int, ...], count: int) -> None:
    if split not in ("train", "test"):
        raise UserError(f"walk: split is {split!r}; it must be train or test")
    if not walls or not set(walls) <= set(range(MAX_WALLS + 1)):
        raise UserError(f"walk: walls is {walls}; give how many walls a puzzle has: 0 to {MAX_WALLS}")
    if count < 1:
        raise UserError(f"walk: count is {count}; it must be at least 1")


def _stream(split: str, walls: int, seed: int) -> Iterator[Puzzle]:
    """Every puzzle of a split and number of walls once."""
    others = len(CELLS) - 1
    sets = math.comb(others - 1, walls)
    shuffle = random.Random(f"walk order {seed} {walls}").shuffle
    for rank in shuffled((others + 1) * others * sets, [seed, walls]):
        ends, rank = divmod(rank, sets)
        free = list(CELLS)
        start, goal = (free.pop(place) for place in divmod(ends, others))
        shown = [free[place] for place in combination(rank, walls)]
        shuffle(shown)
        puzzle = Puzzle(start, goal, tuple(shown))
        if split_of(puzzle) == split and distances(goal, puzzle.walls).get(start) in DISTANCES:
            yield puzzle
