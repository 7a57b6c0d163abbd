"""The split at a glance: where the modes started and where they stand, as one figure and one sentence."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.report.charts import (
    BOTH_COLOUR,
    HIGH_ENTROPY_COLOUR,
    NORMAL_COLOUR,
    SYMBOLS,
    Chart,
    axes_layout,
    error_bars,
    rounded,
)
from policy_split_jax.report.groups import RunGroup, average_of_rows
from policy_split_jax.report.runs import Row, number

PARTED = 0.1
"""From this KL on the modes are said to have parted (nats a token); before training it is some hundredths."""
KL = "kl/high_entropy_to_normal"
COLOURS = (NORMAL_COLOUR, HIGH_ENTROPY_COLOUR)
NAMES = ("normal", "high entropy")


@dataclass(frozen=True)
class Moment:
    """An evaluation, as a mean over seeds; the pairs are by mode."""

    step: int
    entropy: tuple[float, float]
    """Nats a token."""
    accuracy: tuple[float, float]
    kl: float
    """KL(high entropy ‖ normal), nats a token."""


@dataclass(frozen=True)
class Split:
    """The first and last evaluation of a run, or those that several seeds of one have all made."""

    start: Moment
    end: Moment
    evaluations: int
    finished: bool


def split_of(group: RunGroup) -> Split | None:
    """None without a step at which every seed was evaluated in both modes."""
    moments = [moment for rows in group.evaluations if (moment := _moment(rows))]
    if not moments:
        return None
    finished = all(seed.summary is not None for seed in group.seeds)
    return Split(moments[0], moments[-1], len(moments), finished)


def verdict(split: Split) -> str:
    """One sentence about where the modes stand, made from the numbers."""
    start, end = split.start, split.end
    before = f", {_nats(start.kl)} at the start" if split.evaluations > 1 else ""
    if end.kl < PARTED:
        yet = "" if split.finished else " yet"
        head = f"The modes have not parted{yet}: KL {_nats(end.kl)} nats/token{before}"
    else:
        head = f"The modes have parted: KL {_nats(end.kl)} nats/token{before}"
    return f"{head}; high-entropy {_entropy_words(end)} {_accuracy_words(end)}{_way_words(split)}."


def glance_chart(groups: Sequence[RunGroup]) -> Chart | None:
    """An arrow for each mode of each run, from its first evaluation to its last; None without evaluations."""
    drawn = [(index, group, split) for index, group in enumerate(groups) if (split := split_of(group))]
    if not drawn:
        return None
    entropies, accuracies = (_reach(key, drawn) for key in ("entropy", "accuracy"))
    across = _padded(entropies, 0.4 * max(entropies))
    data: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for index, group, split in drawn:
        for mode in (NORMAL, HIGH_ENTROPY):
            data += _mode_traces(group, index, split, mode, _mode_label(group, mode, groups))
            notes += _arrow(split, mode) if split.evaluations > 1 else []
        data.append(_gap(index, split))
        # Words of several runs would lie on each other; the sentences above have the numbers.
        notes += _words(split, across[1] - across[0]) if len(groups) == 1 else []
    layout = axes_layout("entropy (nats per token)", "accuracy (share correct)", legend=False)
    layout |= {"hovermode": "closest", "annotations": notes}
    layout["xaxis"]["range"], layout["yaxis"]["range"] = across, _padded(accuracies, 0.2)
    look_for = (
        "Each mode's way from the first evaluation (ring) to the last; dotted, by those between. Up is more often "
        "right, right is more varied. The dashed line is the gap between the modes: KL(high entropy ‖ normal) in nats "
        "per token."
    )
    summary = " ".join(verdict(split) for _, _, split in drawn)
    return Chart("glance", "Where the modes stand", look_for, data, layout, summary)


def _moment(rows: Sequence[Row]) -> Moment | None:
    """The mean over a step's rows, one a seed; None where one lacks a value."""
    keys = [f"{prefix}/{mode}" for prefix in ("entropy", "accuracy") for mode in MODE_NAMES]
    values = [[number(row, key) for row in rows] for key in (*keys, KL)]
    means = [sum(value for value in each if value is not None) / len(rows) for each in values]
    if any(value is None for each in values for value in each):
        return None
    return Moment(rows[0]["step"], (means[0], means[1]), (means[2], means[3]), means[4])


def _nats(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def _entropy_words(end: Moment) -> str:
    normal, high = end.entropy
    if normal <= 0:
        return f"has an entropy of {_nats(high)} nats/token against {_nats(normal)}"
    ratio = f"{high / normal:.2f}"
    if ratio == "1.00":
        return "has the same entropy"
    return f"keeps {ratio} × the entropy" if high > normal else f"has only {ratio} × the entropy"


def _accuracy_words(end: Moment) -> str:
    points = 100 * (end.accuracy[HIGH_ENTROPY] - end.accuracy[NORMAL])
    size = f"{abs(points):.1f}"
    if size == "0.0":
        return "at the same accuracy"
    return f"at {size} points {'more' if points > 0 else 'less'} accuracy"


def _way_words(split: Split) -> str:
    """What became of the normal mode's accuracy: modes part in a run that is destroyed, too."""
    if split.evaluations == 1:
        return ""
    start, end = (100 * moment.accuracy[NORMAL] for moment in (split.start, split.end))
    return f"; the normal mode's went from {start:.1f} % to {end:.1f} %"


def _mode_label(group: RunGroup, mode: int, groups: Sequence[RunGroup]) -> str:
    # plotly.js reads markup in names; a folder may be called anything.
    return NAMES[mode] if len(groups) == 1 else f"{NAMES[mode]} · {html.escape(group.legend)}"


def _mode_traces(group: RunGroup, index: int, split: Split, mode: int, name: str) -> list[dict[str, Any]]:
    """The way over all evaluations, faint; a ring at the start; a marker at the end."""
    colour, where = COLOURS[mode], "entropy %{x:.3f} nats, accuracy %{y:.1%}"
    common = {"type": "scatter", "meta": index, "showlegend": False}
    rows = [group.average(lambda run: run.evaluation, f"{key}/{MODE_NAMES[mode]}") for key in ("entropy", "accuracy")]
    traces = []
    if rows[0] and rows[1] and len(rows[0].steps) > 2:
        path = {"x": rounded(rows[0].mean.tolist()), "y": rounded(rows[1].mean.tolist()), "mode": "lines"}
        pen = {"color": colour, "width": 1.2, "dash": "dot"}
        traces.append(common | path | {"line": pen, "opacity": 0.6, "hoverinfo": "skip"})
    if split.evaluations > 1:
        ring = {"color": colour, "size": 11, "symbol": f"{SYMBOLS[index % len(SYMBOLS)]}-open", "line": {"width": 2}}
        start = {"x": rounded([split.start.entropy[mode]]), "y": rounded([split.start.accuracy[mode]])}
        hover = {"hovertemplate": f"{name}, start (step {split.start.step:,})<br>{where}<extra></extra>"}
        traces.append(common | start | hover | {"marker": ring, "mode": "markers"})
    end = {"x": rounded([split.end.entropy[mode]]), "y": rounded([split.end.accuracy[mode]]), "mode": "markers"}
    marker = {"color": colour, "size": 14, "symbol": SYMBOLS[index % len(SYMBOLS)]}
    hover = {"hovertemplate": f"{name}, end (step {split.end.step:,})<br>{where}<extra></extra>"}
    return [*traces, common | end | hover | {"marker": marker} | _bars(group, split.end.step, mode)]


def _bars(group: RunGroup, step: int, mode: int) -> dict[str, Any]:
    """The band of an evaluation in both directions, where there are several seeds."""
    if len(group.seeds) == 1:
        return {}
    rows = _rows_at(group, step)
    axes = {"error_x": f"entropy/{MODE_NAMES[mode]}", "error_y": f"accuracy/{MODE_NAMES[mode]}"}
    return {axis: error_bars(found) for axis, key in axes.items() if (found := average_of_rows(rows, key))}


def _rows_at(group: RunGroup, step: int) -> tuple[Row, ...]:
    """An evaluation, a row a seed."""
    return next(rows for rows in group.evaluations if rows[0]["step"] == step)


def _arrow(split: Split, mode: int) -> list[dict[str, Any]]:
    return [
        {
            "x": split.end.entropy[mode],
            "y": split.end.accuracy[mode],
            "ax": split.start.entropy[mode],
            "ay": split.start.accuracy[mode],
            "axref": "x",
            "ayref": "y",
            "text": "",
            "showarrow": True,
            "arrowhead": 2,
            "arrowwidth": 2.5,
            "arrowcolor": COLOURS[mode],
            "standoff": 8,
            "startstandoff": 7,
        }
    ]


def _gap(index: int, split: Split) -> dict[str, Any]:
    pen = {"color": BOTH_COLOUR, "width": 1.5, "dash": "dash"}
    ends = {"x": rounded(split.end.entropy), "y": rounded(split.end.accuracy)}
    style = {"type": "scatter", "mode": "lines", "line": pen, "meta": index, "showlegend": False, "hoverinfo": "skip"}
    return style | ends


def _words(split: Split, span: float) -> list[dict[str, Any]]:
    """The modes' names beside their ends, to the outside, where no arrow comes from, and the KL between them.

    `span` is the width of the figure in nats.
    """
    low, high = sorted((NORMAL, HIGH_ENTROPY), key=lambda mode: split.end.entropy[mode])
    side = 1 if sum(split.end.accuracy) >= sum(split.start.accuracy) else -1
    words = [
        {
            "x": split.end.entropy[mode],
            "y": split.end.accuracy[mode],
            "text": f"<b>{NAMES[mode]}</b>",
            # The page colours it, so that it can be read on light and dark.
            "name": MODE_NAMES[mode],
            "font": {"size": 14},
            "showarrow": False,
            "xanchor": anchor,
            "yshift": 18 * side,
        }
        for mode, anchor in ((low, "right"), (high, "left"))
    ]
    apart = split.end.entropy[high] - split.end.entropy[low] > 0.35 * span
    middle = {"x": sum(split.end.entropy) / 2, "y": sum(split.end.accuracy) / 2, "yshift": (15 if apart else 38) * side}
    words.append(middle | {"text": f"<b>KL {_nats(split.end.kl)}</b>", "showarrow": False, "font": {"size": 13}})
    if split.evaluations > 1:
        at = {"x": sum(split.start.entropy) / 2, "y": sum(split.start.accuracy) / 2}
        words.append(at | {"text": "start", "showarrow": False, "yshift": -20 * side})
    return words


def _reach(key: str, drawn: Sequence[tuple[int, RunGroup, Split]]) -> list[float]:
    """All values of the arrows' ends, and how far their bars reach."""
    values: list[float] = []
    for _, group, split in drawn:
        values += [*getattr(split.start, key), *getattr(split.end, key)]
        rows = _rows_at(group, split.end.step)
        ends = (average_of_rows(rows, f"{key}/{mode}") for mode in MODE_NAMES)
        values += [float(value[0]) for end in ends if end for value in (end.low, end.high)]
    return values


def _padded(values: Sequence[float], least: float) -> list[float]:
    """A range with room for the words; not so narrow that a small step looks like a large one.

    Nothing here is below zero but the ends of some bars.
    """
    low, high = max(0.0, min(values)), max(values)
    room = max(0.3 * (high - low), (least - (high - low)) / 2)
    return rounded([max(low - room, -0.05 * (high + room)), high + room])
