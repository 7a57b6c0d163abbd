"""The page in a real browser: charts drawn, nothing executed that a run wrote, no error in the console."""

import json
import re
import shutil
import subprocess

import pytest

from policy_split_jax.report.page import write_report

HOSTILE = "</script><script>document.title='broken in'</script><img src=x onerror=\"document.title='broken in'\">"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def dump_dom(tmp_path):
    """Opens a page and returns its document after the scripts ran, and the lines of the console."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH ({', '.join(NAMES)})")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]

    def dump(path):
        command = [browser, *flags, path.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True, encoding="utf-8")
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return dump


def write_run(folder, rows, samples):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "config.yaml").write_text(HOSTILE)
    return folder


def rows(steps):
    for step in range(steps):
        reward = {f"reward/{mode}": 0.1 * step for mode in ("normal", "high_entropy")}
        kl = {"kl/high_entropy_to_normal": 0.01 + step, "time/rollout": 2.0, "time/update": 1.0}
        yield {"kind": "train", "step": step} | reward | kl
    yield {"kind": "eval", "step": steps, "pass@1/normal": 0.5, "pass@2/normal": 0.75, "accuracy/normal": 0.5}


def samples(steps):
    for step in steps:
        row = {"step": step, "kind": "train", "question": HOSTILE, "text": HOSTILE, "reward": 1.0, "index": 0}
        yield from (row | {"mode": mode} for mode in ("normal", "high_entropy"))


def test_charts_are_drawn_and_hostile_text_stays_text(tmp_path, dump_dom):
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", list(rows(20)), list(samples([0, 5, 19])))
    other = write_run(tmp_path / "other", list(rows(10)), [])
    document, console = dump_dom(write_report([run, other], tmp_path / "report.html"))
    assert console == []
    assert "<title>Policy Split · 2 runs compared</title>" in document
    assert "<img" not in document
    drawn = re.findall(r'<div class="plot js-plotly-plot" id="chart-([a-z-]+)"', document)
    assert drawn == ["accuracy", "pass-at-k", "reward", "kl", "time"]
    # plotly.js draws each chart as an svg of the traces and one above it for the legend.
    assert document.count('class="main-svg"') >= 2 * len(drawn)
    assert len(re.findall(r'<path class="js-line"', document)) >= 8
    # Only the chosen step's samples are on show.
    shown = re.findall(r'<div data-samples="(\d)"( hidden="")?>', document)
    assert shown == [("0", ' hidden=""'), ("1", "")]


def test_the_policy_stops_a_script_that_slipped_through(tmp_path, dump_dom):
    # The second barrier, tested by tearing down the first.
    run = write_run(tmp_path / "run", list(rows(3)), list(samples([0])))
    page = write_report([run], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(
        text.replace("<main>", f"<main><script>document.title='broken in'</script>{HOSTILE}"),
        encoding="utf-8",
    )
    document, console = dump_dom(page)
    assert "<title>Policy Split · run</title>" in document
    assert any("Content Security Policy" in line for line in console)
