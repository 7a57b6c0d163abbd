"""The embedded tasks: which there are, and the puzzles of each."""

from dataclasses import dataclass
from typing import Any, Literal

from policy_split_jax.data import countdown, walk

TASKS = {"countdown": countdown, "walk": walk}


@dataclass(frozen=True)
class PuzzleConfig:
    """Which puzzles are generated."""

    task: Literal["countdown", "walk"] = "countdown"
    """The embedded task."""
    numbers: tuple[int, ...] = (3,)
    """Countdown: how many numbers a puzzle has; several sizes alternate."""
    max_number: int = 20
    """Countdown: the largest number given."""
    walls: tuple[int, ...] = (4,)
    """Walk: how many walls a puzzle has; several numbers alternate."""


def puzzles(config: PuzzleConfig, split: str, *, count: int, seed: int = 0) -> list[Any]:
    """Different puzzles of the task. Raises UserError as the `puzzles` of its module does."""
    match config.task:
        case "countdown":
            given = {"numbers": config.numbers, "max_number": config.max_number}
            return countdown.puzzles(split, count=count, seed=seed, **given)
        case "walk":
            return walk.puzzles(split, count=count, seed=seed, walls=config.walls)
