"""The report: one page about a run, or several beside each other."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from policy_split_jax.modes import MODE_NAMES
from policy_split_jax.report.charts import DASHES, SYMBOLS, build_charts
from policy_split_jax.report.frame import chart_card, charts_section, frame, resource, write_page
from policy_split_jax.report.glance import Split, glance_chart, split_of, verdict
from policy_split_jax.report.groups import Named, RunGroup, average_of_rows, band_words, read_groups
from policy_split_jax.report.runs import Row, number
from policy_split_jax.report.samples import rollout_data

SIDES = {"normal": "normal mode", "high_entropy": "high-entropy mode", "both": "both together"}
DASH_PATTERNS = dict(zip(DASHES, ("", "7,4", "2,3", "7,3,2,3", "12,4", "12,4,2,4"), strict=True))
SIGNS = dict(zip(SYMBOLS, "●■◆▲✚✖", strict=True))


@dataclass(frozen=True)
class Headline:
    """A row of the table: what is measured, and the key of metrics.jsonl in the column of each side."""

    title: str
    note: str
    keys: dict[str, str]
    percent: bool = False


@dataclass(frozen=True)
class Figure:
    """A mean over seeds; half of the band's width where there are several."""

    mean: float
    half: float | None


def _each_side(prefix: str, *sides: str) -> dict[str, str]:
    return {side: f"{prefix}/{side}" for side in sides}


HEADLINES = (
    Headline("Accuracy", "mean of the samples", _each_side("accuracy", *MODE_NAMES), percent=True),
    Headline("Entropy", "nats per token", _each_side("entropy", *MODE_NAMES)),
    Headline(
        "Inter-mode KL",
        "from this mode to the other, nats per token",
        {"normal": "kl/normal_to_high_entropy", "high_entropy": "kl/high_entropy_to_normal"},
    ),
    Headline("Best of k", "highest reward of a question; both: of all its samples", _each_side("best_of_k", *SIDES)),
    Headline(
        "Distinct correct",
        "different right answers a question; both: of all its samples",
        _each_side("distinct_correct", *SIDES),
    ),
)


def write_report(runs: Sequence[Named], output: Path) -> Path:
    """Writes the page about these runs, or groups of seeds, to `output` and returns its path.

    Raises:
      UserError: a folder has no metrics.jsonl, or a file holds a malformed line.
    """
    return write_page(render(read_groups(runs)), output)


def render(groups: Sequence[RunGroup], watched: bool = False) -> str:
    """The whole page; one that is `watched` renews itself from the server that it came from."""
    sections = build_charts(groups)
    glance = glance_chart(groups)
    none = '<p class="muted">No training step has been recorded yet, so there are no charts.</p>'
    main = {
        "verdict": f"<h2>The split at a glance</h2>{_verdicts(groups)}",
        "glance": f'<div class="glance">{chart_card(glance)}</div>' if glance else "",
        "headline": f"<h2>Start → end</h2>{_headline(groups)}",
        "charts": "\n".join(charts_section(heading, charts) for heading, charts in sections) or none,
        "rollouts": resource("rollouts.html"),
        "details": _details(groups),
    }
    return frame(
        title_of(groups),
        watch_line(watched) + live("facts", _facts(groups)) + _reading(groups),
        "\n".join(text if name == "rollouts" else live(name, text) for name, text in main.items()),
        charts=[*([glance] if glance else []), *(chart for _, drawn in sections for chart in drawn)],
        scripts=["page.js", "rollouts.js", *(["watch.js"] if watched else [])],
        data={"rollout-data": rollout_data(groups)},
    )


def title_of(groups: Sequence[RunGroup]) -> str:
    """What the page is about."""
    return groups[0].label if len(groups) == 1 else f"{len(groups)} runs compared"


def watch_line(watched: bool) -> str:
    """Says whether the server is still there."""
    return '<p class="muted reading" id="watch-state" role="status">watching</p>' if watched else ""


def live(name: str, text: str) -> str:
    """A part that a watched page replaces when it has changed."""
    return f'<div data-live id="{name}">{text}</div>'


def _facts(groups: Sequence[RunGroup]) -> str:
    buttons = [_run_button(index, group.label) if len(groups) > 1 else "" for index, group in enumerate(groups)]
    facts = (f"<li>{button}{_fact(group)}</li>" for button, group in zip(buttons, groups, strict=True))
    return f'<ul class="facts">{"".join(facts)}</ul>'


def _run_button(index: int, label: str) -> str:
    """Shows how the run is drawn, and takes it out of the charts and back."""
    pattern, sign = DASH_PATTERNS[DASHES[index % len(DASHES)]], SIGNS[SYMBOLS[index % len(SYMBOLS)]]
    line = f'<line x1="0" y1="5" x2="38" y2="5" stroke="currentColor" stroke-width="2" stroke-dasharray="{pattern}"/>'
    return (
        f'<button type="button" data-run="{index}" aria-pressed="true" aria-label="Show {html.escape(label)}">'
        f'<svg viewBox="0 0 38 10" aria-hidden="true">{line}</svg>{sign}</button>'
    )


def _fact(group: RunGroup) -> str:
    seeds = group.seeds
    parts = [band_words(len(seeds))] if len(seeds) > 1 else []
    steps = _range([run.train[-1]["step"] for run in seeds if run.train])
    parts.append(f"training step {steps}" if steps else "no training step yet")
    evaluations = [len(run.evaluation) for run in seeds]
    parts.append(f"{_range(evaluations)} evaluation{'s' * (set(evaluations) != {1})}")
    if seconds := sum(number(row, "time/step") or 0.0 for run in seeds for row in run.train):
        parts.append(f"{_duration(seconds)} of training")
    if failed := sum(number(row, "grader/failed") or 0.0 for run in seeds for row in run.train):
        parts.append(f"{failed:,.6g} failed grades, left out")
    unfinished = sum(run.summary is None for run in seeds)
    some = f"{unfinished} of them " if 0 < unfinished < len(seeds) else ""
    parts.append(f"{some}not finished" if unfinished else "finished")
    return f"<b>{html.escape(group.label)}</b> · " + " · ".join(parts)


def _range(values: Sequence[int]) -> str:
    low, high = min(values, default=None), max(values, default=None)
    return "" if low is None or high is None else f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _reading(groups: Sequence[RunGroup]) -> str:
    """The key of colours, and how lines and bands are to be read."""
    key = "".join(f'<li><i class="{side}"></i>{label}</li>' for side, label in SIDES.items())
    words = ["Thin lines are single steps, bold lines their moving average, markers are evaluations."]
    if several := sorted({band_words(len(group.seeds)) for group in groups if len(group.seeds) > 1}):
        words.append(
            "Of several seeds lines and figures are means at steps that all of them have, bands and bars around them "
            "the range of the seeds (min–max) or, from four seeds on, the 95 % t-interval of the mean "
            f"(here: {'; '.join(several)}); ± is half of its width."
        )
    if len(groups) > 1:
        words.append("Runs differ by dash and marker; a run's button takes it out of the charts.")
    return f'<ul class="key" aria-label="Colours">{key}</ul><p class="muted reading">{" ".join(words)}</p>'


def _verdicts(groups: Sequence[RunGroup]) -> str:
    splits = [(group, split_of(group)) for group in groups]
    if not any(split for _, split in splits):
        return f'<p class="verdict muted">{_no_evaluation(groups)}</p>'
    several = len(groups) > 1
    lines = []
    for group, split in splits:
        name = f"<b>{html.escape(group.label)}</b>: " if several else ""
        lines.append(f"{name}{_split_in_words(group, split) if split else _no_evaluation([group])}")
    return "".join(f'<p class="verdict{" several" * several}">{line}</p>' for line in lines)


def _split_in_words(group: RunGroup, split: Split) -> str:
    seeds = len(group.seeds)
    means = f' <small class="muted">(means of {seeds} seeds at step {split.end.step:,})</small>' if seeds > 1 else ""
    return html.escape(verdict(split)) + means


def _no_evaluation(groups: Sequence[RunGroup]) -> str:
    if any(run.evaluation for group in groups for run in group.seeds):
        return "There is no step yet at which every seed was evaluated in both modes."
    return "No evaluation has been recorded yet."


def _headline(groups: Sequence[RunGroup]) -> str:
    if not any(group.evaluations for group in groups):
        return f'<p class="card muted">{_no_evaluation(groups)}</p>'
    rows = [_headline_row(line, group, len(groups), i) for line in HEADLINES for i, group in enumerate(groups)]
    run_column = '<th scope="col" class="run-name">run</th>' if len(groups) > 1 else ""
    sides = "".join(
        f'<th scope="col" class="side-name {side}-text">{html.escape(label)}</th>' for side, label in SIDES.items()
    )
    return (
        '<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Start and end">'
        f'<table><thead><tr><th scope="col"><small>{_span(groups)}</small></th>{run_column}{sides}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _span(groups: Sequence[RunGroup]) -> str:
    if len(groups) > 1:
        return "first → last evaluation"
    k = number(groups[0].evaluations[-1][0], "k")
    samples = f", k = {k:g}" if k is not None else ""
    return f"evaluation at {_steps(groups[0])}{samples}"


def _steps(group: RunGroup) -> str:
    """Of the first and last evaluation; empty where the seeds have none in common."""
    steps = [rows[0]["step"] for rows in group.evaluations]
    return f"step {steps[0]:,} → {steps[-1]:,}" if steps else ""


def _headline_row(line: Headline, group: RunGroup, groups: int, index: int) -> str:
    heading = f'<th scope="rowgroup" rowspan="{groups}">{line.title}<small>{line.note}</small></th>'
    name = f'<td class="run">{html.escape(group.label)}<small>{_steps(group)}</small></td>' if groups > 1 else ""
    cells = "".join(
        f'<td data-side="{label}">{_change(group, line.keys.get(side), line.percent)}</td>'
        for side, label in SIDES.items()
    )
    kind = ' class="same"' if index else ""
    return f"<tr{kind}>{heading if index == 0 else ''}{name}{cells}</tr>"


def _change(group: RunGroup, key: str | None, percent: bool) -> str:
    if key is None:
        return ""
    figures = [_figure(rows, key) for rows in group.evaluations]
    first, last = (figures[0], figures[-1]) if figures else (None, None)
    if first is None and last is None:
        return '<span class="muted">—</span>'
    if len(figures) == 1:
        return f"<b>{_value(last, percent)}</b>"
    if first is None or last is None:
        return f"{_value(first, percent)} → <b>{_value(last, percent)}</b>"
    sign, size = "−" if last.mean < first.mean else "+", abs(last.mean - first.mean)
    difference = f"{_percent(size)} points" if percent else _plain(size)
    return f"{_value(first, percent)} → <b>{_value(last, percent)}</b><small>{sign}{difference}</small>"


def _figure(rows: Sequence[Row], key: str) -> Figure | None:
    """Of a step's rows, one a seed; None where a seed lacks the value."""
    found = average_of_rows(rows, key)
    if found is None:
        return None
    return Figure(float(found.mean[0]), float(found.high[0] - found.low[0]) / 2 if len(rows) > 1 else None)


def _value(figure: Figure | None, percent: bool) -> str:
    if figure is None:
        return "—"
    show = _percent if percent else _plain
    around = "" if figure.half is None else f" ± {show(figure.half)}"
    return f"{show(figure.mean)}{around}" + " %" * percent


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _plain(value: float) -> str:
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.3f}" if abs(value) < 1 else f"{value:,.2f}"


def _details(groups: Sequence[RunGroup]) -> str:
    blocks = []
    for run in (run for group in groups for run in group.seeds):
        if run.config is not None:
            blocks.append(_folded(f"Configuration of {run.name}", run.config))
        if run.summary is not None:
            blocks.append(_folded(f"Summary of {run.name}", json.dumps(run.summary, indent=2, ensure_ascii=False)))
    return "<h2>Settings</h2>" + "".join(blocks) if blocks else ""


def _folded(title: str, text: str) -> str:
    summary, body = html.escape(title), html.escape(text)
    return f'<details class="card"><summary>{summary}</summary><pre tabindex="0">{body}</pre></details>'
