"""Reading run folders: partial files are fine, malformed ones name their line."""

import json

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.report.runs import number, read_rows, read_run, spread

GOOD = b'{"kind": "train", "step": 1}\n'


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("cut", [b"{", b'{"kind": "tra', b'{"kind": "train", "text": "\xe2\x82'])
def test_a_line_still_being_written_is_passed_over(tmp_path, cut):
    rows = list(read_rows(write(tmp_path / "metrics.jsonl", GOOD + GOOD + cut)))
    assert [row["step"] for row in rows] == [1, 1]


def test_a_whole_last_line_needs_no_newline(tmp_path):
    assert len(list(read_rows(write(tmp_path / "metrics.jsonl", GOOD + GOOD.rstrip())))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"kind": "tra\n', "line 2 is not JSON"),
        (b"\xff\xfe{}\n", "line 2 is not JSON"),
        (b"[" * 100_000 + b"\n", "line 2 is not JSON"),
        (b"[1]\n", "line 2 is not a JSON object"),
        (b'{"kind": "train"}\n', 'line 2 lacks a whole "step"'),
        (b'{"kind": "train", "step": 1.5}\n', 'line 2 lacks a whole "step"'),
        (b'{"kind": "train", "step": true}\n', 'line 2 lacks a whole "step"'),
        (b'{"kind": null, "step": 1}\n', 'line 2 lacks a whole "step" or a "kind"'),
    ],
)
@pytest.mark.parametrize("after", [b"", GOOD])
def test_a_malformed_line_is_named(tmp_path, line, message, after):
    path = write(tmp_path / "metrics.jsonl", GOOD + line + after)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_blank_lines_count_but_do_not_matter(tmp_path):
    path = write(tmp_path / "metrics.jsonl", GOOD + b"\n  \n" + GOOD + b"oops\n")
    with pytest.raises(UserError, match="line 5"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("true", 1.0),
        ("null", None),
        ("NaN", None),
        ("-Infinity", None),
        ('"4"', None),
        ("1" + "0" * 400, None),
    ],
)
def test_number_is_finite_or_none(text, expected):
    assert number(json.loads(f'{{"x": {text}}}'), "x") == expected
    assert number({}, "x") is None


def test_rows_are_ordered_and_a_resumed_step_replaces_the_old_one(tmp_path):
    rows = [("train", 1, 0.1), ("eval", 2, 0.2), ("train", 3, 0.3), ("train", 2, 0.4), ("train", 3, 0.5)]
    lines = [json.dumps({"kind": kind, "step": step, "loss": loss}) for kind, step, loss in rows]
    write(tmp_path / "metrics.jsonl", "\n".join(lines).encode())
    run = read_run(tmp_path, "tiny")
    assert [(row["step"], row["loss"]) for row in run.train] == [(1, 0.1), (2, 0.4), (3, 0.5)]
    assert [(row["step"], row["loss"]) for row in run.evaluation] == [(2, 0.2)]
    assert (run.config, run.summary, list(run.samples)) == (None, None, [])


def write_samples(folder, *places):
    rows = [{"kind": kind, "step": step} for kind, step in places]
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    rows = [row | {"text": f"{row['kind']} {row['step']}"} for row in rows]
    write(folder / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def test_samples_are_those_of_the_first_and_last_step_and_of_evaluations(tmp_path):
    write_samples(tmp_path, *(("train", step) for step in (10, 20, 30)), *(("eval", step) for step in (0, 15, 30)))
    texts = [row["text"] for row in read_run(tmp_path, "tiny").samples]
    assert texts == ["train 10", "train 30", "eval 0", "eval 15", "eval 30"]


def test_samples_of_many_evaluations_are_read_from_some(tmp_path):
    write_samples(tmp_path, *(("eval", step) for step in range(31)))
    # 16 of 31: every second.
    assert [row["step"] for row in read_run(tmp_path, "tiny").samples] == list(range(0, 31, 2))


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(3, 3, [0, 1, 2]), (3, 9, [0, 1, 2]), (9, 3, [0, 4, 8]), (9, 2, [0, 8]), (10, 4, [0, 3, 6, 9]), (0, 2, [])],
)
def test_a_spread_goes_from_the_first_to_the_last(count, most, expected):
    assert spread(range(count), most) == expected


def test_a_malformed_summary_is_named(tmp_path):
    write(tmp_path / "metrics.jsonl", b"")
    write(tmp_path / "summary.json", b"{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON; delete it"):
        read_run(tmp_path, "tiny")
