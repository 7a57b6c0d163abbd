"""Which rollouts share a row, and which questions a microbatch: the host's half of packing.

A microbatch is a fixed number of rows of a fixed length, filled with whole questions. Their sequences (a prompt and
a response) lie one behind another, so that a short response does not pay for the longest.
"""

from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Array, Int

from policy_split_jax.objective.scorer import Places
from policy_split_jax.padding import bucket
from policy_split_jax.training.accumulate import Microbatches
from policy_split_jax.training.batch import Batch, Packing

_SMALLEST_ROW = 128


class _Rows(NamedTuple):
    """Where a question's sequences lie, and what is left of the rows."""

    row: Int[np.ndarray, "G"]
    start: Int[np.ndarray, "G"]
    free: Int[np.ndarray, "R"]


def pack_batch(batch: Batch, *, rows: int, limit: int, updates: int) -> tuple[Packing, float]:
    """Packs each update's questions; also the share of the rows' cells that hold a token.

    `rows` of `limit` tokens is what a microbatch holds. Where the longest sequence is much shorter than that, rows
    are too, and there are more of them. Raises ValueError where a question may not fit into a microbatch.
    """
    group = batch.responses.shape[1]
    if rows < group:
        raise ValueError(f"{rows} rows cannot hold {group} rollouts, each of which may need a row of its own")
    prompts, responses = np.asarray(batch.prompt_lengths), np.asarray(batch.response_lengths)
    sizes = prompts.max(axis=1)[:, None] + responses
    width = bucket(int(sizes.max()), limit, _SMALLEST_ROW)
    height = rows * (limit // width)
    each = [_pack_update(part, height, width) for part in np.split(sizes, updates)]
    members, used, row, start = (np.stack([one[at] for one in each]) for at in range(4))
    starts = start + prompts.max(axis=1).reshape(updates, -1, 1)
    tokens = (prompts[:, None].mean(axis=2) + responses).sum()
    microbatches = Microbatches(cast(Array, members), cast(Array, used))
    packing = Packing(microbatches, Places(row, starts.astype(np.int32), height, width))
    return packing, float(tokens / (used.sum() * height * width))


def _pack_update(
    sizes: Int[np.ndarray, "P G"], height: int, width: int
) -> tuple[Int[np.ndarray, "P Q"], Int[np.ndarray, ""], Int[np.ndarray, "P G"], Int[np.ndarray, "P G"]]:
    """(members, number of microbatches, row of each sequence, its first column).

    The largest questions first, each into the first microbatch that has room for all of its sequences.
    """
    questions = len(sizes)
    most = min(questions, height)
    members: list[list[int]] = []
    free: list[Int[np.ndarray, "R"]] = []
    row, start = np.zeros(sizes.shape, np.int32), np.zeros(sizes.shape, np.int32)
    for question in np.argsort(-sizes.sum(axis=1), kind="stable"):
        open_ones = (at for at in range(len(free)) if len(members[at]) < most)
        found = ((at, placed) for at in open_ones if (placed := _place(sizes[question], free[at], width)))
        at, placed = next(found, (len(free), None))
        if placed is None:
            members.append([])
            free.append(np.full(height, width))
            placed = _place(sizes[question], free[at], width)
            assert placed is not None, "an empty microbatch holds any question"
        members[at].append(int(question))
        row[question], start[question], free[at] = placed
    padded = np.full((questions, most), questions, np.int32)
    for at, chosen in enumerate(members):
        padded[at, : len(chosen)] = chosen
    return padded, np.asarray(len(members), np.int32), row, start


def _place(sizes: Int[np.ndarray, "G"], free: Int[np.ndarray, "R"], width: int) -> _Rows | None:
    """The longest sequence first, each into the fullest row that has room; None where one has none."""
    if free.sum() < sizes.sum():
        return None
    free, row, start = free.copy(), np.zeros_like(sizes), np.zeros_like(sizes)
    for at in np.argsort(-sizes, kind="stable"):
        room = np.flatnonzero(free >= sizes[at])
        if not len(room):
            return None
        row[at] = room[np.argmin(free[room])]
        start[at] = width - free[row[at]]
        free[row[at]] -= sizes[at]
    return _Rows(row, start, free)
