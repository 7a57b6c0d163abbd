import json

import pyarrow
import pyarrow.parquet
import pytest

from policy_split_jax.data.formats import Row, read_rows
from policy_split_jax.errors import UserError

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 6 times 7?"}],
    "reward_model": {"style": "rule", "ground_truth": "42"},
    "extra_info": {"index": 3, "split": "train"},
}


def write(path, *records):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=[".jsonl", ".parquet"])
def path(request, tmp_path):
    return tmp_path / f"sums{request.param}"


def test_plain_columns(path):
    write(
        path,
        {"question": "日: 1+1?", "answer": "2", "level": 1},
        {"question": "2+2?", "answer": "4", "level": 2},
    )
    assert read_rows(path) == [
        Row("日: 1+1?", "2", "sums", {"level": 1}),
        Row("2+2?", "4", "sums", {"level": 2}),
    ]


def test_columns_by_name(path):
    write(path, {"problem": "1+1?", "final": 2, "data_source": "school"})
    assert read_rows(path, "problem", "final") == [Row("1+1?", 2, "school", {})]


def test_verl_layout(path):
    write(path, VERL)
    assert read_rows(path) == [Row("What is 6 times 7?", "42", "openai/gsm8k", {"index": 3, "split": "train"})]


def test_named_columns_win_over_a_chat_prompt(path):
    write(path, {**VERL, "question": "6*7?", "answer": 42})
    (row,) = read_rows(path)
    assert (row.question, row.ground_truth) == ("6*7?", 42)


def test_verl_layout_without_optional_columns(path):
    write(path, {"prompt": VERL["prompt"], "reward_model": {"ground_truth": "42"}})
    assert read_rows(path) == [Row("What is 6 times 7?", "42", "sums", {})]


def test_any_json_value_is_ground_truth(tmp_path):
    values = ["4", 4, 4.5, True, None, ["4", "four"], {"numbers": [3, 8], "target": 24}]
    path = write(tmp_path / "a.jsonl", *({"question": "q", "answer": value} for value in values))
    assert [row.ground_truth for row in read_rows(path)] == values


def test_blank_lines_byte_order_mark_and_line_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    record = '{"question": "a\u2028b", "answer": 1}'.encode()
    path.write_bytes(b"\xef\xbb\xbf" + record + b"\r\n\n  \n" + record + b"\n\n")
    assert read_rows(path) == [Row("a\u2028b", 1, "a", {})] * 2


def test_parquet_of_several_batches(tmp_path):
    path = write(tmp_path / "a.parquet", *({"question": f"q{i}", "answer": i} for i in range(2500)))
    assert [row.ground_truth for row in read_rows(path)] == list(range(2500))


def chat(*messages):
    return {**VERL, "prompt": [{"role": role, "content": content} for role, content in messages]}


BAD_RECORDS = [
    (
        {"problem": "1+1?", "answer": 2},
        "no column 'question'; columns found: problem, answer; set question_co",
    ),
    (
        {"question": "1+1?", "label": 2},
        "no column 'answer'; columns found: question, label; set question_column",
    ),
    ({"question": 5, "answer": 2}, "question holds int 5; it must be text"),
    ({"question": ["a"], "answer": 2}, "question holds a list; it must be text"),
    ({"question": None, "answer": 2}, "question holds null; it must be text"),
    ({"question": " \n", "answer": 2}, "question is empty; remove the row"),
    ({"question": "q", "answer": 2, "data_source": 7}, "data_source holds int 7; it must be text"),
    (
        chat(("system", "Be brief."), ("user", "q")),
        "prompt has a system message, but the modes own the system",
    ),
    (
        chat(("user", "q"), ("assistant", "a"), ("user", "r")),
        "prompt has the roles .*; give exactly one user",
    ),
    (chat(("assistant", "a")), "prompt has the roles .*; give exactly one user message"),
    (chat(("user", "")), "the user message of prompt is empty"),
    (chat(("user", ["part"])), "the user message of prompt holds a list"),
    ({**VERL, "prompt": ["q"]}, "prompt must be a list of messages with role and content"),
    ({"prompt": VERL["prompt"], "label": "2"}, "no column 'reward_model'; columns found: prompt, label"),
    ({**VERL, "reward_model": {"style": "rule"}}, "reward_model must be an object with ground_truth"),
    ({**VERL, "extra_info": "none"}, "extra_info holds text; it must be an object"),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS)
def test_bad_records_are_named(path, record, message):
    write(path, record)
    place = f"{path}:1" if path.suffix == ".jsonl" else f"{path}, row 1"
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{place}: ")
    assert "\n" not in str(caught.value)


BAD_LINES = [
    (b'{"question": "q", "answer": 1', "malformed JSON .*; write one JSON object per line"),
    (b"[" * 100_000, "malformed JSON .*; write one JSON object per line"),
    (
        b'{"question": "q", "answer": ' + b"9" * 5000 + b"}",
        "malformed JSON .*; write one JSON object per line",
    ),
    (b"[1, 2]", "holds a list; write one JSON object per line"),
    (b'{"question": "caf\xe9", "answer": 1}', "not UTF-8 at byte 17; save the file as UTF-8"),
    (b'{"question": "\\ud800", "answer": 1}', "question holds half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "q", "answer": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_the_row_of_a_parquet_error(tmp_path):
    path = write(tmp_path / "a.parquet", *({"question": "q" * (i != 1500), "answer": i} for i in range(2000)))
    with pytest.raises(UserError, match="row 1501: question is empty"):
        read_rows(path)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"questions\.txt: unknown format '\.txt'; .* \.jsonl, \.parquet or \.csv"):
        read_rows(tmp_path / "questions.txt")
    for name in ("absent.jsonl", "absent.parquet", "absent.csv"):
        with pytest.raises(UserError, match=f"{name}: cannot be read .*; check the path"):
            read_rows(tmp_path / name)
    for name in ("folder.jsonl", "folder.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name}: cannot be read .*; check the path"):
            read_rows(tmp_path / name)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"torn\.parquet: not a readable parquet file"):
        read_rows(tmp_path / "torn.parquet")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no rows"):
        read_rows(tmp_path / "empty.jsonl")


def test_gsm8k_loads_as_it_is(shared):
    train = read_rows(shared / "data/gsm8k/train.jsonl")
    test = read_rows(shared / "data/gsm8k/test.jsonl")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0].question.startswith("Natalia sold clips to 48 of her friends in April")
    assert train[0].ground_truth.endswith("#### 72")


def test_csv_with_line_breaks_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer,level\r\n"one, ""two""\nthree",5,x\r\nq,,y\r\n')
    assert read_rows(path) == [
        Row('one, "two"\nthree', "5", "a", {"level": "x"}),
        Row("q", "", "a", {"level": "y"}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer\na,1\nb\n", r"a\.csv, row 2: has not as many fields as the header"),
        (b"question,answer\na,1,2\n", r"a\.csv, row 1: has not as many fields as the header"),
        (b'question,answer\n"a,1\n', r"a\.csv, row 1: malformed CSV \(unexpected end of data\)"),
        (b"question,answer\n\xff,1\n", r"a\.csv: not UTF-8"),
        (b"question,answer\n", r"a\.csv: holds no rows"),
    ],
)
def test_bad_csv_is_named(content, message, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "a.csv")
