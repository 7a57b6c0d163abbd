"""Damaged, foreign and half-written checkpoints: found, named, and the last whole one taken."""

import errno
import json
import os
import random
import re
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from policy_split_jax import config as settings
from policy_split_jax.cli import main
from policy_split_jax.config import RunConfig
from policy_split_jax.errors import UserError
from policy_split_jax.model.qwen3 import abstract_params
from policy_split_jax.policy import load_policy
from policy_split_jax.training import metrics_log
from policy_split_jax.training.checkpoint import Checkpoints, latest_step, load_run
from policy_split_jax.training.loop import Trainer, run_mesh, train
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.run_folder import check_folder, locked
from policy_split_jax.training.state import init_state, state_shardings
from policy_split_jax.training.stop import Stopped

# The checkpoint library warns of its own deprecations, and leaves what it was at when a file was damaged.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def chosen(output, **changes):
    tree = {
        "name": "run",
        "output": str(output),
        "prompt": {"high_entropy": "High-entropy mode."},
        "data": {"numbers": [3], "train_size": 16, "test_size": 2},
        "rollout": {"questions_per_step": 2, "rollouts_per_mode": 1, "max_prompt_tokens": 48, "max_new_tokens": 4},
        "train": {"steps": 4, "save_every": 2},
        "eval": {"questions": 1, "k": 1},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return settings.from_dict(RunConfig, tree, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("trained")
    train(chosen(output))
    return output


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    return chosen(tmp_path)


class Reader:
    """Restores a run's checkpoints, again and again."""

    def __init__(self, config):
        policy = load_policy(config.folder / "model")
        mesh, optimizer = run_mesh(config, policy.config, jax.devices()), make_optimizer(config.optimizer)
        self.shardings = state_shardings(policy.config, optimizer, mesh)
        start = partial(init_state, optimizer=optimizer, seed=0, eta=0.5)
        self.like = jax.eval_shape(start, abstract_params(policy.config))
        self.whose = json.loads((config.folder / "checkpoints" / "4" / "extra" / "metadata").read_text())["run"]

    def restore(self, folder, whose=None):
        with Checkpoints(folder, 3, self.whose if whose is None else whose) as checkpoints:
            return checkpoints.restore(self.like, self.shardings)


def arrays(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]


@pytest.fixture(scope="module")
def reader(trained):
    return Reader(chosen(trained))


@pytest.fixture(scope="module")
def sound(trained, reader):
    """What checkpoints hold, by their steps."""
    found = {4: reader.restore(trained / "run" / "checkpoints")}
    before = trained / "before"
    shutil.copytree(trained / "run" / "checkpoints", before)
    shutil.rmtree(before / "4")
    return {step: (arrays(one.state), one.extra) for step, one in (found | {2: reader.restore(before)}).items()}


def files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def assert_sound(found, sound):
    """It is what was saved at some step; where that is not the last one, the last is out of the way and was named."""
    values, extra = sound[found.step]
    for one, other in zip(arrays(found.state), values, strict=True):
        np.testing.assert_array_equal(one, other)
    assert found.extra == extra
    assert set(found.damaged) == ({4} if found.step == 2 else set())


def damages(folder):
    """Every file cut off, emptied and taken away."""
    for path in files(folder / "4"):
        name = path.relative_to(folder / "4")
        yield f"{name} halved", name, partial(truncate, share=0.5)
        yield f"{name} emptied", name, partial(truncate, share=0.0)
        yield f"{name} gone", name, Path.unlink


def test_a_damaged_file_is_never_taken_for_a_whole_one(trained, reader, sound, tmp_path, figure):
    fallen = 0
    for number, (what, name, damage) in enumerate(damages(trained / "run" / "checkpoints")):
        folder = tmp_path / str(number)
        shutil.copytree(trained / "run" / "checkpoints", folder)
        damage(folder / "4" / name)
        before = {path.relative_to(folder / "4"): path.read_bytes() for path in files(folder / "4")}
        found = reader.restore(folder)
        assert_sound(found, sound)
        if found.step == 2:
            fallen += 1
            # Nothing of it is lost.
            kept = folder / "damaged" / "4"
            assert {path.relative_to(kept): path.read_bytes() for path in files(kept)} == before, what
    assert fallen > 10
    figure(f"{number + 1} checkpoints with a file cut off, emptied or missing: {fallen} found damaged, none misread")


@pytest.mark.slow
def test_a_wrong_bit_is_never_restored(trained, reader, sound, tmp_path, figure):
    draw, fallen, tries = random.Random(0), 0, 0
    names = [path.relative_to(trained / "run" / "checkpoints" / "4") for path in
             files(trained / "run" / "checkpoints" / "4") if path.stat().st_size]  # fmt: skip
    for name in names:
        # Large files are where a bit most likely flips.
        for _ in range(30 if (trained / "run" / "checkpoints" / "4" / name).stat().st_size > 10_000 else 10):
            folder = tmp_path / str(tries)
            shutil.copytree(trained / "run" / "checkpoints", folder)
            flip(folder / "4" / name, draw)
            found = reader.restore(folder)
            assert_sound(found, sound)
            fallen += found.step == 2
            tries += 1
            shutil.rmtree(folder)
    assert fallen > tries / 4
    figure(f"{tries} checkpoints with one wrong bit: {fallen} found damaged, {tries - fallen} restored exactly")


def test_a_wrong_weight_shows_whatever_stored_it(trained, reader, tmp_path, monkeypatch):
    """One bit, behind all checks of the libraries."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "run" / "checkpoints", folder)
    from policy_split_jax.training import checkpoint

    restored, wrong = checkpoint._restored, []

    def off_by_a_bit(manager, step, args):
        found = restored(manager, step, args)
        if step == 4 and "state" in found:
            leaves, tree = jax.tree.flatten(found["state"]["params"])
            bits = np.array(leaves[0]).view(np.uint32)
            bits.reshape(-1)[3] ^= 1
            leaves[0] = jax.device_put(bits.view(np.float32), leaves[0].sharding)
            found["state"]["params"] = jax.tree.unflatten(tree, leaves)
            wrong.append(step)
        return found

    monkeypatch.setattr(checkpoint, "_restored", off_by_a_bit)
    found = reader.restore(folder)
    assert (wrong, found.step) == ([4], 2)
    assert re.fullmatch(r"\['params'\]\S+ is not what was saved", found.damaged[4])


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_says_so(trained, copy, capsys):
    state = copy.folder / "checkpoints" / "4" / "state"
    for path in files(state):
        truncate(path, 0.5)
    train(copy)
    output = capsys.readouterr().out
    assert "warning: checkpoint 4 is damaged" in output
    assert "resuming after step 2" in output
    # The damaged one is kept, a new one is in its place, and the figures are those of the first time.
    assert sorted(path.name for path in (copy.folder / "checkpoints").iterdir()) == ["2", "4", "damaged"]
    assert [path.name for path in (copy.folder / "checkpoints" / "damaged").iterdir()] == ["4"]

    def rows(folder):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in found]

    assert rows(copy.folder) == rows(trained / "run")


@pytest.fixture(scope="module")
def trained_by_runs(runs):
    output = runs.folder / "four-steps"
    assert runs.finish(output, "train.steps=4", "train.save_every=2") == 0, (output / "err").read_text()
    return output


@pytest.mark.slow
@pytest.mark.parametrize("what", ["extra", "state", "bit"])
def test_what_is_damaged_for_one_process_is_damaged_for_both(runs, trained_by_runs, tmp_path, what):
    output = tmp_path / "output"
    shutil.copytree(trained_by_runs, output)
    second = [str(Path(__file__).with_name("other_disk.py")), what]
    # No step is left after the second, so that nothing need be compiled.
    both = runs.start_two(output, "train.steps=2", "train.save_every=2", second=second)
    assert [process.wait(300) for process in both] == [0, 0], (output / "err").read_text()
    said = (output / "out").read_text()
    reason = r"\['step'\] is not what was saved" if what == "bit" else "the disk of this process"
    assert re.search(rf"warning: checkpoint 4 is damaged, now in \S+: {reason}", " ".join(said.split()))
    assert "resuming after step 2" in said
    assert sorted(path.name for path in (output / "run" / "checkpoints").iterdir()) == ["2", "damaged"]


def test_where_no_checkpoint_is_whole_nothing_is_touched(copy):
    for step in (2, 4):
        for path in files(copy.folder / "checkpoints" / str(step) / "state"):
            truncate(path, 0.5)
    before = {path: path.read_bytes() for path in files(copy.folder) if path.name != ".lock"}
    with pytest.raises(UserError, match=r"no checkpoint there can be read \(step 4: .*; step 2: "):
        train(replace(copy, train=replace(copy.train, steps=6)))
    assert {path: path.read_bytes() for path in files(copy.folder) if path.name != ".lock"} == before


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.EIO, "Input/output error"), errno.EIO),
        (OSError(errno.ESTALE, "Stale file handle"), errno.ESTALE),
        (PermissionError(errno.EACCES, "Permission denied"), errno.EACCES),
        (ValueError("UNKNOWN: Error reading local file \"d/0\": Input/output error [os_error_code='5']"), errno.EIO),
        (ValueError("RESOURCE_EXHAUSTED: Too many open files [os_error_code='24']"), errno.EMFILE),
        (MemoryError(), errno.ENOMEM),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."), errno.ENOMEM),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: socket closed"), errno.EIO),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_be_read_for_now_is_not_damaged(trained, reader, monkeypatch, error, number, wrapped):
    def restore(self, step, args):
        if wrapped:
            raise ValueError("Could not load") from error
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    folder = trained / "run" / "checkpoints"
    with pytest.raises(OSError, match=r"could not be read .*; nothing was changed, try again") as found:
        reader.restore(folder)
    assert (found.value.errno, found.value.filename) == (number, str(folder.resolve() / "4"))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]


def test_a_model_that_cannot_be_read_for_now_is_one_line_and_exit_code_1(trained, monkeypatch, capsys):
    def restore(self, step, args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    assert main(["eval", "--checkpoint", str(trained / "run"), "--questions", "1", "--k", "1"]) == 1
    assert capsys.readouterr().err == (
        f"policy-split: error: {(trained / 'run' / 'checkpoints').resolve()}/4: could not be read "
        "([Errno 5] Input/output error); nothing was changed, try again\n"
    )


@pytest.mark.parametrize("over", [False, True])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(copy, over):
    """They were deleted, or lie on a disk that is not mounted; the run may be over or not."""
    shutil.rmtree(copy.folder / "checkpoints")
    if not over:
        (copy.folder / "summary.json").unlink()
        with (copy.folder / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "step": 5}\n{"kind": "trai')
    before = {path: path.read_bytes() for path in files(copy.folder)}
    name = "summary.json" if over else "metrics.jsonl"
    with pytest.raises(UserError, match=rf"/{name}: this run had checkpoints, and none is in \S+/checkpoints; put"):
        train(copy)
    assert {path: path.read_bytes() for path in files(copy.folder)} == before


def test_a_run_that_was_killed_before_its_first_checkpoint_was_whole_begins_anew(copy):
    """The second save waits for the first, so that two saves' steps say nothing of a whole checkpoint."""
    shutil.rmtree(copy.folder / "checkpoints")
    (copy.folder / "summary.json").unlink()
    assert [row["step"] for row in map(json.loads, (copy.folder / "metrics.jsonl").open())] == [0, 1, 2, 3, 4, 4]
    check_folder(copy, 0, False)


def test_a_damaged_model_is_not_evaluated(copy, capsys):
    for path in files(copy.folder / "checkpoints" / "4" / "state"):
        truncate(path, 0.5)
    assert main(["eval", "--checkpoint", str(copy.folder), "--questions", "1", "--k", "1"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"checkpoints/4: damaged \(.*\); move it away to use step 2$", error.strip())
    shutil.rmtree(copy.folder / "checkpoints" / "2")
    with pytest.raises(UserError, match="there is none before it"):
        load_run(copy.folder)


def edited(config, change):
    """The run with something else in what its last checkpoint says of itself, its digest corrected."""
    from policy_split_jax.training.checkpoint import digest_of

    path = config.folder / "checkpoints" / "4" / "extra" / "metadata"
    content = json.loads(path.read_text())
    content.pop("digest")
    change(content)
    path.write_text(json.dumps(content | {"digest": digest_of(content)}))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (1, "use the older version, or start the run anew"),
        (2, "use the older version, or start the run anew"),
        (99, "use the newer version"),
    ],
)
def test_another_format_is_refused(copy, number, remedy):
    edited(copy, lambda content: content.update(format=number))
    with pytest.raises(UserError, match=f"checkpoints/4: has format {number}, this version reads 3; {remedy}"):
        train(copy)
    with pytest.raises(UserError, match=f"has format {number}"):
        load_run(copy.folder)
    assert (copy.folder / "checkpoints" / "4").is_dir()


@pytest.mark.parametrize(
    "what", ["settings", "model files", "stop tokens", "prompts", "questions", "test questions", "reward code"]
)
def test_a_checkpoint_of_another_run_is_refused(copy, what):
    edited(copy, lambda content: content["run"].update({what: "0"}))
    with pytest.raises(UserError, match=f"checkpoints/4: was saved with other {what}; put back this run's own"):
        train(copy)
    assert (copy.folder / "checkpoints" / "4").is_dir()


def test_another_vocabulary_is_refused(copy):
    """Of the same size, so that every array fits."""
    path = copy.folder / "model" / "tokenizer.json"
    text = path.read_text()
    assert "<|im_end|>" in text
    path.write_text(text.replace("}", "} ", 1))
    with pytest.raises(UserError, match="was saved with other model files"):
        train(copy)
    with pytest.raises(UserError, match="was saved with other model files"):
        load_run(copy.folder)


def test_rows_are_on_the_disk_before_the_checkpoint_after_them_is_saved(copy, monkeypatch):
    events, save, append = [], Checkpoints.save, metrics_log._append
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(metrics_log, "_append", lambda path, rows: (events.append("rows"), append(path, rows)))
    monkeypatch.setattr(Checkpoints, "save", lambda self, *what: (events.append("save"), save(self, *what)))
    train(replace(copy, train=replace(copy.train, steps=5)))
    saved = events.index("save")
    written = max(at for at in range(saved) if events[at] == "rows")
    paths = (copy.folder / "metrics.jsonl", copy.folder / "samples.jsonl", copy.folder)
    assert events[written + 1 : saved] == [path.stat().st_ino for path in paths]


@pytest.mark.parametrize("asked", [False, True])
def test_a_signal_while_the_last_checkpoint_is_written_does_not_end_the_run(copy, asked, monkeypatch):
    """At the end of the run, and where it was asked to stop before."""
    close, step, ended = Checkpoints.close, Trainer.step, []

    def late(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    def early(self, number):
        step(self, number)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "close", late)
    monkeypatch.setattr(Trainer, "step", early)
    before = signal.signal(signal.SIGTERM, lambda *unused: ended.append("killed"))
    try:
        with pytest.raises(Stopped) if asked else nullcontext():
            train(replace(copy, train=replace(copy.train, steps=5)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == []
    assert latest_step(copy.folder / "checkpoints") == 5


@pytest.mark.parametrize(
    ("name", "old", "new", "what"),
    [
        ("generation_config.json", '"eos_token_id": [', '"eos_token_id": [7, ', "stop tokens"),
        ("policy_split.json", "High-entropy mode.", "Another mode.", "prompts"),
    ],
)
def test_what_a_run_reads_again_is_that_which_it_began_with(copy, name, old, new, what):
    path = copy.folder / "model" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"checkpoints/4: was saved with other {what}"):
        train(copy)


def test_a_second_run_in_a_folder_is_refused(copy):
    longer = replace(copy, train=replace(copy.train, steps=5))
    before = {path: path.read_bytes() for path in files(copy.folder) if path.name != ".lock"}
    with locked(copy, 4):
        with pytest.raises(
            UserError, match=r"run: another run goes on there; wait for its end, or choose another name"
        ):
            train(longer)
        assert {path: path.read_bytes() for path in files(copy.folder) if path.name != ".lock"} == before
    train(longer)


def test_a_run_that_came_first_is_not_overrun(copy):
    """Another process may have gone on between the look at the folder and the lock."""
    check_folder(copy, 2, False)
    with pytest.raises(UserError, match="another run has just gone on there"), locked(copy, 2):
        pass
