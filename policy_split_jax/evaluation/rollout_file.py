"""The rollouts of an evaluation as a file: what its figures need, so that a killed evaluation goes on.

The first line holds the settings. A line for each rollout follows, a batch of questions at a time: first the normal
mode's rollouts of a question, then the high-entropy mode's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from policy_split_jax.errors import UserError
from policy_split_jax.evaluation.evaluate import GroupScores, TokenSums
from policy_split_jax.evaluation.journal import Record, cut, next_record
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.rewards import Grade
from policy_split_jax.rollouts import Group
from policy_split_jax.sampler.batcher import FinishReason

_PLACE = ("benchmark", "question", "mode", "index")
"""What says which rollout a line holds."""


class QuestionBatch(NamedTuple):
    """Questions of a benchmark that are sampled together and saved together."""

    benchmark: str
    first: int
    """The place of the first of them in the benchmark."""
    count: int


@dataclass
class SavedQuestion:
    """What a file holds of a question, as figures need it (`rollouts.Graded`); the lists run over the rollouts."""

    modes: list[int] = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    finish_reasons: list[FinishReason] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    """Summed over the tokens of each (nats)."""
    kl: list[float] = field(default_factory=list)
    """To the other mode, summed likewise."""


def question_batches(sizes: Mapping[str, int], at_once: int, done: Mapping[str, int]) -> list[QuestionBatch]:
    """The batches that are left of an evaluation, in their order.

    `sizes` says how many questions each benchmark has, and `done` how many of them are there.
    """
    return [
        QuestionBatch(name, first, min(at_once, size - first))
        for name, size in sizes.items()
        for first in range(done[name], size, at_once)
    ]


def rollout_records(batch: QuestionBatch, groups: Sequence[Group], scores: Sequence[GroupScores]) -> Iterator[Record]:
    """The lines of a batch."""
    k = len(groups[0].rollouts) // len(MODE_NAMES)
    for question, (group, score) in enumerate(zip(groups, scores, strict=True), start=batch.first):
        for at, (mode, length, grade) in enumerate(zip(group.modes, group.lengths, group.grades, strict=True)):
            yield {
                **dict(zip(_PLACE, (batch.benchmark, question, MODE_NAMES[mode], at % k), strict=True)),
                "batch": batch.count,
                "text": group.texts[at],
                "reward": grade.score,
                "grader_error": grade.error,
                "answer": grade.answer,
                "finish_reason": group.finish_reasons[at],
                "tokens": length,
                "entropy_sum": float(score.entropy[mode, at, :length].sum(dtype=np.float64)),
                "kl_sum": float(score.kl[mode, at, :length].sum(dtype=np.float64)),
            }


def finished_questions(path: Path, sizes: Mapping[str, int], k: int) -> dict[str, int]:
    """How many questions of each benchmark the file has, in whole batches; what follows these is cut off.

    Raises UserError where a line holds another rollout than the one that belongs there, or is damaged.
    """
    done = dict.fromkeys(sizes, 0)
    with path.open("rb") as file:
        file.readline()
        end = file.tell()
        for name, size in sizes.items():
            while done[name] < size and (count := _whole_batch(path, file, name, done[name], k)):
                done[name] += count
                end = file.tell()
            if done[name] < size:
                break
    cut(path, end)
    return done


def read_questions(path: Path) -> dict[str, list[SavedQuestion]]:
    """The questions of a finished file, by benchmark; their texts are not kept."""
    found: dict[str, list[SavedQuestion]] = {}
    with path.open("rb") as file:
        next(file)
        for record in map(json.loads, file):
            questions = found.setdefault(record["benchmark"], [])
            if record["question"] == len(questions):
                questions.append(SavedQuestion())
            _add(questions[-1], record)
    return found


def saved_sums(questions: Sequence[SavedQuestion], mode: int) -> TokenSums:
    """Of each of a mode's rollouts."""
    own = [
        (question.entropy[at], question.kl[at], question.lengths[at])
        for question in questions
        for at, sampled in enumerate(question.modes)
        if sampled == mode
    ]
    entropy, kl, lengths = zip(*own, strict=True)
    return TokenSums(np.array(entropy, np.float64), np.array(kl, np.float64), sum(lengths))


def _add(question: SavedQuestion, record: Record) -> None:
    question.modes.append(MODE_NAMES.index(record["mode"]))
    question.grades.append(Grade(record["reward"], record["answer"], record["grader_error"]))
    question.lengths.append(record["tokens"])
    question.finish_reasons.append(record["finish_reason"])
    question.entropy.append(record["entropy_sum"])
    question.kl.append(record["kl_sum"])


def _whole_batch(path: Path, file: BinaryIO, name: str, first: int, k: int) -> int:
    """Reads the batch that begins with a question; how many it has, 0 where a line is missing or was cut off."""
    start = file.tell()
    leading = next_record(file)
    if leading is None:
        return 0
    count = leading.get("batch")
    if type(count) is not int or count < 1:
        raise UserError(f"{path}: question {first} of {name} has a batch of {count!r}; repair it, or give --fresh")
    file.seek(start)
    places = (
        (name, question, MODE_NAMES[mode], index)
        for question in range(first, first + count)
        for mode in (NORMAL, HIGH_ENTROPY)
        for index in range(k)
    )
    for place in places:
        record = next_record(file)
        if record is None:
            return 0
        found = tuple(record.get(key) for key in _PLACE)
        if found != place:
            raise UserError(f"{path}: has the rollout {found} where {place} belongs; give --fresh")
    return count
