"""Metrics of verl, and of the authors' trainer on top of it, under our own names.

Ours are listed in docs/architecture.md ("Metrics"). Where a name here has a counterpart that measures nearly the same,
the difference is said beside it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from policy_split_jax.errors import UserError
from policy_split_jax.parity.logs import Curves

Curve = Sequence[tuple[int, float]]


class Counterpart(NamedTuple):
    """Our name, and what to multiply their values by."""

    name: str
    factor: float = 1.0


COUNTERPARTS: dict[str, Counterpart] = {
    "actor/pg_loss": Counterpart("loss"),
    "actor/grad_norm": Counterpart("grad_norm"),
    "actor/lr": Counterpart("learning_rate"),
    "actor/lr(1e-4)": Counterpart("learning_rate", 1e-4),
    "actor/pg_clipfrac": Counterpart("clip_fraction"),
    # The score is the grader's, the reward may have a penalty taken off it.
    "critic/score/mean": Counterpart("reward"),
    "critic/rewards/mean": Counterpart("reward"),
    "response_length/mean": Counterpart("response_length"),
    "response_length/clip_ratio": Counterpart("truncated"),
    "timing_s/step": Counterpart("time/step"),
    "timing_s/gen": Counterpart("time/rollout"),
    "timing_s/reward": Counterpart("time/reward"),
    "timing_s/update_actor": Counterpart("time/update"),
    # The authors' own: sampled estimates, and means over responses of means over tokens, where ours are exact
    # and means over tokens.
    "actor/org_he_kl": Counterpart("kl/normal_to_high_entropy"),
    "actor/he_org_kl": Counterpart("kl/high_entropy_to_normal"),
    "actor/org_logprob": Counterpart("neg_logprob/normal", -1.0),
    "actor/he_logprob": Counterpart("neg_logprob/high_entropy", -1.0),
    # Of the rollouts that the normal mode sampled and trains on; `sub_batch_he` is all the rest, and no mode's.
    "sub_batch_org/critic/score/mean": Counterpart("reward/normal"),
    "sub_batch_org/critic/rewards/mean": Counterpart("reward/normal"),
    "sub_batch_org/response_length/mean": Counterpart("response_length/normal"),
    "sub_batch_org/response_length/clip_ratio": Counterpart("truncated/normal"),
}
"""Of two that have the same counterpart in one log, the first gets it."""

ENTROPY = ("actor/entropy_loss", "actor/entropy")
MEANS = ("reward", "response_length", "truncated", "entropy", "clip_fraction")
"""What verl gives as one number for all rollouts, and we for each mode."""

_BOTH_MODES = re.compile(r"actor/(org_he|he_org)_kl|sub_batch_org/.*")
_ACCURACY = re.compile(r"val-core/.+/mean@\d+|val/test_score/.+")


def to_common(curves: Curves, names: Mapping[str, str] | None = None) -> Curves:
    """The same curves in our names; what has no counterpart keeps its own.

    `names` (theirs: ours) comes before what is known here. Then the mean over both modes is added under the bare name
    (`reward`) to what has a value for each mode, or for the normal mode alone; and `…/high_entropy` to what has
    the mean and the normal mode, as the authors' logs do.

    Raises:
      UserError: two curves would get one name by `names`.
    """
    names = names or {}
    known = _known(curves.metrics) | {theirs: Counterpart(ours) for theirs, ours in names.items()}
    result = {name: curve for name, curve in curves.metrics.items() if name not in known}
    for theirs in [*names, *(name for name in known if name not in names)]:
        if theirs not in curves.metrics:
            continue
        ours, factor = known[theirs]
        if ours in result:
            if theirs in names:
                raise UserError(f"{curves.name}: {theirs} and another metric are both named {ours}; name one otherwise")
            ours, factor = theirs, 1.0
        result[ours] = [(step, factor * value) for step, value in curves.metrics[theirs]]
    for name in MEANS:
        result |= _completed(result, name)
    return Curves(curves.name, result)


def read_names(path: Path) -> dict[str, str]:
    """A YAML file of `their name: our name`; UserError where it is anything else."""
    try:
        names = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(names, dict):
        raise UserError(f"{path}: expected lines of `their name: our name`, found {type(names).__name__}")
    for theirs, ours in names.items():
        if not (isinstance(theirs, str) and isinstance(ours, str)):
            raise UserError(f"{path}: {theirs}: {ours}: both must be names; put quotes around them")
    return names


def _known(metrics: Mapping[str, Curve]) -> dict[str, Counterpart]:
    """The counterparts of a log, in the order in which they are taken."""
    # With two modes verl's entropy is the mean over both, each also on the other's rollouts.
    entropy = "entropy" if any(map(_BOTH_MODES.fullmatch, metrics)) else "entropy/normal"
    known = COUNTERPARTS | {name: Counterpart(entropy) for name in ENTROPY}
    # Ours is one test set. Several sources are not averaged here: they may differ in size.
    accuracies = [name for name in metrics if _ACCURACY.fullmatch(name)]
    if len(accuracies) == 1:
        known[accuracies[0]] = Counterpart("eval/accuracy/normal")
    # As our own TensorBoard and Weights & Biases logs have them.
    return known | {name: Counterpart(name.removeprefix("train/")) for name in metrics if name.startswith("train/")}


def _completed(metrics: Mapping[str, Curve], name: str) -> dict[str, Curve]:
    """What of a metric's mean and high-entropy mode follows from the others.

    Both modes have equally many rollouts. The authors' shared rollouts lack their stop token, so that a length of the
    high-entropy mode is one token short.
    """
    mean, normal, high_entropy = (metrics.get(f"{name}{mode}") for mode in ("", "/normal", "/high_entropy"))
    if normal and mean and not high_entropy:
        curve = _combined(lambda both, one: 2 * both - one, mean, normal)
        return {f"{name}/high_entropy": curve} if curve else {}
    if normal and not mean:
        curve = _combined(lambda one, other: (one + other) / 2, normal, high_entropy or normal)
        return {name: curve} if curve else {}
    return {}


def _combined(function: Callable[[float, float], float], first: Curve, second: Curve) -> Curve:
    """At the steps that both have."""
    values = dict(second)
    return [(step, function(value, values[step])) for step, value in first if step in values]
