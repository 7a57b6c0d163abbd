"""Charts are valid plotly figures of the right numbers."""

import numpy as np
import pytest

from policy_split_jax.report import charts
from policy_split_jax.report.groups import RunGroup
from policy_split_jax.report.runs import Run, series


def run_of(train=(), evaluation=(), name="tiny") -> Run:
    def numbered(rows, kind):
        return [{"kind": kind, "step": step} | row for step, row in enumerate(rows)]

    return Run(name, numbered(train, "train"), numbered(evaluation, "eval"), [], None, None)


def alone(*runs: Run) -> list[RunGroup]:
    return [RunGroup(run.name, (run,)) for run in runs]


def everything(steps: int) -> Run:
    """A run whose rows hold every key that some chart draws."""
    panels = (*charts.OUTCOME, *charts.SPLIT, *charts.HEALTH)
    keys = [line.key for panel in panels for line in panel.lines] + [f"time/{phase}" for phase in charts.PHASES]
    passes = [f"pass@{k}/{who}" for k in (1, 2, 4) for who in ("normal", "high_entropy", "both")]
    rng = np.random.default_rng(0)
    rows = [{key: float(rng.uniform(0.1, 1)) for key in keys + passes} for _ in range(steps)]
    return run_of(rows, rows[:3])


@pytest.mark.parametrize("runs", [1, 8])
def test_plotly_accepts_every_chart(runs):
    import plotly.graph_objects as go

    sections = charts.build_charts(alone(*[everything(40)] * runs))
    built = [chart for _, group in sections for chart in group]
    # Figure refuses unknown properties and values.
    figures = [go.Figure(data=chart.data, layout=chart.layout) for chart in built]
    assert len(figures) == 15
    assert all(len(figure.data) > 0 for figure in figures)


def test_the_modes_keep_their_colours_in_every_chart():
    for _, group in charts.build_charts(alone(everything(40))):
        for chart in group:
            for trace in chart.data:
                colour = trace.get("line", {}).get("color")
                if trace["name"].startswith("normal"):
                    assert colour == "#3b6fb6"
                if trace["name"].startswith("high entropy"):
                    assert colour == "#d9762b"


def test_a_chart_without_values_is_left_out():
    sections = charts.build_charts(alone(run_of([{"eta": 0.1, "reward/normal": None, "grad_norm": float("nan")}])))
    assert [(title, [chart.slug for chart in group]) for title, group in sections] == [
        ("Health of the training", ["eta"])
    ]


def test_rows_without_the_key_are_skipped():
    rows = [{"eta": 0.5}, {}, {"eta": None}, {"eta": 0.25}]
    assert series(run_of(rows).train, "eta") == ([0, 3], [0.5, 0.25])


def test_smoothing_is_the_weighted_mean_of_the_past():
    values = np.random.default_rng(1).normal(size=80).tolist()
    keep = 1 - 2 / (80 / 8 + 1)
    expected = [np.average(values[: t + 1], weights=keep ** np.arange(t, -1, -1.0)) for t in range(80)]
    # float64 sums of 80 terms in another order
    np.testing.assert_allclose(charts.smooth(values), expected, atol=1e-12)


def test_smoothing_keeps_a_constant_and_a_short_run():
    np.testing.assert_allclose(charts.smooth([2.5] * 30), 2.5, atol=1e-12)
    assert charts.smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]
    assert charts.smooth([]) == []


def test_a_noisy_curve_is_thin_under_a_bold_one():
    rows = [{"reward/normal": float(step % 2)} for step in range(40)]
    reward = next(panel for panel in charts.OUTCOME if panel.slug == "reward")
    chart = charts.step_chart(reward, alone(run_of(rows)))
    thin, bold = chart.data
    assert thin["y"] == [float(step % 2) for step in range(40)]
    assert thin["opacity"] < 0.5
    assert (thin["showlegend"], bold["showlegend"]) == (False, True)
    # With a span of 5 the alternating curve stays within a third of its middle.
    assert all(abs(value - 0.5) < 1 / 3 for value in bold["y"][10:])


def test_a_schedule_is_drawn_as_it_is():
    rows = [{"eta": min(1.0, step / 10)} for step in range(40)]
    eta = next(panel for panel in charts.HEALTH if panel.slug == "eta")
    [trace] = charts.step_chart(eta, alone(run_of(rows))).data
    assert trace["y"] == [min(1.0, step / 10) for step in range(40)]


def test_evaluations_are_markers_beside_the_training_line():
    reward = next(panel for panel in charts.OUTCOME if panel.slug == "accuracy")
    rows = [{"accuracy/normal": value} for value in (0.1, 0.2)]
    line, points = charts.step_chart(reward, alone(run_of(rows, [{"accuracy/normal": 0.3}]))).data
    assert line["mode"] == "lines"
    assert (points["x"], points["y"], points["mode"]) == ([0], [0.3], "lines+markers")
    assert points["showlegend"] is False


def test_pass_at_k_orders_k_as_numbers_and_compares_first_with_last():
    first = {"pass@2/normal": 0.2, "pass@10/normal": 0.4, "pass@1/normal": 0.1}
    last = {"pass@2/normal": 0.5, "pass@10/normal": 0.9, "pass@1/normal": None, "pass@x/normal": 1.0}
    chart = charts.pass_at_k_chart(alone(run_of(evaluation=[first, {}, last])))
    traces = {trace["name"]: (trace["x"], trace["y"], trace["line"]["dash"]) for trace in chart.data}
    assert traces == {
        "normal, step 0": ([1, 2, 10], [0.1, 0.2, 0.4], "dot"),
        "normal, step 2": ([2, 10], [0.5, 0.9], "solid"),
    }
    assert chart.layout["xaxis"]["tickvals"] == [1, 2, 4, 8]
    assert chart.look_for.endswith("Dotted: the first evaluation.")


def test_phases_are_stacked_over_steps_with_zero_where_they_did_not_happen():
    rows = [{"time/rollout": 2.0, "time/update": 1.0}, {"time/rollout": 3.0}]
    chart = charts.time_chart([run_of(rows)])
    assert {trace["name"]: trace["y"] for trace in chart.data} == {
        "rollout": [2.0, 3.0],
        "update": [1.0, 0.0],
    }
    assert {trace["stackgroup"] for trace in chart.data} == {"phases"}


def test_a_step_that_compiles_does_not_flatten_the_others():
    chart = charts.time_chart([run_of([{"time/rollout": 20.0}, *[{"time/rollout": 1.0, "time/update": 1.0}] * 9])])
    assert chart.layout["yaxis"]["range"] == [0.0, 2.2]
    assert chart.look_for.endswith("Not in the frame: steps of up to 20 s, as those that compile.")
    even = charts.time_chart([run_of([{"time/rollout": 1.0}] * 9)])
    assert "range" not in even.layout["yaxis"]
    assert "frame" not in even.look_for


def test_phases_of_several_runs_are_means_per_step():
    first = run_of([{"time/rollout": 2.0, "time/update": 1.0}, {"time/rollout": 3.0}], name="first")
    second = run_of([{"time/rollout": 8.0}], name="second")
    chart = charts.time_chart([first, second])
    bars = {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in chart.data}
    assert bars == {"rollout": {"first": 2.5, "second": 8.0}, "update": {"first": 0.5, "second": 0.0}}
    assert chart.layout["barmode"] == "stack"
    assert chart.layout["xaxis"]["automargin"]


def panel(slug):
    return next(panel for panel in (*charts.OUTCOME, *charts.HEALTH) if panel.slug == slug)


def test_seeds_are_a_mean_in_a_band():
    seeds = tuple(run_of([{"eta": value} for value in values]) for values in ([1.0, 2.0], [3.0, 6.0, 9.0]))
    band, line = charts.step_chart(panel("eta"), [RunGroup("mine", seeds)]).data
    # At the steps that both have: means 2 and 4, between 1 and 3, and 2 and 6.
    assert (line["x"], line["y"], line["name"]) == ([0, 1], [2.0, 4.0], "η")
    assert (band["x"], band["y"]) == ([0, 1, 1, 0], [3.0, 6.0, 2.0, 1.0])
    assert band["fillcolor"] == line["line"]["color"]


def test_seeds_are_smoothed_before_they_are_averaged():
    values = [[float(step % 2) for step in range(40)], [5.0] * 40]
    seeds = tuple(run_of([{"reward/normal": value} for value in each]) for each in values)
    band, line = charts.step_chart(panel("reward"), [RunGroup("mine", seeds)]).data
    smoothed = charts.smooth(values[0])
    np.testing.assert_allclose(line["y"], (np.array(smoothed) + 5) / 2, rtol=1e-5)
    np.testing.assert_allclose(band["y"][40:], smoothed[::-1], rtol=1e-5, atol=1e-6)


def test_evaluations_of_seeds_have_bars():
    seeds = tuple(run_of(evaluation=[{"accuracy/normal": value}]) for value in (0.25, 0.5, 1.0))
    [points] = charts.step_chart(panel("accuracy"), [RunGroup("mine", seeds)]).data
    np.testing.assert_allclose(points["y"], [1.75 / 3], rtol=1e-5)
    np.testing.assert_allclose(points["error_y"]["array"], [1 - 1.75 / 3], rtol=1e-5)
    np.testing.assert_allclose(points["error_y"]["arrayminus"], [1.75 / 3 - 0.25], rtol=1e-5)


def test_pass_at_k_of_seeds_is_a_mean_where_all_have_it():
    rows = [{"pass@1/normal": 0.25, "pass@2/normal": 0.5}, {"pass@1/normal": 0.75}]
    chart = charts.pass_at_k_chart([RunGroup("mine", tuple(run_of(evaluation=[row]) for row in rows))])
    [trace] = chart.data
    assert (trace["x"], trace["y"], trace["error_y"]["array"]) == ([1], [0.5], [0.25])


def test_pass_at_k_of_seeds_is_that_of_the_last_step_they_all_have():
    rows = [{"pass@1/normal": value} for value in (0.25, 0.5, 1.0)]
    seeds = (run_of(evaluation=rows), run_of(evaluation=rows[:2]))
    traces = {trace["name"]: trace["y"] for trace in charts.pass_at_k_chart([RunGroup("mine", seeds)]).data}
    assert traces == {"normal, step 0": [0.25], "normal, step 1": [0.5]}
    assert charts.pass_at_k_chart([RunGroup("mine", (seeds[0], run_of()))]) is None


def test_the_legend_of_several_runs_names_the_lines_once():
    rows = [{"reward/normal": 0.5, "reward/high_entropy": 0.25}] * 3
    chart = charts.step_chart(panel("reward"), alone(*(run_of(rows, name=name) for name in "abcdefgh")))
    assert [trace["name"] for trace in chart.data if trace["showlegend"]] == ["normal", "high entropy"]
    assert {trace["meta"] for trace in chart.data if "meta" in trace} == set(range(8))


def test_many_runs_are_drawn_without_single_steps():
    rows = [{"reward/normal": float(step % 2)} for step in range(40)]
    for count, noisy in ((3, True), (4, False)):
        chart = charts.step_chart(panel("reward"), alone(*[run_of(rows)] * count))
        assert any(trace.get("opacity", 1) < 0.5 for trace in chart.data) == noisy
