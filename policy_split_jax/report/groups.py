"""Runs that differ in their seed alone, taken together: how they are named, their mean, and the band around it."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from policy_split_jax.errors import UserError
from policy_split_jax.report.runs import Row, Run, read_run, series

T_INTERVAL_SEEDS = 4
"""From so many seeds on a band is a t-interval."""

Selection = Callable[[Run], Sequence[Row]]
"""Which rows of a run: those of training, or those of evaluations."""


class Named(NamedTuple):
    """What an argument of the command line names."""

    label: str | None
    """None where a path stands alone."""
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Average:
    """A metric over seeds, at the steps that all of them have."""

    steps: Int[np.ndarray, "n"]
    mean: Float[np.ndarray, "n"]
    low: Float[np.ndarray, "n"]
    high: Float[np.ndarray, "n"]


@dataclass(frozen=True)
class RunGroup:
    """One run, or several that differ in their seed alone."""

    label: str
    seeds: tuple[Run, ...]

    @property
    def legend(self) -> str:
        """The label, with what the band is."""
        words = band_words(len(self.seeds))
        return f"{self.label} ({words})" if words else self.label

    @property
    def evaluations(self) -> list[tuple[Row, ...]]:
        """The evaluations at the steps that all seeds have, in order: one row a seed."""
        seeds = [{row["step"]: row for row in seed.evaluation} for seed in self.seeds]
        return [tuple(seed[step] for seed in seeds) for step in common_steps(seeds)]

    def average(self, rows: Selection, key: str, change: Callable[[list[float]], list[float]] = list) -> Average | None:
        """Of a key of metrics.jsonl; `change` is applied to each seed's values first."""
        seeds = [series(rows(seed), key) for seed in self.seeds]
        return average_of_seeds([dict(zip(steps, change(values), strict=True)) for steps, values in seeds])


def parse_named(text: str) -> Named:
    """Reads `PATH`, or `LABEL=PATH,PATH,…` for several seeds.

    Raises:
      UserError: an empty label or path.
    """
    label, equals, paths = text.partition("=")
    if not equals or os.path.exists(text):
        return Named(None, (text,))
    parts = tuple(path.strip() for path in paths.split(","))
    if not label.strip() or not all(parts):
        raise UserError(f"{text!r}: has an empty label or path; write LABEL=PATH or LABEL=PATH,PATH")
    return Named(label.strip(), parts)


def read_groups(named: Sequence[Named]) -> list[RunGroup]:
    """Reads every run; those of one folder name are told apart by more of their paths, the same folder by a number.

    Raises:
      UserError: no run at all, a folder has no metrics.jsonl, or a file holds a malformed line.
    """
    if not named:
        raise UserError("no run folder given; name at least one, for example runs/tiny")
    folders = [Path(path) for each in named for path in each.paths]
    runs = (read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True))
    groups = [tuple(next(runs) for _ in each.paths) for each in named]
    labels = told_apart([each.label or seeds[0].name for each, seeds in zip(named, groups, strict=True)])
    return [RunGroup(label, seeds) for label, seeds in zip(labels, groups, strict=True)]


def told_apart(labels: Sequence[str]) -> list[str]:
    """The labels, a second of the same name numbered."""
    counts = [labels[: index + 1].count(label) for index, label in enumerate(labels)]
    return [f"{label} ({count})" if count > 1 else label for label, count in zip(labels, counts, strict=True)]


def common_steps(seeds: Sequence[Mapping[int, Any]]) -> list[int]:
    """The steps that all seeds have, in order."""
    return sorted(set(seeds[0]).intersection(*seeds[1:]))


def average_of_rows(rows: Sequence[Row], key: str) -> Average | None:
    """Of a step's rows, one a seed; None where a seed lacks the value."""
    return average_of_seeds([dict(zip(*series([row], key), strict=True)) for row in rows])


def average_of_seeds(seeds: Sequence[Mapping[int, float]]) -> Average | None:
    """Mean and band of values by step; None where the seeds have no step in common.

    The band spans the seeds, or from four seeds on is the 95 % t-interval of the mean.
    """
    steps = common_steps(seeds)
    if not steps:
        return None
    values = np.array([[seed[step] for step in steps] for seed in seeds])
    mean = values.mean(axis=0)
    if len(seeds) < T_INTERVAL_SEEDS:
        return Average(np.array(steps), mean, values.min(axis=0), values.max(axis=0))
    half = t_half_width(values)
    return Average(np.array(steps), mean, mean - half, mean + half)


def t_half_width(values: Float[np.ndarray, "seeds n"]) -> Float[np.ndarray, "n"]:
    """Half the width of the 95 % t-interval of the mean over two seeds or more."""
    from scipy.special import stdtrit

    seeds = len(values)
    return float(stdtrit(seeds - 1, 0.975)) * values.std(axis=0, ddof=1) / math.sqrt(seeds)


def band_words(seeds: int) -> str:
    """What a band over so many seeds is; empty for one seed, which has none."""
    if seeds == 1:
        return ""
    return f"{seeds} seeds, {'min–max' if seeds < T_INTERVAL_SEEDS else '95 % t-interval'}"


def _names(folders: Sequence[Path]) -> list[str]:
    paths = [folder.resolve() for folder in folders]
    return told_apart([_tail(path, [other for other in paths if other != path]) for path in paths])


def _tail(path: Path, others: Sequence[Path]) -> str:
    """The end of a path, of as many parts as tell it from the others."""
    tails = (path.parts[-count:] for count in range(1, len(path.parts) + 1))
    return str(Path(*next(tail for tail in tails if all(other.parts[-len(tail) :] != tail for other in others))))
