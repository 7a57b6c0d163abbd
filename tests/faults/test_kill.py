"""A run killed at any moment goes on as if nothing had happened."""

import json
import random
import shutil
import signal
import time

import pytest

STEPS = ("train.steps=40", "train.save_every=2", "train.eval_every=10")
# 30 at a random moment, 10 while saving, 2 while reporting.
KILLS = 42


@pytest.fixture(scope="module")
def undisturbed(runs):
    folder = runs.folder / "undisturbed"
    started = time.monotonic()
    assert runs.finish(folder, *STEPS) == 0, (folder / "err").read_text()
    return folder, time.monotonic() - started


def at_a_random_moment(folder, process, draw, seconds):
    """From before the first line on."""
    time.sleep(draw.uniform(0, seconds))


def while_saving(folder, process, draw, seconds):
    """As soon as some checkpoint is half there."""
    until(process, lambda: any("tmp" in path.name for path in (folder / "run" / "checkpoints").glob("*")))


def while_reporting(folder, process, draw, seconds):
    """When the run is over, and its page is being made."""
    until(process, (folder / "run" / "summary.json").is_file)


def until(process, holds):
    while process.poll() is None and not holds():
        time.sleep(0.001)


def assert_same(runs, folder, other):
    """Every row once, and each of its figures to the last bit, and so what the last checkpoint holds."""
    assert runs.rows(folder) == runs.rows(other)
    assert runs.rows(folder, "samples.jsonl") == runs.rows(other, "samples.jsonl")
    assert saved(folder) == saved(other)
    assert last_checkpoint(folder) == last_checkpoint(other)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_times_is_the_undisturbed_run(runs, undisturbed, figure):
    other, seconds = undisturbed
    draw, folder = random.Random(0), runs.folder / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    moments = {at_a_random_moment: 0, while_saving: 0, while_reporting: 0}
    lost = []
    while sum(moments.values()) < KILLS:
        # The end of the run is near when all other kills are done.
        left = KILLS - sum(moments.values())
        moment = while_reporting if left <= 2 else while_saving if left % 4 == 0 else at_a_random_moment
        before = last_row(folder)
        process = runs.start(folder, *STEPS)
        moment(folder, process, draw, seconds / 3)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL), (folder / "err").read_text()
        if process.returncode:
            moments[moment] += 1
            lost.append(max(0, before - saved(folder)))
        elif moment is not while_reporting:
            # It was over before its moment came: once more from nothing.
            shutil.rmtree(folder / "run")
    assert runs.finish(folder, *STEPS) == 0, (folder / "err").read_text()
    assert_same(runs, folder, other)
    assert (folder / "run" / "report.html").is_file()
    assert not list((folder / "run").glob("*.part"))
    # Saves of 2 steps apart, and the one before may still be being written until the next one begins.
    assert max(lost) < 2 * 2
    counts = ", ".join(f"{count} {moment.__name__.replace('_', ' ')}" for moment, count in moments.items())
    figure(
        f"{KILLS} kills ({counts}): metrics and samples of all 40 steps, and the last checkpoint's fingerprints, equal "
        f"those of the undisturbed run bit for bit; at most {max(lost)} logged steps were made again"
    )


def last_row(folder):
    path = folder / "run" / "metrics.jsonl"
    if not path.is_file():
        return 0
    complete = path.read_bytes().rpartition(b"\n")[0].splitlines()
    return max((json.loads(line)["step"] for line in complete), default=0)


def saved(folder):
    """The step of the last whole checkpoint."""
    names = [path.name for path in (folder / "run" / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def last_checkpoint(folder):
    """What it says of its arrays, by their fingerprints, and all else that a run goes on from."""
    return json.loads((folder / "run" / "checkpoints" / str(saved(folder)) / "extra" / "metadata").read_text())


@pytest.mark.slow
def test_the_same_seed_is_the_same_run(runs, undisturbed, figure):
    other, _ = undisturbed
    folder = runs.folder / "again"
    assert runs.finish(folder, *STEPS) == 0
    assert_same(runs, folder, other)
    third = runs.folder / "another-seed"
    assert runs.finish(third, *STEPS, "train.seed=1") == 0
    assert runs.rows(third) != runs.rows(other)
    assert last_checkpoint(third)["fingerprints"] != last_checkpoint(other)["fingerprints"]
    figure("two runs of the same seed: 40 steps and 5 evaluations equal bit for bit")


@pytest.mark.slow
def test_a_run_killed_while_it_saves_goes_on(runs, tmp_path):
    """The quick form: one kill, in the middle of a checkpoint, and all figures as if there had been none."""
    steps = ("train.steps=4", "train.save_every=2")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runs.finish(whole, *steps) == 0, (whole / "err").read_text()
    process = runs.start(killed, *steps)
    while_saving(killed, process, None, 0)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert runs.finish(killed, *steps) == 0, (killed / "err").read_text()
    assert_same(runs, killed, whole)
