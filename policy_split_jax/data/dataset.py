"""Rows to training batches: a grain iterator that repeats, reshuffles every epoch and resumes exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain

from policy_split_jax.data.embedded import TASKS, PuzzleConfig, puzzles
from policy_split_jax.data.formats import Row, read_rows
from policy_split_jax.errors import UserError

_DEFAULT = PuzzleConfig()
# No run sees the end of so many; what grain calls endless overflows where a batch is one row.
_EPOCHS = 1 << 31


@dataclass(frozen=True)
class Question:
    """A row and its index among all rows."""

    index: int
    row: Row


def load_rows(
    source: str | Path,
    config: PuzzleConfig = _DEFAULT,
    *,
    question_column: str = "question",
    answer_column: str = "answer",
    split: str = "train",
    count: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """The rows of a file (the columns apply), or "embedded" ones (the other settings apply).

    An embedded row's data_source is its task, and its ground truth what the grader of that name wants.
    Raises UserError as `formats.read_rows` and `embedded.puzzles` do.
    """
    if source != "embedded":
        return read_rows(source, question_column, answer_column)
    task = TASKS[config.task]
    return [
        Row(task.render(puzzle), task.ground_truth(puzzle), config.task, {"split": split})
        for puzzle in puzzles(config, split, count=count, seed=seed)
    ]


def make_iterator(
    rows: Sequence[Row],
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
) -> grain.DatasetIterator:
    """Endless lists of batch_size `Question`s, the same in every process of a run.

    Rows repeat before they are batched: every row comes once an epoch, no batch is partial, and a batch may join
    two epochs. The state (`state_to_json`) fits any number of processes.

    Raises UserError when the sizes do not fit each other.
    """
    _check(len(rows), batch_size, seed)
    indices = grain.MapDataset.source(range(len(rows))).seed(seed)
    if shuffle:
        indices = indices.shuffle()
    batches = indices.repeat(_EPOCHS).batch(batch_size, batch_fn=list)
    questions = batches.map(lambda batch: [Question(index, rows[index]) for index in batch])
    # The rows are in memory: threads and a read-ahead buffer would only cost.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(questions.to_iter_dataset(options))


def state_to_json(iterator: grain.DatasetIterator) -> dict[str, Any]:
    """Where the iterator stands, as a JSON object for a checkpoint."""
    return dict(iterator.get_state())


def restore_state(iterator: grain.DatasetIterator, state: dict[str, Any]) -> None:
    """Continues where `state` was taken, given an iterator over the same rows, batch size and seed."""
    iterator.set_state(state)


def _check(rows: int, batch_size: int, seed: int) -> None:
    if not 1 <= batch_size <= rows:
        raise UserError(f"batch size {batch_size} does not fit {rows} rows; choose one in 1..{rows}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must lie in 0..{2**32 - 1}")
