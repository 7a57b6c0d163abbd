"""The pages in a real browser: charts drawn, rollouts readable, nothing executed that a run wrote, no error in the
console; on a desk and on a phone. Pictures are left where POLICY_SPLIT_SCREENSHOTS says."""

import json
import re
import socket
import threading

import pytest

from policy_split_jax.parity import curves
from policy_split_jax.report import samples as samples_of_page
from policy_split_jax.report.groups import parse_named
from policy_split_jax.report.page import write_report
from policy_split_jax.report.watch import Watcher, watch

HOSTILE = "</script><script>document.title='broken in'</script><img src=x onerror=\"document.title='broken in'\">"
DESK, PHONE = {"width": 1280}, {"width": 390, "height": 844, "mobile": True}
SCREENS = {"desk": DESK, "desk-dark": DESK | {"dark": True}, "phone": PHONE, "phone-dark": PHONE | {"dark": True}}
MODES = ("normal", "high_entropy")


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def metrics(steps, gain=0.0):
    for step in range(1, steps + 1):
        row = {f"reward/{mode}": 0.1 + 0.02 * step for mode in MODES}
        kl = {"kl/high_entropy_to_normal": 0.01 + 0.03 * step, "time/rollout": 2.0, "time/update": 1.0}
        yield {"kind": "train", "step": step} | row | kl
    for step in (0, steps):
        done = step / steps
        row = {"accuracy/normal": 0.4 + (0.2 + gain) * done, "accuracy/high_entropy": 0.4 + (0.1 + gain) * done}
        row |= {"entropy/normal": 0.45 - 0.2 * done, "entropy/high_entropy": 0.45 - 0.05 * done}
        row |= {"kl/high_entropy_to_normal": 0.6 * done, "pass@1/normal": 0.4, "pass@2/normal": 0.6}
        yield {"kind": "eval", "step": step} | row


def tokens(*figures):
    texts, entropies, kls = zip(*figures, strict=True)
    return {"text": texts, "entropy": entropies, "kl": kls, "left_out": 0}


FIGURES = tokens(("two ", 0.0, 0.5), ("", 0.2, 0.0), ("€", 1.0, 0.25), ("<b>", 0.5, 0.0))


def samples(step):
    """Three questions: both modes right, the normal mode alone, the high-entropy mode alone."""
    for at, right in enumerate((MODES, MODES[:1], MODES[1:])):
        for mode in MODES:
            row = {"step": step, "kind": "eval", "question": f"question {at}", "mode": mode, "index": 0}
            yield row | {"text": "two €<b>", "reward": float(mode in right), "entropy": 0.5, "tokens": FIGURES}


def report(*runs):
    return write_report([parse_named(str(run)) for run in runs], runs[0].parent / "report.html").as_uri()


@pytest.fixture
def run(tmp_path):
    return write(write(tmp_path / "run", "metrics.jsonl", metrics(20)), "samples.jsonl", [*samples(0), *samples(20)])


@pytest.fixture
def rollouts(tmp_path):
    """A run whose page opens at once, for want of charts: its evaluations have samples and no figures."""
    rows = ({"kind": kind, "step": step} for kind, step in (("eval", 0), ("eval", 20), ("train", 21)))
    return write(write(tmp_path / "run", "metrics.jsonl", rows), "samples.jsonl", [*samples(0), *samples(20)])


def shown(browser):
    return browser.run("document.getElementById('rollout-question').textContent")


def choose(browser, element, value):
    place = f"document.getElementById('{element}')"
    browser.run(f"{place}.value = '{value}'; {place}.dispatchEvent(new Event('change'))")


def test_charts_are_drawn_and_hostile_text_stays_text(tmp_path, browser):
    hostile = tmp_path / "<img src=x onerror=alert(1)>"
    row = {"step": 20, "kind": "train", "question": HOSTILE, "text": HOSTILE, "reward": 1.0, "index": 0}
    write(hostile, "metrics.jsonl", metrics(20))
    write(hostile, "samples.jsonl", [row | {"mode": "normal"}, row | {"mode": "high_entropy", "tokens": {
        "text": [HOSTILE], "entropy": [1.0], "kl": [1.0], "left_out": 0}}])  # fmt: skip
    (hostile / "config.yaml").write_text(HOSTILE)
    browser.look(**DESK)
    browser.open(report(hostile, write(tmp_path / "other", "metrics.jsonl", metrics(10))))
    assert browser.console == []
    assert browser.run("document.title") == "Policy Split · 2 runs compared"
    assert browser.run("document.querySelectorAll('img').length") == 0
    drawn = browser.run("[...document.querySelectorAll('.plot.js-plotly-plot')].map(({id}) => id.slice(6))")
    assert drawn == ["glance", "accuracy", "pass-at-k", "reward", "entropy", "kl", "time"]
    # plotly.js draws each chart as an svg of the traces and one above it for the legend.
    assert browser.run("document.querySelectorAll('.main-svg').length") >= 2 * len(drawn)
    assert browser.run("document.querySelectorAll('path.js-line').length") >= 8
    assert shown(browser) == HOSTILE
    texts = browser.run("[...document.querySelectorAll('#rollout-sides .text')].map((each) => each.textContent)")
    assert texts == [HOSTILE, HOSTILE]


def test_the_policy_stops_a_script_that_slipped_through(run, browser):
    # The second barrier, tested by tearing down the first.
    report(run)
    page = run.parent / "report.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace("<main>", f"<main><script>document.title='broken in'</script>{HOSTILE}"),
        encoding="utf-8",
    )
    browser.open(page.as_uri())
    assert browser.run("document.title") == "Policy Split · run"
    assert any("Content Security Policy" in line for line in browser.console)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("page", ["run", "seeds", "curves"])
def test_every_screen_shows_the_whole_page(run, browser, screenshots, screen, page):
    others = [write(run.parent / name, "metrics.jsonl", metrics(20, gain)) for name, gain in (("b", 0.1), ("c", 0.2))]
    seeds = f"three-seeds={run},{others[0]},{others[1]}"
    if page == "curves":
        groups = [curves.parse_group(text) for text in (seeds, str(others[0]))]
        address = curves.write_curves(groups, run.parent / "curves.html").as_uri()
    else:
        named = [parse_named(text) for text in ([str(run)] if page == "run" else [seeds, *map(str, others)])]
        address = write_report(named, run.parent / "report.html").as_uri()
    browser.look(**SCREENS[screen])
    browser.open(address)
    browser.screenshot(screenshots / f"{page}-{screen}.png")
    assert browser.console == []
    assert browser.run("document.documentElement.scrollWidth") == SCREENS[screen]["width"]
    # What lies outside of a chart's frame is not drawn.
    outside = "!each.ownerSVGElement && each.getBoundingClientRect().right > innerWidth + 1"
    wide = f"[...document.querySelectorAll('main *')].filter((each) => {outside})"
    assert browser.run(f"{wide}.map((each) => each.outerHTML.slice(0, 80))") == []
    undrawn = "document.querySelectorAll('.plot:not(.js-plotly-plot)').length"
    assert browser.run(undrawn) == 0


def test_tokens_are_shaded_by_their_figures(rollouts, browser):
    browser.look(**DESK)
    browser.open(report(rollouts))
    every = "[...document.querySelectorAll('.side.normal .token')].map((each) =>"
    heats = f"{every} each.style.getPropertyValue('--heat'))"
    backgrounds = f"{every} getComputedStyle(each).backgroundColor)"
    assert browser.run(f"{every} each.textContent)") == ["two ", "◦", "€", "<b>"]
    # The scale ends with the 98th percentile: 1 nat of entropy, and 0.5 of KL.
    assert [float(heat) for heat in browser.run(heats)] == [0.0, 0.2, 1.0, 0.5]
    assert browser.run("document.getElementById('rollout-legend').textContent").endswith("0  1.0 nats and more")
    by_entropy = browser.run(backgrounds)
    assert len(set(by_entropy)) == 4
    browser.run("document.querySelector('[data-shade=kl]').click()")
    assert [float(heat) for heat in browser.run(heats)] == [1.0, 0.0, 0.5, 0.0]
    assert browser.run(backgrounds)[1] != by_entropy[1]
    browser.run("document.querySelector('[data-shade=none]').click()")
    assert set(browser.run(backgrounds)) == {"rgba(0, 0, 0, 0)"}
    browser.point(".side.normal .token:nth-child(3)")
    browser.wait_for("!document.getElementById('token-value').hidden")
    assert browser.run("document.getElementById('token-value').textContent") == "entropy 1.000 · KL 0.250 nats"


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (each / 255 for each in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, deep = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (deep + 0.05)


def test_text_on_the_deepest_shade_can_be_read(rollouts, browser):
    """The contrast that WCAG asks of body text, 4.5, of both measures on light and dark."""
    browser.look(**DESK)
    browser.open(report(rollouts))
    deepest = "[...document.querySelectorAll('.token')].find((each) => each.style.getPropertyValue('--heat') >= 1)"
    style, under = f"getComputedStyle({deepest})", "getComputedStyle(document.querySelector('.answer')).backgroundColor"
    for dark in (False, True):
        browser.look(**DESK, dark=dark)
        for shade in ("entropy", "kl"):
            browser.run(f"document.querySelector('[data-shade={shade}]').click()")
            found = browser.run(f"[{style}.color, {style}.backgroundColor, {under}]")
            text, (*over, alpha), below = ([float(part) for part in re.findall(r"[\d.]+", colour)] for colour in found)
            assert alpha > 0.8
            behind = [alpha * top + (1 - alpha) * bottom for top, bottom in zip(over, below, strict=True)]
            assert contrast(text, behind) >= 4.5


def test_questions_are_turned_by_buttons_and_arrow_keys(rollouts, browser):
    # So low that the rollouts are out of sight at the top of the page.
    browser.look(width=1280, height=200)
    browser.open(report(rollouts))
    browser.run("document.getElementById('rollouts').scrollIntoView()")
    assert shown(browser) == "question 0"
    assert browser.run("document.getElementById('rollout-previous').disabled")
    browser.press("ArrowRight")
    assert shown(browser) == "question 1"
    browser.run("document.getElementById('rollout-next').click()")
    assert shown(browser) == "question 2"
    browser.press("ArrowRight")
    assert shown(browser) == "question 2"
    browser.press("ArrowLeft")
    assert shown(browser) == "question 1"
    browser.run("scrollTo(0, 0)")
    browser.press("ArrowRight")
    assert shown(browser) == "question 1"


def test_questions_can_be_filtered(rollouts, browser):
    browser.open(report(rollouts))
    expected = {"disagree": ("1", 2), "normal": ("1", 1), "high_entropy": ("2", 1), "all": ("0", 3)}
    for value, (first, count) in expected.items():
        choose(browser, "rollout-filter", value)
        assert shown(browser) == f"question {first}"
        assert browser.run("document.getElementById('rollout-place').textContent") == f"question 1 of {count}"


def test_steps_can_be_chosen_and_the_last_evaluation_is_first(rollouts, browser):
    trained = ({**row, "kind": "train"} for row in samples(21))
    browser.open(report(write(rollouts, "samples.jsonl", [*samples(0), *samples(20), *trained])))
    step = "document.getElementById('rollout-step').value"
    assert browser.run(step) == "step 20 · evaluation"
    choose(browser, "rollout-step", "step 0 · evaluation")
    assert browser.run(step) == "step 0 · evaluation"
    assert shown(browser) == "question 0"


def test_older_samples_are_shown_without_shading(rollouts, browser):
    rows = [{key: value for key, value in row.items() if key != "tokens"} for row in samples(20)]
    browser.open(report(write(rollouts, "samples.jsonl", rows)))
    assert browser.console == []
    assert browser.run("document.querySelector('.side.normal .text').textContent") == "two €<b>"
    assert browser.run("document.querySelectorAll('.token').length") == 0
    assert browser.run("document.getElementById('rollout-legend').textContent").startswith("No figures by token")


def test_what_the_page_has_no_room_for_is_counted(rollouts, browser, monkeypatch):
    monkeypatch.setattr(samples_of_page, "CHARACTERS_OF_PAGE", 700)
    browser.open(report(rollouts))
    assert browser.console == []
    words = [browser.run(f"document.getElementById('rollout-{name}').textContent") for name in ("place", "left-out")]
    assert words == ["no question is short enough to be shown", " samples.jsonl has 3 more questions."]
    assert browser.run("document.getElementById('rollout-legend').textContent") == ""


def test_a_run_can_be_taken_out_of_the_charts(run, browser):
    other = write(run.parent / "other", "metrics.jsonl", metrics(10))
    browser.look(**DESK)
    browser.open(report(run, other))
    lines = "document.querySelectorAll('#chart-kl path.js-line').length"
    before = browser.run(lines)
    button = "document.querySelector('[data-run=\"1\"]')"
    browser.run(f"{button}.click()")
    browser.wait_for(f"{lines} < {before}")
    assert browser.run(f"{button}.getAttribute('aria-pressed')") == "false"
    browser.run(f"{button}.click()")
    browser.wait_for(f"{lines} === {before}")


def test_a_watched_page_renews_itself_where_it_stands(tmp_path, browser):
    folder = tmp_path / "run"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        address = f"http://127.0.0.1:{bound.getsockname()[1]}/"
        arguments = (Watcher([parse_named(str(folder))]), bound.dup())
        threading.Thread(target=watch, args=arguments, daemon=True).start()
        browser.look(**PHONE)
        browser.open(address)
    assert browser.console == []
    assert "Waiting for" in browser.run("document.querySelector('main').textContent")
    # The page that waits gives way to the report.
    write(write(folder, "samples.jsonl", [*samples(0), *samples(20)]), "metrics.jsonl", metrics(20))
    browser.wait_for("document.querySelectorAll('.js-plotly-plot').length > 3")
    choose(browser, "rollout-step", "step 0 · evaluation")
    browser.run("document.querySelector('[data-shade=kl]').click(); document.getElementById('rollout-next').click()")
    browser.run("document.querySelector('[data-chart=kl]').click(); scrollTo(0, 900); window.here = true")
    svg = "document.querySelector('#chart-reward .main-svg')"
    browser.run(f"{svg}.dataset.here = 'yes'")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 21, "kl/high_entropy_to_normal": 5.0}) + "\n")
    browser.wait_for("document.getElementById('facts').textContent.includes('training step 21')")
    assert browser.run("[window.here, scrollY]") == [True, 900]
    assert browser.run("document.getElementById('rollout-step').value") == "step 0 · evaluation"
    assert browser.run("document.getElementById('rollouts').dataset.shade") == "kl"
    assert shown(browser) == "question 1"
    # The chart that changed has its new value and its axis; the other was not touched.
    assert browser.run("document.getElementById('chart-kl').data.flatMap(({y}) => y).includes(5)")
    assert browser.run("document.getElementById('chart-kl').layout.yaxis.type") == "log"
    assert browser.run(f"{svg}.dataset.here") == "yes"
    assert browser.console == []
