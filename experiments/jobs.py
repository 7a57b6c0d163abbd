"""Commands of the command line, side by side, a core each: what the experiments have in common."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any, Protocol, TypeVar

MAIN = {
    "accuracy, normal": "accuracy/normal",
    "accuracy, HE": "accuracy/high_entropy",
    "entropy, normal": "entropy/normal",
    "entropy, HE": "entropy/high_entropy",
    "KL(HE‖N)": "kl/high_entropy_to_normal",
}
BEST = {"best of 8, normal": "best_of_k/normal", "best of 8, HE": "best_of_k/high_entropy"}


class HasName(Protocol):
    @property
    def name(self) -> str: ...


Item = TypeVar("Item", bound=HasName)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """One run: a configuration and the settings that replace its own."""

    name: str
    config: str
    settings: Mapping[str, Any]


def side_by_side(
    work: Callable[[Item, int], Found], items: Sequence[Item], parallel: int
) -> Iterator[tuple[Item, Found]]:
    """Does `work(item, core)` for each, so many at once, and yields them as they end; whatever it raises ends all."""
    free: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0))[:parallel]:
        free.put(core)
    pool = ThreadPoolExecutor(parallel)
    try:
        futures = {pool.submit(_on_a_free_core, work, item, free): item for item in items}
        for number, future in enumerate(as_completed(futures), 1):
            found = future.result()
            print(f"{number} of {len(items)}: {futures[future].name}", file=sys.stderr, flush=True)
            yield futures[future], found
    finally:
        # Whoever stops here, and what failed, should not have to wait for those that have not begun.
        pool.shutdown(cancel_futures=True)


def _on_a_free_core(work: Callable[[Item, int], Found], item: Item, free: "Queue[int]") -> Found:
    core = free.get()
    try:
        return work(item, core)
    finally:
        free.put(core)


def ended(jobs: Sequence[Job], folder: Path, parallel: int) -> Iterator[Job]:
    """Runs them, and yields each as it ends; those that had ended before are not run again, those interrupted go on.

    Raises CalledProcessError where a run fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for job, _ in side_by_side(partial(_run, folder=folder), jobs, parallel):
        yield job


def _run(job: Job, core: int, folder: Path) -> None:
    if (folder / job.name / "summary.json").is_file():
        return
    settings = {"output": folder, "name": job.name} | dict(job.settings)
    arguments = ["train", job.config, *(f"{key}={value}" for key, value in settings.items())]
    _command(arguments, folder, folder / f"{job.name}.log", core)


def evaluate(options: Mapping[str, Any], output: Path, core: int) -> dict[str, Any]:
    """What `policy-split eval` says."""
    chosen = [f"--{name}={value}" for name, value in options.items()]
    _command(["eval", "--fresh", f"--output={output}", *chosen], output.parent, output.with_suffix(".log"), core)
    return json.loads(output.read_text(encoding="utf-8"))


def _command(arguments: Iterable[str], folder: Path, log: Path, core: int) -> None:
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, "-m", "policy_split_jax.cli", *arguments],
            stdout=file, stderr=file, check=True,
            env=os.environ | _shared_programs(folder),
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip


def _shared_programs(folder: Path) -> dict[str, str]:
    """What lets runs share all that they compile, also what takes less than JAX's second."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))
