"""Reads a run folder for the report: finished or under way, complete or not."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_split_jax.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the report knows of a run; `train` and `evaluation` are ordered by step, one row a step."""

    name: str
    train: Sequence[Row]
    evaluation: Sequence[Row]
    samples: Sequence[Row]
    config: str | None
    summary: Row | None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads every folder; runs of the same folder name are told apart by their parents' names."""
    if not folders:
        raise UserError("no run folder given; name at least one, for example runs/tiny")
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Reads metrics.jsonl (required), samples.jsonl, config.yaml and summary.json (where there are any)."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics} not found; give the folder of a run that `policy-split train` has started")
    rows = list(read_rows(metrics))
    samples, config = folder / "samples.jsonl", folder / "config.yaml"
    return Run(
        name=name,
        train=_last_of_each_step(rows, "train"),
        evaluation=_last_of_each_step(rows, "eval"),
        samples=_first_and_last_steps(read_rows(samples)) if samples.is_file() else [],
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


def _first_and_last_steps(rows: Iterable[Row]) -> list[Row]:
    """The rows of each kind's first and last step, holding no more than that in memory."""
    kinds: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        steps = kinds.setdefault(row["kind"], {})
        steps.setdefault(row["step"], []).append(row)
        if len(steps) > 2:
            del steps[sorted(steps)[1]]
    return [row for steps in kinds.values() for step in sorted(steps) for row in steps[step]]


def _read_summary(path: Path) -> Row | None:
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON; delete it, the report does without") from None
    return summary if isinstance(summary, dict) else {"summary": summary}


def _names(folders: Sequence[Path]) -> list[str]:
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    return [
        f"{path.parent.name}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]
