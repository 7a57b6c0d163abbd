"""Evaluation of both modes: what the graders say, and what the two distributions look like."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from policy_split_jax.data.formats import Row
from policy_split_jax.evaluation import metrics
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import batch_shards, compiler_options, replicated
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.objective.scorer import TokenScores, score_rollouts
from policy_split_jax.padding import TokenRow
from policy_split_jax.policy import Policy
from policy_split_jax.rewards import Grade, GraderPool
from policy_split_jax.rollouts import Graded, Group, Progress, grade_groups, no_progress, sample_groups
from policy_split_jax.sampler.batcher import Sampling
from policy_split_jax.sampler.rollout import Sampler
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.collate import make_batch

CORRECT = 0.5
"""A reward above this counts as a right answer."""

TOKENS_KEPT = 512
"""Of a scored sample, how many tokens' figures are written at most: some 10 kB."""

_BOTH = len(MODE_NAMES)
"""Stands where a mode would, for the rollouts of both together: twice as many as one mode has."""

_SCORED_QUESTIONS = 4
_SCORED_TOKENS = 1 << 16
"""Questions scored at once: at most so many, and no more than have so many tokens under both modes, but one."""

Row_ = dict[str, Any]


class Scorer(NamedTuple):
    """Scores batches under both modes, at temperature 1, with the exact KL between them."""

    run: Callable[[qwen3.Params, Batch], TokenScores]
    shards: int
    """The rollouts of a batch are divided over so many devices."""


@dataclass(frozen=True)
class GroupScores:
    """Scores of one question's rollouts under both modes, padding included (nats)."""

    entropy: Float[np.ndarray, "2 G T"]
    logprobs: Float[np.ndarray, "2 G T"]
    kl: Float[np.ndarray, "2 G T"]


class TokenSums(NamedTuple):
    """What one mode's distributions are like on its own rollouts (nats): of each token, or summed over each rollout."""

    entropy: Float[np.ndarray, "N"]
    kl: Float[np.ndarray, "N"]
    """To the other mode."""
    tokens: int
    """How many tokens all of them are."""


def make_scorer(
    config: qwen3.Qwen3Config, *, dtype: DTypeLike = jnp.float32, chunk: int = 256, mesh: Mesh | None = None
) -> Scorer:
    """The scorer of a model, jitted."""

    @partial(jax.jit, out_shardings=mesh and replicated(mesh), compiler_options=compiler_options(mesh))
    def score(params: qwen3.Params, batch: Batch) -> TokenScores:
        return score_rollouts(
            params,
            batch.prompts,
            batch.prompt_lengths,
            batch.responses,
            batch.response_lengths,
            config=config,
            dtype=dtype,
            chunk=chunk,
            with_kl=True,
            mesh=mesh,
        )

    return Scorer(score, batch_shards(mesh))


def score_groups(
    scorer: Scorer,
    params: qwen3.Params,
    groups: Sequence[Group],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> list[GroupScores]:
    """Scores every rollout under both modes, a few questions at a time, in their order."""
    scored: list[GroupScores] = []
    tokens = max(
        2 * len(group.rollouts) * (max(map(len, group.prompts)) + max(len(r.tokens) for r in group.rollouts))
        for group in groups
    )
    at_once = questions_at_once(len(groups[0].rollouts), tokens, scorer.shards)
    for start in range(0, len(groups), at_once):
        part = list(groups[start : start + at_once])
        # The last part is filled up, so that one compiled program serves.
        full = part + [part[-1]] * (at_once - len(part))
        batch = make_batch(
            [group.prompts for group in full],
            [group.rollouts for group in full],
            [group.modes for group in full],
            [[0.0] * len(group.rollouts) for group in full],
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
        )
        scores = jax.device_get(scorer.run(params, batch))
        scored += [
            GroupScores(scores.entropy[:, at], scores.logprobs[:, at], scores.kl[:, at]) for at in range(len(part))
        ]
    return scored


def questions_at_once(group: int, tokens: int, shards: int) -> int:
    """How many questions are scored at once, of `tokens` tokens each under both modes together.

    Few, since whole batches are kept; but so many that their rollouts can be divided evenly over the devices,
    which costs nobody memory.
    """
    least = shards // math.gcd(group, shards)
    return max(least, min(_SCORED_QUESTIONS, _SCORED_TOKENS // tokens) // least * least)


def rewards_of(groups: Sequence[Graded], mode: int) -> Float[np.ndarray, "Q n"]:
    """One mode's rewards; NaN where grading failed."""
    return np.array(
        [
            [np.nan if grade.score is None else grade.score for grade in _of_mode(group, group.grades, mode)]
            for group in groups
        ],
        np.float64,
    )


def _of_mode(group: Graded, values: Sequence[Any], mode: int) -> list[Any]:
    return [value for value, own in zip(values, group.modes, strict=True) if mode in (own, _BOTH)]


def _correct(rewards: Float[np.ndarray, "Q n"]) -> Float[np.ndarray, "Q n"]:
    return np.where(np.isnan(rewards), np.nan, rewards > CORRECT)


def _answers(groups: Sequence[Graded], mode: int) -> list[list[str | None]]:
    """What each rollout answered, for votes and for counting solutions; None where it was cut off too early to.

    A rollout that was cut off and is right all the same had answered.
    """
    return [
        [
            None if reason == "length" and not _is_right(grade) else grade.answer
            for grade, reason in _of_mode(group, list(zip(group.grades, group.finish_reasons, strict=True)), mode)
        ]
        for group in groups
    ]


def _is_right(grade: Grade) -> bool:
    return grade.score is not None and grade.score > CORRECT


def outcome_metrics(groups: Sequence[Graded]) -> Row_:
    """What the graders and lengths say, per mode and across the modes that sampled; in training and evaluations."""
    sampled = [mode for mode in (NORMAL, HIGH_ENTROPY) if mode in groups[0].modes]
    row: Row_ = {}
    for mode in sampled:
        row |= _outcomes(groups, mode, MODE_NAMES[mode])
    if len(sampled) > 1:
        row |= _outcomes(groups, _BOTH, "both")
        correct = [_correct(rewards_of(groups, mode)) for mode in sampled]
        row["only_high_entropy_solved"] = metrics.only_second_solved(*correct)
    row["grader/failed"] = sum(grade.score is None for group in groups for grade in group.grades)
    return row


def _outcomes(groups: Sequence[Graded], part: int, name: str) -> Row_:
    """Of one mode's rollouts, or of all."""
    rewards, answers = rewards_of(groups, part), _answers(groups, part)
    correct = _correct(rewards)
    lengths = [length for group in groups for length in _of_mode(group, group.lengths, part)]
    reasons = [reason for group in groups for reason in _of_mode(group, group.finish_reasons, part)]
    return {
        f"reward/{name}": metrics.mean_reward(rewards),
        f"accuracy/{name}": metrics.average_at_k(correct),
        f"response_length/{name}": float(np.mean(lengths)),
        f"truncated/{name}": float(np.mean([reason == "length" for reason in reasons])),
        f"best_of_k/{name}": metrics.best_of_k(rewards),
        f"distinct_correct/{name}": metrics.distinct_correct(answers, correct),
    }


def pass_metrics(groups: Sequence[Graded], k: int) -> Row_:
    """pass@1, 2, 4, … and k, and maj@k: per mode, and with half of the samples from each mode.

    `both` has only even sizes.
    """
    correct = [_correct(rewards_of(groups, mode)) for mode in (NORMAL, HIGH_ENTROPY)]
    answers = [_answers(groups, mode) for mode in (NORMAL, HIGH_ENTROPY)]
    row: Row_ = {}
    for mode, name in enumerate(MODE_NAMES):
        row[f"maj@{k}/{name}"] = metrics.majority_at_k(answers[mode], correct[mode])
        for size in _sizes(k):
            row[f"pass@{size}/{name}"] = metrics.pass_at_k(correct[mode], size)
    for size in _sizes(k):
        if size % 2 == 0:
            row[f"pass@{size}/both"] = metrics.pass_at_k_split(correct[NORMAL], correct[HIGH_ENTROPY], size)
    if k % 2 == 0:
        # As many votes as one mode has.
        half = k // 2
        both = [[*first[:half], *second[:half]] for first, second in zip(*answers, strict=True)]
        row[f"maj@{k}/both"] = metrics.majority_at_k(both, np.concatenate([part[:, :half] for part in correct], axis=1))
    return row


def _sizes(k: int) -> list[int]:
    """The powers of two below k, and k."""
    return [*(2**power for power in range(k.bit_length()) if 2**power < k), k]


def distribution_metrics(normal: TokenSums, high_entropy: TokenSums) -> Row_:
    """Exact entropies and inter-mode KL, means over tokens: each mode on its own rollouts (nats, and bits)."""
    row: Row_ = {
        "kl/normal_to_high_entropy": _per_token(normal.kl, normal.tokens),
        "kl/high_entropy_to_normal": _per_token(high_entropy.kl, high_entropy.tokens),
    }
    together = np.concatenate([normal.entropy, high_entropy.entropy])
    entropies = (normal.entropy, high_entropy.entropy, together)
    tokens = (normal.tokens, high_entropy.tokens, normal.tokens + high_entropy.tokens)
    for name, values, count in zip((*MODE_NAMES, "both"), entropies, tokens, strict=True):
        row[f"entropy/{name}"] = _per_token(values, count)
        row[f"entropy_bits/{name}"] = row[f"entropy/{name}"] / float(np.log(2))
    return row


def _per_token(values: Float[np.ndarray, "N"], tokens: int) -> float:
    return float(values.sum(dtype=np.float64) / tokens)


def token_sums(groups: Sequence[Group], scores: Sequence[GroupScores], mode: int) -> TokenSums:
    """Each of a mode's own tokens."""
    entropy, kl = [], []
    for group, score in zip(groups, scores, strict=True):
        own = _own_tokens(group, mode, score.entropy.shape[-1])
        entropy.append(score.entropy[mode][own])
        kl.append(score.kl[mode][own])
    values = np.concatenate(entropy)
    return TokenSums(values, np.concatenate(kl), values.size)


def _own_tokens(group: Group, mode: int, width: int) -> Bool[np.ndarray, "G T"]:
    sizes: Int[np.ndarray, "G"] = np.array([len(rollout.tokens) for rollout in group.rollouts])
    own = np.array(group.modes) == mode
    return (np.arange(width) < sizes[:, None]) & own[:, None]


def sample_rows(groups: Sequence[Group]) -> list[Row_]:
    """Rollouts as rows of samples.jsonl."""
    rows = []
    for group in groups:
        counts = dict.fromkeys(group.modes, 0)
        for index, (rollout, mode) in enumerate(zip(group.rollouts, group.modes, strict=True)):
            rows.append(
                {
                    "question": group.row.question,
                    "mode": MODE_NAMES[mode],
                    "index": counts[mode],
                    "text": group.texts[index],
                    "reward": group.grades[index].score,
                    "grader_error": group.grades[index].error,
                    "finish_reason": rollout.finish_reason,
                    "entropy": None,
                }
            )
            counts[mode] += 1
    return rows


def scored_sample_rows(
    groups: Sequence[Group], scores: Sequence[GroupScores], pieces: Callable[[TokenRow], list[str]]
) -> list[Row_]:
    """The same of rollouts that were scored, with their mean entropy and with what the scores say token by token.

    `pieces` gives each token's text. `tokens` holds the texts of at most TOKENS_KEPT tokens, half of them from the
    beginning and half from the end, their entropies in the mode that sampled and its KL to the other mode (nats), and
    how many tokens were `left_out` between the two halves.
    """
    places = [(at, index) for at, group in enumerate(groups) for index in range(len(group.rollouts))]
    rows = sample_rows(groups)
    for row, (at, index) in zip(rows, places, strict=True):
        mode, tokens = groups[at].modes[index], groups[at].rollouts[index].tokens
        entropy, kl = (values[mode, index, : len(tokens)] for values in (scores[at].entropy, scores[at].kl))
        row["entropy"] = float(entropy.mean())
        parts = _kept(len(tokens))
        row["tokens"] = {
            "text": [piece for part in parts for piece in pieces(tokens[part])],
            "entropy": [round(float(value), 3) for part in parts for value in entropy[part]],
            "kl": [round(float(value), 3) for part in parts for value in kl[part]],
            "left_out": max(0, len(tokens) - TOKENS_KEPT),
        }
    return rows


def _kept(tokens: int) -> list[slice]:
    """Of so many tokens, the parts that are kept."""
    half = TOKENS_KEPT // 2
    return [slice(tokens)] if tokens <= TOKENS_KEPT else [slice(half), slice(tokens - half, tokens)]


def evaluation_metrics(groups: Sequence[Graded], tokens: Sequence[TokenSums], k: int) -> Row_:
    """One row of metrics of k answers to every question in both modes; `tokens` are by mode."""
    row: Row_ = {"k": k, "questions": len(groups)}
    return row | outcome_metrics(groups) | pass_metrics(groups, k) | distribution_metrics(*tokens)


def scored_metrics(groups: Sequence[Group], scores: Sequence[GroupScores], k: int) -> Row_:
    """The same of groups that `answer` made."""
    return evaluation_metrics(groups, [token_sums(groups, scores, mode) for mode in (NORMAL, HIGH_ENTROPY)], k)


def accuracy_intervals(strata: Sequence[Sequence[Graded]]) -> Row_:
    """95 % bootstrap intervals over questions of each mode's accuracy, and of what the high-entropy mode has more.

    Accuracies are means over the strata (the benchmarks; one where there is one). The difference is paired: of each
    question in both modes.
    """
    normal, high_entropy = (
        [metrics.average_at_k_per_question(_correct(rewards_of(groups, mode))) for groups in strata]
        for mode in (NORMAL, HIGH_ENTROPY)
    )
    difference = [second - first for first, second in zip(normal, high_entropy, strict=True)]
    row: Row_ = {"accuracy_difference": float(np.mean([metrics.mean_over_questions(part) for part in difference]))}
    for name, values in (("/normal", normal), ("/high_entropy", high_entropy), ("_difference", difference)):
        low, high = metrics.stratified_interval(values)
        row |= {f"accuracy{name}/low": low, f"accuracy{name}/high": high}
    return row


def answer(
    params: qwen3.Params,
    policy: Policy,
    sampler: Sampler,
    scorer: Scorer,
    pool: GraderPool,
    rows: Sequence[Row],
    *,
    k: int,
    key: Key[Array, ""],
    sampling: Sampling,
    first: int = 0,
    progress: Progress = no_progress,
) -> tuple[list[Group], list[GroupScores]]:
    """k answers to every question in both modes, graded and scored; `first` as `sample_groups` has it."""
    groups = sample_groups(
        params, policy, sampler, rows, per_mode=k, key=key, sampling=sampling, first=first, progress=progress
    )
    grade_groups(pool, groups)
    limits = {"max_prompt_tokens": sampler.max_prompt_tokens, "max_new_tokens": sampling.max_new_tokens}
    return groups, score_groups(scorer, params, groups, **limits)
