"""Reads a run folder for the report: finished or under way, complete or not."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_split_jax.errors import UserError

Row = dict[str, Any]

EVALUATIONS_READ = 16
"""Of so many evaluations the samples are read at most."""


@dataclass(frozen=True)
class Run:
    """What the report knows of a run; `train` and `evaluation` are ordered by step, one row a step."""

    name: str
    train: Sequence[Row]
    evaluation: Sequence[Row]
    samples: Sequence[Row]
    config: str | None
    summary: Row | None


def read_run(folder: Path, name: str) -> Run:
    """Reads metrics.jsonl (required), samples.jsonl, config.yaml and summary.json (where there are any)."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics} not found; give the folder of a run that `policy-split train` has started")
    rows = list(read_rows(metrics))
    config = folder / "config.yaml"
    train, evaluation = (_last_of_each_step(rows, kind) for kind in ("train", "eval"))
    return Run(
        name=name,
        train=train,
        evaluation=evaluation,
        samples=_samples_of(folder / "samples.jsonl", train, evaluation),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        summary=_read_summary(folder / "summary.json"),
    )


def read_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a JSON lines file, each an object with a whole `step` and a `kind`.

    A last line that does not end in a newline is still being written, and is passed over where it is
    incomplete; anything else that is malformed is a UserError naming the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"{path}, line {number} is not JSON; repair or delete that line") from None
            yield _checked(row, path, number)


def number(row: Row, key: str) -> float | None:
    """The row's value as a finite float; None where it is missing, null, NaN or no number."""
    value = row.get(key)
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under this key."""
    pairs = [(row["step"], value) for row in rows if (value := number(row, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _checked(row: Any, path: Path, line: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {line} is not a JSON object; repair or delete that line")
    if type(row.get("step")) is not int or not isinstance(row.get("kind"), str):
        raise UserError(f'{path}, line {line} lacks a whole "step" or a "kind"; repair or delete that line')
    return row


def _last_of_each_step(rows: Sequence[Row], kind: str) -> list[Row]:
    # A resumed run writes the steps after its checkpoint again; the later row is the one that counts.
    latest = {row["step"]: row for row in rows if row["kind"] == kind}
    return [latest[step] for step in sorted(latest)]


def _samples_of(path: Path, train: Sequence[Row], evaluation: Sequence[Row]) -> list[Row]:
    """The samples of the first and last step, and of evaluations spread evenly from the first to the last."""
    wanted = {("train", row["step"]) for row in (*train[:1], *train[-1:])}
    wanted |= {("eval", row["step"]) for row in spread(evaluation, EVALUATIONS_READ)}
    return [row for row in read_rows(path) if (row["kind"], row["step"]) in wanted] if path.is_file() else []


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many (two or more) of the values, evenly from the first to the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(at * (len(values) - 1) / (most - 1))] for at in range(most)]


def _read_summary(path: Path) -> Row | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON; delete it, the report does without") from None
    return summary if isinstance(summary, dict) else {"summary": summary}
