"""A copy of the project's folder, and stub programs that note how they are called (stub.py)."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


BASH = shutil.which("bash") or "bash"
WORKER_PROGRAMS = ("sudo", "mountpoint", "fusermount", "gcsfuse")
STUB = f"""#!/bin/sh
exec '{sys.executable}' -I -S '{Path(__file__).with_name("stub.py")}' "${{0##*/}}" "$@"
"""


@dataclass(frozen=True)
class Call:
    """One call of a stub program."""

    program: str
    arguments: list[str]
    worker: str | None
    environment: dict[str, str]


@dataclass(frozen=True)
class Place:
    """Where a launcher runs: the project's folder, the stubs' folder, and the environment of the shell."""

    project: Path
    stubs: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, script: str, *arguments: str) -> list[str]:
        return [BASH, str(self.project / "launch" / script), *arguments]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script, *arguments),
            cwd=self.project.parent,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """In the background, in a process group of its own, as a terminal starts it."""
        process = subprocess.Popen(
            self.command(script, *arguments),
            cwd=self.project.parent,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        """Ends whatever still runs here, on the workers too."""
        notes = [*self.stubs.glob("workers/*/policy-split/.launch/pid"), *self.project.glob(".launch/pid")]
        groups = [int(path.read_text()) for path in notes]
        for group in [*groups, *(process.pid for process in self.started)]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        for process in self.started:
            process.communicate()

    def plan(self, **processes: list[dict[str, object]]) -> None:
        """What the processes of a run do at each of their starts: plan(p0=[{"code": 1}, {}])."""
        (self.stubs / "plan.json").write_text(json.dumps({name[1:]: steps for name, steps in processes.items()}))

    def calls(self, *programs: str) -> list[Call]:
        """What was called so far, or what of these programs."""
        log = self.stubs / "calls.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        calls = [Call(row["program"], row["arguments"], row["worker"], row.get("environment", {})) for row in rows]
        return [call for call in calls if not programs or call.program in programs]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    project, stubs = tmp_path / "my project", tmp_path / "stubs"
    shutil.copytree(PROJECT / "launch", project / "launch")
    shutil.copy(PROJECT / "pyproject.toml", project)
    for name in ("configs/tiny.yaml", "policy_split_jax/cli.py", ".git/HEAD", "runs/tiny/metrics.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("")
    for folder, names in {
        "near": ("gcloud", "srun", "sbatch", "python3"),
        "far": ("python3", "python3.13", "python3.12", "python3.11", "python", "uv-python", *WORKER_PROGRAMS),
        ".": ("stub", "policy-split"),
    }.items():
        for name in names:
            path = stubs / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(STUB)
            path.chmod(0o755)
    environment = {
        "PATH": f"{stubs / 'near'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "STUBS": str(stubs),
        "POLL_SECONDS": "0.05",
        "BACKOFF_SECONDS": "0",
    }
    place = Place(project, stubs, environment)
    place.plan()
    yield place
    place.clean_up()
