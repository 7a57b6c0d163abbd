"""Means, bands and distances against numbers computed by hand, and the page that shows them."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.parity import curves as curves_module
from policy_split_jax.parity.curves import (
    Distance,
    Group,
    average,
    build_charts,
    distance,
    parse_group,
    shared_averages,
    write_curves,
)
from policy_split_jax.parity.logs import Curves
from policy_split_jax.report.frame import content_policy
from policy_split_jax.report.groups import Average

HOSTILE = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"><!--"


def seed(start=1, **metrics) -> Curves:
    named = {name.replace("__", "/"): list(enumerate(values, start)) for name, values in metrics.items()}
    return Curves("seed", named)


def group(label, *seeds) -> Group:
    return Group(label, seeds)


def average_of(values, start=1) -> Average:
    found = average(group("a", seed(start, m=values)), "m")
    assert found is not None
    return found


def write_log(path, **metrics):
    rows = [{"step": step, "data": {name: value * step for name, value in metrics.items()}} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Groups ---------------------------------------------------------------------------------------------------------------


def test_a_path_is_a_group_of_one_seed_in_our_names(tmp_path):
    path = write_log(tmp_path / "verl.jsonl", **{"actor/pg_loss": 0.5})
    assert parse_group(str(path)) == Group("verl", (Curves("verl", {"loss": [(1, 0.5), (2, 1.0), (3, 1.5)]}),))


def test_a_label_has_seeds(tmp_path):
    paths = [write_log(tmp_path / f"{name}.jsonl", loss=value) for name, value in (("a", 1.0), ("b", 2.0))]
    parsed = parse_group(f" ours = {paths[0]} ,{paths[1]}")
    assert parsed.label == "ours"
    assert [each.name for each in parsed.seeds] == ["a", "b"]
    assert parsed.seeds[1].metrics == {"loss": [(1, 2.0), (2, 4.0), (3, 6.0)]}


def test_a_users_names_hold_for_all_seeds(tmp_path):
    path = write_log(tmp_path / "a.jsonl", mine=1.0)
    parsed = parse_group(f"ours={path},{path}", {"mine": "loss"})
    assert [list(each.metrics) for each in parsed.seeds] == [["loss"], ["loss"]]


def test_a_path_may_hold_an_equals_sign(tmp_path):
    path = write_log(tmp_path / "lr=1.jsonl", loss=1.0)
    assert parse_group(str(path)).label == "lr=1"


@pytest.mark.parametrize("text", ["=a.jsonl", "ours=", "ours=a.jsonl,", "ours= ,a.jsonl"])
def test_an_empty_label_or_path(text):
    with pytest.raises(UserError, match="has an empty label or path; write LABEL=PATH"):
        parse_group(text)


@pytest.mark.parametrize("text", ["nowhere.jsonl", "ours=nowhere.jsonl"])
def test_a_missing_file_is_named(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^nowhere\.jsonl: no such file or folder"):
        parse_group(text)


# Means and bands ------------------------------------------------------------------------------------------------------


def test_two_seeds_have_their_mean_and_range_at_common_steps():
    found = average(group("a", seed(1, m=[1.0, 2.0, 3.0]), seed(2, m=[4.0, 2.0, 9.0])), "m")
    assert found is not None
    assert found.steps.tolist() == [2, 3]
    assert found.mean.tolist() == [3.0, 2.5]
    assert found.low.tolist() == [2.0, 2.0]
    assert found.high.tolist() == [4.0, 3.0]


def test_four_seeds_have_a_t_interval():
    values = np.random.default_rng(0).normal(size=(4, 5))
    found = average(group("a", *(seed(m=row.tolist()) for row in values)), "m")
    assert found is not None
    # 3.182446 is the 97.5 % quantile of t with 3 degrees of freedom, from tables (seven digits).
    half = 3.182446305 * np.sqrt(((values - values.mean(0)) ** 2).sum(0) / 3) / 2
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.high - found.mean, half, rtol=1e-8)
    np.testing.assert_allclose(found.mean - found.low, half, rtol=1e-8)


def test_the_quantile_follows_the_number_of_seeds():
    found = average(group("a", *(seed(m=[value]) for value in (0.0, 0.0, 0.0, 0.0, 5.0))), "m")
    assert found is not None
    # Mean 1, standard deviation sqrt(5), so the half width is the quantile for 4 degrees of freedom.
    np.testing.assert_allclose(found.high - 1, 2.776445105, rtol=1e-8)


def test_one_seed_is_its_own_mean():
    found = average_of([1.0, 2.0])
    assert found.low.tolist() == found.mean.tolist() == found.high.tolist() == [1.0, 2.0]


def test_seeds_without_a_common_step_have_no_mean():
    assert average(group("a", seed(1, m=[1.0]), seed(2, m=[1.0])), "m") is None
    assert average(group("a", seed(m=[1.0]), seed(other=[1.0])), "m") is None


# Distances ------------------------------------------------------------------------------------------------------------


def test_a_distance_by_hand():
    first = average_of([1.0, -2.0, 3.0, 4.0, 0.0])
    other = average_of([-1.0, 3.0, 1.0, 1.0], start=2)
    # At steps 2 to 5 the differences are 1, 0, −3, 1, and the first's absolute values 2, 3, 4, 0.
    expected = Distance(
        steps=4, mean_absolute=1.25, largest=-3.0, largest_step=4, relative=-0.25 / 2.25, last_tenth=1.0
    )
    assert distance(first, other) == expected


def test_the_last_tenth_is_rounded_up():
    zeros = average_of([0.0] * 21)
    found = distance(zeros, average_of([float(value) for value in range(21)]))
    assert found is not None
    assert found.last_tenth == (18 + 19 + 20) / 3
    assert found.relative is None


def test_a_run_is_at_distance_0_from_itself():
    mine = average_of([0.5, 0.25, 4.0])
    assert distance(mine, mine) == Distance(3, 0.0, 0.0, 1, 0.0, 0.0)


def test_without_a_common_step_there_is_no_distance():
    assert distance(average_of([1.0]), average_of([1.0], start=5)) is None


# What is shared -------------------------------------------------------------------------------------------------------


def test_the_order_of_the_charts():
    names = (
        "zebra",
        "aha",
        "grad_norm",
        "loss",
        "response_length",
        "kl__x",
        "entropy__normal",
        "eval__accuracy",
        "reward",
    )
    both = group("a", seed(1, **{name: [1.0] for name in names}))
    assert list(shared_averages([both, both])) == [
        "reward",
        "eval/accuracy",
        "entropy/normal",
        "kl/x",
        "response_length",
        "loss",
        "grad_norm",
        "aha",
        "zebra",
    ]


def test_what_two_of_three_have_is_shared():
    groups = [group("a", seed(p=[1.0])), group("b", seed(p=[1.0], q=[2.0])), group("c", seed(q=[3.0], r=[1.0]))]
    shared = shared_averages(groups)
    assert list(shared) == ["p", "q"]
    assert [each is None for each in shared["q"]] == [True, False, False]


def test_one_group_is_refused():
    with pytest.raises(UserError, match="give at least two"):
        shared_averages([group("a", seed(p=[1.0]))])


def test_no_shared_metric_is_refused_and_nothing_written(tmp_path):
    output = tmp_path / "curves.html"
    with pytest.raises(UserError, match=r"no metric is in two groups \(a has p; b has q, r\); map their names"):
        write_curves([group("a", seed(p=[1.0])), group("b", seed(q=[1.0], r=[1.0]))], output)
    assert list(tmp_path.iterdir()) == []


# The page -------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Start tags with their attributes, the text of each `<script>`, and all other text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.words.append(data)

    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(groups, folder) -> Elements:
    return Elements(write_curves(groups, folder / "curves.html").read_text(encoding="utf-8"))


def two_groups():
    ours = group(
        "ours", seed(reward=[0.25, 0.5], loss=[1.0, 2.0]), seed(reward=[0.75, 1.0], loss=[1.0, 2.0], eta=[1.0])
    )
    return [ours, group("verl", seed(reward=[0.5, 0.5], loss=[3.0, 1.0], perf__mfu=[0.4]))]


def test_the_page_is_written_where_asked_and_returned(tmp_path):
    output = tmp_path / "deep" / "curves.html"
    assert write_curves(two_groups(), output) == output
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_data_of_the_page_are_the_values(tmp_path):
    reward, loss = json.loads(page_of(two_groups(), tmp_path).scripts[0])
    band, ours, verl = reward["data"]
    assert band["fill"] == "toself"
    assert band["x"] == [1, 2, 2, 1]
    assert band["y"] == [0.75, 1.0, 0.5, 0.25]
    assert (ours["x"], ours["y"], ours["name"]) == ([1, 2], [0.5, 0.75], "ours (2 seeds, min–max)")
    assert (verl["x"], verl["y"], verl["name"]) == ([1, 2], [0.5, 0.5], "verl")
    assert ours["line"]["color"] != verl["line"]["color"]
    assert band["fillcolor"] == ours["line"]["color"]
    assert [trace["y"] for trace in loss["data"]] == [[1.0, 2.0, 2.0, 1.0], [1.0, 2.0], [3.0, 1.0]]


def test_the_legend_names_the_t_interval():
    many = group("ours", *(seed(m=[float(value)]) for value in range(5)))
    groups = [many, group("verl", seed(m=[1.0]))]
    chart = build_charts(groups, shared_averages(groups))[0]
    assert [trace["name"] for trace in chart.data if trace["showlegend"]] == ["ours (5 seeds, 95 % t-interval)", "verl"]


def test_the_table_has_the_distances(tmp_path):
    text = page_of(two_groups(), tmp_path).text()
    # reward: differences 0 and −0.25 of 0.5 and 0.75; loss: 2 and −1 of 1 and 2
    assert "reward verl 2 0.125 −0.25 at step 2 −20 % −0.25 loss verl 2 1.5 +2 at step 1 +33.3 % −1" in text


def test_metrics_of_one_group_stand_at_the_end(tmp_path):
    text = page_of(two_groups(), tmp_path).text()
    assert text.rstrip().endswith("Metrics of one group only ours eta verl perf/mfu")


def test_a_metric_without_common_steps_has_dashes(tmp_path):
    groups = [group("a", seed(m=[1.0], p=[1.0])), group("b", seed(start=7, m=[1.0], p=[1.0]))]
    assert "m b 0 — — — — p b 0 — — — —" in page_of(groups, tmp_path).text()


def test_a_run_beside_itself_is_numbered(tmp_path):
    same = group("tiny", seed(loss=[1.0, 2.0]))
    page = page_of([same, same], tmp_path)
    assert [trace["name"] for trace in json.loads(page.scripts[0])[0]["data"]] == ["tiny", "tiny (2)"]
    assert "loss tiny (2) 2 0 0 at step 1 0 % 0" in page.text()


def test_a_wide_range_offers_a_logarithmic_axis(tmp_path):
    groups = [group(label, seed(kl__x=[0.001, 0.5], loss=[0.5, 1.0], zero=[0.0, 9.0])) for label in "ab"]
    buttons = [attributes["data-chart"] for tag, attributes in page_of(groups, tmp_path).tags if tag == "button"]
    assert buttons == ["curve-0"]


def test_nothing_is_loaded(tmp_path):
    page = page_of(two_groups(), tmp_path)
    references = {"src", "href", "srcset", "data", "action"}
    assert not [tag for tag, attributes in page.tags if references & set(attributes)]
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [content_policy(*page.scripts[1:])]
    assert policies[0].startswith("default-src 'none'; script-src 'sha256-")


def test_the_page_looks_like_the_report(tmp_path):
    page = write_curves(two_groups(), tmp_path / "curves.html").read_text(encoding="utf-8")
    assert "@media (prefers-color-scheme: dark)" in page
    assert "@media (max-width: 680px)" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_nothing_from_a_log_is_markup(tmp_path):
    hostile = Curves(HOSTILE, {HOSTILE: [(1, 1.0)], "own" + HOSTILE: [(1, 1.0)]})
    page = page_of([group(HOSTILE, hostile), group(HOSTILE, Curves("b", {HOSTILE: [(1, 1.0)]}))], tmp_path)
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    assert "img" not in {tag for tag, _ in page.tags}
    names = [trace["name"] for trace in json.loads(page.scripts[0])[0]["data"]]
    # plotly.js reads markup in names.
    assert names == [html.escape(HOSTILE), html.escape(HOSTILE) + " (2)"]


def test_plotly_accepts_every_chart():
    import plotly.graph_objects as go

    many = group("ours", *(seed(m=[float(value)] * 40, n=[1.0]) for value in range(5)))
    groups = [many] * (len(curves_module.COLOURS) + 2)
    charts = build_charts(groups, shared_averages(groups))
    # Figure refuses unknown properties and values.
    figures = [go.Figure(data=chart.data, layout=chart.layout).to_dict() for chart in charts]
    assert [len(figure["data"]) for figure in figures] == [16, 16]
