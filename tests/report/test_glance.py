"""The sentence and the figure about where the modes stand."""

import pytest

from policy_split_jax.report.glance import Moment, Split, glance_chart, split_of, verdict
from policy_split_jax.report.groups import RunGroup
from policy_split_jax.report.runs import Run

START = Moment(step=0, entropy=(0.432, 0.427), accuracy=(0.43, 0.415), kl=0.0027)


def split(entropy, accuracy, kl, evaluations=2, finished=True) -> Split:
    return Split(START, Moment(9, entropy, accuracy, kl), evaluations, finished)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            split((0.267, 0.368), (0.534, 0.51), 0.6475),
            "The modes have parted: KL 0.65 nats/token, 0.0027 at the start; "
            "high-entropy keeps 1.38 × the entropy at 2.4 points less accuracy; "
            "the normal mode's went from 43.0 % to 53.4 %.",
        ),
        (
            split((0.5, 0.25), (0.5, 0.625), 0.1),
            "The modes have parted: KL 0.10 nats/token, 0.0027 at the start; "
            "high-entropy has only 0.50 × the entropy at 12.5 points more accuracy; "
            "the normal mode's went from 43.0 % to 50.0 %.",
        ),
        (
            split((0.4, 0.4), (0.5, 0.5), 0.0029),
            "The modes have not parted: KL 0.0029 nats/token, 0.0027 at the start; "
            "high-entropy has the same entropy at the same accuracy; the normal mode's went from 43.0 % to 50.0 %.",
        ),
        (
            split((0.4, 0.6), (0.5, 0.4996), 0.0999, finished=False),
            "The modes have not parted yet: KL 0.1 nats/token, 0.0027 at the start; "
            "high-entropy keeps 1.50 × the entropy at the same accuracy; the normal mode's went from 43.0 % to 50.0 %.",
        ),
        (
            Split(START, START, 1, False),
            "The modes have not parted yet: KL 0.0027 nats/token; "
            "high-entropy has only 0.99 × the entropy at 1.5 points less accuracy.",
        ),
        (
            split((0.0, 0.3), (0.5, 0.4), 2.0),
            "The modes have parted: KL 2.00 nats/token, 0.0027 at the start; "
            "high-entropy has an entropy of 0.30 nats/token against 0 at 10.0 points less accuracy; "
            "the normal mode's went from 43.0 % to 50.0 %.",
        ),
    ],
)
def test_the_sentence_says_what_the_numbers_say(given, sentence):
    assert verdict(given) == sentence


def evaluation(step, entropy, accuracy, kl):
    names = ("normal", "high_entropy")
    row = {"kind": "eval", "step": step, "kl/high_entropy_to_normal": kl}
    row |= {f"entropy/{name}": value for name, value in zip(names, entropy, strict=True)}
    return row | {f"accuracy/{name}": value for name, value in zip(names, accuracy, strict=True)}


FIRST = evaluation(0, (0.5, 0.5), (0.25, 0.25), 0.0)
LAST = evaluation(9, (0.25, 0.75), (0.75, 0.5), 0.5)


def run(*rows, summary=None) -> Run:
    return Run("tiny", [], rows, [], None, summary)


def test_a_split_is_a_mean_over_seeds():
    other = evaluation(9, (0.75, 0.25), (0.25, 0.5), 1.5)
    between = evaluation(5, (0.5, 0.5), (0.5, 0.5), 0.25)
    found = split_of(RunGroup("mine", (run(FIRST, LAST, summary={}), run(FIRST, between, other))))
    assert found == Split(
        Moment(0, (0.5, 0.5), (0.25, 0.25), 0.0), Moment(9, (0.5, 0.5), (0.5, 0.5), 1.0), evaluations=2, finished=False
    )


def test_bars_lie_within_the_frame_and_nothing_far_below_zero():
    far = evaluation(9, (3.5, 0.25), (0.0, 0.0), 9.0)
    layout = glance_chart([RunGroup("mine", (run(FIRST, LAST), run(FIRST, far)))]).layout
    # Of two seeds the bar is their range: entropies from 0.25 to 3.5, accuracies from 0 to 0.75.
    low, high = layout["xaxis"]["range"]
    assert high > 3.5
    assert -0.3 < low < 0.25
    low, high = layout["yaxis"]["range"]
    assert high > 0.75
    assert -0.1 < low < 0


def test_seeds_end_where_the_slowest_has_got_to():
    further = evaluation(99, (0.125, 0.875), (1.0, 1.0), 2.0)
    group = RunGroup("mine", (run(FIRST, LAST, further), run(FIRST, LAST)))
    assert split_of(group) == split_of(RunGroup("mine", (run(FIRST, LAST),)))
    [end, _] = [trace for trace in glance_chart([group]).data if "end (" in trace.get("hovertemplate", "")]
    assert end["hovertemplate"].startswith("normal, end (step 9)<br>")
    assert (end["error_x"]["array"], end["error_y"]["array"]) == ([0.0], [0.0])
    assert split_of(RunGroup("mine", (run(FIRST), run(LAST)))) is None


def test_evaluations_of_one_mode_alone_do_not_count():
    half = {key: value for key, value in LAST.items() if "high_entropy" not in key}
    assert split_of(RunGroup("mine", (run(half),))) is None
    found = split_of(RunGroup("mine", (run(FIRST, half),)))
    assert found is not None
    assert found.end == found.start


def test_without_evaluations_there_is_neither():
    group = RunGroup("mine", (run(),))
    assert split_of(group) is None
    assert glance_chart([group]) is None
    assert split_of(RunGroup("mine", (run(FIRST), run()))) is None


def test_an_arrow_leads_each_mode_from_its_start_to_its_end():
    chart = glance_chart([RunGroup("mine", (run(FIRST, LAST),))])
    arrows = [note for note in chart.layout["annotations"] if note["showarrow"]]
    assert [(note["ax"], note["ay"], note["x"], note["y"]) for note in arrows] == [
        (0.5, 0.25, 0.25, 0.75),
        (0.5, 0.25, 0.75, 0.5),
    ]
    words = [note["text"] for note in chart.layout["annotations"] if not note["showarrow"]]
    assert sorted(words) == ["<b>KL 0.50</b>", "<b>high entropy</b>", "<b>normal</b>", "start"]
    for axis, values in (("xaxis", (0.25, 0.75)), ("yaxis", (0.25, 0.75))):
        low, high = chart.layout[axis]["range"]
        assert low < min(values)
        assert high > max(values)


def test_a_small_step_does_not_look_like_a_large_one():
    near = evaluation(9, (0.5, 0.501), (0.25, 0.251), 0.001)
    chart = glance_chart([RunGroup("mine", (run(FIRST, near),))])
    widths = [high - low for low, high in (chart.layout[axis]["range"] for axis in ("xaxis", "yaxis"))]
    assert widths == pytest.approx([0.4 * 0.501, 0.2])


def test_the_ends_of_seeds_have_bars_and_names_are_escaped():
    other = evaluation(9, (0.5, 0.75), (0.75, 1.0), 0.5)
    groups = [RunGroup("<b>", (run(FIRST, LAST), run(FIRST, other))), RunGroup("two", (run(FIRST, LAST),))]
    data = glance_chart(groups).data
    ends = [trace for trace in data if "end (step 9)<br>" in trace.get("hovertemplate", "")]
    assert ends[0]["hovertemplate"].startswith("normal · &lt;b&gt; (2 seeds, min–max), end (")
    assert (ends[0]["error_x"]["array"], ends[0]["error_y"]["array"]) == ([0.125], [0.0])
    assert (ends[1]["error_x"]["array"], ends[1]["error_y"]["array"]) == ([0.0], [0.25])
    assert "error_x" not in ends[2]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_plotly_accepts_the_figure(count):
    import plotly.graph_objects as go

    between = evaluation(5, (0.4, 0.6), (0.5, 0.4), 0.2)
    chart = glance_chart([RunGroup("mine", (run(FIRST, between, LAST), run(FIRST, LAST)))] * count)
    assert len(go.Figure(data=chart.data, layout=chart.layout).data) > 0
