"""Two processes on one machine do what one does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from policy_split_jax import cli, processes
from policy_split_jax.errors import UserError

SETTINGS = {
    "name": "run",
    "prompt": {"high_entropy": "High-entropy mode."},
    "data": {"numbers": [3], "train_size": 32, "test_size": 8},
    "rollout": {
        "questions_per_step": 4, "rollouts_per_mode": 2, "max_prompt_tokens": 64, "max_new_tokens": 8, "slots": 8,
    },
    "optimizer": {"learning_rate": 1e-3},
    "train": {"save_every": 1, "sample_questions": 4},
    # Three questions are no equal shares.
    "eval": {"questions": 3, "k": 2},
}  # fmt: skip


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(folder, count, steps, *overrides, devices=1):
    """Trains with `count` processes; returns what they printed."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "policy_split_jax.cli", "train", str(config)]
    command += [f"output={folder}", f"train.steps={steps}", *overrides]
    port = free_port()
    each = [[]]
    if count > 1:
        where = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count), "--process-id"]
        each = [[*where, str(number)] for number in range(count)]
    running = [
        subprocess.Popen(
            command + options, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for options in each
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * count, outputs
    return outputs


def rows(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def assert_same_run(one, other):
    """The same rollouts and rewards to the letter; sums of float32 in another order elsewhere."""
    texts = [
        [(row["step"], row["question"], row["text"], row["reward"]) for row in rows(folder, "samples.jsonl")]
        for folder in (one, other)
    ]
    assert texts[0] == texts[1]
    pairs = list(zip(rows(one), rows(other), strict=True))
    assert [row["kind"] for row, _ in pairs] == ["eval", "train", "train", "eval"]
    for expected, found in pairs:
        assert list(expected) == list(found)
        for name in expected:
            if name != "kind" and not name.startswith("time"):
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder, 1, 2)
    assert abs(rows(folder)[1]["loss"]) > 1e-6
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes with two devices each, after one step."""
    folder = tmp_path_factory.mktemp("two")
    outputs = run(folder, 2, 1, "mesh.tp=2", devices=2)
    assert "4 cpu devices of 2 processes" in outputs[0]
    assert "step 1/1" in outputs[0]
    # The other process shows nothing.
    assert "step" not in outputs[1]
    return folder


def test_two_processes_go_on_as_one(one, two, tmp_path):
    """The first step with two processes, the second with one."""
    folder = tmp_path / "folder"
    shutil.copytree(two, folder)
    run(folder, 1, 2, "train.eval_every=0")
    kept = [row for row in rows(folder) if (row["kind"], row["step"]) != ("eval", 1)]
    samples = [row for row in rows(folder, "samples.jsonl") if (row["kind"], row["step"]) != ("eval", 1)]
    for name, values in (("metrics.jsonl", kept), ("samples.jsonl", samples)):
        (folder / "run" / name).write_text("".join(json.dumps(row) + "\n" for row in values))
    assert_same_run(one, folder)


def test_two_processes_do_the_same_as_one(one, tmp_path):
    run(tmp_path, 2, 2)
    assert_same_run(one, tmp_path)


def test_the_shares_of_all_processes_are_everything(monkeypatch):
    for count, things in ((1, 5), (3, 7), (4, 2)):
        monkeypatch.setattr(processes.jax, "process_count", lambda count=count: count)
        parts = []
        for index in range(count):
            monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
            parts.append(list(range(things))[processes.share(things)])
        assert [thing for part in parts for thing in part] == list(range(things))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_is_sent_in_pieces_arrives_whole(monkeypatch):
    """As three processes would see it, of which this one is played."""
    everybody = [b"", b"abcdefgh", b"xyz"]
    monkeypatch.setattr(processes, "_PIECE", 3)
    calls = []

    def others(values):
        calls.append(values)
        if values.dtype != np.uint8:
            return np.array([[len(data)] for data in everybody])
        start = 3 * (len(calls) - 2)
        return np.stack([
            np.frombuffer(data[start : start + 3].ljust(len(values), b"\0"), np.uint8) for data in everybody
        ])  # fmt: skip

    monkeypatch.setattr(processes, "_everybodys", others)
    assert processes._gather_bytes(everybody[1]) == everybody
    assert [bytes(values.tobytes()) for values in calls[1:]] == [b"abc", b"def", b"gh"]


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, "slurm"),
        # A script of sbatch itself, and a step of one task.
        ({"SLURM_NTASKS": "2"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, None),
    ],
)
def test_who_started_this_process_with_others(environment, found):
    assert processes._detected(environment) == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--processes", "2"], "give all three"),
        (["--coordinator", "a", "--processes", "2", "--process-id", "0"], "write host:port"),
        (["--coordinator", "a:1", "--processes", "2", "--process-id", "2"], "must be from 0 to 1"),
    ],
)
def test_half_an_answer_about_the_others_is_refused(options, words, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    assert cli.main(["train", str(config), f"output={tmp_path}", *options]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [config]


def test_processes_without_one_folder_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "_everybodys", lambda values: np.array([values, values + 1]))
    with pytest.raises(UserError, match="different checkpoints"):
        processes.check_same(3, "different checkpoints")
    monkeypatch.setattr(processes, "_everybodys", lambda values: np.array([values, values]))
    processes.check_same(3, "different checkpoints")


def test_nothing_of_the_other_process_is_left(two):
    assert sorted(path.name for path in Path(two / "run").iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "metrics.jsonl", "model", "report.html", "samples.jsonl", "summary.json",
    ]  # fmt: skip
