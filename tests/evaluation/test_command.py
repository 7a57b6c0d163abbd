"""`policy-split eval` on the embedded model, as a user calls it."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from policy_split_jax.cli import main
from policy_split_jax.evaluation import command
from policy_split_jax.evaluation.journal import journal
from policy_split_jax.evaluation.rollout_file import QuestionBatch, finished_questions, question_batches
from policy_split_jax.policy import model_folder

SMALL = ["--questions", "5", "--questions-at-once", "2", "--k", "2", "--max-new-tokens", "10"]
# Lines of one batch of two questions: two modes, k = 2.
LINES = 8


def arguments(folder, *more):
    return ["eval", *SMALL, "--output", str(folder / "found.json"), *more]


def rollouts(folder):
    return folder / "found.rollouts.jsonl"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(folder)) == 0
    return folder


def same(folder, other):
    files = ("found.json", "found.rollouts.jsonl")
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_a_killed_evaluation_goes_on_bit_for_bit(undisturbed, tmp_path):
    path = rollouts(tmp_path)
    code = "import sys; from policy_split_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments(tmp_path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    # The header and a batch; it is still at the next one, or just behind.
    while not path.is_file() or path.read_bytes().count(b"\n") <= LINES:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "found.json").exists()
    assert main(arguments(tmp_path)) == 0
    assert same(undisturbed, tmp_path)


@pytest.fixture
def sampled(monkeypatch):
    """The first question of each batch that is sampled."""
    firsts = []
    answer = command.answer

    def spy(*given, first, **more):
        firsts.append(first)
        return answer(*given, first=first, **more)

    monkeypatch.setattr(command, "answer", spy)
    return firsts


@pytest.mark.parametrize(
    ("kept", "torn", "expected"),
    [
        (LINES + 1, b'{"benchmark": "emb', [2, 4]),
        (LINES + 4, b"", [2, 4]),
        (2 * LINES, b"\0\0\n", [2, 4]),
        (2 * LINES + 1, b"\xff", [4]),
    ],
)
def test_only_unfinished_batches_are_sampled_again(kept, torn, expected, undisturbed, sampled, tmp_path):
    lines = rollouts(undisturbed).read_bytes().splitlines(keepends=True)
    rollouts(tmp_path).write_bytes(b"".join(lines[:kept]) + torn)
    assert main(arguments(tmp_path)) == 0
    assert sampled == expected
    assert same(undisturbed, tmp_path)


def test_a_damaged_line_among_others_is_no_kill(undisturbed, tmp_path, capsys):
    lines = rollouts(undisturbed).read_bytes().splitlines(keepends=True)
    content = b"".join([*lines[:2], b'{"benchmark": "emb\n', *lines[3:]])
    rollouts(tmp_path).write_bytes(content)
    assert main(arguments(tmp_path)) == 2
    assert "line 3 is damaged, and others follow; repair it, or delete it and all behind it" in capsys.readouterr().err
    assert rollouts(tmp_path).read_bytes() == content


def test_what_is_finished_of_several_benchmarks(tmp_path):
    def lines(name, first, count):
        for question in range(first, first + count):
            for mode in ("normal", "high_entropy"):
                record = {"benchmark": name, "question": question, "mode": mode, "index": 0, "batch": count}
                yield json.dumps(record).encode() + b"\n"

    whole = [b"{}\n", *lines("a", 0, 2), *lines("b", 0, 2), *lines("b", 2, 1)]
    path = tmp_path / "found.jsonl"
    path.write_bytes(b"".join([*whole, *list(lines("b", 3, 2))[:3]]))
    assert finished_questions(path, {"a": 2, "b": 5, "c": 1}, 1) == {"a": 2, "b": 3, "c": 0}
    assert path.read_bytes() == b"".join(whole)


@pytest.mark.parametrize("batch", ['"x"', "1.5", "null", "-1", "true"])
def test_a_batch_is_a_number_of_questions(batch, undisturbed, tmp_path, capsys):
    lines = rollouts(undisturbed).read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"batch": 2', f'"batch": {batch}'.encode())
    rollouts(tmp_path).write_bytes(b"".join(lines))
    assert main(arguments(tmp_path)) == 2
    assert f"question 0 of embedded has a batch of {json.loads(batch)!r}; repair it" in capsys.readouterr().err


def test_a_finished_evaluation_samples_nothing(undisturbed, sampled, tmp_path):
    rollouts(tmp_path).write_bytes(rollouts(undisturbed).read_bytes() + b"left behind")
    assert main(arguments(tmp_path)) == 0
    assert sampled == []
    assert same(undisturbed, tmp_path)


def test_a_question_is_answered_alike_in_any_batch(undisturbed, tmp_path):
    assert main(arguments(tmp_path, "--questions-at-once", "5")) == 0
    texts = [
        [json.loads(line)["text"] for line in rollouts(folder).read_text().splitlines()[1:]]
        for folder in (undisturbed, tmp_path)
    ]
    assert len(texts[0]) == 5 * 2 * 2
    assert texts[0] == texts[1]
    before, now = (json.loads((folder / "found.json").read_text()) for folder in (undisturbed, tmp_path))
    # Batches are padded differently, which changes the order of sums in float32.
    np.testing.assert_allclose(before.pop("entropy/both"), now["entropy/both"], rtol=1e-5)
    assert before["accuracy/both"] == now["accuracy/both"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "3"], "has other settings: k (2 there, 3 now); give those, another --output, or --fresh"),
        (["--seed", "1", "--top-k", "5"], "seed (0 there, 1 now), top_k (0 there, 5 now)"),
        (["--high-entropy-prompt", "Explore."], 'high_entropy_prompt ("High-entropy mode." there, "Explore." now)'),
        (["--questions", "4"], 'questions of embedded ({"count": 5,'),
    ],
)
def test_other_settings_are_refused_by_name(more, message, undisturbed, capsys):
    before = rollouts(undisturbed).read_bytes()
    assert main(arguments(undisturbed, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert rollouts(undisturbed).read_bytes() == before


def test_another_model_is_refused(undisturbed, tmp_path, capsys):
    from policy_split_jax.model import huggingface
    from policy_split_jax.policy import load_model

    policy, params = load_model("embedded")
    params = jax.tree.map(lambda leaf: leaf * 1.001, params)
    files = {
        "base_config": huggingface.read_json(policy.folder / "config.json"),
        "generation_config": huggingface.read_json(policy.folder / "generation_config.json"),
        "tokenizer_files": policy.folder,
    }
    huggingface.save_model(tmp_path / "model", params, policy.config, **files)
    assert main(arguments(undisturbed, "--model", str(tmp_path / "model"))) == 2
    assert "model (" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not JSON\n", b'{"step": 1}\n'])
def test_another_file_is_not_written_over(content, tmp_path, capsys):
    rollouts(tmp_path).write_bytes(content)
    assert main(arguments(tmp_path)) == 2
    assert "its first line holds no settings" in capsys.readouterr().err
    assert rollouts(tmp_path).read_bytes() == content


def test_fresh_begins_again_and_keeps_what_was_there(undisturbed, tmp_path, capsys):
    rollouts(tmp_path).write_bytes(b"anything\n")
    assert main(arguments(tmp_path, "--fresh", "--grader", "nobody.py:score")) == 2
    assert "nobody.py" in capsys.readouterr().err
    assert rollouts(tmp_path).read_bytes() == b"anything\n"
    assert main(arguments(tmp_path, "--fresh")) == 0
    assert same(undisturbed, tmp_path)
    assert (tmp_path / "found.rollouts.jsonl.before").read_bytes() == b"anything\n"


def test_another_grader_of_the_same_name_is_refused(tmp_path, capsys):
    grader = tmp_path / "mine.py"
    signature = "def score(data_source, solution_str, ground_truth, extra_info):"
    for value, code in ((1.0, 0), (0.5, 2)):
        grader.write_text(f"{signature}\n    return {value}\n")
        more = ["--questions", "2", "--k", "1", "--max-new-tokens", "2", "--grader", f"{grader}:score"]
        assert main(arguments(tmp_path, *more)) == code
    assert f"has other settings: content of {grader} (" in capsys.readouterr().err
    assert json.loads((tmp_path / "found.json").read_text())["accuracy/normal"] == 1.0


def test_two_processes_do_not_share_a_file(undisturbed, capsys):
    path = rollouts(undisturbed)
    settings = json.loads(path.read_bytes().splitlines()[0])["settings"]
    with journal(path, settings, fresh=False):
        assert main(arguments(undisturbed)) == 2
    assert f"{path}: another process is at work on it" in capsys.readouterr().err


def test_stop_tokens_and_tokenizer_are_of_the_model(undisturbed, tmp_path, capsys):
    """Of the same weights: the rollouts would be others."""
    shutil.copytree(model_folder("embedded"), tmp_path / "model")
    config = tmp_path / "model" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, 2]}))
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text() + " ")
    assert main(arguments(undisturbed, "--model", str(tmp_path / "model"))) == 2
    error = capsys.readouterr().err
    assert "stop_ids (" in error
    assert "tokenizer and configuration (" in error
    assert " model (" not in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--question-column", "q"], "--question-column says nothing of the embedded task"),
        (["--data", "{file}", "--task", "walk"], "--task says nothing of a file"),
        (["--benchmark", "math500={file}", "--answer-column", "a"], "--answer-column says nothing of a benchmark"),
        (["--data", "{file}", "--output", "{file}"], "is what is read; choose another --output"),
        (["--benchmark", "math500={file}", "--output", "{file}"], "is what is read; choose another --output"),
    ],
)
def test_options_that_would_do_nothing_or_harm(more, message, tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "1 + 1?", "problem": "1 + 1?", "answer": "2"}\n')
    assert main(arguments(tmp_path, *(text.format(file=file) for text in more))) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


def test_rows_of_another_place_are_refused(undisturbed, tmp_path, capsys):
    lines = rollouts(undisturbed).read_bytes().splitlines(keepends=True)
    rollouts(tmp_path).write_bytes(b"".join([lines[0], *lines[2:]]))
    assert main(arguments(tmp_path)) == 2
    assert "('embedded', 0, 'normal', 1) where ('embedded', 0, 'normal', 0) belongs" in capsys.readouterr().err


def test_batches_do_not_cross_benchmarks():
    assert question_batches({"a": 3, "b": 2}, 2, {"a": 0, "b": 0}) == [
        QuestionBatch("a", 0, 2),
        QuestionBatch("a", 2, 1),
        QuestionBatch("b", 0, 2),
    ]
    assert question_batches({"a": 5, "b": 2}, 4, {"a": 3, "b": 0}) == [
        QuestionBatch("a", 3, 2),
        QuestionBatch("b", 0, 2),
    ]


@pytest.mark.parametrize(("size", "expected"), [("5", [4]), ("1", [4]), ("3", [4])])
def test_other_batches_keep_what_is_there(size, expected, undisturbed, sampled, tmp_path):
    """Two batches of two are there, and of the last question half."""
    lines = rollouts(undisturbed).read_bytes().splitlines(keepends=True)
    rollouts(tmp_path).write_bytes(b"".join(lines[: 2 * LINES + 3]))
    assert main(arguments(tmp_path, "--questions-at-once", size)) == 0
    assert sampled == expected
    assert rollouts(tmp_path).read_bytes().startswith(b"".join(lines[: 2 * LINES + 1]))


@pytest.mark.parametrize(("slots", "k", "expected"), [(64, 8, 64), (8, 8, 8), (1, 64, 1), (64, 1, 512)])
def test_a_batch_keeps_the_slots_busy(slots, k, expected):
    options = argparse.Namespace(questions_at_once=None, slots=slots, k=k)
    assert command._questions_at_once(options) == expected
    assert command._questions_at_once(argparse.Namespace(questions_at_once=3)) == 3


def test_a_mistyped_setting_can_be_corrected(tmp_path):
    """What holds its settings alone has nothing to lose."""
    assert main(arguments(tmp_path, "--grader", "mathh")) == 2
    assert main(arguments(tmp_path)) == 0


@pytest.fixture
def benchmarks(tmp_path):
    """Of each kind a file of a question or two, and the options that name them."""
    choice = {"question": "Which is even?", "options": ["1", "2", "3"], "answer": "B", "answer_index": 1}
    files = {
        "math500": [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}],
        "aime24": [{"problem": "3+3?", "answer": "006"}],
        "aime25": [{"question": "4+4?", "answer": "8"}],
        "mmlu_pro": [choice],
    }
    options = []
    for name, records in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        options += ["--benchmark", f"{name}={path}"]
    return options


def test_benchmarks_are_sampled_as_in_the_paper(benchmarks, tmp_path, capsys):
    output = tmp_path / "paper.json"
    # Few tokens, or the tiny model would fill them all.
    assert main(["eval", *benchmarks, "--max-new-tokens", "8", "--k", "4", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    settings = found["settings"]
    assert (settings["temperature"], settings["top_k"], settings["top_p"], settings["k"]) == (0.6, 20, 0.95, 4)
    assert settings["question_template"] == "{question}"
    assert settings["questions of math500"]["grader"] == "math"
    assert settings["questions of mmlu_pro"]["grader"] == "letter"
    assert list(found["benchmarks"]) == ["math500", "aime24", "aime25", "mmlu_pro"]
    assert [row["questions"] for row in found["benchmarks"].values()] == [2, 1, 1, 1]
    entropy = {name: row["entropy/normal"] for name, row in found["benchmarks"].items()}
    # Both exams of AIME are one of the three benchmarks; their answers are cut off at the same length.
    assert found["mean"]["truncated/normal"] == 1
    three = (entropy["math500"], (entropy["aime24"] + entropy["aime25"]) / 2, entropy["mmlu_pro"])
    assert found["mean"]["entropy/normal"] == pytest.approx(sum(three) / 3)
    assert found["mean"]["questions"] == 5
    shown = capsys.readouterr().out
    for name in (*entropy, "mean"):
        assert shown.count(f"│ {name} ") == 2


def test_the_mean_of_benchmarks_by_hand():
    from policy_split_jax.evaluation.rollout_file import SavedQuestion
    from policy_split_jax.rewards import Grade

    def question(normal, high_entropy):
        grades = [Grade(float(score), str(score)) for score in (*normal, *high_entropy)]
        return SavedQuestion([0, 0, 1, 1], grades, [1, 3, 2, 2], ["stop"] * 4, [1.0, 2.0, 4.0, 4.0], [0.5] * 4)

    first = [question((1, 1), (1, 0)), question((0, 0), (0, 0)), question((1, 0), (1, 1))]
    second = [question((0, 0), (1, 1))]
    row = command._metrics([first, second], 2)
    assert row["accuracy/normal"] == pytest.approx((0.5 + 0) / 2)
    assert row["accuracy/high_entropy"] == pytest.approx((0.5 + 1) / 2)
    assert row["accuracy_difference"] == pytest.approx(0.5)
    assert row["pass@2/normal"] == pytest.approx((2 / 3 + 0) / 2)
    assert row["entropy/normal"] == pytest.approx(3 / 4)
    assert row["entropy_bits/high_entropy"] == pytest.approx(2 / np.log(2))
    assert row["kl/high_entropy_to_normal"] == pytest.approx(1 / 4)
    assert (row["questions"], row["grader/failed"], row["k"], row["questions_left_out"]) == (4, 0, 2, 0)
    # The second benchmark has one question, and the first is at 0, 1/2 or 1 with each of its own.
    assert 0 <= row["pass@2/normal/low"] < 1 / 3 < row["pass@2/normal/high"] <= 0.5
    assert row["entropy_bits/normal/low"] == row["entropy_bits/normal/high"] == pytest.approx(0.75 / np.log(2))
    # Two benchmarks that the paper counts as one have a mean too, over the questions of both.
    pooled = command._show_benchmarks({"aime24": first, "aime25": second}, 2)
    assert pooled["mean"]["accuracy/normal"] == pytest.approx((3 * 0.5 + 0) / 4)
    assert "mean" not in command._show_benchmarks({"aime24": first}, 2)


@pytest.mark.parametrize(("given", "grader"), [([], "math"), (["--grader", "exact"], "exact")])
def test_files_of_one_name_are_one_benchmark(given, grader, benchmarks, tmp_path):
    shutil.copy(tmp_path / "aime25.jsonl", tmp_path / "second.jsonl")
    # One that is given twice counts once.
    again = 2 * ["--benchmark", f"aime25={tmp_path / 'second.jsonl'}"]
    options = [*benchmarks[4:6], *again, "--max-new-tokens", "2", "--k", "1", "--temperature", "0", *given]
    assert main(["eval", *options, "--output", str(tmp_path / "aime.json")]) == 0
    found = json.loads((tmp_path / "aime.json").read_text())
    assert found["benchmarks"]["aime25"]["questions"] == 2
    assert found["settings"]["temperature"] == 0
    assert found["settings"]["questions of aime25"]["grader"] == grader
    assert "mean" not in found


@pytest.mark.parametrize("text", ["math500", "math500=", "maths=a.jsonl"])
def test_a_benchmark_is_a_name_and_a_file(text, capsys):
    assert main(["eval", "--benchmark", text]) == 2
    assert f"--benchmark {text}: write NAME=FILE; the names are math500, aime24" in capsys.readouterr().err


def test_another_prompt_of_the_high_entropy_mode(tmp_path):
    """It changes what that mode answers, and nothing else."""
    texts = []
    for number, more in enumerate(([], ["--high-entropy-prompt", "Normal mode."])):
        output = tmp_path / f"{number}.json"
        small = ["--questions", "4", "--k", "4", "--max-new-tokens", "10", "--output", str(output)]
        assert main(["eval", *small, *more]) == 0
        rows = map(json.loads, output.with_name(f"{number}.rollouts.jsonl").read_text().splitlines()[1:])
        texts.append([(row["mode"], row["text"]) for row in rows])
    assert json.loads(output.read_text())["settings"]["high_entropy_prompt"] == "Normal mode."
    changed = {mode for (mode, before), (_, now) in zip(*texts, strict=True) if before != now}
    assert changed == {"high_entropy"}
