"""The fault harness: what it measured is printed at the end, and docs/reliability.md quotes it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

_FIGURE = "figure"

# A run of the embedded model whose steps take a moment each.
SETTINGS: dict[str, Any] = {
    "name": "run",
    "prompt": {"high_entropy": "High-entropy mode."},
    "data": {"numbers": [3], "max_number": 30, "train_size": 64, "test_size": 8},
    "rollout": {
        "questions_per_step": 4, "rollouts_per_mode": 2, "max_prompt_tokens": 48, "max_new_tokens": 10, "slots": 16,
    },
    "advantage": {"eta": 0.5, "kappa": 1.0},
    "eta": {"schedule": "target_kl"},
    "optimizer": {"learning_rate": 1e-3},
    "eval": {"questions": 4, "k": 2},
}  # fmt: skip


class Runs:
    """Runs of the command line in processes of their own, which share what they compile."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._config = folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(SETTINGS))
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(
        self, output: Path, *overrides: str, program: Sequence[str] = ("-m", "policy_split_jax.cli")
    ) -> "subprocess.Popen[str]":
        command = [sys.executable, *program, "train", str(self._config), f"output={output}"]
        output.mkdir(exist_ok=True)
        # In files: nobody reads while the run goes on, and a full pipe would stop it.
        with (output / "out").open("a") as out, (output / "err").open("a") as err:
            return subprocess.Popen([*command, *overrides], env=self._environment, stdout=out, stderr=err, text=True)

    def finish(self, output: Path, *overrides: str) -> int:
        """The exit code of a run that is let alone."""
        return self.start(output, *overrides).wait(600)

    def start_two(
        self, output: Path, *overrides: str, second: Sequence[str] = ("-m", "policy_split_jax.cli")
    ) -> "list[subprocess.Popen[str]]":
        """Two processes of one run; the other one may be another program."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        where = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id")
        first = self.start(output, *overrides, *where, "0")
        return [first, self.start(output, *overrides, *where, "1", program=second)]

    @staticmethod
    def wait_for(output: Path, text: str, process: "subprocess.Popen[str]", seconds: float = 300.0) -> None:
        """Returns as soon as the run has printed the text."""
        end = time.monotonic() + seconds
        while text not in (output / "out").read_text():
            assert process.poll() is None, (output / "err").read_text()
            assert time.monotonic() < end
            time.sleep(0.001)

    @staticmethod
    def rows(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """A run's rows without what a clock says."""
        found = [json.loads(line) for line in (output / "run" / name).read_bytes().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in found]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


sys.path.append(str(Path(__file__).parent))  # for what tests share, and scripts here


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Keeps a line for the end of the run, whichever process the test runs in."""
    return lambda line: record_property(_FIGURE, line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = [
        f"{report.nodeid.partition('::')[2]}: {value}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == _FIGURE
    ]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
