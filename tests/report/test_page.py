"""The whole page: what it holds, what it leaves out, and that nothing from a run is markup in it."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.report import page as page_module
from policy_split_jax.report.charts import HIGH_ENTROPY_COLOUR, NORMAL_COLOUR
from policy_split_jax.report.page import CHARACTERS_SHOWN, write_report

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


def page_of(*runs: Path) -> Elements:
    return Elements(write_report(runs, runs[0].parent / "out" / "report.html").read_text(encoding="utf-8"))


def charts_of(page: Elements) -> dict[str, dict]:
    return {chart["slug"]: chart for chart in json.loads(page.scripts[0])}


def test_the_page_is_written_where_asked_and_returned(make_run, tmp_path):
    output = tmp_path / "deep" / "er" / "report.html"
    assert write_report([make_run()], output) == output
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_headline_goes_from_the_first_to_the_last_evaluation(make_run):
    text = page_of(make_run(metrics=[eval_row(0, 0.25), eval_row(5, 0.75), eval_row(9, 0.5)])).text()
    assert "evaluation at step 0 → 9, k = 8" in text
    assert "25.0 % → 50.0 % +25.0 points 12.5 % → 37.5 % +25.0 points" in text
    # unchanged values, one for each side of the table in its order
    assert "Best of k highest reward of a question 0.500 → 0.500 +0.000 0.625 → 0.625 +0.000 0.750 → 0.750" in text
    assert "Distinct correct different right answers a question 1.50 → 1.50 +0.000 2.50 → 2.50" in text
    # the normal column holds KL(normal ‖ high entropy)
    assert "nats per token 0.013 → 0.013 +0.000 0.250 → 0.250" in text


def test_a_fall_is_shown_as_a_fall(make_run):
    text = page_of(make_run(metrics=[eval_row(0, 0.5), eval_row(9, 0.25)])).text()
    assert "50.0 % → 25.0 % −25.0 points" in text


def test_one_evaluation_is_shown_without_an_arrow(make_run):
    text = page_of(make_run(metrics=[eval_row(0, 0.25)])).text()
    assert "mean of the samples 25.0 % 12.5 %" in text


def test_nothing_is_loaded_and_plotly_is_inlined_once(make_run):
    run = make_run(samples=[sample(1)], config="a: 1", summary={"steps": 2})
    page = page_of(run, make_run("other"))
    assert [attributes.get("type") for attributes in page.all("script")] == ["application/json", None, None]
    assert sum("plotly.js v" in script[:200] for script in page.scripts) == 1
    references = {"src", "href", "srcset", "data", "action"}
    assert not [tag for tag, attributes in page.tags if references & set(attributes)]
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}


def test_the_policy_allows_the_two_scripts_and_nothing_else(make_run):
    from base64 import b64encode
    from hashlib import sha256

    page = page_of(make_run())
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert policies[0].startswith(f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}';")


def test_every_chart_has_a_heading_a_sentence_and_words(make_run):
    page = page_of(make_run())
    charts = charts_of(page)
    assert set(charts) == {
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
    assert [a["data-chart"] for a in page.all("button")] == ["kl"]


def test_the_colours_of_the_page_are_those_of_the_charts(make_run):
    style = write_report([make_run()], make_run("x") / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert f"--normal: {NORMAL_COLOUR};" in style
    assert f"--high-entropy: {HIGH_ENTROPY_COLOUR};" in style


def test_a_run_that_has_just_started_has_a_page(make_run):
    page = page_of(make_run(metrics=[]))
    assert charts_of(page) == {}
    assert "No evaluation has been recorded yet." in page.text()
    assert "no training step yet · 0 evaluations · not finished" in page.text()
    assert page.all("select") == []


def test_training_without_evaluation_has_charts_but_no_headline(make_run):
    page = page_of(make_run(metrics=[train_row(1), train_row(2)]))
    assert set(charts_of(page)) == {"reward", "eta"}
    assert "No evaluation has been recorded yet." in page.text()
    assert "training step 2 · 0 evaluations · 2 min of training · not finished" in page.text()


def test_samples_stand_side_by_side_with_their_marks(make_run):
    samples = [
        sample(3, mode="high_entropy", text="the HE text", reward=0.0),
        sample(3, index=0, text="a right answer"),
        sample(3, index=1, text="a half answer", reward=0.5),
        sample(3, index=2, text="no grade", reward=None, finish_reason="length"),
    ]
    text = page_of(make_run(samples=samples)).text()
    normal, high_entropy = text.split("What is 6 × 7?")[1].split("high-entropy mode")
    assert "✓ reward 1 entropy 0.25 nats a right answer" in normal
    assert "◐ reward 0.5 entropy 0.25 nats a half answer" in normal
    assert "? not graded entropy 0.25 nats cut off at the length limit no grade" in normal
    assert "✗ reward 0 entropy 0.25 nats the HE text" in high_entropy


def test_only_the_first_and_last_sampled_steps_can_be_chosen(make_run):
    samples = [sample(step, text=f"text of {step}") for step in (10, 20, 30)]
    samples += [sample(step, kind="eval", text=f"eval of {step}") for step in (0, 15, 30)]
    page = page_of(make_run(samples=samples))
    text = page.text()
    choices = ["step 0 · evaluation", "step 10 · training", "step 30 · evaluation", "step 30 · training"]
    assert " ".join(choices) in text
    assert [a["value"] for a in page.all("option") if "selected" in a] == ["3"]
    assert [a["data-samples"] for a in page.all("div") if "data-samples" in a] == ["0", "1", "2", "3"]
    assert "text of 20" not in text
    assert "eval of 15" not in text
    assert "text of 10" in text


def test_samples_written_again_after_a_resume_replace_the_old_ones(make_run):
    text = page_of(make_run(samples=[sample(1, text="a first text"), sample(1, text="a second text")])).text()
    assert "a second text" in text
    assert "a first text" not in text


def test_many_questions_and_answers_are_counted_instead_of_shown(make_run):
    samples = [sample(1, question=f"question {i}.") for i in range(15)]
    samples += [sample(1, question="question 0.", index=i) for i in range(1, 11)]
    text = page_of(make_run(samples=samples)).text()
    assert "question 11." in text
    assert "question 12." not in text
    assert "3 more questions are in samples.jsonl." in text
    assert "3 more in samples.jsonl" in text


def test_a_long_text_keeps_its_beginning_and_its_end(make_run):
    text = page_of(make_run(samples=[sample(1, text="begin" + "x" * 2 * CHARACTERS_SHOWN + "the end")])).text()
    assert "begin" in text
    assert "the end" in text
    assert f"[… {CHARACTERS_SHOWN + 12:,} characters left out …]" in text


@pytest.mark.parametrize("field", ["question", "text", "kind"])
def test_a_hostile_sample_is_text(make_run, field):
    page = page_of(make_run(samples=[sample(1, **{field: HOSTILE})]))
    assert len(page.all("script")) == 3
    assert page.all("img") == []
    assert re.sub(r"\s+", " ", HOSTILE) in page.text()


def test_hostile_names_keys_and_settings_are_text(make_run):
    name = "<img src=x onerror=alert(1)>"
    metrics = [eval_row(0, 0.5) | {"</script><script>alert(1)//": 1, f"pass@2/{HOSTILE}": 1}]
    run = make_run(name, metrics=metrics, config=HOSTILE, summary={HOSTILE: HOSTILE})
    page = page_of(run, make_run("b"))
    assert len(page.all("script")) == 3
    assert page.all("img") == []
    assert name in page.text()
    # Inside the data no tag is left to end the element, and plotly.js gets the name escaped.
    assert "<" not in page.scripts[0]
    names = [trace["name"] for trace in charts_of(page)["accuracy"]["data"]]
    assert f"normal · {html.escape(name)}, evaluation" in names


def test_data_cannot_end_the_element_that_holds_it():
    text = page_module.embedded_json({"name": HOSTILE})
    assert "<" not in text
    assert json.loads(text) == {"name": HOSTILE}


def test_a_dollar_sign_in_a_text_is_no_placeholder(make_run):
    text = page_of(make_run(samples=[sample(1, text="it costs $title and $$5 or ${data}")])).text()
    assert "it costs $title and $$5 or ${data}" in text


def test_a_lone_surrogate_does_not_stop_the_report(make_run):
    assert "half ? a pair" in page_of(make_run(samples=[sample(1, text="half \ud83d a pair")])).text()


def test_configuration_and_summary_are_folded(make_run):
    page = page_of(make_run(config="model:\n  layers: 2\n", summary={"steps": 4}))
    assert len(page.all("details")) == 2
    assert all("open" not in attributes for attributes in page.all("details"))
    assert "Configuration of tiny model: layers: 2" in page.text()
    assert '{ "steps": 4 }' in page.text()
    assert "· finished" in page.text()


def test_several_runs_share_the_charts(make_run):
    page = page_of(make_run("one"), make_run("two"))
    text = page.text()
    assert "2 runs compared" in text
    traces = charts_of(page)["accuracy"]["data"]
    assert {(trace["name"], trace["marker"]["color"], trace["marker"]["symbol"]) for trace in traces} == {
        ("normal · one, evaluation", NORMAL_COLOUR, "circle"),
        ("high entropy · one, evaluation", HIGH_ENTROPY_COLOUR, "circle"),
        ("normal · two, evaluation", NORMAL_COLOUR, "square"),
        ("high entropy · two, evaluation", HIGH_ENTROPY_COLOUR, "square"),
    }
    assert "mean of the samples one 25.0 % → 50.0 %" in text
    assert "two 25.0 % → 50.0 %" in text


def test_a_missing_folder_names_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"absent/metrics\.jsonl not found; give the folder of a run"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
