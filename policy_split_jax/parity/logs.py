"""Training metrics of a run, from our own folders and from what verl's loggers and other tools leave behind."""

import csv
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from policy_split_jax.errors import UserError
from policy_split_jax.report.runs import number

Points = tuple[int, dict[str, float]]
"""A step, and values of that step by metric."""

EVENT_FILES = "events.out.tfevents.*"
STEP_COLUMNS = ("Step", "trainer/global_step", "_step")
"""Of a table by Weights & Biases; the first that is there counts."""

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What stands before is a prefix by ray, or a progress bar that shares the line.
_CONSOLE = re.compile(r"(?<![\w/])step:(\d+) - (.*)")
_WRAPPED = re.compile(r"\w[\w.]*\(([^()]*)\)")


@dataclass(frozen=True)
class Curves:
    """The metrics of one run: (step, value) by step, each step once, every value finite."""

    name: str
    metrics: Mapping[str, Sequence[tuple[int, float]]]


def read_curves(path: str | Path) -> Curves:
    """Reads a run's metrics, by what the path is:

    - a folder of our own run (metrics.jsonl; evaluations as `eval/NAME`);
    - a folder with TensorBoard's event files (the extra `tensorboard` reads them);
    - `.jsonl` of verl's file logger
      (https://github.com/volcengine/verl/blob/main/verl/utils/tracking.py), or flat objects with a `step`;
    - `.log` or `.txt` with the lines of verl's console logger, which older versions round to three decimals;
    - `.csv` as Weights & Biases or TensorBoard export it; the latter holds one metric, named as the file.

    Where a step is there twice, the later value counts, as in a run that was resumed. Values that are not finite
    are left out. A last line that has no newline yet may be incomplete, and is then passed over.

    Raises:
      UserError: nothing there, another format, a malformed line, no metrics, or a missing package.
    """
    path = Path(path)
    metrics: dict[str, dict[int, float]] = {}
    try:
        for step, values in _reader(path)():
            for name, value in values.items():
                if math.isfinite(value):
                    metrics.setdefault(name, {})[step] = value
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not metrics:
        raise UserError(f"{path}: holds no metrics; give the log of a run that has made a step")
    name = path.resolve().name if path.is_dir() else path.stem
    return Curves(name, {metric: sorted(points.items()) for metric, points in metrics.items()})


def _reader(path: Path) -> Callable[[], Iterable[Points]]:
    if path.is_dir():
        if (path / "metrics.jsonl").is_file():
            return partial(_jsonl_points, path / "metrics.jsonl")
        if any(path.glob(EVENT_FILES)):
            return partial(_event_points, path)
        raise UserError(f"{path}: holds neither metrics.jsonl nor {EVENT_FILES}; give the folder of a run")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    readers = {".jsonl": _jsonl_points, ".log": _console_points, ".txt": _console_points, ".csv": _csv_points}
    if path.suffix not in readers:
        known = ", ".join(readers)
        raise UserError(f"{path}: unknown format {path.suffix!r}; logs end in {known}, or are folders of runs")
    return partial(readers[path.suffix], path)


def _jsonl_points(path: Path) -> Iterator[Points]:
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            place = f"{path}, line {line_number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                if not line.endswith(b"\n"):
                    return
                raise UserError(f"{place} is not JSON; repair or delete that line") from None
            yield _row_points(place, row)


def _row_points(place: str, row: Any) -> Points:
    """Of an object as verl's file logger writes it, or of a flat one."""
    step = number(row, "step") if isinstance(row, dict) else None
    if step is None or not step.is_integer():
        raise UserError(f'{place} is no JSON object with a whole "step"; repair or delete that line')
    if not isinstance(values := row.get("data"), dict):
        values = {key: value for key, value in row.items() if key != "step"}
    prefix = "eval/" if row.get("kind") == "eval" else ""
    found = {f"{prefix}{key}": number(values, key) for key in values}
    return int(step), {key: value for key, value in found.items() if value is not None}


def _console_points(path: Path) -> Iterator[Points]:
    """Of `step:1 - NAME:VALUE - NAME:VALUE …`; whatever else a log holds is passed over."""
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            match = _CONSOLE.search(_ANSI.sub("", line.decode("utf-8", errors="replace")).rstrip())
            # A number at the end of a line that goes on would be cut without looking so.
            if match is None or not line.endswith(b"\n"):
                continue
            pieces = match[2].split(" - ")
            pairs = [_console_pair(piece) for piece in pieces]
            if pairs[0] is None:
                continue
            if None in pairs:
                piece = pieces[pairs.index(None)]
                raise UserError(f"{path}, line {line_number}: {piece[:80]!r} is not NAME:NUMBER; repair that line")
            yield int(match[1]), dict(pair for pair in pairs if pair is not None)


def _console_pair(piece: str) -> tuple[str, float] | None:
    """(name, value) of `actor/lr:1e-06` or `actor/lr:np.float64(1e-06)`; None for anything else."""
    name, _, text = piece.strip().rpartition(":")
    wrapped = _WRAPPED.fullmatch(text)
    value = _float(wrapped[1] if wrapped else text)
    return (name, value) if name and value is not None else None


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _csv_points(path: Path) -> Iterator[Points]:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    reader = csv.reader(lines)
    unfinished = len(lines) if lines[-1] else 0
    try:
        header = next(reader, [])
        step, columns = _csv_columns(path, header)
        for cells in reader:
            if not any(cells):
                continue
            try:
                yield _csv_row(f"{path}, line {reader.line_num}", header, cells, step, columns)
            except UserError:
                if reader.line_num == unfinished:
                    return
                raise
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; export the file again") from None


def _csv_columns(path: Path, header: Sequence[str]) -> tuple[int, dict[int, str]]:
    """The place of the steps, and the metric of each other column that holds one."""
    if list(header) == ["Wall time", "Step", "Value"]:
        return 1, {2: path.stem}
    found = [name for name in STEP_COLUMNS if name in header]
    if not found:
        raise UserError(f"{path}, line 1: no column {', '.join(STEP_COLUMNS)}; export the steps too")
    split = {place: column.rpartition(" - ") for place, column in enumerate(header) if column not in STEP_COLUMNS}
    runs = sorted({run for run, _, _ in split.values() if run})
    if len(runs) > 1:
        raise UserError(f"{path}, line 1: holds several runs ({', '.join(runs)}); export each to a file of its own")
    columns = {
        place: metric
        for place, (_, _, metric) in split.items()
        if metric and not metric.startswith("_") and not metric.endswith(("__MIN", "__MAX"))
    }
    if twice := sorted(metric for metric in set(columns.values()) if list(columns.values()).count(metric) > 1):
        raise UserError(f"{path}, line 1: {twice[0]} is there twice; export each run to a file of its own")
    return header.index(found[0]), columns


def _csv_row(place: str, header: Sequence[str], cells: Sequence[str], step: int, columns: Mapping[int, str]) -> Points:
    if len(cells) != len(header):
        raise UserError(f"{place}: {len(cells)} cells under {len(header)} columns; repair or delete that line")
    whole = _float(cells[step])
    if whole is None or not whole.is_integer():
        raise UserError(f"{place}: {header[step]} holds {cells[step]!r}, no whole number; repair or delete that line")
    values = {metric: _float(cells[at]) for at, metric in columns.items() if cells[at].strip()}
    for metric, value in values.items():
        if value is None:
            raise UserError(f"{place}: {metric} holds no number; repair that cell, or leave the column out")
    return int(whole), {metric: value for metric, value in values.items() if value is not None}


def _event_points(folder: Path) -> Iterator[Points]:
    try:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-not-found]
    except ImportError:
        needed = "TensorBoard's event files need tensorboardX: pip install 'policy-split-jax[tensorboard]'"
        raise UserError(f"{folder}: {needed}") from None
    from google.protobuf.message import DecodeError

    # The names begin with the time, so that a resumed run's file comes later.
    for path in sorted(folder.glob(EVENT_FILES)):
        with path.open("rb") as file:
            for place, record in _records(path, file):
                try:
                    event = Event.FromString(record)
                except DecodeError:
                    raise UserError(f"{place} is no event of TensorBoard; remove that file") from None
                scalars = {value.tag: _scalar(value) for value in event.summary.value}
                yield event.step, {tag: value for tag, value in scalars.items() if value is not None}


def _records(path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(place for error messages, content) of a TFRecord file: length, its checksum, content, its checksum.

    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    An incomplete last record is still being written.
    """
    while len(head := file.read(12)) == 12:
        place = f"{path}: the record before byte {file.tell()}"
        length = struct.unpack("<Q", _checked(place, head))[0]
        if len(record := file.read(length + 4)) < length + 4:
            return
        yield place, _checked(place, record)


def _checked(place: str, part: bytes) -> bytes:
    """The part without its checksum at the end; UserError where the two do not fit."""
    from tensorboardX.record_writer import masked_crc32c  # type: ignore[import-not-found]

    content, checksum = part[:-4], part[-4:]
    if struct.pack("<I", masked_crc32c(content)) != checksum:
        raise UserError(f"{place} is damaged; copy the file again, or remove it")
    return content


def _scalar(value: Any) -> float | None:
    """Of a value in an event: a plain number, or a tensor that holds one float; None for anything else."""
    if value.WhichOneof("value") == "simple_value":
        return float(value.simple_value)
    # Data types 1 and 2 of TensorFlow: float and double. What holds no tensor has the type 0.
    tensor, dtype = value.tensor, {1: "<f4", 2: "<f8"}.get(value.tensor.dtype)
    if dtype is None:
        return None
    listed = tensor.float_val if tensor.dtype == 1 else tensor.double_val
    numbers = listed or np.frombuffer(tensor.tensor_content, dtype).tolist()
    return float(numbers[0]) if len(numbers) == 1 else None
