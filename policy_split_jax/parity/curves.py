"""One self-contained HTML page that lays training curves of several runs over each other, with their distances."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policy_split_jax.errors import UserError
from policy_split_jax.parity.logs import Curves, read_curves
from policy_split_jax.parity.names import to_common
from policy_split_jax.report.charts import DASHES, Chart, axes_layout, band_trace
from policy_split_jax.report.frame import charts_section, frame, write_page
from policy_split_jax.report.groups import Average, average_of_seeds, band_words, parse_named, told_apart

COLOURS = ("#2f9e8f", "#8b6bb1", "#c4603c", "#b3a43c", "#5b7fa6", "#c2679a")
"""Of the groups; none is a mode's."""
ORDER = ("reward", "accuracy", "entropy", "kl", "response_length", "loss", "grad_norm")
COLUMNS = ("common steps", "mean |difference|", "largest difference", "relative difference", "last tenth")


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in our names."""

    label: str
    seeds: tuple[Curves, ...]


@dataclass(frozen=True)
class Distance:
    """How far another group's mean lies from the first's at their common steps; differences are other − first."""

    steps: int
    mean_absolute: float
    largest: float
    """With its sign; the largest in size."""
    largest_step: int
    relative: float | None
    """The mean difference as a share of the first's mean absolute value; None where that is 0."""
    last_tenth: float
    """Difference of the means over the last tenth of the steps, rounded up."""


def parse_group(text: str, names: Mapping[str, str] | None = None) -> Group:
    """Reads `PATH`, or `LABEL=PATH,PATH,…` for several seeds; `names` as in `to_common`.

    Raises:
      UserError: an empty label or path, or one that cannot be read.
    """
    label, paths = parse_named(text)
    seeds = tuple(to_common(read_curves(path), names) for path in paths)
    return Group(label or seeds[0].name, seeds)


def average(group: Group, metric: str) -> Average | None:
    """Mean and band of a metric; None where the seeds have no step of it in common."""
    return average_of_seeds([dict(seed.metrics.get(metric, ())) for seed in group.seeds])


def distance(first: Average, other: Average) -> Distance | None:
    """None where the two have no step in common."""
    steps, mine, theirs = np.intersect1d(first.steps, other.steps, assume_unique=True, return_indices=True)
    if not len(steps):
        return None
    difference = other.mean[theirs] - first.mean[mine]
    largest, size = np.argmax(np.abs(difference)), float(np.abs(first.mean[mine]).mean())
    return Distance(
        steps=len(steps),
        mean_absolute=float(np.abs(difference).mean()),
        largest=float(difference[largest]),
        largest_step=int(steps[largest]),
        relative=float(difference.mean()) / size if size else None,
        last_tenth=float(difference[-math.ceil(len(steps) / 10) :].mean()),
    )


def write_curves(groups: Sequence[Group], output: Path) -> Path:
    """Writes the page to `output` and returns its path.

    Raises:
      UserError: fewer than two groups, or no metric that two of them share.
    """
    return write_page(render(groups), output)


def render(groups: Sequence[Group]) -> str:
    """The whole page."""
    labels = told_apart([group.label for group in groups])
    groups = [Group(label, group.seeds) for label, group in zip(labels, groups, strict=True)]
    shared = shared_averages(groups)
    charts = build_charts(groups, shared)
    reading = "Lines are means over seeds at the steps that all of them have; the legend says what a band is."
    return frame(
        f"curves of {' and '.join(labels)}",
        f'{_facts(groups)}<p class="muted reading">{reading}</p>',
        f"<h2>Distances from {html.escape(labels[0])}</h2>{_table(groups, shared)}\n"
        f"{charts_section('Curves', charts)}\n{_unshared(groups, shared)}",
        charts=charts,
        scripts=["page.js"],
    )


def shared_averages(groups: Sequence[Group]) -> dict[str, list[Average | None]]:
    """The metrics that at least two groups have, in the order of the page; one average or None a group.

    Raises:
      UserError: fewer than two groups, or nothing is shared.
    """
    if len(groups) < 2:
        raise UserError("one run has nothing to be compared with; give at least two")
    metrics = sorted({metric for group in groups for seed in group.seeds for metric in seed.metrics}, key=_rank)
    averages = {metric: [average(group, metric) for group in groups] for metric in metrics}
    shared = {metric: found for metric, found in averages.items() if len(found) - found.count(None) > 1}
    if not shared:
        has = "; ".join(f"{group.label} has {', '.join(sorted(group.seeds[0].metrics)[:5])}" for group in groups)
        raise UserError(f"no metric is in two groups ({has}); map their names to ours in a file of names")
    return shared


def build_charts(groups: Sequence[Group], shared: Mapping[str, Sequence[Average | None]]) -> list[Chart]:
    """One chart a metric."""
    return [_chart(f"curve-{index}", metric, groups, found) for index, (metric, found) in enumerate(shared.items())]


def _rank(metric: str) -> tuple[int, str, bool]:
    name = metric.removeprefix("eval/")
    kind = name.partition("/")[0]
    return ORDER.index(kind) if kind in ORDER else len(ORDER), name, name != metric


def _chart(slug: str, metric: str, groups: Sequence[Group], found: Sequence[Average | None]) -> Chart:
    drawn = [(index, groups[index], each) for index, each in enumerate(found) if each is not None]
    data = [trace for index, group, each in drawn for trace in _traces(index, group, each)]
    # The bands go underneath.
    data.sort(key=lambda trace: "fill" not in trace)
    means = np.concatenate([each.mean for _, _, each in drawn])
    log = bool(means.min() > 0 and means.max() > 100 * means.min())
    summary = "; ".join(f"{group.label}: from {each.mean[0]:.3g} to {each.mean[-1]:.3g}" for _, group, each in drawn)
    return Chart(slug, metric, _in_words(groups, found), data, axes_layout("step", "", legend=True), summary, log)


def _traces(index: int, group: Group, each: Average) -> list[dict[str, Any]]:
    colour, several = COLOURS[index % len(COLOURS)], len(group.seeds) > 1
    steps, means = each.steps.tolist(), each.mean.tolist()
    # plotly.js reads markup in names; a folder may be called anything.
    name = html.escape(f"{group.label} ({band_words(len(group.seeds))})" if several else group.label)
    common = {"type": "scatter", "legendgroup": str(index), "name": name}
    pen = {"color": colour, "dash": DASHES[index % len(DASHES)], "width": 2}
    # Few points are evaluations, and one makes no line.
    mode = "lines" if len(steps) > 30 else "lines+markers"
    line = common | {"x": steps, "y": means, "mode": mode, "line": pen, "showlegend": True}
    return [common | band_trace(each, colour), line] if several else [line]


def _in_words(groups: Sequence[Group], found: Sequence[Average | None]) -> str:
    distances = zip(groups[1:], _distances(found), strict=True)
    return "; ".join(
        f"{group.label}: mean |difference| {each.mean_absolute:.3g} over {_steps(each.steps)}"
        for group, each in distances
        if each is not None
    )


def _distances(found: Sequence[Average | None]) -> list[Distance | None]:
    """Of each group but the first."""
    first = found[0]
    return [None if first is None or other is None else distance(first, other) for other in found[1:]]


def _facts(groups: Sequence[Group]) -> str:
    return '<ul class="facts">' + "".join(f"<li>{_fact(group)}</li>" for group in groups) + "</ul>"


def _fact(group: Group) -> str:
    steps = [step for seed in group.seeds for curve in seed.metrics.values() for step, _ in curve]
    parts = [band_words(len(group.seeds)) or "1 seed", f"steps {min(steps):,} to {max(steps):,}"]
    return f"<b>{html.escape(group.label)}</b> · " + " · ".join(parts)


def _table(groups: Sequence[Group], shared: Mapping[str, Sequence[Average | None]]) -> str:
    rows = "".join(_table_rows(metric, groups, found) for metric, found in shared.items() if found[0] is not None)
    if not rows:
        return f'<p class="card muted">{html.escape(groups[0].label)} shares no metric with the others.</p>'
    heads = "".join(f'<th scope="col" class="side-name">{html.escape(head)}</th>' for head in COLUMNS)
    return (
        '<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Distances"><table><thead><tr>'
        '<th scope="col"><small>differences are other − first, of means over seeds</small></th>'
        f'<th scope="col" class="run-name">other</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></div>'
    )


def _table_rows(metric: str, groups: Sequence[Group], found: Sequence[Average | None]) -> str:
    others = [(groups[at].label, each) for at, each in enumerate(_distances(found), 1) if found[at] is not None]
    heading = f'<th scope="rowgroup" rowspan="{len(others)}">{html.escape(metric)}</th>'
    rows = []
    for index, (label, each) in enumerate(others):
        named = zip(COLUMNS, _cells(each), strict=True)
        cells = "".join(f'<td data-side="{html.escape(head)}">{cell}</td>' for head, cell in named)
        kind, head = (' class="same"', "") if index else ("", heading)
        rows.append(f'<tr{kind}>{head}<td class="run">{html.escape(label)}</td>{cells}</tr>')
    return "".join(rows)


def _cells(each: Distance | None) -> tuple[str, ...]:
    """One a column; dashes where there is nothing to compare."""
    if each is None:
        return ("0", "—", "—", "—", "—")
    return (
        f"{each.steps:,}",
        f"<b>{each.mean_absolute:.4g}</b>",
        f"{_signed(each.largest)}<small>at step {each.largest_step:,}</small>",
        "—" if each.relative is None else f"{_signed(100 * each.relative)} %",
        _signed(each.last_tenth),
    )


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "−") if value else "0"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def _unshared(groups: Sequence[Group], shared: Mapping[str, Sequence[Average | None]]) -> str:
    """By name, what is in no chart: other groups, or other seeds of the same, lack it."""
    items = []
    for group in groups:
        names = sorted({metric for seed in group.seeds for metric in seed.metrics} - shared.keys())
        if names:
            listed = html.escape(", ".join(names))
            items.append(f'<p class="card reading"><b>{html.escape(group.label)}</b> {listed}</p>')
    return "<h2>Metrics of one group only</h2>" + "".join(items) if items else ""
