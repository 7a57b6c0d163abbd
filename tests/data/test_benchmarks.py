"""The loaders on rows written here, in the columns of the published files."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from policy_split_jax.data.benchmarks import BENCHMARKS, aime24, aime25, gpqa_diamond, math500, mmlu_pro
from policy_split_jax.errors import UserError
from policy_split_jax.rewards.grading import GradeItem, load_grader

MATH = {
    "problem": "What is $1+1$?",
    "solution": r"It is $\boxed{2}$.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}
GPQA = {
    "Pre-Revision Question": "old",
    "Question": "Which is a noble gas?\n",
    "Correct Answer": "neon\n",
    "Incorrect Answer 1": "oxygen",
    "Incorrect Answer 2": "iron",
    "Incorrect Answer 3": "gold",
    "Record ID": "rec1",
    "Subdomain": "Inorganic Chemistry",
}
MMLU = {
    "question_id": 70,
    "question": "Which is even?",
    "options": ["1", "2", "3"],
    "answer": "B",
    "answer_index": 1,
    "cot_content": "",
    "category": "math",
    "src": "ori_mmlu-x",
}


def write(path, *records):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_math500(tmp_path):
    (row,) = math500(write(tmp_path / "test.jsonl", MATH))
    assert row.question == "What is $1+1$?\nReason step by step, and put the final answer within \\boxed{}."
    assert (row.ground_truth, row.data_source) == ("2", "math500")
    assert row.extra_info == {"unique_id": "test/algebra/1.json", "subject": "Algebra", "level": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("record", "truth", "kept"),
    [
        ({"id": 60, "problem": "P", "solution": "S", "answer": "033", "url": "u", "year": "2024"}, "33", {"id": 60}),
        ({"ID": "2024-I-1", "Problem": "P", "Solution": "S", "Answer": 204}, "204", {"ID": "2024-I-1"}),
        ({"question": "P", "answer": r"336^\circ"}, "336", {}),
        ({"problem": "P", "answer": "000", "id": "0"}, "0", {"id": "0"}),
    ],
)
def test_the_layouts_of_aime(suffix, record, truth, kept, tmp_path):
    path = write(tmp_path / f"test{suffix}", record)
    for read, name in ((aime24, "aime24"), (aime25, "aime25")):
        (row,) = read(path)
        assert row.question.startswith("P\nReason")
        assert (row.ground_truth, row.data_source, row.extra_info) == (truth, name, kept)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_choices_of_gpqa_are_shuffled_by_their_content(suffix, tmp_path):
    records = [{**GPQA, "Question": f"Question {number}?"} for number in range(60)]
    rows = gpqa_diamond(write(tmp_path / f"gpqa_diamond{suffix}", *records))
    for number, row in enumerate(rows):
        lines = row.question.splitlines()
        assert lines[:2] == [f"Question {number}?", ""]
        choices = dict(line.split(". ") for line in lines[2:6])
        assert sorted(choices.values()) == ["gold", "iron", "neon", "oxygen"]
        assert list(choices) == ["A", "B", "C", "D"]
        assert choices[row.ground_truth] == "neon"
        assert row.question.endswith("put the letter of the right choice within \\boxed{}.")
        assert row.extra_info == {"Record ID": "rec1", "Subdomain": "Inorganic Chemistry"}
    # Each letter is right now and then: one of four would be missing by chance in 1 of 8 million such lists.
    assert {row.ground_truth for row in rows} == set("ABCD")
    alone = gpqa_diamond(write(tmp_path / "one.csv", records[31]))
    assert alone == [rows[31]]
    # Which choice is the right one does not decide where it stands.
    other = {**records[31], "Correct Answer": "gold", "Incorrect Answer 3": "neon"}
    (swapped,) = gpqa_diamond(write(tmp_path / "other.csv", other))
    assert swapped.question == rows[31].question
    assert swapped.ground_truth != rows[31].ground_truth


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_mmlu_pro(suffix, tmp_path):
    ten = {**MMLU, "options": [*map(str, range(1, 19, 2)), "2"], "answer": "J", "answer_index": 9}
    first, second = mmlu_pro(write(tmp_path / f"test{suffix}", MMLU, ten))
    assert first.question == (
        "Which is even?\n\nA. 1\nB. 2\nC. 3\n\n"
        "Reason step by step, and put the letter of the right choice within \\boxed{}."
    )
    assert (first.ground_truth, first.extra_info) == ("B", {"question_id": 70, "category": "math"})
    assert "\nJ. 2\n" in second.question
    assert second.ground_truth == "J"


def test_each_grader_takes_what_its_loader_gives(tmp_path):
    aime = {"problem": "P", "answer": "033", "id": 1}
    records = {"math500": MATH, "aime24": aime, "aime25": aime, "gpqa_diamond": GPQA, "mmlu_pro": MMLU}
    assert records.keys() == BENCHMARKS.keys()
    for name, record in records.items():
        (row,) = BENCHMARKS[name].read(write(tmp_path / f"{name}.jsonl", record))
        grade = load_grader(BENCHMARKS[name].grader)
        right, wrong = (grade(GradeItem(f"\\boxed{{{text}}}", row.ground_truth)) for text in (row.ground_truth, "Z"))
        assert (right.score, wrong.score) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("math500", {"question": "q", "answer": "2"}, "no column 'problem'; columns found: question, answer"),
        ("math500", {**MATH, "answer": 2}, "answer holds int 2; it must be text"),
        ("aime24", {"answer": "2"}, "no column 'problem' or 'Problem' or 'question'; columns found: answer"),
        (
            "aime25",
            {"problem": "q", "answer": "1000"},
            "the answer is '1000'; those of AIME are integers from 0 to 999",
        ),
        ("gpqa_diamond", {**GPQA, "Correct Answer": " "}, "Correct Answer is empty"),
        ("mmlu_pro", {**MMLU, "options": ["1", "2"]}, "options must be a list of 3 to 10 texts"),
        ("mmlu_pro", {**MMLU, "options": "1, 2, 3"}, "options must be a list of 3 to 10 texts"),
        ("mmlu_pro", {**MMLU, "answer": "D"}, "answer is 'D'; it must be a letter from A to C"),
        ("mmlu_pro", {**MMLU, "answer_index": 2}, "answer B and answer_index 2 disagree"),
    ],
)
def test_bad_rows_are_named(name, record, message, tmp_path):
    with pytest.raises(UserError, match=rf"bad\.jsonl:1: {message}"):
        BENCHMARKS[name].read(write(tmp_path / "bad.jsonl", record))


def test_an_empty_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl: holds no rows"):
        math500(write(tmp_path / "a.jsonl"))
