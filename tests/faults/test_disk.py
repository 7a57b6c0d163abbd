"""A disk that is full, a folder that may not be written, and two runs at once."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policy_split_jax.training.checkpoint import latest_step

pytestmark = pytest.mark.slow


@pytest.fixture
def mounted(tmp_path):
    """Makes a small file system of its own."""
    places = []

    def mount(size, *options):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount a tmpfs here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(runs, mounted, tmp_path, figure):
    whole = tmp_path / "whole"
    assert runs.finish(whole, "train.steps=6", "train.save_every=2") == 0
    # Room for one checkpoint and a part of the second.
    size = sum(path.stat().st_size for path in (whole / "run" / "checkpoints" / "2").rglob("*") if path.is_file())
    disk = mounted(int(1.6 * size))
    code = runs.finish(disk, "train.steps=6", "train.save_every=2")
    error = (disk / "err").read_text().strip().splitlines()
    assert code == 2, error
    wanted = "a checkpoint could not be written (No space left on device); make room, and the same command goes on from"
    assert wanted in error[-1]
    assert latest_step(disk / "run" / "checkpoints") == 2
    # With room again it goes on as if nothing had been.
    subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
    assert runs.finish(disk, "train.steps=6", "train.save_every=2") == 0, (disk / "err").read_text()
    assert runs.rows(disk) == runs.rows(whole)
    figure("a disk that filled during a save: exit code 2, the checkpoint before it intact, the run went on from it")


def test_a_folder_that_cannot_be_written_is_refused_at_once(runs, mounted):
    disk = mounted(1 << 20)
    output = disk / "output"
    output.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    config = str(runs.folder / "config.yaml")
    found = subprocess.run(
        [sys.executable, "-m", "policy_split_jax.cli", "train", config, f"output={output}"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert found.returncode == 2
    assert found.stderr.strip() == f"policy-split: error: {output}/run: Read-only file system"


def test_two_runs_in_one_folder(runs, tmp_path):
    first = runs.start(tmp_path, "train.steps=100000")
    while not (tmp_path / "run" / "config.yaml").is_file():
        assert first.poll() is None
        time.sleep(0.01)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert runs.finish(tmp_path, "train.steps=5") == 2
    assert "another run goes on there" in (tmp_path / "err").read_text()
    assert first.poll() is None
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    # The lock goes with its process, however that ends.
    first.kill()
    first.wait()
    assert runs.finish(tmp_path, "train.steps=1") == 0
    assert Path(tmp_path / "run" / "summary.json").is_file()
