"""Watches a run's figures for what goes wrong in silence: numbers that are none, a sampler and a trainer that disagree,
a high-entropy mode that runs away.

Pure: a state and a step's row of metrics give the next state and what was found. The state is part of checkpoints.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

Action = Literal["warn", "lower_eta", "stop"]

_SMOOTHING = 0.9
_FIRST_STEPS = 10
"""Before so many steps nothing is said of trends: means are of too little."""
_QUIET_STEPS = 50
"""What was said once is not said again for so many steps."""
_INFLATED = 0.5
"""Below so many nats a token no entropy is inflated, however little it was at the start."""
_ABLE = 0.05
"""A mode that never solved so much has no accuracy to lose."""


@dataclass(frozen=True)
class GuardConfig:
    """What is said, and done, about a run that goes wrong."""

    skipped_steps: int = 5
    """So many steps in a row whose update was skipped, because a number in it was not finite, end the run."""
    sampler_kl: float = 0.01
    """Largest KL(sampler ‖ trainer) of a step, nats per token; 0 is off."""
    on_disagreement: Literal["warn", "stop"] = "warn"
    """Where that is exceeded."""
    entropy_growth: float = 3.0
    """The high-entropy mode's entropy is inflated when its mean over some ten steps is so many times that of the first
    ones; 0 is off."""
    accuracy_loss: float = 0.5
    """A mode's accuracy has collapsed when its mean over some ten steps has lost this share of its best; 0 is off."""
    on_collapse: Action = "warn"
    """Where either happens: say so, halve η for good each time it is seen, or end the run."""

    def __post_init__(self) -> None:
        checks = {
            "skipped_steps must be at least 1": self.skipped_steps >= 1,
            "sampler_kl must be at least 0": self.sampler_kl >= 0,
            "entropy_growth must be above 1, or 0": self.entropy_growth == 0 or self.entropy_growth > 1,
            "accuracy_loss must lie in [0, 1)": 0 <= self.accuracy_loss < 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)


class Finding(NamedTuple):
    """Something to say, in a line that names the remedy, and to do."""

    text: str
    action: Action


@dataclass(frozen=True)
class Guard:
    """What has been seen so far; JSON has all of it."""

    steps: int = 0
    skipped: int = 0
    """Steps in a row whose update was skipped."""
    means: dict[str, float] = field(default_factory=dict)
    """Running means of what is watched for trends."""
    marks: dict[str, float] = field(default_factory=dict)
    """Of each, what it is compared with: the entropy of the first steps, the best accuracy."""
    said: dict[str, int] = field(default_factory=dict)
    """When each finding was last said."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def watch(guard: Guard, row: Mapping[str, Any], config: GuardConfig) -> tuple[Guard, list[Finding]]:
    """The guard after a step with these metrics, and what there is to say."""
    guard = _with_trends(replace(guard, steps=guard.steps + 1), row)
    guard = replace(guard, skipped=guard.skipped + 1 if row["skipped"] else 0)
    found = _skips(guard, config) | _disagreement(row, config) | _trends(guard, config)
    # A run that ends says why, whenever it was last said.
    new = {
        what: finding
        for what, finding in found.items()
        if finding.action == "stop" or guard.steps - guard.said.get(what, -_QUIET_STEPS) >= _QUIET_STEPS
    }
    said = guard.said | dict.fromkeys(new, guard.steps)
    return replace(guard, said=said), list(new.values())


def _with_trends(guard: Guard, row: Mapping[str, Any]) -> Guard:
    means, marks = dict(guard.means), dict(guard.marks)
    for name in ("entropy/high_entropy", "accuracy/normal", "accuracy/high_entropy"):
        value = float(row.get(name, math.nan))
        if not math.isfinite(value):
            continue
        # The first steps' mean is the plain one.
        weight = max(1 - _SMOOTHING, 1 / guard.steps)
        means[name] = (1 - weight) * means.get(name, value) + weight * value
        if guard.steps <= _FIRST_STEPS:
            marks[name] = means[name]
        elif name.startswith("accuracy"):
            marks[name] = max(marks.get(name, 0.0), means[name])
    return replace(guard, means=means, marks=marks)


def _skips(guard: Guard, config: GuardConfig) -> dict[str, Finding]:
    if not guard.skipped:
        return {}
    text = "the update was skipped: its loss, its gradient or a log-probability is not a finite number"
    if guard.skipped < config.skipped_steps:
        return {"skip": Finding(f"{text}; the step's rollouts are in the folder skipped", "warn")}
    remedy = "lower optimizer.learning_rate or set model.dtype=float32; the last checkpoint is sound"
    return {"skip": Finding(f"{text}, {guard.skipped} steps in a row (guard.skipped_steps); {remedy}", "stop")}


def _disagreement(row: Mapping[str, Any], config: GuardConfig) -> dict[str, Finding]:
    measured = row["sampler/kl"]
    # Written so that what is not a number exceeds every limit.
    if not config.sampler_kl or measured <= config.sampler_kl:
        return {}
    text = (
        f"the sampler and the trainer disagree: KL {measured:.2g} nats a token, the largest difference "
        f"{row['sampler/max_difference']:.2g} (guard.sampler_kl is {config.sampler_kl:g}); set model.dtype=float32, "
        "and report it where that does not help"
    )
    return {"disagreement": Finding(text, config.on_disagreement)}


def _trends(guard: Guard, config: GuardConfig) -> dict[str, Finding]:
    if guard.steps <= _FIRST_STEPS:
        return {}
    found: dict[str, str] = {}
    entropy, first = guard.means.get("entropy/high_entropy", 0.0), guard.marks.get("entropy/high_entropy", 0.0)
    if config.entropy_growth and entropy > max(config.entropy_growth * first, _INFLATED):
        found["inflation"] = f"the high-entropy mode's entropy grew from {first:.2f} to {entropy:.2f} nats a token"
    for mode, name in (("normal", "accuracy/normal"), ("high-entropy", "accuracy/high_entropy")):
        mean, best = guard.means.get(name, 0.0), guard.marks.get(name, 0.0)
        if config.accuracy_loss and best > _ABLE and mean < (1 - config.accuracy_loss) * best:
            found[name] = f"the {mode} mode's accuracy fell from {best:.2f} to {mean:.2f}"
    halved = ", which is halved now" if config.on_collapse == "lower_eta" else ""
    remedy = f"η is too large{halved}; lower advantage.eta and eta.largest, or optimizer.learning_rate"
    return {what: Finding(f"{text}: {remedy}", config.on_collapse) for what, text in found.items()}
