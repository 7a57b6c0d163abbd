"""Ragged token lists into rectangular arrays, and the lengths such arrays may have."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

TokenRow = Sequence[int] | Int[np.ndarray, "_"]


def bucket(length: int, limit: int, smallest: int = 16) -> int:
    """The smallest power of two, at least `smallest`, that holds `length`, but no more than `limit`.

    Few lengths mean few compilations.
    """
    size = 1
    while size < max(length, smallest):
        size *= 2
    return min(size, limit)


def pad_right(rows: Sequence[TokenRow], width: int) -> Int[np.ndarray, "R W"]:
    """Rows padded with 0 behind."""
    padded = np.zeros((len(rows), width), np.int32)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return padded


def pad_left(rows: Sequence[TokenRow], width: int) -> Int[np.ndarray, "R W"]:
    """Rows padded with 0 in front."""
    padded = np.zeros((len(rows), width), np.int32)
    for at, row in enumerate(rows):
        padded[at, width - len(row) :] = row
    return padded


def lengths(rows: Sequence[TokenRow]) -> Int[np.ndarray, "R"]:
    return np.array([len(row) for row in rows], np.int32)
