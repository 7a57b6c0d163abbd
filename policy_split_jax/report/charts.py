"""The report's charts as plain plotly.js data and layout, from the rows of the runs.

The two modes have the same two colours everywhere, told apart with any kind of colour vision; runs differ by
dash and marker, and the page has one key of them. Seeds of one run are drawn as their mean with a band. A chart whose
keys appear in no run is left out.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from policy_split_jax.report.groups import Average, RunGroup, average_of_seeds
from policy_split_jax.report.runs import Row, Run, number, series

NORMAL_COLOUR = "#3b6fb6"
HIGH_ENTROPY_COLOUR = "#d9762b"
BOTH_COLOUR = "#7c8694"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
NOISY_RUNS = 3
"""With more runs than that on a page single steps are not drawn."""
PHASES = {
    "rollout": "#2f9e8f",
    "reward": "#b3a43c",
    "update": "#8b6bb1",
}


@dataclass(frozen=True)
class Line:
    """One key of metrics.jsonl, as a line of a chart."""

    key: str
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """A chart over steps: its lines, and a sentence that says what to look for; a noisy one is smoothed."""

    slug: str
    title: str
    look_for: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False
    noisy: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart ready to draw; `summary` says in words what it shows, `log` offers a logarithmic axis."""

    slug: str
    title: str
    look_for: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    summary: str
    log: bool = False


def modes(prefix: str, both: bool = False) -> tuple[Line, ...]:
    """The lines of a quantity measured in each mode, and in both together where asked."""
    pair = (
        Line(f"{prefix}/normal", "normal", NORMAL_COLOUR),
        Line(f"{prefix}/high_entropy", "high entropy", HIGH_ENTROPY_COLOUR),
    )
    return (*pair, Line(f"{prefix}/both", "both together", BOTH_COLOUR)) if both else pair


OUTCOME = (
    Panel(
        "accuracy",
        "Accuracy",
        "Both modes should rise; the high-entropy mode may stay a little behind.",
        "share correct",
        modes("accuracy"),
    ),
    Panel(
        "reward",
        "Reward",
        "The training reward should rise in both modes without a sudden fall.",
        "mean reward",
        modes("reward"),
    ),
    Panel(
        "best-of-k",
        "Best of k",
        "Of a question's samples; both together has those of either mode, twice as many, and lies above them where the "
        "two find different solutions. Training takes rollouts_per_mode samples of a question, evaluations eval.k.",
        "highest reward",
        modes("best_of_k", both=True),
    ),
    Panel(
        "distinct-correct",
        "Distinct correct answers",
        "The high-entropy mode should find at least as many different right answers as the normal one. Training "
        "takes rollouts_per_mode samples of a question, evaluations eval.k.",
        "answers per question",
        modes("distinct_correct", both=True),
    ),
    Panel(
        "only-high-entropy",
        "Solved by the high-entropy mode only",
        "Above zero, the high-entropy mode brings signal that the normal mode lacks. Training takes "
        "rollouts_per_mode samples of a question, evaluations eval.k.",
        "share of questions",
        (Line("only_high_entropy_solved", "high entropy only", HIGH_ENTROPY_COLOUR),),
    ),
)
SPLIT = (
    Panel(
        "entropy",
        "Entropy",
        "The curves should part: high entropy stays up while normal keeps its confidence.",
        "nats per token",
        modes("entropy"),
    ),
    Panel(
        "kl",
        "Divergence between the modes",
        "It starts near 0.01 and should grow: that is the split. The log axis shows the early steps.",
        "nats per token",
        (
            Line("kl/normal_to_high_entropy", "KL(normal ‖ high entropy)", NORMAL_COLOUR),
            Line("kl/high_entropy_to_normal", "KL(high entropy ‖ normal)", HIGH_ENTROPY_COLOUR),
        ),
        log=True,
    ),
)
HEALTH = (
    Panel(
        "response-length",
        "Response length",
        "A collapse to very short answers, or steady growth to the limit, is a warning.",
        "tokens",
        modes("response_length"),
    ),
    Panel(
        "truncated",
        "Truncated responses",
        "It should stay low: a truncated response can hardly be right.",
        "share of responses",
        modes("truncated"),
    ),
    Panel(
        "clip-fraction",
        "Clip fraction",
        "Zero with one update a step; with several, a few per cent. More means steps that are too large.",
        "share of tokens",
        modes("clip_fraction"),
    ),
    Panel(
        "grad-norm",
        "Gradient norm",
        "Steady is good; spikes well above the clipping threshold announce trouble.",
        "norm before clipping",
        (Line("grad_norm", "gradient norm", BOTH_COLOUR),),
        log=True,
    ),
    Panel(
        "eta",
        "Bonus weight η",
        "How strongly the high-entropy mode is paid for exploring, as scheduled.",
        "η",
        (Line("eta", "η", HIGH_ENTROPY_COLOUR),),
        noisy=False,
    ),
    Panel(
        "agreement",
        "Agreement of sampler and trainer",
        "Both should be tiny and flat: the same tokens must have the same log-probabilities in both.",
        "nats",
        (
            Line("sampler/kl", "KL(sampler ‖ trainer)", "#2f9e8f"),
            Line("sampler/max_difference", "largest difference", "#8b6bb1"),
        ),
        log=True,
    ),
)


def build_charts(groups: Sequence[RunGroup]) -> list[tuple[str, list[Chart]]]:
    """The sections of the report with their charts; a section without charts is left out."""
    outcome = [step_chart(panel, groups) for panel in OUTCOME]
    outcome.insert(1, pass_at_k_chart(groups))
    sections = [
        ("What was learned", outcome),
        ("The split", [step_chart(panel, groups) for panel in SPLIT]),
        ("Health of the training", [step_chart(panel, groups) for panel in HEALTH]),
        ("Time", [time_chart([run for group in groups for run in group.seeds])]),
    ]
    drawn = [(title, [chart for chart in charts if chart]) for title, charts in sections]
    return [(title, charts) for title, charts in drawn if charts]


def step_chart(panel: Panel, groups: Sequence[RunGroup]) -> Chart | None:
    """Training as smooth lines, over thin ones of every step; evaluation as markers; None without values."""
    data: list[dict[str, Any]] = []
    words: list[str] = []
    for index, group in enumerate(groups):
        for line in panel.lines:
            name = _label(line.label, group, groups)
            traces = _line_traces(line, group, index, name, panel.noisy, len(groups))
            data += traces
            words += [_in_words(name, traces)] if traces else []
    if not data:
        return None
    # Noise and bands go underneath.
    data.sort(key=lambda trace: "opacity" not in trace)
    named = _legend(data, panel.lines, len(groups))
    layout = axes_layout("step", panel.unit, legend=named > 1)
    return Chart(panel.slug, panel.title, panel.look_for, data, layout, "; ".join(words), panel.log)


def pass_at_k_chart(groups: Sequence[RunGroup]) -> Chart | None:
    """pass@k over k at the last evaluation of each run, and at the first where nothing else is on the page."""
    lines = modes("pass", both=True)
    data: list[dict[str, Any]] = []
    words: list[str] = []
    for index, group in enumerate(groups):
        evaluations = group.evaluations
        if not evaluations:
            continue
        if len(groups) == 1 and len(evaluations) > 1:
            first = [trace for line in lines for trace in _pass_traces(line, evaluations[0], 0, line.label, "dot")]
            data += [trace | {"opacity": 0.55, "showlegend": False} for trace in first]
        for line in lines:
            name = _label(line.label, group, groups)
            traces = _pass_traces(line, evaluations[-1], index, name, DASHES[index % len(DASHES)])
            data += traces
            words += [_in_words(traces[-1]["name"], traces)] if traces else []
    if not data:
        return None
    _legend(data, lines, len(groups))
    layout = axes_layout("samples per question, k", "share solved", legend=True)
    layout["xaxis"] |= {"type": "log", "tickvals": _powers_of_two(max(max(t["x"]) for t in data if t["x"] != [None]))}
    dotted = " Dotted: the first evaluation." if len(groups) == 1 else ""
    look_for = f"Both together should overtake the normal mode as k grows.{dotted}"
    return Chart("pass-at-k", "Pass@k", look_for, data, layout, "; ".join(words))


def time_chart(runs: Sequence[Run]) -> Chart | None:
    """Seconds of each phase: stacked over the steps of one run, as a mean per step for several."""
    data = _phases_over_steps(runs[0]) if len(runs) == 1 else _phases_by_run(runs)
    if not data:
        return None
    layout = axes_layout("step", "seconds per step", legend=True)
    if len(runs) > 1:
        layout |= {
            "barmode": "stack",
            "hovermode": "closest",
            "xaxis": {"title": {"text": ""}, "type": "category", "automargin": True},
        }
    look_for = "The rollout usually takes most of a step; a phase that grows is where to look first."
    if len(runs) == 1:
        look_for += _cut_off(layout["yaxis"], np.sum([trace["y"] for trace in data], axis=0))
    words = (f"{trace['name']}: {sum(trace['y']) / len(trace['y']):.3g} s a step on average" for trace in data)
    return Chart("time", "Time per phase", look_for, data, layout, "; ".join(words))


def _cut_off(axis: dict[str, Any], seconds: Float[np.ndarray, "steps"]) -> str:
    """Ends the axis above the most usual steps, since one that compiles would flatten all others; says so."""
    top = 1.1 * float(np.quantile(seconds, 0.98, method="lower"))
    if seconds.max() <= top or not top:
        return ""
    axis["range"] = rounded([0.0, top])
    return f" Not in the frame: steps of up to {seconds.max():.3g} s, as those that compile."


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without start-up bias; its span grows with the run, to 50 steps at most."""
    span = min(50.0, max(1.0, len(values) / 8))
    keep = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def band_trace(each: Average, colour: str) -> dict[str, Any]:
    """The band as a plain area of plotly's, without a legend."""
    steps = each.steps.tolist()
    return {
        "type": "scatter",
        "x": steps + steps[::-1],
        "y": rounded(each.high.tolist() + each.low.tolist()[::-1]),
        "mode": "lines",
        "fill": "toself",
        "fillcolor": colour,
        "opacity": 0.18,
        "line": {"width": 0, "color": colour},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def error_bars(each: Average) -> dict[str, Any]:
    """The band as plotly's error bars."""
    above, below = (each.high - each.mean).tolist(), (each.mean - each.low).tolist()
    return {"type": "data", "symmetric": False, "array": rounded(above), "arrayminus": rounded(below), "thickness": 1}


def _line_traces(line: Line, group: RunGroup, index: int, name: str, noisy: bool, groups: int) -> list[dict[str, Any]]:
    """Of a group's training and evaluations; `meta` tells the page whose they are."""
    common = {"type": "scatter", "legendgroup": line.key, "name": name, "meta": index}
    pen = {"color": line.colour, "dash": DASHES[index % len(DASHES)]}
    several = len(group.seeds) > 1
    traces: list[dict[str, Any]] = []
    raw = group.average(lambda run: run.train, line.key)
    trained = group.average(lambda run: run.train, line.key, smooth) if noisy else raw
    if raw and trained:
        steps, values = trained.steps.tolist(), trained.mean.tolist()
        if several:
            traces.append(common | band_trace(trained, line.colour))
        elif values != raw.mean.tolist() and groups <= NOISY_RUNS:
            thin = {"color": line.colour, "width": 1}
            noise = {"x": steps, "y": rounded(raw.mean.tolist()), "mode": "lines", "line": thin, "opacity": 0.28}
            traces.append(common | noise | {"hoverinfo": "skip", "showlegend": False})
        # One point makes no line.
        mode = "lines" if len(values) > 1 else "lines+markers"
        bold = {"x": steps, "y": rounded(values), "mode": mode, "line": pen | {"width": 2.4}}
        traces.append(common | bold | {"showlegend": True})
    evaluated = group.average(lambda run: run.evaluation, line.key)
    if evaluated:
        marker = {"color": line.colour, "size": 9, "symbol": SYMBOLS[index % len(SYMBOLS)]}
        points = {"x": evaluated.steps.tolist(), "y": rounded(evaluated.mean.tolist()), "mode": "lines+markers"}
        thin = {"line": pen | {"width": 1, "dash": "dot"}, "name": f"{name}, evaluation", "marker": marker}
        bars = {"error_y": error_bars(evaluated)} if several else {}
        traces.append(common | points | thin | bars | {"showlegend": not traces})
    return traces


def _legend(data: list[dict[str, Any]], lines: Sequence[Line], groups: int) -> int:
    """With several runs the legend names the lines alone: the page has a key of runs. How many entries there are."""
    if groups == 1:
        return sum(trace["showlegend"] for trace in data)
    present = {trace["legendgroup"] for trace in data}
    for trace in data:
        trace["showlegend"] = False
    entries = [line for line in lines if line.key in present]
    data += [
        {
            "type": "scatter",
            "x": [None],
            "y": [None],
            "mode": "lines",
            "name": line.label,
            "legendgroup": line.key,
            "line": {"color": line.colour, "width": 2.4},
            "showlegend": True,
        }
        for line in entries
    ]
    return len(entries)


def _pass_traces(line: Line, rows: Sequence[Row], index: int, name: str, dash: str) -> list[dict[str, Any]]:
    """pass@k of one evaluation, a row a seed."""
    found = average_of_seeds([_pass_by_k(row, line.key.removeprefix("pass/")) for row in rows])
    if found is None:
        return []
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{name}, step {rows[0]['step']}",
        "legendgroup": line.key,
        "meta": index,
        "x": found.steps.tolist(),
        "y": rounded(found.mean.tolist()),
        "line": {"color": line.colour, "dash": dash, "width": 2.4},
        "marker": {"color": line.colour, "size": 7, "symbol": SYMBOLS[index % len(SYMBOLS)]},
        "showlegend": True,
    }
    return [trace | ({"error_y": error_bars(found)} if len(rows) > 1 else {})]


def _pass_by_k(row: Row, who: str) -> dict[int, float]:
    keys = {int(match[1]): key for key in row if (match := re.fullmatch(rf"pass@(\d{{1,6}})/{who}", key))}
    return {k: value for k in keys if (value := number(row, keys[k])) is not None}


def _powers_of_two(highest: int) -> list[int]:
    return [2**power for power in range(highest.bit_length())]


def _phases_over_steps(run: Run) -> list[dict[str, Any]]:
    steps = [row["step"] for row in run.train]
    traces = []
    for phase, colour in PHASES.items():
        if series(run.train, f"time/{phase}")[0]:
            seconds = [number(row, f"time/{phase}") or 0.0 for row in run.train]
            area = {"type": "scatter", "mode": "lines", "stackgroup": "phases", "fillcolor": colour}
            style = {"line": {"width": 0, "color": colour}, "name": phase, "showlegend": True}
            traces.append(area | style | {"x": steps, "y": rounded(seconds)})
    return traces


def _phases_by_run(runs: Sequence[Run]) -> list[dict[str, Any]]:
    traces = []
    for phase, colour in PHASES.items():
        totals = [sum(series(run.train, f"time/{phase}")[1]) / max(1, len(run.train)) for run in runs]
        if any(totals):
            bar = {"type": "bar", "name": phase, "marker": {"color": colour}, "showlegend": True}
            traces.append(bar | {"x": [html.escape(run.name) for run in runs], "y": rounded(totals)})
    return traces


def axes_layout(x: str, y: str, legend: bool) -> dict[str, Any]:
    """plotly's layout of a chart with these titles of its axes."""
    return {
        "margin": {"l": 12, "r": 12, "t": 8, "b": 8},
        "hovermode": "x unified",
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x, "standoff": 6}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y, "standoff": 8}, "automargin": True, "zeroline": False},
    }


def _label(label: str, group: RunGroup, groups: Sequence[RunGroup]) -> str:
    # plotly.js reads markup in names; a folder may be called anything.
    return label if len(groups) == 1 else f"{label} · {html.escape(group.legend)}"


def _in_words(name: str, traces: Sequence[dict[str, Any]]) -> str:
    values = traces[-1]["y"]
    return f"{html.unescape(name)}: from {values[0]:.3g} to {values[-1]:.3g}"


def rounded(values: Sequence[float]) -> list[float]:
    """Six significant digits: more than a screen shows, and a third of the page's size."""
    return [float(f"{value:.6g}") for value in values]
