"""Writes the report: one HTML file that loads nothing and so can be mailed, archived and opened anywhere.

Everything that comes from a run (texts of the model, names, configuration) is escaped. As a second barrier
the page carries a content security policy that allows its own two scripts by their hash, and no other script,
image or request.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from policy_split_jax.files import whole_file
from policy_split_jax.modes import MODE_NAMES
from policy_split_jax.report.charts import Chart, build_charts
from policy_split_jax.report.runs import Row, Run, number, read_runs

SIDES = {"normal": "normal mode", "high_entropy": "high-entropy mode", "both": "both together"}
QUESTIONS_SHOWN = 12
ANSWERS_SHOWN = 8
CHARACTERS_SHOWN = 6000


@dataclass(frozen=True)
class Headline:
    """A row of the table: what is measured, and the key of metrics.jsonl in the column of each side."""

    title: str
    note: str
    keys: dict[str, str]
    percent: bool = False


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
    Headline("Best of k", "highest reward of a question", _each_side("best_of_k", *SIDES)),
    Headline("Distinct correct", "different right answers a question", _each_side("distinct_correct", *SIDES)),
)


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Writes the page about these run folders to `output` and returns its path.

    Raises:
      UserError: a folder has no metrics.jsonl, or a file holds a malformed line.
    """
    page = render(read_runs(runs))
    output.parent.mkdir(parents=True, exist_ok=True)
    # Lone surrogates can come out of a tokenizer, and have no UTF-8.
    with whole_file(output, errors="replace") as file:
        file.write(page)
    return output


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    script = resource("page.js")
    sections = build_charts(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return Template(resource("template.html")).substitute(
        policy=content_policy(plotly, script),
        title=html.escape(f"Policy Split · {title}"),
        facts=_facts(runs),
        headline=_headline(runs),
        charts="\n".join(charts_section(heading, charts) for heading, charts in sections)
        or '<p class="muted">No training step has been recorded yet, so there are no charts.</p>',
        samples=_samples(runs),
        details=_details(runs),
        data=embedded_json(
            [{"slug": c.slug, "data": c.data, "layout": c.layout} for _, group in sections for c in group]
        ),
        plotly=plotly,
        script=script,
    )


def resource(name: str) -> str:
    """A text file beside this module."""
    return resources.files("policy_split_jax.report").joinpath(name).read_text(encoding="utf-8")


def content_policy(*scripts: str) -> str:
    """The Content-Security-Policy of a page that runs these scripts and loads nothing."""
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)
    # plotly.js sets the styles of its elements itself, and tries out an image that it holds as data.
    rest = "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    # `</script>` or `<!--` in a name would otherwise end the element that holds the data.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _facts(runs: Sequence[Run]) -> str:
    return '<ul class="facts">' + "".join(f"<li>{_fact(run)}</li>" for run in runs) + "</ul>"


def _fact(run: Run) -> str:
    parts = [f"training step {run.train[-1]['step']:,}" if run.train else "no training step yet"]
    parts.append(f"{len(run.evaluation)} evaluation{'s' * (len(run.evaluation) != 1)}")
    if seconds := sum(number(row, "time/step") or 0.0 for row in run.train):
        parts.append(f"{_duration(seconds)} of training")
    if failed := sum(number(row, "grader/failed") or 0.0 for row in run.train):
        parts.append(f"{failed:,.6g} failed grades, left out")
    parts.append("finished" if run.summary is not None else "not finished")
    return f"<b>{html.escape(run.name)}</b> · " + " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _headline(runs: Sequence[Run]) -> str:
    if not any(run.evaluation for run in runs):
        return '<p class="card muted">No evaluation has been recorded yet.</p>'
    rows = [_headline_row(line, run, len(runs), i) for line in HEADLINES for i, run in enumerate(runs)]
    run_column = '<th scope="col" class="run-name">run</th>' if len(runs) > 1 else ""
    sides = "".join(
        f'<th scope="col" class="side-name {side}-text">{html.escape(label)}</th>' for side, label in SIDES.items()
    )
    return (
        '<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Start and end">'
        f'<table><thead><tr><th scope="col"><small>{_span(runs)}</small></th>{run_column}{sides}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></div>"
    )


def _span(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return "first → last evaluation"
    first, last = runs[0].evaluation[0], runs[0].evaluation[-1]
    k = number(last, "k")
    samples = f", k = {k:g}" if k is not None else ""
    return f"evaluation at step {first['step']:,} → {last['step']:,}{samples}"


def _headline_row(line: Headline, run: Run, runs: int, index: int) -> str:
    heading = f'<th scope="rowgroup" rowspan="{runs}">{line.title}<small>{line.note}</small></th>'
    name = f'<td class="run">{html.escape(run.name)}</td>' if runs > 1 else ""
    cells = "".join(
        f'<td data-side="{label}">{_change(run.evaluation, line.keys.get(side), line.percent)}</td>'
        for side, label in SIDES.items()
    )
    kind = ' class="same"' if index else ""
    return f"<tr{kind}>{heading if index == 0 else ''}{name}{cells}</tr>"


def _change(rows: Sequence[Row], key: str | None, percent: bool) -> str:
    if key is None:
        return ""
    first, last = (number(rows[0], key), number(rows[-1], key)) if rows else (None, None)
    if first is None and last is None:
        return '<span class="muted">—</span>'
    if len(rows) == 1:
        return f"<b>{_value(last, percent)}</b>"
    if first is None or last is None:
        return f"{_value(first, percent)} → <b>{_value(last, percent)}</b>"
    sign, size = "−" if last < first else "+", abs(last - first)
    difference = f"{100 * size:.1f} points" if percent else _value(size, percent)
    return f"{_value(first, percent)} → <b>{_value(last, percent)}</b><small>{sign}{difference}</small>"


def _value(value: float | None, percent: bool) -> str:
    if value is None:
        return "—"
    if percent:
        return f"{100 * value:.1f} %"
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:,.3f}" if abs(value) < 1 else f"{value:,.2f}"


def charts_section(heading: str, charts: Sequence[Chart]) -> str:
    """Cards of charts under a heading."""
    cards = "\n".join(_card(chart) for chart in charts)
    return f'<h2>{html.escape(heading)}</h2>\n<div class="grid">\n{cards}\n</div>'


def _card(chart: Chart) -> str:
    title, summary = html.escape(chart.title), html.escape(f"{chart.title}. {chart.summary}")
    button = (
        f'<button type="button" data-chart="{chart.slug}" aria-pressed="false">log axis</button>' if chart.log else ""
    )
    # The legend stands above the lines, and takes a row for every entry or two.
    height = 300 + 18 * max(0, sum(trace["showlegend"] for trace in chart.data) - 3)
    return (
        f'<section class="card chart" aria-labelledby="title-{chart.slug}">'
        f'<header><h3 id="title-{chart.slug}">{title}</h3>{button}</header>'
        f"<p>{html.escape(chart.look_for)}</p>"
        f'<div class="plot" id="chart-{chart.slug}" role="img" style="min-height: {height}px"'
        f' aria-label="{summary}"></div></section>'
    )


def _samples(runs: Sequence[Run]) -> str:
    sets = [(label, rows) for run in runs for label, rows in _sample_sets(run, len(runs) > 1)]
    if not sets:
        return ""
    options = "".join(
        f'<option value="{i}"{" selected" * (i == len(sets) - 1)}>{html.escape(label)}</option>'
        for i, (label, _) in enumerate(sets)
    )
    blocks = "\n".join(f'<div data-samples="{i}">{_questions(rows)}</div>' for i, (_, rows) in enumerate(sets))
    return (
        "<h2>Samples of both modes</h2>"
        '<p class="pick"><label for="sample-choice">First and last step that were sampled:</label>'
        f'<select id="sample-choice">{options}</select></p>\n{blocks}'
    )


def _sample_sets(run: Run, several: bool) -> list[tuple[str, list[Row]]]:
    sets: dict[tuple[int, str], list[Row]] = {}
    for row in run.samples:
        sets.setdefault((row["step"], row["kind"]), []).append(row)
    kinds = {"train": "training", "eval": "evaluation"}
    name = f"{run.name} · " if several else ""
    return [(f"{name}step {step:,} · {kinds.get(kind, kind)}", sets[step, kind]) for step, kind in sorted(sets)]


def _questions(rows: Sequence[Row]) -> str:
    questions: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.get("mode") in MODE_NAMES:
            sides = questions.setdefault(str(row.get("question", "")), {mode: [] for mode in MODE_NAMES})
            sides[row["mode"]].append(row)
    shown = "".join(_question(text, sides) for text, sides in list(questions.items())[:QUESTIONS_SHOWN])
    more = len(questions) - QUESTIONS_SHOWN
    return shown + (f'<p class="muted">{more:,} more questions are in samples.jsonl.</p>' if more > 0 else "")


def _question(text: str, sides: dict[str, list[Row]]) -> str:
    columns = "".join(
        f'<div class="side {mode}"><h3>{SIDES[mode]}</h3>{_answers(sides[mode])}</div>' for mode in MODE_NAMES
    )
    return (
        f'<article class="card question"><div class="asked">{_text(text)}</div>'
        f'<div class="sides">{columns}</div></article>'
    )


def _answers(rows: Sequence[Row]) -> str:
    # A resumed run writes the samples after its checkpoint again; the later one counts.
    latest = {str(row.get("index", f"unnumbered {position}")): row for position, row in enumerate(rows)}
    answers = list(latest.values())
    shown = "".join(_answer(row) for row in answers[:ANSWERS_SHOWN])
    more = len(answers) - ANSWERS_SHOWN
    return shown + (f'<p class="muted">{more:,} more in samples.jsonl</p>' if more > 0 else "")


def _answer(row: Row) -> str:
    notes = [_mark(number(row, "reward"))]
    if (entropy := number(row, "entropy")) is not None:
        notes.append(f"<span>entropy {entropy:.2f} nats</span>")
    if row.get("finish_reason") == "length":
        notes.append("<span>cut off at the length limit</span>")
    head, text = "".join(notes), _text(str(row.get("text", "")))
    return f'<div class="answer"><div class="head">{head}</div><div class="text" tabindex="0">{text}</div></div>'


def _mark(reward: float | None) -> str:
    if reward is None:
        return '<span class="mark part">? not graded</span>'
    kind, sign = ("good", "✓") if reward >= 1 else ("part", "◐") if reward > 0 else ("bad", "✗")
    return f'<span class="mark {kind}">{sign} reward {reward:.3g}</span>'


def _text(text: str) -> str:
    """Escaped; the middle of a very long text is left out, since the answer stands at the end."""
    if len(text) > CHARACTERS_SHOWN:
        half, cut = CHARACTERS_SHOWN // 2, len(text) - CHARACTERS_SHOWN
        text = f"{text[:half]}\n\n[… {cut:,} characters left out …]\n\n{text[-half:]}"
    return html.escape(text)


def _details(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        if run.config is not None:
            blocks.append(_folded(f"Configuration of {run.name}", run.config))
        if run.summary is not None:
            blocks.append(_folded(f"Summary of {run.name}", json.dumps(run.summary, indent=2, ensure_ascii=False)))
    return "<h2>Settings</h2>" + "".join(blocks) if blocks else ""


def _folded(title: str, text: str) -> str:
    summary, body = html.escape(title), html.escape(text)
    return f'<details class="card"><summary>{summary}</summary><pre tabindex="0">{body}</pre></details>'
