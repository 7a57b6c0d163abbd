"""Walk: moves that lead from the start to the goal of a grid, around its walls.

A ground truth is `{"start": int, "goal": int, "walls": [int, ...], "most": int}`, the last of which is how many moves
are allowed. The rule is that of `data/walk.py`; moves are looked up one by one, and few enough to be graded without a
process of their own.
"""

import re
from collections.abc import Mapping
from typing import Any

from policy_split_jax.data.walk import end_of
from policy_split_jax.rewards.answers import after_think, last_boxed, last_line

MAX_LENGTH = 200

_MOVES = re.compile("[UDLR]+", re.IGNORECASE)


def score(response: str, ground_truth: Mapping[str, Any]) -> float:
    """1.0 for a response whose moves are a right answer, else 0.0."""
    return float(canonical(response, ground_truth) is not None)


def canonical(response: str, ground_truth: Mapping[str, Any]) -> str | None:
    """The moves of a right answer, as capitals without spaces; None where it is not right."""
    start, goal, walls, most = (ground_truth[key] for key in ("start", "goal", "walls", "most"))
    moves = answered(response, ground_truth)
    right = moves is not None and len(moves) <= most and end_of(start, tuple(walls), moves) == goal
    return moves if right else None


def answered(response: str, ground_truth: Mapping[str, Any]) -> str | None:
    """The moves answered, right or wrong; None where there are none."""
    answer = after_think(response)
    boxed = last_boxed(answer)
    text = last_line(answer) if boxed is None else boxed
    if len(text) > MAX_LENGTH:
        return None
    moves = "".join(text.split())
    return moves.upper() if _MOVES.fullmatch(moves) else None
