"""Training runs of the command line, side by side, a core each: what the experiments have in common."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

MAIN = {
    "accuracy, normal": "accuracy/normal",
    "accuracy, HE": "accuracy/high_entropy",
    "entropy, normal": "entropy/normal",
    "entropy, HE": "entropy/high_entropy",
    "KL(HE‖N)": "kl/high_entropy_to_normal",
}
BEST = {"best of 8, normal": "best_of_k/normal", "best of 8, HE": "best_of_k/high_entropy"}


@dataclass(frozen=True)
class Job:
    """One run: a configuration and the settings that replace its own."""

    name: str
    config: str
    settings: Mapping[str, Any]


def ended(jobs: Sequence[Job], folder: Path, parallel: int) -> Iterator[Job]:
    """Runs them, and yields each as it ends; those that had ended before are not run again, those interrupted go on.

    Raises CalledProcessError where a run fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[:parallel]:
        free.put(core)
    pool = ThreadPoolExecutor(parallel)
    try:
        futures = {pool.submit(_run, job, folder, free): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            print(f"{number} of {len(jobs)}: {futures[future].name}", file=sys.stderr, flush=True)
            yield futures[future]
    finally:
        # Whoever stops here, and a run that failed, should not have to wait for those that have not begun.
        pool.shutdown(cancel_futures=True)


def _run(job: Job, folder: Path, free: "Queue[int]") -> None:
    if (folder / job.name / "summary.json").is_file():
        return
    core = free.get()
    settings = {"output": folder, "name": job.name} | dict(job.settings)
    command = [sys.executable, "-m", "policy_split_jax.cli", "train", job.config]
    try:
        with (folder / f"{job.name}.log").open("a") as log:
            subprocess.run(
                [*command, *(f"{key}={value}" for key, value in settings.items())],
                stdout=log, stderr=log, check=True,
                env=os.environ | _shared_programs(folder),
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )  # fmt: skip
    finally:
        free.put(core)


def _shared_programs(folder: Path) -> dict[str, str]:
    """What lets runs share all that they compile, also what takes less than JAX's second."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def evaluate(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `policy-split eval` says of a run's last checkpoint."""
    output = folder / "eval.json"
    chosen = (f"--{name}={value}" for name, value in options.items())
    command = [sys.executable, "-m", "policy_split_jax.cli", "eval", f"--checkpoint={folder}", f"--output={output}"]
    environment = os.environ | _shared_programs(folder.parent)
    subprocess.run([*command, "--fresh", *chosen], env=environment, stdout=subprocess.DEVNULL, check=True)
    return json.loads(output.read_text(encoding="utf-8"))


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
