"""Whole runs of a few steps on the embedded model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from policy_split_jax import config as settings
from policy_split_jax.cli import main
from policy_split_jax.config import LossConfig, ModelConfig, RewardConfig, RunConfig
from policy_split_jax.errors import UserError
from policy_split_jax.policy import load_policy
from policy_split_jax.training.checkpoint import load_checkpoint_params
from policy_split_jax.training.loop import Trainer, train, update_config

# Third-party code of the checkpoint library warns about its own deprecations.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def small_run(folder: Path, **train_settings) -> RunConfig:
    tree = {
        "name": "run",
        "output": str(folder),
        "prompt": {"high_entropy": "High-entropy mode."},
        "data": {"max_number": 30, "train_size": 64, "test_size": 4},
        "rollout": {
            "questions_per_step": 2,
            "rollouts_per_mode": 2,
            "max_prompt_tokens": 48,
            "max_new_tokens": 12,
            "slots": 8,
        },
        "advantage": {"eta": 0.5, "kappa": 1.0},
        "eta": {"schedule": "target_kl"},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 4, "save_every": 2, **train_settings},
        "eval": {"questions": 2, "k": 2},
    }
    return settings.from_dict(RunConfig, tree, "test")


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """A run's rows without what a clock says."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in found]


def last_params(config: RunConfig) -> list[np.ndarray]:
    params = load_checkpoint_params(config.folder, load_policy(config.folder / "model"))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_two_steps_and_two_more_are_four_bit_for_bit(tmp_path):
    whole = small_run(tmp_path / "whole")
    train(whole)
    train(small_run(tmp_path / "cut", steps=2))
    cut = small_run(tmp_path / "cut")
    train(cut, must_resume=True)

    # The shorter run evaluated after its last step too; everything else is the same to the last bit.
    kept = [row for row in rows(cut.folder) if (row["kind"], row["step"]) != ("eval", 2)]
    assert kept == rows(whole.folder)
    assert [row["step"] for row in kept] == [0, 1, 2, 3, 4, 4]
    assert [row["text"] for row in rows(cut.folder, "samples.jsonl") if row["kind"] == "train"] == [
        row["text"] for row in rows(whole.folder, "samples.jsonl") if row["kind"] == "train"
    ]
    for one, other in zip(last_params(whole), last_params(cut), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_leaves_what_the_documentation_says(tmp_path):
    config = small_run(tmp_path, steps=1)
    folder = train(config)
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "report.html",
        "samples.jsonl",
        "summary.json",
    }
    assert settings.from_dict(RunConfig, yaml.safe_load((folder / "config.yaml").read_text()), "") == config
    kinds = [(row["kind"], row["step"]) for row in rows(folder)]
    assert kinds == [("eval", 0), ("train", 1), ("eval", 1)]
    step = rows(folder)[1]
    assert step["sampler/max_difference"] < 1e-4  # the sampler and the trainer are the same model
    assert step["tokens/rollout"] > 0
    modes = {row["mode"] for row in rows(folder, "samples.jsonl")}
    assert modes == {"normal", "high_entropy"}
    samples = [row for row in rows(folder, "samples.jsonl") if row["kind"] == "eval"]
    for tokens, row in ((row["tokens"], row) for row in samples):
        assert "".join(tokens["text"]).removesuffix("<|im_end|>") == row["text"]
        # Rounded to three decimals.
        assert np.mean(tokens["entropy"]) == pytest.approx(row["entropy"], abs=5e-4)
        assert len(tokens["kl"]) == len(tokens["text"])

    # Run again: nothing is left to do, and nothing is changed.
    before = (folder / "metrics.jsonl").read_bytes()
    train(config)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_setting_in_the_same_folder_is_refused(tmp_path):
    train(small_run(tmp_path, steps=1))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"another train\.seed"):
        train(small_run(tmp_path, steps=1, seed=7))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_checkpoint_may_start_again_with_other_settings(tmp_path):
    config = small_run(tmp_path, steps=1)
    config.folder.mkdir()
    first = settings.to_dict(small_run(tmp_path, steps=1, seed=7))
    (config.folder / "config.yaml").write_text(yaml.safe_dump(first))
    (config.folder / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n')
    train(config)
    assert settings.load(RunConfig, config.folder / "config.yaml") == config
    assert [row["step"] for row in rows(config.folder)] == [0, 1, 1]


def test_a_resumed_run_needs_its_own_folder_only(tmp_path):
    """The model that it began with may be gone, and its own copy of the prompts is what counts."""
    source = tmp_path / "source"
    assert main(["export", "--output", str(source)]) == 0
    config = replace(small_run(tmp_path, steps=1), model=ModelConfig(path=str(source)))
    train(config)
    shutil.rmtree(source)
    before = {path: path.read_bytes() for path in (config.folder / "model").iterdir()}
    longer = replace(config, train=replace(config.train, steps=2))
    train(longer, must_resume=True)
    assert [row["step"] for row in rows(config.folder)] == [0, 1, 1, 2, 2]
    assert {path: path.read_bytes() for path in (config.folder / "model").iterdir()} == before


def test_a_run_may_start_from_another_runs_checkpoint(tmp_path):
    first = small_run(tmp_path / "first", steps=2)
    train(first)
    second = replace(small_run(tmp_path / "second", steps=1), model=ModelConfig(checkpoint=str(first.folder)))
    train(second)
    # The same model on the same questions with the evaluation's own seed: the same figures.
    assert rows(second.folder)[0] == rows(first.folder)[-1] | {"step": 0}
    with pytest.raises(UserError, match=r"another model\.checkpoint"):
        train(replace(second, model=ModelConfig()))
    with pytest.raises(UserError, match=r"another model\.checkpoint"):
        train(replace(first, model=ModelConfig(checkpoint=str(first.folder))))


def test_a_run_that_goes_on_is_not_over(tmp_path, monkeypatch):
    config = small_run(tmp_path, steps=1)
    train(config)
    assert (config.folder / "summary.json").is_file()

    def stop(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(small_run(tmp_path, steps=2))
    assert not (config.folder / "summary.json").exists()


def test_a_grader_that_fails_is_shown(tmp_path, capsys):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    raise ValueError('no luck')\n"
    )
    config = replace(small_run(tmp_path, steps=1), reward=RewardConfig(grader=f"{reward}:compute_score", workers=1))
    train(config)
    assert f"no grade for 8 rollouts, which count nowhere; the first: ValueError: no luck ({reward}:2)" in (
        capsys.readouterr().out
    )
    step = rows(config.folder)[1]
    assert (step["grader/failed"], step["reward/normal"]) == (8, None)
    assert all("no luck" in row["grader_error"] for row in rows(config.folder, "samples.jsonl"))


def test_a_strangers_folder_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        train(small_run(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_seeds_differ(tmp_path):
    first = train(small_run(tmp_path / "a", steps=1))
    second = train(small_run(tmp_path / "b", steps=1, seed=1))
    assert rows(first)[1]["loss"] != rows(second)[1]["loss"]
    assert rows(first)[0] == rows(second)[0]  # the evaluation has a seed of its own


def test_the_aggregate_constant_divides_by_the_most_new_tokens(tmp_path):
    config = replace(small_run(tmp_path), loss=LossConfig(aggregate="constant"))
    assert (update_config(config).aggregate, update_config(config).max_new_tokens) == ("constant", 12)


def test_questions_with_long_prompts_are_an_error_or_left_out_and_counted(tmp_path, capsys):
    def write(name, questions):
        lines = [json.dumps({"question": text, "answer": "1"}) + "\n" for text in questions]
        (tmp_path / name).write_text("".join(lines))
        return str(tmp_path / name)

    short, long = "Make 35 from 3, 5, 4.", "Make 35 from 3, 5, 4." * 4
    config = small_run(tmp_path / "runs", steps=1, sample_questions=2)
    data = replace(
        config.data, train=write("train.jsonl", [short, long, short]), test=write("test.jsonl", [short, long])
    )
    config = replace(config, data=data, reward=RewardConfig(grader="exact"))
    with pytest.raises(UserError, match=r"1 of 3 questions make prompts of more than 48 tokens.*long_prompts=skip"):
        train(config)
    assert not config.folder.exists()

    train(replace(config, rollout=replace(config.rollout, long_prompts="skip")))
    said = " ".join(capsys.readouterr().out.split())
    assert "2 training and 1 test questions" in said
    assert "2 questions left out: more than 48 prompt tokens" in said
    assert {row["question"] for row in rows(config.folder, "samples.jsonl")} == {short}

    nothing = replace(config, name="none", rollout=replace(config.rollout, long_prompts="skip", max_prompt_tokens=4))
    with pytest.raises(UserError, match=r"no question has a prompt of at most 4 tokens; raise rollout\.max_prompt"):
        train(nothing)
    assert not nothing.folder.exists()
