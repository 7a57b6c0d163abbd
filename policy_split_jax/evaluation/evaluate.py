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
from policy_split_jax.rewards import GraderPool
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
"""Scored at once: rollouts of at most so many questions, of no more tokens under both modes, but one rollout."""

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
    progress: Progress = no_progress,
) -> list[GroupScores]:
    """Scores every rollout under both modes, a few questions or a part of one at a time, in their order.

    `progress` is told of no samples before each part, so that whoever asks for a stop need not wait for the last.
    """
    size = len(groups[0].rollouts)
    tokens = 2 * max(
        max(map(len, group.prompts)) + max(len(rollout.tokens) for rollout in group.rollouts) for group in groups
    )
    at_once, rollouts = scored_at_once(size, tokens, scorer.shards)
    parts = [
        (group.prompts, group.rollouts[first : first + rollouts], group.modes[first : first + rollouts])
        for group in groups
        for first in range(0, size, rollouts)
    ]
    scored: list[TokenScores] = []
    for start in range(0, len(parts), at_once):
        progress(0)
        now = parts[start : start + at_once]
        # The last ones are filled up, so that one compiled program serves.
        prompts, responses, modes = zip(*now, *[now[-1]] * (at_once - len(now)), strict=True)
        batch = make_batch(
            prompts,
            responses,
            modes,
            [[0.0] * rollouts] * at_once,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
        )
        scores = jax.device_get(scorer.run(params, batch))
        scored += [jax.tree.map(lambda leaf, at=at: leaf[:, at], scores) for at in range(len(now))]
    each = size // rollouts
    return [_together(scored[start : start + each]) for start in range(0, len(scored), each)]


def _together(parts: Sequence[TokenScores]) -> GroupScores:
    """The scores of a question's parts, each as wide as its longest rollout."""
    width = max(part.entropy.shape[-1] for part in parts)

    def joined(values: Sequence[Float[np.ndarray, "2 _ _"]]) -> Float[np.ndarray, "2 G T"]:
        wide = [np.pad(value, ((0, 0), (0, 0), (0, width - value.shape[-1]))) for value in values]
        return np.concatenate(wide, axis=1)

    return GroupScores(*(joined([getattr(part, name) for part in parts]) for name in ("entropy", "logprobs", "kl")))


def scored_at_once(group: int, tokens: int, shards: int) -> tuple[int, int]:
    """How many questions are scored at once, and how many of the `group` rollouts of each.

    `tokens` are those of one rollout under both modes together. Few, since whole batches are kept; but so many that
    the rollouts can be divided evenly over the devices, which costs nobody memory. What is too long for a whole
    question goes by parts of one size, each counted as a question.
    """
    fitting = max(1, _SCORED_TOKENS // tokens)
    rollouts = max(size for size in range(1, min(fitting, group) + 1) if group % size == 0)
    least = shards // math.gcd(rollouts, shards)
    return max(least, min(_SCORED_QUESTIONS, fitting // rollouts) // least * least), rollouts


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
    """What each rollout answered, right or wrong, for counting solutions."""
    return [[grade.answer for grade in _of_mode(group, group.grades, mode)] for group in groups]


def _votes(groups: Sequence[Graded], mode: int) -> list[list[str | None]]:
    """The same for votes: what was cut off has none, right or wrong, or the vote would know which is which."""
    reasons = [_of_mode(group, group.finish_reasons, mode) for group in groups]
    return [
        [None if reason == "length" else answer for answer, reason in zip(*own, strict=True)]
        for own in zip(_answers(groups, mode), reasons, strict=True)
    ]


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
    votes = [_votes(groups, mode) for mode in (NORMAL, HIGH_ENTROPY)]
    row: Row_ = {}
    for mode, name in enumerate(MODE_NAMES):
        row[f"maj@{k}/{name}"] = metrics.majority_at_k(votes[mode], correct[mode])
        for size in _sizes(k):
            row[f"pass@{size}/{name}"] = metrics.pass_at_k(correct[mode], size)
    for size in _sizes(k):
        if size % 2 == 0:
            row[f"pass@{size}/both"] = metrics.pass_at_k_split(correct[NORMAL], correct[HIGH_ENTROPY], size)
    if k % 2 == 0:
        # As many votes as one mode has.
        half = k // 2
        both = [[*first[:half], *second[:half]] for first, second in zip(*votes, strict=True)]
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


def intervals(strata: Sequence[Sequence[Graded]], tokens: Sequence[Sequence[Sequence[TokenSums]]], k: int) -> Row_:
    """95 % bootstrap intervals over questions of each mode's accuracy, pass@k, maj@k and entropy.

    Figures are means over the strata (the benchmarks; one where there is one); `tokens` has for each stratum and mode
    the sums of each question. `accuracy_difference` is what the high-entropy mode has more, paired by question.
    """
    found = [[_per_question(groups, mode, k) for groups in strata] for mode in (NORMAL, HIGH_ENTROPY)]
    row: Row_ = {}
    for mode, name in enumerate(MODE_NAMES):
        for figure in found[mode][0]:
            row |= _ends(f"{figure}/{name}", [part[figure] for part in found[mode]])
        sums = [own[mode] for own in tokens]
        bits = [np.array([_per_token(each.entropy, each.tokens) / np.log(2) for each in own]) for own in sums]
        row |= _ends(f"entropy_bits/{name}", bits, [np.array([each.tokens for each in own], float) for own in sums])
    differences = [second["accuracy"] - first["accuracy"] for first, second in zip(*found, strict=True)]
    row["accuracy_difference"] = float(np.mean([metrics.mean_over_questions(part) for part in differences]))
    return row | _ends("accuracy_difference", differences)


def _per_question(groups: Sequence[Graded], mode: int, k: int) -> dict[str, Float[np.ndarray, "Q"]]:
    correct = _correct(rewards_of(groups, mode))
    return {
        "accuracy": metrics.average_at_k_per_question(correct),
        f"pass@{k}": metrics.pass_at_k_per_question(correct, k),
        f"maj@{k}": metrics.majority_at_k_per_question(_votes(groups, mode), correct),
    }


def _ends(name: str, strata: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None = None) -> Row_:
    low, high = metrics.stratified_interval(strata, weights)
    return {f"{name}/low": low, f"{name}/high": high}


def left_out(strata: Sequence[Sequence[Graded]], k: int) -> int:
    """How many questions have too few graded samples for pass@k in some mode, and count nowhere in it."""
    found = 0
    for groups in strata:
        correct = (_correct(rewards_of(groups, mode)) for mode in (NORMAL, HIGH_ENTROPY))
        normal, high_entropy = (metrics.pass_at_k_per_question(part, k) for part in correct)
        found += metrics.left_out(normal + high_entropy)
    return found


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
    return groups, score_groups(scorer, params, groups, **limits, progress=progress)
