"""A long run needs no more of the machine at its end than after its warm-up."""

import time
from pathlib import Path

import numpy as np
import pytest

STEPS = 5000
WARM = 0.2
"""Share of the run that is not looked at: until every program is compiled and every buffer has its size."""


def used(process, folder):
    """Memory (MiB), threads, open files, child processes, checkpoints, and programs compiled so far."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return (
        int(status["VmRSS"].split()[0]) / 1024,
        int(status["Threads"]),
        len(list(Path(f"/proc/{process.pid}/fd").iterdir())),
        len(children),
        len([path for path in (folder / "run" / "checkpoints").glob("*") if path.name.isdigit()]),
        len(list((folder.parent / "compiled").glob("*"))),
    )


@pytest.mark.slow
def test_five_thousand_steps_need_no_more_than_the_first_thousand(runs, figure):
    folder = runs.folder / "long"
    small = (f"train.steps={STEPS}", "train.save_every=50", "train.eval_every=500", "rollout.questions_per_step=2",
             "rollout.rollouts_per_mode=2", "rollout.slots=8", "reward.grader=math")  # fmt: skip
    process = runs.start(folder, *small)
    seen, started = [], time.monotonic()
    try:
        while process.poll() is None:
            done = (folder / "out").read_text().count("\nstep ")
            if done:
                try:
                    seen.append((done, *used(process, folder)))
                except OSError:
                    break  # it has just ended
            time.sleep(2)
    finally:
        process.kill()
    assert process.wait() == 0, (folder / "err").read_text()
    minutes = (time.monotonic() - started) / 60
    at, memory, *counts = np.array([row for row in seen if row[0] > WARM * STEPS]).T
    slope = np.polyfit(at, memory, 1)[0] * 1000
    figure(f"{STEPS} steps in {minutes:.1f} minutes: memory {memory[0]:.0f} MiB after {at[0]:.0f} steps, "
           f"{memory[-1]:.0f} MiB at the end, slope {slope:+.2f} MiB for 1000 steps")  # fmt: skip
    # Saving takes some for a moment, so that growth shows in what is usual.
    allowed = {"threads": 2, "open files": 8, "processes": 0, "checkpoints": 1}
    quarter = len(at) // 4
    for (name, slack), values in zip(allowed.items(), counts[:-1], strict=True):
        first, last = np.median(values[:quarter]), np.median(values[-quarter:])
        figure(f"{name}: {values.min():.0f} to {values.max():.0f}, usually {first:.0f} and at the end {last:.0f}")
        assert last - first <= slack, name
    figure(f"programs compiled after {at[0]:.0f} steps: {counts[-1][-1] - counts[-1][0]:.0f}")
    assert counts[-1][-1] == counts[-1][0]
    assert counts[-2].max() <= 4
    # A leak of one float of every token would show: what is left is the allocator's.
    assert abs(slope) < 5
