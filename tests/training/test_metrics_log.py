"""Where a run's figures go: metrics.jsonl first, TensorBoard and Weights & Biases where switched on."""

import json
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.training.metrics_log import MetricsLog


def log_of(folder, *, last_step=-1, evaluated=True, tensorboard=False, wandb=False):
    return MetricsLog(folder, "run", last_step=last_step, evaluated=evaluated, tensorboard=tensorboard, wandb=wandb)


def written(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def tensorboard_events(folder):
    """A record is its length (8 bytes), a checksum (4), data, a checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (folder / "tensorboard").iterdir()
    content, at = path.read_bytes(), 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + size])
        at += size + 16


def test_numbers_of_any_kind_become_json_and_what_is_not_finite_becomes_null(tmp_path):
    log_of(tmp_path).row("train", 3, {"loss": np.float32(0.5), "count": 7, "bad": float("nan"), "worse": -np.inf})
    assert written(tmp_path) == [{"kind": "train", "step": 3, "loss": 0.5, "count": 7, "bad": None, "worse": None}]


def test_a_resumed_run_drops_what_lies_after_its_checkpoint(tmp_path):
    log = log_of(tmp_path)
    for step in (1, 2, 3):
        log.row("train", step, {"loss": float(step)})
        log.samples("train", step, [{"text": str(step)}])
    log.samples("train", 2, [{"text": "one line\u2028to JSON"}])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "träin"'.encode()[:-4])  # the crash came in the middle of a character
    log_of(tmp_path, last_step=2)
    assert [row["step"] for row in written(tmp_path)] == [1, 2]
    assert [row["text"] for row in written(tmp_path, "samples.jsonl")] == ["1", "2", "one line\u2028to JSON"]


@pytest.mark.parametrize("evaluated", [False, True])
def test_an_evaluation_that_is_made_again_is_not_there_twice(tmp_path, evaluated):
    """A run that was stopped before its evaluation, went on, made it, and was killed: it goes on from before it."""
    log = log_of(tmp_path)
    for kind, step in (("eval", 0), ("train", 1), ("eval", 1), ("train", 2), ("eval", 2), ("train", 3)):
        log.row(kind, step, {})
        log.samples(kind, step, [{"text": kind}])
    log_of(tmp_path, last_step=2, evaluated=evaluated)
    kept = [("eval", 0), ("train", 1), ("eval", 1), ("train", 2), *([("eval", 2)] if evaluated else [])]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [(row["kind"], row["step"]) for row in written(tmp_path, name)] == kept


def test_tensorboard_gets_the_same_figures(tmp_path):
    pytest.importorskip("tensorboardX")
    with log_of(tmp_path, tensorboard=True) as log:
        log.row("train", 1, {"loss": 0.5, "grader/failed": 3, "bad": float("nan")})
        log.row("eval", 2, {"accuracy/normal": 0.25})
    events = tensorboard_events(tmp_path)
    assert [(value.tag, event.step, value.simple_value) for event in events for value in event.summary.value] == [
        ("train/loss", 1, 0.5),
        ("train/grader/failed", 1, 3.0),
        ("eval/accuracy/normal", 2, 0.25),
    ]


@pytest.mark.parametrize(("last_step", "first"), [(-1, 0), (2, 3)])
def test_tensorboard_shows_no_step_twice(tmp_path, last_step, first):
    """It drops what other files of the folder have from the step on that a session starts with."""
    pytest.importorskip("tensorboardX")
    with log_of(tmp_path, last_step=last_step, tensorboard=True):
        pass
    sessions = [event for event in tensorboard_events(tmp_path) if event.HasField("session_log")]
    assert [(event.step, event.session_log.status) for event in sessions] == [(first, 1)]


@pytest.fixture
def wandb(monkeypatch):
    """Stands in for the package, and keeps what it is told."""
    found = SimpleNamespace(started=[], logged=[], finished=0)

    def init(**options):
        found.started.append(options)
        return SimpleNamespace(log=lambda values, step: found.logged.append((step, values)), finish=finish)

    def finish():
        found.finished += 1

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return found


def test_wandb_gets_the_same_figures(tmp_path, wandb):
    with log_of(tmp_path, wandb=True) as log:
        log.row("train", 4, {"loss": 0.5})
    assert wandb.finished == 1
    assert wandb.logged == [(4, {"train/loss": 0.5})]
    assert (wandb.started[0]["name"], wandb.started[0]["resume"]) == ("run", "allow")


def test_wandb_knows_a_run_again_and_no_other_of_its_name(tmp_path, wandb):
    """One that goes on, one that begins in the same folder, and one of another folder."""
    for folder, last_step in (("a", -1), ("a", 2), ("a", -1), ("b", -1)):
        (tmp_path / folder).mkdir(exist_ok=True)
        log_of(tmp_path / folder, last_step=last_step, wandb=True)
    first, again, anew, other = (options["id"] for options in wandb.started)
    assert first == again
    assert len({first, anew, other}) == 3


@pytest.mark.parametrize(("switch", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_switch_without_its_package_says_what_to_install(switch, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    log_of(tmp_path).row("train", 1, {"loss": 0.5})
    with pytest.raises(UserError, match=rf"train\.{switch} needs {module}: pip install"):
        log_of(tmp_path, **{switch: True})
    assert len(written(tmp_path)) == 1  # nothing was dropped before it was refused
