"""Files that are written whole or not at all."""

import os

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.files import check_output, whole_file, write_json


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


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    assert check_output(tmp_path / "out.txt") == tmp_path / "out.txt"
    with pytest.raises(UserError, match="is a folder"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        check_output(tmp_path / "missing" / "out.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(UserError, match="not writable"):
        check_output(tmp_path / "out.txt")
