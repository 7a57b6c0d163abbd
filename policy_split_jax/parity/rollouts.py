"""`policy-split compare rollouts`: a dump of the released trainer's rollouts under our scorer and our advantages.

That trainer (https://github.com/BITHLP/PolicySplit, `verl/trainer/ppo/ray_entropy_rl_trainer_v6.py`, on a verl like
0.4.0) writes one JSON object a training sequence. What it does, as far as it matters here:

- A question's responses come in four quarters (`training/quarters.py`), in the same order where their own mode trains
  on them and where the other does. `input` and `output` are decoded without special tokens; `in_batch_ids` counts the
  step's questions; `uuids` names a question under one prompt, which is a group of the advantages. All quarters are
  graded, shared ones by their own text.
- A shared response is its text encoded anew, cut at the response limit, without a stop token. Its prompt is the
  decoded prompt, without a leading `user\\n` and the trailing `\\nassistant\\n`, as one user turn.
- `actor/org_he_kl` is log p of normal responses under the normal prompt, less that of the shared ones under the
  high-entropy prompt, position by position (`kl_penalty` k1): a mean over the tokens of each response as sampled, stop
  token included, and then over responses. `actor/he_org_kl` is the same of high-entropy responses.
- Where the sampled response has its stop token, the shared one has ended, and verl's scorer has there the
  log-probability of a token that does not follow: with `use_remove_padding` that of the first of the next packed
  sequence, else that of padding. It is in both KL, and in that trainer also in the bonus of the stop token; advantages
  here are those of our training, where the bonus meets nothing there.
- `actor/org_logprob` and `actor/he_logprob` are means in the same way of what each mode says of its own responses, but
  the normal mode's with the mask of the shared responses, which leaves out the stop token.
- `actor/entropy_loss` is the exact entropy, a mean over the tokens of all quarters (`loss_agg_mode` token-mean).
- `sub_batch_org/…` is the first quarter, `sub_batch_he/…` the other three. `critic/advantages/…` has no such prefix,
  and what is logged under it is that of the three.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from policy_split_jax import config as settings
from policy_split_jax import masked
from policy_split_jax.config import RunConfig, SharingConfig
from policy_split_jax.data.formats import Row, read_records
from policy_split_jax.errors import UserError
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL, ModePrompts, encode_plain, render_both
from policy_split_jax.padding import TokenRow
from policy_split_jax.policy import Policy
from policy_split_jax.rewards import Grade
from policy_split_jax.rollouts import Group, shared_groups, shared_views, training_prompts
from policy_split_jax.sampler.batcher import Rollout
from policy_split_jax.training.batch import Batch, SharedView, own_rollouts, token_mask, training_mask
from policy_split_jax.training.collate import SharedGroup, make_batch
from policy_split_jax.training.loop import update_config
from policy_split_jax.training.quarters import QUARTERS
from policy_split_jax.training.state import TrainState, init_state
from policy_split_jax.training.update import Measures, Step, TokenRecord, joined, measure

SharedPrompt = Literal["user_turn", "system"]
"""Of normal responses in the high-entropy mode, as `SharingConfig.high_entropy_prompt`."""
Place = tuple[int, int]
"""A quarter: the mode that is trained and the mode that sampled."""


@dataclass(frozen=True)
class ScoreOptions:
    """How a dump's rollouts were made and are scored."""

    preset: Literal["released", "paper"] = "released"
    """Whose advantages."""
    max_new_tokens: int | None = None
    """The trainer's response limit: a response of so many tokens has no stop token. None: all ended by themselves."""
    remove_padding: bool = True
    """The trainer's `actor_rollout_ref.model.use_remove_padding`; only the KL metrics depend on it."""
    microbatch_questions: int = 4
    """Questions scored at once. Changes memory, not results."""
    dtype: str = "float32"
    """Of the activations."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "microbatch_questions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"ScoreOptions: {name} must be at least 1")


@dataclass(frozen=True)
class Quarter:
    """Means over the tokens of a quarter (nats), but for length and score, which are over its responses."""

    trained: str
    sampled: str
    advantage: float
    advantage_abs: float
    entropy: float
    neg_logprob: float
    response_length: float
    score: float


@dataclass(frozen=True)
class StepFigures:
    """One step of a dump."""

    step: int
    questions: int
    rollouts: int
    """Of a question, of both modes."""
    shared_prompt: SharedPrompt
    rescored: int
    """Shared responses whose score is not that which they had as sampled. Advantages are of the latter."""
    quarters: list[Quarter]
    metrics: dict[str, float]
    """By the trainer's names, as it would log them."""
    right: dict[str, float]
    """By our names (docs/architecture.md), with every response as it was sampled under both modes' own prompts."""


@dataclass(frozen=True)
class RolloutComparison:
    """All steps of a dump, in its order."""

    file: str
    preset: str
    steps: list[StepFigures]


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


def compare_rollouts(
    path: Path, policy: Policy, params: qwen3.Params, options: ScoreOptions = ScoreOptions()
) -> RolloutComparison:
    """Scores every step of a dump with the model that made it; `dataclasses.asdict` makes the result JSON-able.

    Raises:
      UserError: see `read_dump`.
    """
    tree = settings.with_preset({"name": "rollouts", "preset": options.preset})
    config = settings.from_dict(RunConfig, tree, f"preset {options.preset}")
    update = replace(update_config(config), dtype=options.dtype)
    step = Step(policy.config, update, optax.identity(), None, None)
    state = init_state(params, step.optimizer, 0, float(update.advantage.eta))
    score = jax.jit(partial(_score, step))
    dumps = read_dump(path, policy, options.max_new_tokens)
    return RolloutComparison(
        str(path), options.preset, [_figures(dump, partial(score, state), options) for dump in dumps]
    )


# ---------------------------------------------------------------------------------------------------- reading


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


# ---------------------------------------------------------------------------------------------------- scoring


class _Scores(NamedTuple):
    """Of every training sequence, over its tokens; the axis of 2 is the mode that is trained."""

    tokens: Float[Array, "P 2 G"]
    entropy: Float[Array, "P 2 G"]
    logprob: Float[Array, "P 2 G"]
    advantage: Float[Array, "P 2 G"]
    advantage_abs: Float[Array, "P 2 G"]
    highest: Float[Array, "P 2 G"]
    """The largest advantage."""
    lowest: Float[Array, "P 2 G"]
    logged_kl: Float[Array, "P G"]
    """Of every response, as the trainer logs it: of the mode that sampled it from the other, a mean over tokens."""
    logged_logprob: Float[Array, "P G"]
    """The same of its log-probability under the mode that sampled it."""


def _score(step: Step, state: TrainState, own: Batch, longer: SharedView) -> tuple[_Scores, Measures]:
    """Of some questions; the measures are of what was sampled.

    `longer` is what is shared, with one token more: that of which the trainer's scorer gives the log-probability
    behind the end.
    """
    right = step.score(state.params, own, None)
    other = step.score_rollouts(state.params, *longer)
    batch = own._replace(shared=longer._replace(response_lengths=longer.response_lengths - 1))
    mine, mask = own_rollouts(batch), training_mask(batch)
    # As `Step.score` does, which would score again what was sampled.
    seen = jax.tree.map(
        lambda sampled, shared: masked.where(mask, jnp.where(mine, sampled, shared)), right._replace(kl=None), other
    )
    advantages = step.terms(seen, batch, state, 0).advantages
    exact = step.terms(right, own, state, 0).advantages
    record = TokenRecord(right, right.logprobs, exact, jnp.zeros_like(exact))

    # Both are one text, so that a shared response lacks no more than the stop token.
    by_own = jnp.sum(masked.where(mine, right.logprobs), axis=0)
    by_other = jnp.sum(masked.where(~mine, other.logprobs), axis=0)
    sums = (seen.entropy, seen.logprobs, advantages, jnp.abs(advantages))
    each = (
        masked.count(mask, axis=-1),
        *(masked.total(values, mask, axis=-1) for values in sums),
        jnp.max(masked.where(mask, advantages, -jnp.inf), axis=-1),
        jnp.min(masked.where(mask, advantages, jnp.inf), axis=-1),
    )
    scores = _Scores(
        *(jnp.moveaxis(values, 1, 0) for values in each),
        logged_kl=masked.mean(by_own - by_other, token_mask(own), axis=-1),
        # The high-entropy mode's mask: for normal responses that of the shared ones.
        logged_logprob=masked.mean(by_own, mask[HIGH_ENTROPY], axis=-1),
    )
    return scores, measure(record, own)


def _figures(
    dump: Dump, score: Callable[[Batch, SharedView], tuple[_Scores, Measures]], options: ScoreOptions
) -> StepFigures:
    parts = [jax.device_get(score(*part)) for part in _microbatches(dump, options)]
    scores = {name: np.concatenate([getattr(part, name) for part, _ in parts]) for name in _Scores._fields}
    columns = {quarter: _column(dump, quarter, scores) for quarter in QUARTERS}
    right = reduce(joined, (measures for _, measures in parts)).values()
    return StepFigures(
        step=dump.step,
        questions=len(dump.groups),
        rollouts=len(dump.groups[0].rollouts),
        shared_prompt=dump.shared_prompt,
        rescored=sum(
            grade.score != score
            for group, scores in zip(dump.groups, dump.shared_scores, strict=True)
            for grade, score in zip(group.grades, scores, strict=True)
        ),
        quarters=[_quarter(place, column) for place, column in columns.items()],
        metrics=_metrics(columns),
        right={name: float(right[name]) for name in right if name.startswith(_MEASURED)},
    )


_MEASURED = ("kl", "entropy/", "neg_logprob/", "advantage_abs/")
"""The others are of an update, or of what the sampler computed."""


def _microbatches(dump: Dump, options: ScoreOptions) -> Iterator[tuple[Batch, SharedView]]:
    """What was sampled, and what is shared of it with one token behind."""
    padding = huggingface.load_generation_config(dump.policy.folder).pad_id
    shared = [
        SharedGroup(prompts, [[*tokens, prompts[NORMAL][0] if options.remove_padding else padding] for tokens in rows])
        for prompts, rows in dump.shared
    ]
    widest = _longest(prompt for each in (*dump.groups, *shared) for prompt in each.prompts)
    longest = max(
        _longest(rollout.tokens for group in dump.groups for rollout in group.rollouts),
        _longest(tokens for view in shared for tokens in view.responses),
    )
    for start in range(0, len(shared), options.microbatch_questions):
        some = slice(start, start + options.microbatch_questions)
        groups = dump.groups[some]
        batch = make_batch(
            [group.prompts for group in groups],
            [group.rollouts for group in groups],
            [group.modes for group in groups],
            [[grade.score for grade in group.grades] for group in groups],
            max_prompt_tokens=widest,
            max_new_tokens=longest,
            shared=shared[some],
        )
        assert batch.shared is not None
        yield batch._replace(shared=None), batch.shared


def _longest(rows: Iterable[TokenRow]) -> int:
    return max(map(len, rows))


def _rewards(dump: Dump) -> Float[np.ndarray, "P G"]:
    """Of the responses as sampled; NaN where grading failed."""
    return np.array([[grade.score for grade in group.grades] for group in dump.groups], float)


Column = dict[str, Float[np.ndarray, "_"]]
"""The graded sequences of a quarter: what `_Scores` has of each, and its `reward`."""


def _column(dump: Dump, quarter: Place, scores: Mapping[str, Float[np.ndarray, "P *_"]]) -> Column:
    trained, sampled = quarter
    own, shared = _rewards(dump), np.array(dump.shared_scores, float)
    rewards = own if trained == sampled else shared
    modes = np.array([group.modes for group in dump.groups])
    chosen = (modes == sampled) & np.isfinite(own) & np.isfinite(rewards)
    of_mode = {name: values[:, trained] if values.ndim == 3 else values for name, values in scores.items()}
    return {name: values[chosen].astype(float) for name, values in of_mode.items()} | {"reward": rewards[chosen]}


def _quarter(place: Place, column: Column) -> Quarter:
    trained, sampled = (MODE_NAMES[mode] for mode in place)
    return Quarter(
        trained,
        sampled,
        advantage=_token_mean(column, "advantage"),
        advantage_abs=_token_mean(column, "advantage_abs"),
        entropy=_token_mean(column, "entropy"),
        neg_logprob=-_token_mean(column, "logprob"),
        response_length=float(column["tokens"].mean()),
        score=float(column["reward"].mean()),
    )


def _token_mean(column: Column, name: str) -> float:
    return float(column[name].sum() / column["tokens"].sum())


def _metrics(columns: Mapping[Place, Column]) -> dict[str, float]:
    normal, high_entropy, *shared = columns.values()
    rest = _pooled([high_entropy, *shared])
    every = _pooled([normal, rest])
    metrics = {
        "actor/org_he_kl": normal["logged_kl"].mean(),
        "actor/he_org_kl": high_entropy["logged_kl"].mean(),
        "actor/org_logprob": normal["logged_logprob"].mean(),
        "actor/he_logprob": high_entropy["logged_logprob"].mean(),
        "actor/entropy_loss": _token_mean(every, "entropy"),
        "critic/advantages/mean": _token_mean(rest, "advantage"),
        "critic/advantages/max": rest["highest"].max(),
        "critic/advantages/min": rest["lowest"].min(),
    }
    for prefix, part in (("", every), ("sub_batch_org/", normal), ("sub_batch_he/", rest)):
        metrics[f"{prefix}critic/score/mean"] = part["reward"].mean()
        metrics[f"{prefix}critic/rewards/mean"] = part["reward"].mean()
        metrics[f"{prefix}response_length/mean"] = part["tokens"].mean()
    return {name: float(value) for name, value in metrics.items()}


def _pooled(columns: Sequence[Column]) -> Column:
    return {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}


# ---------------------------------------------------------------------------------------------------- showing


def show(found: RolloutComparison, console: Console) -> None:
    """Two tables a step."""
    for each in found.steps:
        turn = {"user_turn": "the text of a user turn", "system": "a system turn"}[each.shared_prompt]
        console.print(
            f"step {each.step}: {each.questions} questions, {each.rollouts} rollouts of each; the high-entropy prompt "
            f"of normal responses is {turn}; {each.rescored} shared responses have another score than as sampled"
        )
        console.print(_quarter_table(each.quarters, found.preset))
        console.print(_metric_table(each))


def _quarter_table(quarters: Sequence[Quarter], preset: str) -> Table:
    table = Table(title=f"Quarters; A are advantages of preset {preset}")
    for heading in ("trained", "sampled", "A", "|A|", "entropy", "−log p", "length", "score"):
        table.add_column(heading, justify="left" if heading in ("trained", "sampled") else "right")
    for quarter in quarters:
        trained, sampled, *figures = astuple(quarter)
        table.add_row(trained, sampled, *(f"{figure:.4f}" for figure in figures))
    return table


def _metric_table(figures: StepFigures) -> Table:
    table = Table(title="As that trainer logs it, then as sampled under the right prompts")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in (figures.metrics | figures.right).items():
        table.add_row(name, f"{value:.4f}")
    return table
