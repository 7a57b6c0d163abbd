"""Question files: JSONL, parquet and CSV, as plain columns or in verl's layout (chat prompt and reward_model)."""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn

from policy_split_jax.errors import UserError

_LEVELS = 64
"""How deep lists and objects may lie in each other: code that is called from deeper writes them again."""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


# Python reads NaN and Infinity, which other readers do not, and keeps the last of two keys that are the same.
_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_object)
_ENCODER = json.JSONEncoder(allow_nan=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One question, without any system turn (the modes own that), and what its grader compares with.

    `ground_truth` is any JSON value, as found. `data_source` is the column of that name, else the file's name
    without its suffix. `extra_info` is verl's column of that name, or the other columns of a plain file.
    """

    question: str
    ground_truth: Any
    data_source: str
    extra_info: dict[str, Any] = field(default_factory=dict)
    place: str = field(default="", compare=False)
    """The file, and the line or row there; for error messages."""


def read_rows(path: str | Path, question_column: str = "question", answer_column: str = "answer") -> list[Row]:
    """Reads a `.jsonl`, `.parquet` or `.csv` file.

    A record that has both named columns is plain; otherwise one whose `prompt` is a list of chat messages is
    in verl's layout (https://verl.readthedocs.io/en/latest/preparation/prepare_data.html): the question is
    the user's message, the ground truth `reward_model.ground_truth`.

    Raises UserError, naming the file, the line or row (from 1) and the remedy, for whatever does not fit.
    """
    path = Path(path)
    return rows_of(path, lambda place, record: _row(place, path.stem, record, question_column, answer_column))


def rows_of(path: Path, row: Callable[[str, dict[str, Any]], Row]) -> list[Row]:
    """What `row` makes of each record and of its place. Raises UserError where there is none."""
    rows = [replace(row(place, record), place=place) for place, record in read_records(path)]
    if not rows:
        raise UserError(f"{path}: holds no rows; give a file with at least one question")
    return rows


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for error messages, record) of each row of a .jsonl, .parquet or .csv file. Raises UserError."""
    readers = {".jsonl": _jsonl_records, ".parquet": _parquet_records, ".csv": _csv_records}
    reader = readers.get(path.suffix)
    if reader is None:
        raise UserError(f"{path}: unknown format {path.suffix!r}; question files end in .jsonl, .parquet or .csv")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                place = f"{path}:{number}"
                yield place, _json_object(place, line)


def _json_object(place: str, line: bytes) -> dict[str, Any]:
    try:
        record = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise UserError(f"{place}: malformed JSON ({error}); write one JSON object per line") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: holds {_kind(record)}; write one JSON object per line")
    if b"\\u" in line:
        _check_characters(place, record)
    return record


def _check_characters(place: str, record: dict[str, Any]) -> None:
    """Raises UserError for half a surrogate pair, which an escape can spell and no file can hold."""
    for column, value in record.items():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = column.encode(errors="backslashreplace").decode()
            raise UserError(f"{place}: {shown} holds half a surrogate pair; repair the text") from None
        except RecursionError:
            raise _too_deep(place, column) from None


def _too_deep(place: str, column: str) -> UserError:
    return UserError(f"{place}: {column} is nested deeper than {_LEVELS} levels; flatten it")


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each row, without holding more than a batch of Arrow memory."""
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    with path.open("rb") as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
        # Damaged text and times too exact for Python are ValueErrors, other damage is an OSError.
        except (pyarrow.lib.ArrowException, ValueError, OverflowError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{path}: not a readable parquet file ({reason}); write it again") from None


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each row below the header; every value is text."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _check_names(path, reader.fieldnames or ())
            for record in reader:
                number += 1
                place = f"{path}, row {number}"
                if None in record or None in record.values():
                    raise UserError(f"{place}: has not as many fields as the header; quote fields that hold commas")
                yield place, record
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: malformed CSV ({error}); write it again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: has the column {twice[0]!r} more than once; rename or remove one")


def _row(place: str, stem: str, record: dict[str, Any], question_column: str, answer_column: str) -> Row:
    named = (question_column, answer_column)
    data_source = record.get("data_source") or stem
    if not isinstance(data_source, str):
        raise UserError(f"{place}: data_source holds {_kind(data_source)}; it must be text")
    if not set(named) <= record.keys() and isinstance(record.get("prompt"), list):
        question = _chat_question(place, record["prompt"])
        ground_truth = _verl_ground_truth(place, record)
        extra_info = record.get("extra_info") or {}
        if not isinstance(extra_info, dict):
            raise UserError(f"{place}: extra_info holds {_kind(extra_info)}; it must be an object")
    else:
        question, ground_truth = (_column(place, record, column) for column in named)
        extra_info = {key: value for key, value in record.items() if key not in {*named, "data_source"}}
        check_text(place, question_column, question)
    check_values(place, {answer_column: ground_truth, **extra_info})
    return Row(question, ground_truth, data_source, extra_info)


def _column(place: str, record: dict[str, Any], column: str) -> Any:
    if column not in record:
        found = names_of(record)
        raise UserError(f"{place}: no column {column!r}; columns found: {found}; set question_column and answer_column")
    return record[column]


def names_of(record: dict[str, Any]) -> str:
    """The columns of a record, for error messages."""
    names = list(record)
    return ", ".join([*names[:20], *(["…"] if len(names) > 20 else [])]) or "none"


def question_of(place: str, record: dict[str, Any]) -> str:
    """The column `question` of a record that needs no answer; UserError where there is no text to ask."""
    if "question" not in record:
        raise UserError(f"{place}: no column 'question'; columns found: {names_of(record)}")
    check_text(place, "question", record["question"])
    return record["question"]


def check_text(place: str, column: str, text: Any) -> None:
    """Raises UserError for what is no text, blank, or half a surrogate pair."""
    if not isinstance(text, str):
        raise UserError(f"{place}: {column} holds {_kind(text)}; it must be text")
    if not text.strip():
        raise UserError(f"{place}: {column} is empty; remove the row or write what is missing")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place}: {column} holds half a surrogate pair; repair the text") from None


def check_values(place: str, record: dict[str, Any]) -> None:
    """Raises UserError for a value that JSON has not, such as a date, bytes or NaN, and for one nested too deeply."""
    for column, value in record.items():
        if isinstance(value, str):
            continue
        if _deeper(value, _LEVELS):
            raise _too_deep(place, column)
        try:
            _ENCODER.encode(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {column} is no JSON value ({error}); write it as text or remove it") from None


def _deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return not levels or any(_deeper(each, levels - 1) for each in inner)


def _chat_question(place: str, prompt: list[Any]) -> str:
    """The one user message of a chat prompt; nothing of a prompt is dropped silently."""
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt):
        raise UserError(f"{place}: prompt must be a list of messages with role and content")
    roles = [message["role"] for message in prompt]
    if "system" in roles:
        raise UserError(
            f"{place}: prompt has a system message, but the modes own the system turn; "
            "remove it or move its text into the user message"
        )
    if roles != ["user"]:
        raise UserError(f"{place}: prompt has the roles {short(roles)}; give exactly one user message")
    question = prompt[0]["content"]
    check_text(place, "the user message of prompt", question)
    return question


def _verl_ground_truth(place: str, record: dict[str, Any]) -> Any:
    reward_model = _column(place, record, "reward_model")
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise UserError(f"{place}: reward_model must be an object with ground_truth")
    return reward_model["ground_truth"]


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"{type(value).__name__} {short(value)}")
