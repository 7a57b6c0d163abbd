"""The command line on the embedded model, as a user calls it."""

import errno
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from policy_split_jax.cli import main

QUESTIONS = [{"question": "Make 35 from 3, 5, 4."}, {"question": "Make 24 from 2, 3, 4."}]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sample(prompts, output, *more):
    assert main(["sample", "--prompts", str(prompts), "--max-new-tokens", "12", "--output", str(output), *more]) == 0
    return read(output)


def test_sample_answers_in_both_modes(prompts, tmp_path):
    rows = sample(prompts, tmp_path / "out.jsonl", "--n", "2", "--mode", "both")
    assert [(row["question"], row["mode"], row["index"]) for row in rows] == [
        (question["question"], mode, index)
        for question in QUESTIONS
        for mode in ("normal", "high-entropy")
        for index in (0, 1)
    ]
    for row in rows:
        assert len(row["tokens"]) == len(row["logprobs"]) <= 12
        assert row["finish_reason"] in ("stop", "length")
        assert max(row["logprobs"]) <= 0


def test_a_rollout_does_not_depend_on_how_many_there_are(prompts, tmp_path):
    few = sample(prompts, tmp_path / "few.jsonl", "--n", "1", "--mode", "high-entropy", "--seed", "5")
    many = sample(prompts, tmp_path / "many.jsonl", "--n", "3", "--mode", "both", "--seed", "5")
    chosen = [row for row in many if row["mode"] == "high-entropy" and row["index"] == 0]
    assert [row["tokens"] for row in few] == [row["tokens"] for row in chosen]


def test_another_prompt_changes_the_high_entropy_mode_alone(prompts, tmp_path):
    own, other = (
        sample(prompts, tmp_path / "out.jsonl", "--n", "4", "--mode", "both", *more)
        for more in ([], ["--high-entropy-prompt", "Normal mode."])
    )
    changed = {row["mode"] for row, now in zip(own, other, strict=True) if row["tokens"] != now["tokens"]}
    assert changed == {"high-entropy"}


def test_a_blank_prompt_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "--high-entropy-prompt", " "])
    assert "--high-entropy-prompt: is blank" in capsys.readouterr().err


def test_scores_agree_with_the_sampler(prompts, tmp_path):
    rows = sample(prompts, tmp_path / "answers.jsonl")
    scored = ["score", "--input", str(tmp_path / "answers.jsonl"), "--output", str(tmp_path / "scores.jsonl")]
    assert main(scored) == 0
    for row, scores in zip(rows, read(tmp_path / "scores.jsonl"), strict=True):
        # Two programs of the same float32 model: rounding only.
        np.testing.assert_allclose(scores[row["mode"]]["logprobs"], row["logprobs"], atol=2e-5)
        for name in ("kl_normal_to_high_entropy", "kl_high_entropy_to_normal"):
            assert len(scores[name]) == len(row["tokens"])
            assert min(scores[name]) > -1e-6
        assert min(scores["normal"]["entropies"]) >= 0


@pytest.mark.parametrize("column", ["response", "text", "response_tokens", "tokens"])
def test_an_answer_may_be_given_as_text_or_tokens(column, tmp_path):
    from policy_split_jax.modes import encode_plain
    from policy_split_jax.policy import load_policy, model_folder

    answer = "5*(3+4)"
    tokens = encode_plain(load_policy(model_folder("embedded")).tokenizer, [answer])[0]
    given = tmp_path / "answers.jsonl"
    given.write_text(
        json.dumps({**QUESTIONS[0], column: tokens if column.endswith("tokens") else answer}), encoding="utf-8"
    )
    assert main(["score", "--input", str(given), "--output", str(tmp_path / "scores.jsonl")]) == 0
    (row,) = read(tmp_path / "scores.jsonl")
    assert row["response_tokens"] == tokens
    # The embedded model knows this puzzle's form: no token of the answer is out of the question.
    assert len(row["normal"]["logprobs"]) == len(tokens)
    assert min(row["normal"]["logprobs"]) > -9


def test_token_rows_are_scored_in_their_own_context(prompts, tmp_path):
    from policy_split_jax.modes import HIGH_ENTROPY, render
    from policy_split_jax.policy import load_policy, model_folder

    rows = sample(prompts, tmp_path / "out.jsonl", "--mode", "high-entropy")
    policy = load_policy(model_folder("embedded"))
    given = tmp_path / "tokens.jsonl"
    given.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_tokens": render(policy.tokenizer, [row["question"]], HIGH_ENTROPY, policy.prompts)[0],
                    "response_tokens": row["tokens"],
                }
            )
            + "\n"
            for row in rows
        )
    )
    output = tmp_path / "scores.jsonl"
    assert main(["score", "--prompt-tokens", "--input", str(given), "--output", str(output)]) == 0
    for row, scores in zip(rows, read(output), strict=True):
        np.testing.assert_allclose(scores["logprobs"], row["logprobs"], atol=2e-5)


def test_eval_writes_a_table_and_a_file(tmp_path, capsys):
    output = tmp_path / "eval.json"
    assert main(["eval", "--questions", "6", "--k", "4", "--max-new-tokens", "12", "--output", str(output)]) == 0
    row = json.loads(output.read_text())
    assert row["questions"] == 6
    assert row["k"] == 4
    for mode in ("normal", "high_entropy"):
        assert row[f"pass@1/{mode}"] == pytest.approx(row[f"accuracy/{mode}"])
        assert row[f"pass@4/{mode}"] == pytest.approx(row[f"best_of_k/{mode}"])
        assert 0 < row[f"entropy/{mode}"] < np.log(360)
    assert row["accuracy/both"] == pytest.approx((row["accuracy/normal"] + row["accuracy/high_entropy"]) / 2)
    for name in ("entropy", "response_length"):
        low, high = sorted((row[f"{name}/normal"], row[f"{name}/high_entropy"]))
        assert low <= row[f"{name}/both"] <= high
    assert "high-entropy" in capsys.readouterr().out


def test_an_exported_model_decodes_alike_in_transformers(prompts, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "exported"
    assert main(["export", "--output", str(folder)]) == 0
    ours = sample(prompts, tmp_path / "out.jsonl", "--temperature", "0", "--mode", "normal", "--model", str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for question, row in zip(QUESTIONS, ours, strict=True):
        turns = [{"role": "user", "content": question["question"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert theirs[0, ids.shape[1] :].tolist() == row["tokens"]


@pytest.mark.parametrize(
    ("command", "rule"),
    [(["sample"], "0 (greedy) or at least 1e-06"), (["eval"], "0 (greedy) or at least 1e-06"),
     (["score", "--input", "missing/in.jsonl"], "at least 1e-06")],
)  # fmt: skip
def test_a_temperature_that_no_logit_survives_is_refused(command, rule, capsys):
    # Were it taken, the folder that is not there would end the command.
    with pytest.raises(SystemExit) as exit:
        main([*command, "--output", "missing/out.jsonl", "--temperature", "1e-40"])
    assert exit.value.code == 2
    assert f"--temperature: 1e-40 must be {rule}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["train", "CONFIG", "train.stpes=3"], "unknown key train.stpes; did you mean train.steps?"),
        (["train", "CONFIG", "train.steps=many"], "train.steps is 'many'"),
        (["train", "CONFIG", "advantage.kappa=0.5"], "kappa must be at least 1"),
        (["train", "CONFIG", "steps"], "write section.key=value"),
        (["train", "CONFIG", "--model", "embedded", "train.stpes=3"], "unknown key train.stpes"),
        (["sample", "--model", "nowhere", "--prompts", "GOOD"], "nowhere: no config.json there"),
        (["sample", "--prompts", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["sample", "--prompts", "BROKEN"], "broken.jsonl:2: malformed JSON"),
        (["score", "--input", "BROKEN", "--output", "out.jsonl"], "broken.jsonl:2: malformed JSON"),
        (["eval", "--checkpoint", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["eval", "--output", "missing/eval.json"], "missing: no such folder"),
        (["eval", "--output", "."], ".: is a folder"),
        (["sample", "--prompts", "GOOD", "--output", "missing/out.jsonl"], "missing: no such folder"),
        (["score", "--input", "GOOD", "--output", "missing/out.jsonl"], "missing: no such folder"),
        (["sample", "--prompts", "EMPTY"], "empty.jsonl: holds no rows"),
        (["sample", "--prompts", "BLANK"], "blank.jsonl:1: question is empty"),
        (["train", "CONFIG", "data.train=nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["train", "CONFIG", "reward.grader=mth"], "unknown reward 'mth'"),
        (["train", "CONFIG", "rollout.questions_per_step=5000"], "batch size 5000 does not fit 4096 rows"),
        (["train", "CONFIG", "rollout.max_prompt_tokens=20"], "questions make prompts of more than 20 tokens"),
        (["train", "CONFIG", "rollout.temperature=1e-40"], "temperature is 1e-40; it must be at least 1e-06"),
        (
            ["train", "CONFIG", "eval.temperature=1e-40"],
            "temperature is 1e-40; it must be 0 (greedy) or at least 1e-06",
        ),
        (["train", "CONFIG", "--resume"], "run: no checkpoint to resume from"),
        (["train", "CONFIG", "--checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("name: run\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "response": "b"}\n{"question": \n')
    (tmp_path / "good.jsonl").write_text('{"question": "a", "response": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"question": " "}\n')
    named = {
        "CONFIG": "config.yaml",
        **{name.upper(): f"{name}.jsonl" for name in ("broken", "good", "empty", "blank")},
    }
    assert main([named.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.ESTALE, 1)])
def test_what_the_system_refuses_is_one_line(number, code, prompts, tmp_path, monkeypatch, capsys):
    """Of what may pass by itself the exit code says so: launchers try again."""
    from pathlib import Path

    def refuse(self, *options, **more):
        raise OSError(number, os.strerror(number), str(self))

    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(Path, "replace", refuse)
    assert main(["sample", "--prompts", str(prompts), "--max-new-tokens", "2", "--output", str(output)]) == code
    assert capsys.readouterr().err == f"policy-split: error: {output}.part: {os.strerror(number)}\n"
    assert [path.name for path in tmp_path.iterdir()] == [prompts.name]


@pytest.mark.parametrize(
    ("command", "function", "goes_on"),
    [
        (["train", "x"], "train", "; the same command goes on from the last checkpoint"),
        (["eval"], "evaluate", "; the same command goes on after the last questions that were saved"),
        (["report", "x"], "report", ""),
    ],
)
def test_an_interrupt_promises_only_what_holds(command, function, goes_on, monkeypatch, capsys):
    from policy_split_jax import commands

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, function, interrupt)
    assert main(command) == 130
    assert capsys.readouterr().err == f"policy-split: interrupted{goes_on}\n"


@pytest.mark.parametrize("rest", [["--modle", "x"], ["--resume", "steps"], ["--resume", "--x=1"]])
def test_words_behind_options_that_are_no_settings_are_refused(rest, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "config.yaml", *rest])
    assert f"unrecognized arguments: {rest[-1] if rest[0] == '--resume' else ' '.join(rest)}" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_named(prompts, capsys):
    assert main(["sample", "--prompts", str(prompts), "--max-prompt-tokens", "16"]) == 2
    assert "Make 35" in capsys.readouterr().err


def test_help_is_quick_and_loads_no_jax():
    code = (
        "import sys; from policy_split_jax.cli import _parser; _parser().format_help();"
        "print('jax' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_a_question_from_standard_input(monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Make 35 from 3, 5, 4.\n"))
    assert main(["sample", "--max-new-tokens", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["normal", "high-entropy"]
    assert jax.device_count() == 1


def test_diversity_is_told_by_mode(tmp_path, capsys):
    texts = {
        "normal": ["the sea the sea the sea", "the sea the sea the sea"],
        "high-entropy": [f"<think>a plan of five words</think>{story}" for story in ("one red fox", "two blue moons")],
    }
    rows = [{"question": "A story.", "mode": mode, "text": text} for mode, both in texts.items() for text in both]
    path, output = tmp_path / "stories.jsonl", tmp_path / "found.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["diversity", str(path), "--output", str(output)]) == 0
    assert "div_2_gram" in capsys.readouterr().out
    found = json.loads(output.read_text())
    counts = {"prompts": 1, "samples": 2, "blank": 0}
    # Two of five bigrams differ, and both texts are one.
    assert found["normal"] == counts | {"div_2_gram": 0.4, "div_bleu": 0.0, "distinct_openings": 0.5}
    assert found["high-entropy"]["div_2_gram"] == found["high-entropy"]["distinct_openings"] == 1.0
    path.write_text("")
    assert main(["diversity", str(path), "--output", str(output)]) == 2
    assert "stories.jsonl: holds no rows" in capsys.readouterr().err
    path.write_text(json.dumps({"question": "A story.", "mode": "normal"}) + "\n")
    assert main(["diversity", str(path), "--output", str(output)]) == 2
    assert "stories.jsonl:1: text must be there as text; give a file that policy-split sample wrote" in (
        capsys.readouterr().err
    )
