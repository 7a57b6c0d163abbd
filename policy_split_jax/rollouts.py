"""From questions to graded rollouts of both modes: what training and evaluation share."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Key

from policy_split_jax import processes
from policy_split_jax.config import SharingConfig
from policy_split_jax.data.formats import Row
from policy_split_jax.errors import UserError
from policy_split_jax.model import qwen3
from policy_split_jax.modes import (
    HIGH_ENTROPY,
    NORMAL,
    encode_again,
    render_both,
    render_user_turn,
    shared_prefix,
)
from policy_split_jax.padding import TokenRow
from policy_split_jax.policy import Policy
from policy_split_jax.rewards import Grade, GradeItem, GraderPool
from policy_split_jax.sampler.batcher import FinishReason, Prompt, Rollout, Sampling
from policy_split_jax.sampler.rollout import Sampler, rollout_keys
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.collate import SharedGroup, make_batch

Progress = Callable[[int], None]
_RENDERED_AT_ONCE = 1024


def no_progress(finished: int) -> None:
    """Shows nothing."""


@runtime_checkable
class Graded(Protocol):
    """What figures need of a question and its rollouts; the lists run over the rollouts."""

    @property
    def modes(self) -> Sequence[int]: ...

    @property
    def grades(self) -> Sequence[Grade]: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens."""
        ...

    @property
    def finish_reasons(self) -> Sequence[FinishReason]: ...


@dataclass
class Group:
    """A question and all of its rollouts; the lists run over the rollouts."""

    row: Row
    prompts: tuple[list[int], list[int]]
    """The question's prompt in each mode."""
    rollouts: list[Rollout]
    modes: list[int]
    """The mode that sampled each rollout."""
    to_text: Callable[[TokenRow], str]
    grades: list[Grade] = field(default_factory=list)

    @cached_property
    def texts(self) -> list[str]:
        """Made when they are asked for: a process grades a part of the groups only."""
        return [self.to_text(rollout.tokens) for rollout in self.rollouts]

    @property
    def lengths(self) -> list[int]:
        return [len(rollout.tokens) for rollout in self.rollouts]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        return [rollout.finish_reason for rollout in self.rollouts]


def sample_groups(
    params: qwen3.Params,
    policy: Policy,
    sampler: Sampler,
    rows: Sequence[Row],
    *,
    per_mode: int,
    key: Key[Array, ""],
    sampling: Sampling,
    modes: Sequence[int] = (NORMAL, HIGH_ENTROPY),
    first: int = 0,
    progress: Progress = no_progress,
) -> list[Group]:
    """Samples `per_mode` rollouts of every question in each of `modes`, all in one batched generate.

    A rollout depends on the key, the question's place, its mode and its index, not on `per_mode`. Places count from
    `first`: that of `rows` in a longer list. Raises UserError naming a question whose prompt is too long.
    """
    prompts = render_prompts(policy, rows, sampler.max_prompt_tokens)
    questions = np.repeat(first + np.arange(len(rows)), len(modes))
    keys = rollout_keys(key, questions, np.tile(np.array(modes), len(rows)), per_mode)
    shared = {mode: len(shared_prefix(policy.tokenizer, mode, policy.prompts)) for mode in modes}
    requests = [
        Prompt(prompts[at][mode], keys[at * len(modes) + place], shared[mode])
        for at in range(len(rows))
        for place, mode in enumerate(modes)
    ]
    sampled = sampler(params, requests, sampling, progress)
    groups = []
    for at, row in enumerate(rows):
        by_mode = sampled[at * len(modes) : (at + 1) * len(modes)]
        rollouts = [rollout for answers in by_mode for rollout in answers]
        groups.append(
            Group(
                row,
                prompts[at],
                rollouts,
                [mode for mode in modes for _ in range(per_mode)],
                policy.text,
            )
        )
    return groups


def grade_groups(pool: GraderPool, groups: Sequence[Group]) -> None:
    """Grades every rollout, in place; each process of a run grades its share and tells the others."""
    own = processes.share(len(groups))
    items = [
        GradeItem(text, group.row.ground_truth, group.row.data_source, group.row.extra_info)
        for group in groups[own]
        for text in group.texts
    ]
    shared = processes.gather([asdict(grade) for grade in pool.grade(items)])
    grades = (Grade(**grade) for part in shared for grade in part)
    for group in groups:
        group.grades = [next(grades) for _ in group.rollouts]


def group_batch(
    groups: Sequence[Group],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    shared: Sequence[SharedGroup] | None = None,
) -> Batch:
    """A step's graded groups as the update reads them."""
    return make_batch(
        [group.prompts for group in groups],
        [group.rollouts for group in groups],
        [group.modes for group in groups],
        [[grade.score for grade in group.grades] for group in groups],
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        shared=shared,
    )


def shared_groups(
    policy: Policy, groups: Sequence[Group], sharing: SharingConfig, max_new_tokens: int
) -> list[SharedGroup] | None:
    """What each mode trains on of the other's rollouts; None where that is what was sampled."""
    if sharing.exact:
        return None
    own = [group.prompts for group in groups]
    prompts = training_prompts(policy, [group.row for group in groups], own, sharing)
    return [
        SharedGroup(pair, [_shared_tokens(policy, rollout, sharing)[:max_new_tokens] for rollout in group.rollouts])
        for pair, group in zip(prompts, groups, strict=True)
    ]


def shared_views(groups: Sequence[Group], shared: Sequence[SharedGroup] | None) -> Sequence[SharedGroup]:
    """`shared`, or in its place what was sampled."""
    if shared is not None:
        return shared
    return [SharedGroup(group.prompts, [rollout.tokens for rollout in group.rollouts]) for group in groups]


def _shared_tokens(policy: Policy, rollout: Rollout, sharing: SharingConfig) -> TokenRow:
    return rollout.tokens if sharing.response == "tokens" else encode_again(policy.tokenizer, rollout.tokens)


def training_prompts(
    policy: Policy, rows: Sequence[Row], prompts: list[tuple[list[int], list[int]]], sharing: SharingConfig
) -> list[tuple[list[int], list[int]]]:
    """The prompts, by mode, under which each mode trains on the other's rollouts; `prompts` are the modes' own."""
    if sharing.high_entropy_prompt == "system":
        return prompts
    turns = render_user_turn(policy.tokenizer, [row.question for row in rows], policy.prompts)
    return [(normal, turn) for (normal, _), turn in zip(prompts, turns, strict=True)]


def render_prompts(policy: Policy, rows: Sequence[Row], limit: int) -> list[tuple[list[int], list[int]]]:
    """Each question's prompts, indexed by mode; UserError where one has more than `limit` tokens."""
    prompts = _render(policy, rows)
    _check(_sizes(prompts), rows, limit)
    return prompts


def check_prompts(policy: Policy, rows: Sequence[Row], limit: int, sharing: SharingConfig) -> None:
    """Raises UserError where a prompt that samples or trains has more than `limit` tokens."""
    _check(_bounded_sizes(policy, rows, limit, sharing), rows, limit)


def without_long_prompts(policy: Policy, rows: Sequence[Row], limit: int, sharing: SharingConfig) -> list[Row]:
    """The rows whose prompts have at most `limit` tokens in both modes."""
    sizes = _bounded_sizes(policy, rows, limit, sharing)
    return [row for row, size in zip(rows, sizes, strict=True) if size <= limit]


def _bounded_sizes(policy: Policy, rows: Sequence[Row], limit: int, sharing: SharingConfig) -> list[int]:
    """Tokens of each question's longest prompt, where they may be more than `limit`; elsewhere a number that is
    at most `limit` and not less than they are.

    A million questions are thus looked at in seconds, and few prompts are held at a time.
    """
    sizes = _most_tokens(policy, rows, sharing)
    doubtful = [at for at, size in enumerate(sizes) if size > limit]
    for start in range(0, len(doubtful), _RENDERED_AT_ONCE):
        part = doubtful[start : start + _RENDERED_AT_ONCE]
        exact = _sizes(_all_prompts(policy, [rows[at] for at in part], sharing))
        for at, size in zip(part, exact, strict=True):
            sizes[at] = size
    return sizes


def _most_tokens(policy: Policy, rows: Sequence[Row], sharing: SharingConfig) -> list[int]:
    """Bounds from the length of the texts alone: no token of Qwen3's is less than a byte, and its normalisation (NFC)
    makes at most three bytes of one."""
    [empty] = _all_prompts(policy, [Row("", None, "")], sharing)
    around = max(len(policy.tokenizer.decode(prompt).encode()) for prompt in empty)
    times = policy.prompts.question_template.count("{question}")
    texts = (row.question for row in rows)
    return [around + times * (len(text) if text.isascii() else 3 * len(text.encode())) for text in texts]


def _all_prompts(policy: Policy, rows: Sequence[Row], sharing: SharingConfig) -> list[tuple[list[int], ...]]:
    """Of each question, those of both modes and those of shared rollouts."""
    prompts = _render(policy, rows)
    pairs = zip(prompts, training_prompts(policy, rows, prompts, sharing), strict=True)
    return [(*own, *shared) for own, shared in pairs]


def _check(sizes: Sequence[int], rows: Sequence[Row], limit: int) -> None:
    if max(sizes, default=0) > limit:
        longest = max(range(len(rows)), key=sizes.__getitem__)
        place = f"{rows[longest].place}: " if rows[longest].place else ""
        raise UserError(
            f"{sum(size > limit for size in sizes)} of {len(rows)} questions make prompts of more than {limit} "
            f"tokens, the longest {sizes[longest]} ({place}{rows[longest].question[:60]!r}); "
            "raise rollout.max_prompt_tokens (--max-prompt-tokens); to train without them: rollout.long_prompts=skip"
        )


def _render(policy: Policy, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    return render_both(policy.tokenizer, [row.question for row in rows], policy.prompts)


def _sizes(prompts: Sequence[Sequence[list[int]]]) -> list[int]:
    """Tokens of each question's longest prompt."""
    return [max(map(len, each)) for each in prompts]


def step_key(key: Key[Array, ""], step: int) -> Key[Array, ""]:
    """The key of everything random in one training step."""
    return jax.random.fold_in(key, step)
