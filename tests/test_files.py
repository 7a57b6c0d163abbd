"""Files that are written whole or not at all."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.files import check_output, sync_folder, whole_file, write_json


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def fail():
        with whole_file(path) as file:
            file.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.txt"]
    write_json(path, {"ü": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "ü": [\n    1\n  ]\n}\n'


def test_a_whole_file_is_on_the_disk_before_its_name_and_its_name_before_we_go_on(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", lambda self, path: events.append("replace") or replace(self, path))
    write_json(tmp_path / "out.json", {})
    assert events == [(tmp_path / "out.json").stat().st_ino, "replace", tmp_path.stat().st_ino]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL, errno.EIO])
def test_a_system_that_syncs_no_folders_is_left_at_that(tmp_path, monkeypatch, number):
    def fsync(descriptor):
        raise OSError(number, "the reason")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the reason") if number == errno.EIO else nullcontext():
        sync_folder(tmp_path)


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    assert check_output(tmp_path / "out.txt") == tmp_path / "out.txt"
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check_output(tmp_path / "missing" / "out.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(UserError, match="not writable"):
        check_output(tmp_path / "out.txt")
