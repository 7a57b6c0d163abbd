"""JSONL that long work appends to, so that it goes on where it was killed; the first line holds its settings."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from policy_split_jax.errors import UserError
from policy_split_jax.files import alone, sync, whole_file

Record = dict[str, Any]


@contextmanager
def journal(path: Path, settings: Mapping[str, Any], fresh: bool) -> Iterator[None]:
    """A file of these settings, for one process while the block lasts; `fresh` begins it anew and keeps what was there
    as `NAME.before`.

    Raises UserError where another process is at work on it, or where it is one of other settings, naming them; but one
    that holds nothing else is replaced.
    """
    refusal = f"{path}: another process is at work on it; wait, or choose another --output"
    with alone(path.with_name(f".{path.name}.lock"), refusal):
        _begin(path, settings, fresh)
        yield


def next_record(file: BinaryIO) -> Record | None:
    """The object in the next line; None where the line is missing, was cut off, or holds no object."""
    return _record(file.readline())


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines; they are on the disk when this returns."""
    with path.open("ab") as file:
        # Lone surrogates in what a server says have no UTF-8.
        file.write("".join(map(_line, records)).encode(errors="replace"))
    sync(path)


def cut(path: Path, end: int) -> None:
    """Cuts off what lies behind `end`: what a kill left of the last work.

    Raises UserError where whole lines follow a broken one there: no kill does that, and they may be dear.
    """
    broken, at = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            at += len(line)
            if at <= end:
                continue
            if _record(line) is None:
                broken = broken or number
            elif broken:
                remedy = "repair it, or delete it and all behind it to have that done again"
                raise UserError(f"{path}, line {broken} is damaged, and others follow; {remedy}")
    with path.open("rb+") as file:
        file.truncate(end)


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _begin(path: Path, settings: Mapping[str, Any], fresh: bool) -> None:
    if path.is_file():
        with path.open("rb") as file:
            header, more = next_record(file), file.read(1)
        if more or _settings_in(header) is None:
            if not fresh:
                return _check_settings(path, header, settings)
            path.replace(path.with_name(f"{path.name}.before"))
    with whole_file(path) as file:
        file.write(_line({"settings": settings}))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _settings_in(header: Record | None) -> Record | None:
    found = (header or {}).get("settings")
    return found if isinstance(found, dict) else None


def _check_settings(path: Path, header: Record | None, settings: Mapping[str, Any]) -> None:
    there = _settings_in(header)
    if there is None:
        raise UserError(f"{path}: its first line holds no settings; choose another --output, or give --fresh")
    now = json.loads(json.dumps(settings))
    differing = [
        f"{name} ({_shown(there.get(name))} there, {_shown(now.get(name))} now)"
        for name in {**there, **now}
        if there.get(name) != now.get(name)
    ]
    if differing:
        raise UserError(f"{path}: has other settings: {', '.join(differing)}; give those, another --output, or --fresh")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
