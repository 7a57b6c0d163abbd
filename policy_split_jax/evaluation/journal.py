"""JSONL that long work appends to, so that it goes on where it was killed; the first line holds its settings."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from policy_split_jax.errors import UserError
from policy_split_jax.files import sync, whole_file

Record = dict[str, Any]


def begin(path: Path, settings: Mapping[str, Any], fresh: bool) -> None:
    """Makes sure that a file of these settings is there; `fresh` drops one that was there before.

    Raises UserError where the file is one of other settings, naming them; but one that holds nothing else is replaced.
    """
    if path.is_file() and not fresh:
        with path.open("rb") as file:
            header, more = next_record(file), file.read(1)
        if more or _settings_in(header) is None:
            return _check_settings(path, header, settings)
    with whole_file(path) as file:
        file.write(_line({"settings": settings}))


def next_record(file: BinaryIO) -> Record | None:
    """The object in the next line; None where the line is missing, was cut off, or holds no object."""
    line = file.readline()
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def append(path: Path, records: Iterable[Record]) -> None:
    """Adds lines; they are on the disk when this returns."""
    with path.open("ab") as file:
        file.write("".join(map(_line, records)).encode())
    sync(path)


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
