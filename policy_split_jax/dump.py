"""A step's rollouts as the released trainer writes them: one JSON object a training sequence, quarter by quarter."""

from collections.abc import Iterator, Sequence
from typing import Any

from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES
from policy_split_jax.policy import Policy
from policy_split_jax.rollouts import Group, shared_views
from policy_split_jax.training.collate import SharedGroup
from policy_split_jax.training.quarters import QUARTERS


def dump_rows(
    policy: Policy, groups: Sequence[Group], shared: Sequence[SharedGroup] | None, step: int
) -> Iterator[dict[str, Any]]:
    """Texts are without special tokens; `uuids` names a question under one mode, `in_batch_ids` a question."""
    views = shared_views(groups, shared)
    modes = {mode for group in groups for mode in group.modes}
    for trained, sampled in (quarter for quarter in QUARTERS if modes.issuperset(quarter)):
        for number, (group, view) in enumerate(zip(groups, views, strict=True)):
            own = trained == sampled
            prompt = (group.prompts if own else view.prompts)[trained]
            for index, rollout in enumerate(group.rollouts):
                if group.modes[index] == sampled:
                    tokens = rollout.tokens if own else view.responses[index]
                    yield {
                        "input": policy.tokenizer.decode(list(prompt), skip_special_tokens=True),
                        "output": policy.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True),
                        "score": group.grades[index].score,
                        "step": step,
                        "is_he_prompt": trained == HIGH_ENTROPY,
                        "is_he_response": sampled == HIGH_ENTROPY,
                        "in_batch_ids": number,
                        "uuids": f"{step}-{number}-{MODE_NAMES[trained]}",
                        "ground_truth": group.row.ground_truth,
                    }
