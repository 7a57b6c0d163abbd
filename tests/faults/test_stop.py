"""SIGTERM and Ctrl-C: what was done is saved, and the run goes on from there."""

import re
import signal
import time

import pytest

STEPS = ("train.steps=8", "train.save_every=100", "train.eval_every=4", "eval.questions=8", "eval.k=8")


def stopped(runs, folder, text, number):
    """The step that was saved, the exit code, and how long it took after the signal, which comes when `text` does."""
    process = runs.start(folder, *STEPS)
    runs.wait_for(folder, text, process)
    process.send_signal(number)
    started = time.monotonic()
    code = process.wait(120)
    message = (folder / "err").read_text().splitlines()[-1]
    match = re.search(r"stopped after step (\d+), which is saved; the same command goes on from there$", message)
    assert match, message
    return int(match[1]), code, time.monotonic() - started


@pytest.fixture(scope="module")
def undisturbed(runs):
    folder = runs.folder / "whole"
    assert runs.finish(folder, *STEPS) == 0, (folder / "err").read_text()
    return folder


def test_a_stopped_run_goes_on_as_if_nothing_had_been(runs, undisturbed, tmp_path, figure):
    """Once in the middle of a step by SIGTERM, once in an evaluation by Ctrl-C."""
    step, code, seconds = stopped(runs, tmp_path, "step 2/8", signal.SIGTERM)
    assert step in (2, 3)
    assert code == 143
    figure(f"SIGTERM within a step: saved and gone after {seconds:.2f} s")
    step, code, seconds = stopped(runs, tmp_path, "step 4/8", signal.SIGINT)
    assert (step, code) == (4, 130)
    figure(f"Ctrl-C within an evaluation: saved and gone after {seconds:.2f} s")
    assert [row["step"] for row in runs.rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert runs.finish(tmp_path, *STEPS) == 0, (tmp_path / "err").read_text()
    assert runs.rows(tmp_path) == runs.rows(undisturbed)
    assert runs.rows(tmp_path, "samples.jsonl") == runs.rows(undisturbed, "samples.jsonl")
    assert "resuming after step 4" in (tmp_path / "out").read_text()


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(runs, tmp_path):
    process = runs.start(tmp_path, *STEPS)
    runs.wait_for(tmp_path, "pairs of figures", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert (tmp_path / "err").read_text().endswith("policy-split: stopped before the first step\n")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_second_interrupt_ends_at_once(runs, tmp_path, figure):
    process = runs.start(tmp_path, *STEPS, "eval.questions=0", "eval.k=400")
    runs.wait_for(tmp_path, "pairs of figures", process)
    process.send_signal(signal.SIGINT)
    while "Ctrl-C again ends at once" not in (tmp_path / "err").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(60) == 130
    seconds = time.monotonic() - started
    assert "stopped" not in (tmp_path / "err").read_text().rpartition("at once")[2]
    figure(f"second Ctrl-C: gone after {seconds:.2f} s")


@pytest.mark.slow
def test_two_processes_stop_together(runs, undisturbed, tmp_path, figure):
    """Only the second one gets SIGTERM; both save the same step, and one process goes on from it."""
    both = runs.start_two(tmp_path, *STEPS)
    runs.wait_for(tmp_path, "step 2/8", both[0])
    both[1].send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert [process.wait(120) for process in both] == [143, 143], (tmp_path / "err").read_text()
    seconds = time.monotonic() - started
    steps = re.findall(r"stopped after step (\d+), which is saved", (tmp_path / "err").read_text())
    assert len(steps) == 2
    assert len(set(steps)) == 1
    assert int(steps[0]) in (2, 3, 4)
    figure(f"SIGTERM to one of two processes: both saved and gone after {seconds:.2f} s")
    assert runs.finish(tmp_path, *STEPS) == 0, (tmp_path / "err").read_text()
    assert f"resuming after step {steps[0]}" in (tmp_path / "out").read_text()
    kinds = [(row["kind"], row["step"]) for row in runs.rows(tmp_path)]
    assert kinds == [(row["kind"], row["step"]) for row in runs.rows(undisturbed)]
