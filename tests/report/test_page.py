"""The whole page: what it holds, what it leaves out, and that nothing from a run is markup in it."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.report.charts import HIGH_ENTROPY_COLOUR, NORMAL_COLOUR
from policy_split_jax.report.frame import embedded_json
from policy_split_jax.report.groups import parse_named
from policy_split_jax.report.page import write_report

HOSTILE = "</script><script>document.title='x'</script><img src=x onerror=\"document.title='x'\"><!--"


class Elements(HTMLParser):
    """Collects start tags with their attributes, and the text of each `<script>`."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.in_script = tag == "script"
        if self.in_script:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.in_script = self.in_script and tag != "script"

    def handle_data(self, data):
        if self.in_script:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def eval_row(step: int, accuracy: float) -> dict:
    return {
        "kind": "eval",
        "step": step,
        "k": 8,
        "accuracy/normal": accuracy,
        "accuracy/high_entropy": accuracy - 0.125,
        "entropy/normal": 0.3,
        "entropy/high_entropy": 0.7,
        "kl/high_entropy_to_normal": 0.25,
        "kl/normal_to_high_entropy": 0.0125,
        "best_of_k/normal": 0.5,
        "best_of_k/high_entropy": 0.625,
        "best_of_k/both": 0.75,
        "distinct_correct/normal": 1.5,
        "distinct_correct/high_entropy": 2.5,
        "distinct_correct/both": 3.5,
        "pass@1/normal": accuracy,
        "pass@8/both": 0.875,
    }


def train_row(step: int) -> dict:
    return {
        "kind": "train",
        "step": step,
        "reward/normal": 0.1 * step,
        "eta": 0.03,
        "loss": None,
        "time/step": 60,
    }


def sample(step: int, **changes) -> dict:
    row = {"step": step, "kind": "train", "question": "What is 6 × 7?", "mode": "normal", "index": 0}
    return row | {"text": "It is 42.", "reward": 1.0, "finish_reason": "stop", "entropy": 0.25} | changes


@pytest.fixture
def make_run(tmp_path):
    def make(name="tiny", metrics=None, samples=None, config=None, summary=None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = [eval_row(0, 0.25), train_row(1), train_row(2), eval_row(2, 0.5)] if metrics is None else metrics
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if samples is not None:
            (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        if config is not None:
            (folder / "config.yaml").write_text(config)
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


def write(runs, output: Path) -> Path:
    return write_report([parse_named(str(run)) for run in runs], output)


@pytest.fixture
def page_of(tmp_path):
    """The page about folders, or about what the command line would say."""

    def page(*runs: Path | str) -> Elements:
        return Elements(write(runs, tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    return page


def charts_of(page: Elements) -> dict[str, dict]:
    return {chart["slug"]: chart for chart in json.loads(page.scripts[0])}


def rollouts_of(page: Elements) -> list[dict]:
    return json.loads(page.scripts[1])["runs"]


def test_the_page_is_written_where_asked_and_returned(make_run, tmp_path):
    output = tmp_path / "deep" / "er" / "report.html"
    assert write([make_run()], output) == output
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_headline_goes_from_the_first_to_the_last_evaluation(make_run, page_of):
    text = page_of(make_run(metrics=[eval_row(0, 0.25), eval_row(5, 0.75), eval_row(9, 0.5)])).text()
    assert "evaluation at step 0 → 9, k = 8" in text
    assert "25.0 % → 50.0 % +25.0 points 12.5 % → 37.5 % +25.0 points" in text
    # unchanged values, one for each side of the table in its order
    unchanged = "0.500 → 0.500 +0.000 0.625 → 0.625 +0.000 0.750 → 0.750"
    assert f"Best of k highest reward of a question; both: of all its samples {unchanged}" in text
    unchanged = "1.50 → 1.50 +0.000 2.50 → 2.50"
    assert f"Distinct correct different right answers a question; both: of all its samples {unchanged}" in text
    # the normal column holds KL(normal ‖ high entropy)
    assert "nats per token 0.013 → 0.013 +0.000 0.250 → 0.250" in text


def test_a_fall_is_shown_as_a_fall(make_run, page_of):
    text = page_of(make_run(metrics=[eval_row(0, 0.5), eval_row(9, 0.25)])).text()
    assert "50.0 % → 25.0 % −25.0 points" in text


def test_one_evaluation_is_shown_without_an_arrow(make_run, page_of):
    text = page_of(make_run(metrics=[eval_row(0, 0.25)])).text()
    assert "mean of the samples 25.0 % 12.5 %" in text


def test_nothing_is_loaded_and_plotly_is_inlined_once(make_run, page_of):
    run = make_run(samples=[sample(1)], config="a: 1", summary={"steps": 2})
    page = page_of(run, make_run("other"))
    assert [attributes.get("type") for attributes in page.all("script")] == ["application/json"] * 2 + [None] * 3
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1
    references = {"src", "href", "srcset", "data", "action"}
    assert not [tag for tag, attributes in page.tags if references & set(attributes)]
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}


def test_the_policy_allows_the_pages_scripts_and_nothing_else(make_run, page_of):
    from base64 import b64encode
    from hashlib import sha256

    page = page_of(make_run())
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in page.scripts[2:]]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert policies[0].startswith(f"default-src 'none'; script-src {allowed}; style-src")
    assert "connect-src" not in policies[0]


def test_every_chart_has_a_heading_a_sentence_and_words(make_run, page_of):
    page = page_of(make_run())
    charts = charts_of(page)
    assert set(charts) == {
        "glance",
        "accuracy",
        "pass-at-k",
        "reward",
        "best-of-k",
        "distinct-correct",
        "entropy",
        "kl",
        "eta",
    }
    plots = {a["id"]: a["aria-label"] for a in page.all("div") if a.get("role") == "img"}
    assert set(plots) == {f"chart-{slug}" for slug in charts}
    assert plots["chart-accuracy"] == "Accuracy. normal: from 0.25 to 0.5; high entropy: from 0.125 to 0.375"
    assert {a["id"] for a in page.all("h3") if "id" in a} == {f"title-{slug}" for slug in charts}
    assert [a["data-chart"] for a in page.all("button") if "data-chart" in a] == ["kl"]


def test_the_colours_of_the_page_are_those_of_the_charts(make_run):
    style = write([make_run()], make_run("x") / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert f"--normal: {NORMAL_COLOUR};" in style
    assert f"--high-entropy: {HIGH_ENTROPY_COLOUR};" in style


def test_a_run_that_has_just_started_has_a_page(make_run, page_of):
    page = page_of(make_run(metrics=[]))
    assert charts_of(page) == {}
    assert "No evaluation has been recorded yet." in page.text()
    assert "no training step yet · 0 evaluations · not finished" in page.text()
    assert rollouts_of(page) == []
    assert "hidden" in next(a for a in page.all("section") if a.get("id") == "rollouts")


def test_training_without_evaluation_has_charts_but_no_headline(make_run, page_of):
    page = page_of(make_run(metrics=[train_row(1), train_row(2)]))
    assert set(charts_of(page)) == {"reward", "eta"}
    assert "No evaluation has been recorded yet." in page.text()
    assert "training step 2 · 0 evaluations · 2 min of training · not finished" in page.text()


@pytest.mark.parametrize("field", ["question", "text"])
def test_a_hostile_sample_is_data(make_run, page_of, field):
    page = page_of(make_run(samples=[sample(1, **{field: HOSTILE})]))
    assert len(page.all("script")) == 5
    assert page.all("img") == []
    assert "<" not in page.scripts[1]
    assert HOSTILE in json.dumps(rollouts_of(page), ensure_ascii=False).encode().decode("unicode_escape")


def test_hostile_names_keys_and_settings_are_text(make_run, page_of):
    name = "<img src=x onerror=alert(1)>"
    metrics = [eval_row(0, 0.5) | {"</script><script>alert(1)//": 1, f"pass@2/{HOSTILE}": 1}]
    run = make_run(name, metrics=metrics, config=HOSTILE, summary={HOSTILE: HOSTILE})
    page = page_of(run, make_run("b"))
    assert len(page.all("script")) == 5
    assert page.all("img") == []
    assert name in page.text()
    # Inside the data no tag is left to end the element, and plotly.js gets the name escaped.
    assert "<" not in page.scripts[0]
    names = [trace["name"] for trace in charts_of(page)["accuracy"]["data"]]
    assert f"normal · {html.escape(name)}, evaluation" in names


def test_data_cannot_end_the_element_that_holds_it():
    text = embedded_json({"name": HOSTILE})
    assert "<" not in text
    assert json.loads(text) == {"name": HOSTILE}


def test_a_dollar_sign_in_a_text_is_no_placeholder(make_run, page_of):
    text = page_of(make_run(config="it costs $title and $$5 or ${data}")).text()
    assert "it costs $title and $$5 or ${data}" in text


def test_a_lone_surrogate_does_not_stop_the_report(make_run, page_of):
    assert "half ? a pair" in page_of(make_run(summary="half \ud83d a pair")).text()


def test_configuration_and_summary_are_folded(make_run, page_of):
    page = page_of(make_run(config="model:\n  layers: 2\n", summary={"steps": 4}))
    assert len(page.all("details")) == 2
    assert all("open" not in attributes for attributes in page.all("details"))
    assert "Configuration of tiny model: layers: 2" in page.text()
    assert '{ "steps": 4 }' in page.text()
    assert "· finished" in page.text()


def test_several_runs_share_the_charts(make_run, page_of):
    page = page_of(make_run("one"), make_run("two"))
    text = page.text()
    assert "2 runs compared" in text
    traces = [trace for trace in charts_of(page)["accuracy"]["data"] if "marker" in trace]
    assert {(trace["name"], trace["marker"]["color"], trace["marker"]["symbol"]) for trace in traces} == {
        ("normal · one, evaluation", NORMAL_COLOUR, "circle"),
        ("high entropy · one, evaluation", HIGH_ENTROPY_COLOUR, "circle"),
        ("normal · two, evaluation", NORMAL_COLOUR, "square"),
        ("high entropy · two, evaluation", HIGH_ENTROPY_COLOUR, "square"),
    }
    assert "mean of the samples one step 0 → 2 25.0 % → 50.0 %" in text
    assert "two step 0 → 2 25.0 % → 50.0 %" in text
    assert [a["aria-label"] for a in page.all("button") if "data-run" in a] == ["Show one", "Show two"]


def test_seeds_are_one_run_with_its_spread(make_run, page_of):
    ends = {"a": 0.5, "b": 0.75, "c": 0.875}
    runs = [make_run(name, metrics=[eval_row(0, 0.25), eval_row(2, end)]) for name, end in ends.items()]
    page = page_of(f"mine={','.join(map(str, runs))}")
    text = page.text()
    # The mean of 50, 75 and 87.5 is 70.8, half of their range 18.75.
    assert "mean of the samples 25.0 ± 0.0 % → 70.8 ± 18.8 % +45.8 points" in text
    assert "mine · 3 seeds, min–max · no training step yet · 2 evaluations" in text
    assert "(here: 3 seeds, min–max); ± is half of its width." in text
    assert "(means of 3 seeds at step 2)" in text
    assert "Policy Split · mine" in text


def test_seeds_are_compared_where_the_slowest_has_got_to(make_run, page_of):
    further = make_run("a", metrics=[eval_row(0, 0.25), eval_row(75, 0.5), eval_row(300, 1.0)])
    seeds = f"mine={further},{make_run('b', metrics=[eval_row(0, 0.25), eval_row(75, 0.75)])}"
    text = page_of(seeds).text()
    assert "evaluation at step 0 → 75, k = 8" in text
    assert "mean of the samples 25.0 ± 0.0 % → 62.5 ± 12.5 % +37.5 points" in text
    assert "(means of 2 seeds at step 75)" in text
    beside = page_of(seeds, make_run("c", metrics=[eval_row(0, 0.25), eval_row(300, 1.0)])).text()
    assert "mine step 0 → 75 25.0 ± 0.0 % → 62.5 ± 12.5 % +37.5 points" in beside
    assert "c step 0 → 300 25.0 % → 100.0 % +75.0 points" in beside


def test_seeds_without_a_common_evaluation_have_no_figures(make_run, page_of):
    seeds = f"mine={make_run('a', metrics=[eval_row(300, 0.5)])},{make_run('b', metrics=[eval_row(0, 0.25)])}"
    none = "There is no step yet at which every seed was evaluated in both modes."
    page = page_of(seeds)
    assert page.text().count(none) == 2
    assert charts_of(page) == {}
    beside = page_of(seeds, make_run("c")).text()
    assert f"mine : {none}" in beside
    assert "mean of the samples mine — — c step 0 → 2 25.0 % → 50.0 %" in beside


@pytest.mark.parametrize("count", [2, 4])
def test_a_figure_that_a_seed_lacks_is_a_dash(make_run, page_of, count):
    rows = [eval_row(0, 0.5)] * (count - 1) + [eval_row(0, 0.5) | {"accuracy/normal": None}]
    runs = [make_run(str(at), metrics=[row]) for at, row in enumerate(rows)]
    # Of the high-entropy mode all seeds have it.
    assert "mean of the samples — 37.5 ± 0.0 %" in page_of(f"mine={','.join(map(str, runs))}").text()


def test_a_page_of_single_runs_does_not_speak_of_bands(make_run, page_of):
    assert "min–max" not in page_of(make_run("one"), make_run("two")).text()


def test_seeds_that_have_got_less_far(make_run, page_of):
    finished = make_run("a", summary={}, metrics=[train_row(1), train_row(2)])
    text = page_of(f"mine={finished},{make_run('b', metrics=[train_row(1)])}").text()
    assert "training step 1 to 2 · 0 evaluations · 3 min of training · 1 of them not finished" in text


def test_a_missing_folder_names_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"absent/metrics\.jsonl not found; give the folder of a run"):
        write([tmp_path / "absent"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
