r"""The paper's benchmarks, from local files in the layouts in which they are published, as questions with instructions.

A question of mathematics ends with the instruction to box the final answer, a multiple-choice question with its
lettered choices and the instruction to box a letter. docs/evaluation.md says where the files are found.
"""

import hashlib
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_split_jax.data.formats import Row, check_text, names_of, rows_of
from policy_split_jax.errors import UserError

_MATHS = "Reason step by step, and put the final answer within \\boxed{}."
_CHOICE = "Reason step by step, and put the letter of the right choice within \\boxed{}."
# The answer of one published problem has a degree sign.
_AIME_ANSWER = re.compile(r"(\d{1,3})(?:\^\{?\\circ\}?)?")
_GPQA_CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_MMLU_PRO_CHOICES = range(3, 11)

Record = dict[str, Any]


def math500(path: Path) -> list[Row]:
    """MATH-500: `problem` and `answer`; `subject`, `level` and `unique_id` are kept where they are there.

    Ground truth is the answer's text. Raises UserError naming file, row and remedy, as all loaders here do.
    """

    def row(place: str, record: Record) -> Row:
        answer = _text(place, record, "answer")
        kept = _kept(record, "unique_id", "subject", "level")
        return Row(f"{_text(place, record, 'problem')}\n{_MATHS}", answer, "math500", kept)

    return rows_of(path, row)


def aime24(path: Path) -> list[Row]:
    """AIME 2024: a problem (`problem`, `Problem` or `question`) and `answer` or `Answer`, an integer from 0 to 999.

    Ground truth is the answer's digits without leading zeros; `id` or `ID` is kept.
    """
    return _aime(path, "aime24")


def aime25(path: Path) -> list[Row]:
    """AIME 2025, in the same columns as AIME 2024."""
    return _aime(path, "aime25")


def gpqa_diamond(path: Path) -> list[Row]:
    """GPQA-Diamond: `Question`, `Correct Answer` and `Incorrect Answer 1` to `3`.

    The choices are in the order of their hashes with the question, so that a question's choices have one order
    everywhere. Ground truth is a letter; `Record ID`, `High-level domain` and `Subdomain` are kept.
    """

    def row(place: str, record: Record) -> Row:
        question, *choices = (_text(place, record, column).strip() for column in ("Question", *_GPQA_CHOICES))
        shuffled = sorted(choices, key=lambda choice: hashlib.sha256(f"{question}\n{choice}".encode()).digest())
        letter = string.ascii_uppercase[shuffled.index(choices[0])]
        kept = _kept(record, "Record ID", "High-level domain", "Subdomain")
        return Row(_multiple_choice(question, shuffled), letter, "gpqa_diamond", kept)

    return rows_of(path, row)


def mmlu_pro(path: Path) -> list[Row]:
    """MMLU-Pro: `question`, `options` (3 to 10 texts) and `answer`, a letter, with which `answer_index` must agree.

    Ground truth is the letter; `question_id` and `category` are kept.
    """

    def row(place: str, record: Record) -> Row:
        question, options = _text(place, record, "question"), _column(place, record, "options")
        texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
        if not texts or len(options) not in _MMLU_PRO_CHOICES:
            raise UserError(f"{place}: options must be a list of 3 to 10 texts; take the file as it is published")
        answer = _text(place, record, "answer")
        letters = string.ascii_uppercase[: len(options)]
        if len(answer) != 1 or answer not in letters:
            raise UserError(f"{place}: answer is {answer!r}; it must be a letter from A to {letters[-1]}")
        if record.get("answer_index", letters.index(answer)) != letters.index(answer):
            raise UserError(
                f"{place}: answer {answer} and answer_index {record['answer_index']} disagree; repair the row"
            )
        kept = _kept(record, "question_id", "category")
        return Row(_multiple_choice(question, options), answer, "mmlu_pro", kept)

    return rows_of(path, row)


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read and graded."""

    read: Callable[[Path], list[Row]]
    grader: str
    average: str
    """Benchmarks that have this in common are one in the mean over the benchmarks, as the paper counts them."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "math500": Benchmark(math500, "math", "math500"),
    "aime24": Benchmark(aime24, "math", "aime"),
    "aime25": Benchmark(aime25, "math", "aime"),
    "gpqa_diamond": Benchmark(gpqa_diamond, "letter", "gpqa_diamond"),
    "mmlu_pro": Benchmark(mmlu_pro, "letter", "mmlu_pro"),
}


def _aime(path: Path, name: str) -> list[Row]:
    def row(place: str, record: Record) -> Row:
        problem = _text(place, record, "problem", "Problem", "question")
        answer = _column(place, record, "answer", "Answer")
        found = _AIME_ANSWER.fullmatch(str(answer).strip())
        if found is None:
            raise UserError(f"{place}: the answer is {answer!r}; those of AIME are integers from 0 to 999")
        return Row(f"{problem}\n{_MATHS}", str(int(found[1])), name, _kept(record, "id", "ID"))

    return rows_of(path, row)


def _multiple_choice(question: str, choices: Sequence[str]) -> str:
    lettered = (f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, choices, strict=False))
    return "\n".join([question, "", *lettered, "", _CHOICE])


def _column(place: str, record: Record, *names: str) -> Any:
    """The value of the first of these columns that is there."""
    for name in names:
        if name in record:
            return record[name]
    raise UserError(f"{place}: no column {' or '.join(map(repr, names))}; columns found: {names_of(record)}")


def _text(place: str, record: Record, *names: str) -> str:
    value = _column(place, record, *names)
    check_text(place, next(name for name in names if name in record), value)
    return value


def _kept(record: Record, *names: str) -> Record:
    """Those of these columns that are there."""
    return {name: record[name] for name in names if record.get(name) is not None}
