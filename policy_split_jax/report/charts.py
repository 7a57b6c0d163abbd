"""The report's charts as plain plotly.js data and layout, from the rows of the runs.

The two modes have the same two colours everywhere, told apart with any kind of colour vision; runs differ by
dash and marker. A chart whose keys appear in no run is left out.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from policy_split_jax.report.runs import Row, Run, number

NORMAL_COLOUR = "#3b6fb6"
HIGH_ENTROPY_COLOUR = "#d9762b"
BOTH_COLOUR = "#7c8694"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
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
        "Both together should lie above either mode: the two find different solutions.",
        "highest reward",
        modes("best_of_k", both=True),
    ),
    Panel(
        "distinct-correct",
        "Distinct correct answers",
        "The high-entropy mode should find at least as many different right answers as the normal one.",
        "answers per question",
        modes("distinct_correct", both=True),
    ),
    Panel(
        "only-high-entropy",
        "Solved by the high-entropy mode only",
        "Above zero, the high-entropy mode brings signal that the normal mode lacks.",
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


def build_charts(runs: Sequence[Run]) -> list[tuple[str, list[Chart]]]:
    """The sections of the report with their charts; a section without charts is left out."""
    outcome = [step_chart(panel, runs) for panel in OUTCOME]
    outcome.insert(1, pass_at_k_chart(runs))
    sections = [
        ("What was learned", outcome),
        ("The split", [step_chart(panel, runs) for panel in SPLIT]),
        ("Health of the training", [step_chart(panel, runs) for panel in HEALTH]),
        ("Time", [time_chart(runs)]),
    ]
    drawn = [(title, [chart for chart in charts if chart]) for title, charts in sections]
    return [(title, charts) for title, charts in drawn if charts]


def step_chart(panel: Panel, runs: Sequence[Run]) -> Chart | None:
    """Training as thin lines of every step under smooth ones, evaluation as markers; None without values."""
    data: list[dict[str, Any]] = []
    words: list[str] = []
    for index, run in enumerate(runs):
        for line in panel.lines:
            name = _label(line.label, run, runs)
            traces = _line_traces(line, run, index, name, panel.noisy)
            data += traces
            words += [_in_words(name, traces)] if traces else []
    if not data:
        return None
    # The noise goes underneath.
    data.sort(key=lambda trace: "opacity" not in trace)
    named = sum(trace["showlegend"] for trace in data) > 1
    layout = axes_layout("step", panel.unit, legend=named)
    return Chart(panel.slug, panel.title, panel.look_for, data, layout, "; ".join(words), panel.log)


def pass_at_k_chart(runs: Sequence[Run]) -> Chart | None:
    """pass@k over k at the last evaluation of each run, and at the first where there is only one run."""
    data: list[dict[str, Any]] = []
    words: list[str] = []
    for index, run in enumerate(runs):
        first = run.evaluation[:1] if len(runs) == 1 and len(run.evaluation) > 1 else []
        for line in modes("pass", both=True):
            who = line.key.removeprefix("pass/")
            for row in first:
                faint = {"opacity": 0.55, "showlegend": False}
                name = f"{line.label}, step {row['step']}"
                data += [trace | faint for trace in _pass_trace(row, who, line.colour, name, "dot")]
            for row in run.evaluation[-1:]:
                name = f"{_label(line.label, run, runs)}, step {row['step']}"
                traces = _pass_trace(row, who, line.colour, name, DASHES[index % len(DASHES)])
                data += traces
                words += [_in_words(name, traces)] if traces else []
    if not data:
        return None
    layout = axes_layout("samples per question, k", "share solved", legend=True)
    layout["xaxis"] |= {"type": "log", "tickvals": _powers_of_two(max(max(trace["x"]) for trace in data))}
    look_for = "Both together should overtake the normal mode as k grows. Dotted: the first evaluation."
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
            "xaxis": {"title": {"text": ""}, "type": "category"},
        }
    look_for = "The rollout usually takes most of a step; a phase that grows is where to look first."
    words = (f"{trace['name']}: {sum(trace['y']) / len(trace['y']):.3g} s a step on average" for trace in data)
    return Chart("time", "Time per phase", look_for, data, layout, "; ".join(words))


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average without start-up bias; its span grows with the run, to 50 steps at most."""
    span = min(50.0, max(1.0, len(values) / 8))
    keep = 1 - 2 / (span + 1)
    total, weight, result = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under this key."""
    pairs = [(row["step"], value) for row in rows if (value := number(row, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _line_traces(line: Line, run: Run, index: int, name: str, noisy: bool) -> list[dict[str, Any]]:
    steps, values = series(run.train, line.key)
    smoothed = smooth(values) if noisy else values
    common = {"type": "scatter", "legendgroup": f"{index}/{line.key}", "name": name}
    pen = {"color": line.colour, "dash": DASHES[index % len(DASHES)]}
    traces: list[dict[str, Any]] = []
    if smoothed != values:
        thin = {"color": line.colour, "width": 1}
        raw = {"x": steps, "y": _rounded(values), "mode": "lines", "line": thin, "opacity": 0.28}
        traces.append(common | raw | {"hoverinfo": "skip", "showlegend": False})
    if values:
        # One point makes no line.
        mode = "lines" if len(values) > 1 else "lines+markers"
        bold = {"x": steps, "y": _rounded(smoothed), "mode": mode, "line": pen | {"width": 2.4}}
        traces.append(common | bold | {"showlegend": True})
    steps, values = series(run.evaluation, line.key)
    if values:
        marker = {"color": line.colour, "size": 9, "symbol": SYMBOLS[index % len(SYMBOLS)]}
        points = {"x": steps, "y": _rounded(values), "mode": "lines+markers", "marker": marker}
        thin = {"line": pen | {"width": 1, "dash": "dot"}, "name": f"{name}, evaluation"}
        traces.append(common | points | thin | {"showlegend": not traces})
    return traces


def _pass_trace(row: Row, who: str, colour: str, name: str, dash: str) -> list[dict[str, Any]]:
    keys = {int(match[1]): key for key in row if (match := re.fullmatch(rf"pass@(\d{{1,6}})/{who}", key))}
    points = [(k, value) for k in sorted(keys) if (value := number(row, keys[k])) is not None]
    if not points:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": [k for k, _ in points],
            "y": _rounded([value for _, value in points]),
            "line": {"color": colour, "dash": dash, "width": 2.4},
            "marker": {"color": colour, "size": 7},
            "showlegend": True,
        }
    ]


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
            traces.append(area | style | {"x": steps, "y": _rounded(seconds)})
    return traces


def _phases_by_run(runs: Sequence[Run]) -> list[dict[str, Any]]:
    traces = []
    for phase, colour in PHASES.items():
        totals = [sum(series(run.train, f"time/{phase}")[1]) / max(1, len(run.train)) for run in runs]
        if any(totals):
            bar = {"type": "bar", "name": phase, "marker": {"color": colour}, "showlegend": True}
            traces.append(bar | {"x": [html.escape(run.name) for run in runs], "y": _rounded(totals)})
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


def _label(label: str, run: Run, runs: Sequence[Run]) -> str:
    # plotly.js reads markup in names; a folder may be called anything.
    return label if len(runs) == 1 else f"{label} · {html.escape(run.name)}"


def _in_words(name: str, traces: Sequence[dict[str, Any]]) -> str:
    values = traces[-1]["y"]
    return f"{html.unescape(name)}: from {values[0]:.3g} to {values[-1]:.3g}"


def _rounded(values: Sequence[float]) -> list[float]:
    """Six significant digits: more than a screen shows, and a third of the page's size."""
    return [float(f"{value:.6g}") for value in values]
