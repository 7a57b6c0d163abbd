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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from rich.console import Console
from rich.table import Table

from policy_split_jax import config as settings
from policy_split_jax import masked
from policy_split_jax.config import RunConfig
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.padding import TokenRow
from policy_split_jax.parity.dumps import Dump, Place, SharedPrompt, read_dump
from policy_split_jax.policy import Policy
from policy_split_jax.rollouts import group_batch
from policy_split_jax.training.batch import Batch, SharedView, own_rollouts, token_mask, training_mask
from policy_split_jax.training.collate import SharedGroup
from policy_split_jax.training.loop import update_config
from policy_split_jax.training.quarters import QUARTERS
from policy_split_jax.training.state import TrainState, init_state
from policy_split_jax.training.update import Measures, Step, TokenRecord, as_trained, joined, measure


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
    seen = as_trained(right, other, batch)
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
    return scores, measure(record, own, training_mask(own))


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
        batch = group_batch(dump.groups[some], max_prompt_tokens=widest, max_new_tokens=longest, shared=shared[some])
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
