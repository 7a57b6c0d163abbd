"""Training runs of the command line, side by side, a core each: what the experiments have in common."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run: a configuration and the settings that replace its own."""

    name: str
    config: str
    settings: Mapping[str, Any]


def run_all(jobs: list[Job], folder: Path, parallel: int) -> None:
    """Runs what has not ended yet; what was interrupted goes on. Raises CalledProcessError where a run fails."""
    folder.mkdir(parents=True, exist_ok=True)
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[:parallel]:
        cores.put(core)
    left = [job for job in jobs if not (folder / job.name / "summary.json").is_file()]
    with ThreadPoolExecutor(parallel) as pool:
        for number, done in enumerate([pool.submit(_run, job, folder, cores) for job in left], 1):
            done.result()
            print(f"{number} of {len(left)} runs done", file=sys.stderr, flush=True)


def _run(job: Job, folder: Path, cores: "Queue[int]") -> None:
    core = cores.get()
    settings = {"output": folder, "name": job.name} | dict(job.settings)
    command = [sys.executable, "-m", "policy_split_jax.cli", "train", job.config]
    try:
        with (folder / f"{job.name}.log").open("a") as log:
            subprocess.run(
                [*command, *(f"{key}={value}" for key, value in settings.items())],
                stdout=log, stderr=log, check=True,
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "compiled")},
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )  # fmt: skip
    finally:
        cores.put(core)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """A run's evaluations, in their order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "eval"]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
