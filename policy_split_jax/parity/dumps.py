"""Reads the rollouts that the released trainer, or `train.dump_rollouts`, writes: JSON lines, quarter by quarter."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from policy_split_jax.config import SharingConfig
from policy_split_jax.data.formats import Row, read_records
from policy_split_jax.errors import UserError
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL, ModePrompts, encode_plain, render_both
from policy_split_jax.padding import TokenRow
from policy_split_jax.policy import Policy
from policy_split_jax.rewards import Grade
from policy_split_jax.rollouts import Group, shared_groups, shared_views, training_prompts
from policy_split_jax.sampler.batcher import Rollout
from policy_split_jax.training.collate import SharedGroup
from policy_split_jax.training.quarters import QUARTERS

SharedPrompt = Literal["user_turn", "system"]
"""Of normal responses in the high-entropy mode, as `SharingConfig.high_entropy_prompt`."""
Place = tuple[int, int]
"""A quarter: the mode that is trained and the mode that sampled."""


@dataclass(frozen=True)
class Dump:
    """One step of a dump, as questions and rollouts."""

    step: int
    policy: Policy
    """With the dump's high-entropy prompt."""
    groups: list[Group]
    """Rollouts are their text encoded and a stop token, without log-probabilities; normal ones come first."""
    shared_prompt: SharedPrompt
    shared: Sequence[SharedGroup]
    """What each mode trains on of the other's rollouts in the released trainer."""
    shared_scores: list[list[float | None]]
    """Of each question's rollouts, where the other mode trains on them."""


class _Line(NamedTuple):
    place: str
    values: dict[str, Any]

    @property
    def quarter(self) -> Place:
        prompt, response = self.values["is_he_prompt"], self.values["is_he_response"]
        return HIGH_ENTROPY if prompt else NORMAL, HIGH_ENTROPY if response else NORMAL

    @property
    def score(self) -> float | None:
        score = self.values["score"]
        return None if score is None else float(score)


Question = dict[Place, list[_Line]]
"""A question's lines, quarter by quarter."""


def _is_text(value: Any) -> bool:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _is_integer(value: Any) -> bool:
    return type(value) is int


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input": (_is_text, "text"),
    "output": (_is_text, "text"),
    "score": (_is_score, "a finite number, or null where grading failed"),
    "step": (_is_integer, "an integer"),
    "is_he_prompt": (_is_boolean, "true or false"),
    "is_he_response": (_is_boolean, "true or false"),
    "in_batch_ids": (_is_integer, "an integer"),
    "uuids": (_is_text, "text"),
    "ground_truth": (lambda _: True, "there"),
}


def read_dump(path: Path, policy: Policy, max_new_tokens: int | None = None) -> list[Dump]:
    """The steps of a dump, in the order in which they begin.

    Raises:
      UserError: a line that lacks a key or has a wrong value; a question that does not have equally many responses in
        every quarter, or others where they are shared; a prompt that is not of the model's chat template.
    """
    steps: dict[int, list[_Line]] = {}
    for place, record in read_records(path):
        _check_record(place, record)
        steps.setdefault(record["step"], []).append(_Line(place, record))
    if not steps:
        raise UserError(f"{path}: holds no rollouts; give a file of the trainer's rollout_data_dir")
    return [_dump(f"{path}: step {step}", lines, policy, max_new_tokens) for step, lines in steps.items()]


def _check_record(place: str, record: Mapping[str, Any]) -> None:
    for key, (holds, words) in _KINDS.items():
        if key not in record:
            raise UserError(f"{place}: no key {key!r}; a line of a rollout dump has {', '.join(_KINDS)}")
        if not holds(record[key]):
            raise UserError(f"{place}: {key} is {json.dumps(record[key])[:40]}; it must be {words}")


def _dump(where: str, lines: Sequence[_Line], policy: Policy, limit: int | None) -> Dump:
    questions = _questions(where, lines)
    texts, high_entropy = _texts(policy, questions)
    policy = replace(policy, prompts=ModePrompts(high_entropy, policy.prompts.enable_thinking))
    prompts = render_both(policy.tokenizer, texts, policy.prompts)
    rows = [
        Row(text, each[QUARTERS[0]][0].values["ground_truth"], where)
        for text, each in zip(texts, questions, strict=True)
    ]
    groups = [_group(policy, *each, limit) for each in zip(rows, prompts, questions, strict=True)]
    kind = _shared_prompt(policy, rows, prompts, questions)
    shared = shared_views(groups, shared_groups(policy, groups, SharingConfig(kind, "text"), limit or sys.maxsize))
    for each, view in zip(questions, shared, strict=True):
        _check_shared(policy, each, view)
    scores = [[line.score for line in _in_order(each, own=False)] for each in questions]
    return Dump(lines[0].values["step"], policy, groups, kind, shared, scores)


def _questions(where: str, lines: Sequence[_Line]) -> list[Question]:
    """Each in the order of its first line; complete, and of one prompt in each quarter."""
    questions: dict[int, Question] = {}
    for line in lines:
        quarters = questions.setdefault(line.values["in_batch_ids"], {quarter: [] for quarter in QUARTERS})
        quarters[line.quarter].append(line)
    expected = max(map(len, next(iter(questions.values())).values()))
    for name, quarters in questions.items():
        for quarter, found in quarters.items():
            if len(found) != expected:
                trained, sampled = (MODE_NAMES[mode].replace("_", "-") for mode in quarter)
                raise UserError(
                    f"{where}: question {name} (in_batch_ids) has {len(found)} {sampled} responses under the {trained} "
                    f"prompt, not {expected}; each question has equally many in every quarter: give whole steps"
                )
        _check_common(quarters)
    for quarter in QUARTERS:
        if all(line.score is None for each in questions.values() for line in each[quarter]):
            raise UserError(f"{where}: {MODE_NAMES[quarter[1]]} responses have no score but null; grade them first")
    return list(questions.values())


def _check_common(question: Question) -> None:
    """What one question's lines have in common."""
    normal, high_entropy, on_high_entropy, on_normal = (question[quarter] for quarter in QUARTERS)
    for key, lines in (
        ("ground_truth", [*normal, *high_entropy, *on_high_entropy, *on_normal]),
        ("uuids", [*normal, *on_high_entropy]),
        ("uuids", [*high_entropy, *on_normal]),
        ("input", [*normal, *on_high_entropy]),
        ("input", high_entropy),
        ("input", on_normal),
    ):
        for line in lines:
            if line.values[key] != lines[0].values[key]:
                raise UserError(
                    f"{line.place}: {key} is not that of {lines[0].place}, which is of the same question by "
                    "in_batch_ids; give a dump as the trainer wrote it"
                )


def _in_order(question: Question, own: bool) -> list[_Line]:
    """The normal mode's responses, then the others, where their own mode trains on them or where the other does."""
    modes = (NORMAL, HIGH_ENTROPY)
    return [line for sampled in modes for line in question[sampled if own else 1 - sampled, sampled]]


_SYSTEM, _QUESTION = "\ue000", "\ue001"
"""What stands for the two texts of a prompt: private-use characters mean nothing to a template."""


def _decoded(policy: Policy, tokens: TokenRow) -> str:
    return policy.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def _texts(policy: Policy, questions: Sequence[Question]) -> tuple[list[str], str]:
    """The questions, and the high-entropy prompt that they share."""
    marked = ModePrompts(_SYSTEM, policy.prompts.enable_thinking)
    [(normal, high_entropy)] = render_both(policy.tokenizer, [_QUESTION], marked)
    before, after = _decoded(policy, normal).split(_QUESTION)
    header, rest = _decoded(policy, high_entropy).split(_SYSTEM)
    texts: list[str] = []
    prompts: list[str] = []
    for each in questions:
        texts.append(_between(each[NORMAL, NORMAL][0], before, after))
        line = each[HIGH_ENTROPY, HIGH_ENTROPY][0]
        prompts.append(_between(line, header, rest.replace(_QUESTION, texts[-1])))
        if prompts[-1] != prompts[0]:
            raise UserError(f"{line.place}: the high-entropy prompt is not that of the step's first question")
    return texts, prompts[0]


def _between(line: _Line, before: str, after: str) -> str:
    text = line.values["input"]
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        raise UserError(
            f"{line.place}: input does not begin with {before!r} and end with {after[-60:]!r}, as the model's chat "
            "template has it; give the model that made the rollouts"
        )
    return text.removeprefix(before).removesuffix(after)


def _group(
    policy: Policy, row: Row, prompts: tuple[list[int], list[int]], question: Question, limit: int | None
) -> Group:
    lines = _in_order(question, own=True)
    encoded = encode_plain(policy.tokenizer, [line.values["output"] for line in lines])
    rollouts = [_rollout(policy, tokens, limit) for tokens in encoded]
    grades = [Grade(line.score) for line in lines]
    return Group(row, prompts, rollouts, [line.quarter[1] for line in lines], policy.text, grades)


def _rollout(policy: Policy, tokens: list[int], limit: int | None) -> Rollout:
    unknown = np.zeros(0, np.float32)
    if limit is not None and len(tokens) >= limit:
        return Rollout(np.array(tokens[:limit], np.int32), unknown, "length")
    return Rollout(np.array([*tokens, policy.stop_ids[0]], np.int32), unknown, "stop")


def _shared_prompt(
    policy: Policy, rows: Sequence[Row], prompts: list[tuple[list[int], list[int]]], questions: Sequence[Question]
) -> SharedPrompt:
    """Which prompt normal responses have in the high-entropy mode."""
    lines = [each[HIGH_ENTROPY, NORMAL][0] for each in questions]
    unlike: list[int] = []
    for kind in get_args(SharedPrompt):
        pairs = training_prompts(policy, rows, prompts, SharingConfig(kind, "text"))
        equal = [
            line.values["input"] == _decoded(policy, pair[HIGH_ENTROPY])
            for line, pair in zip(lines, pairs, strict=True)
        ]
        if all(equal):
            return kind
        unlike.append(equal.index(False))
    raise UserError(
        f"{lines[max(unlike)].place}: input is not the question's high-entropy prompt, neither as a system turn nor as "
        "the text of a user turn, or not as in the step's other lines; give a dump as the trainer wrote it"
    )


def _check_shared(policy: Policy, question: Question, view: SharedGroup) -> None:
    """Shared responses have the text of those sampled, or that of their tokens encoded anew."""
    lines = zip(_in_order(question, own=True), _in_order(question, own=False), view.responses, strict=True)
    for own, shared, tokens in lines:
        if shared.values["output"] not in (own.values["output"], _decoded(policy, tokens)):
            raise UserError(
                f"{shared.place}: output is not that of {own.place}, which it shares; give a dump as the trainer wrote "
                "it, and the trainer's response limit where it cut responses"
            )
