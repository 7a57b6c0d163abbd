"""What tells a run from others."""

import shutil
from dataclasses import replace

import pytest

from policy_split_jax.config import RewardConfig, RunConfig
from policy_split_jax.data.formats import Row
from policy_split_jax.policy import load_policy, model_folder
from policy_split_jax.training.run_folder import identity

ROW = Row("Make 35 from 3, 5, 4.", "35", "countdown", {})


@pytest.fixture
def parts(tmp_path):
    """Configuration, the model's folder, the user's reward, training and test rows."""
    folder, reward = tmp_path / "model", tmp_path / "reward.py"
    shutil.copytree(model_folder("embedded"), folder)
    reward.write_text("one")
    config = RunConfig("run", reward=RewardConfig(grader=f"{reward}:compute_score"))
    return config, folder, reward, [ROW, ROW], [ROW]


def identity_of(config, folder, reward, train_rows, test_rows):
    return identity(config, load_policy(folder), train_rows, test_rows)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = {
    "nothing": lambda config, *rest: (replace(config, train=replace(config.train, steps=7, tensorboard=True)), *rest),
    "settings": lambda config, *rest: (replace(config, train=replace(config.train, seed=7)), *rest),
    "model files": lambda config, folder, *rest: edit(folder / "tokenizer.json", "}", "} "),
    "stop tokens": lambda config, folder, *rest: edit(folder / "generation_config.json", '_id": [', '_id": [7, '),
    "prompts": lambda config, folder, *rest: (folder / "policy_split.json").write_text('{"high_entropy": "Other."}'),
    "questions": lambda *parts: (*parts[:3], [ROW], parts[4]),
    "test questions": lambda *parts: (*parts[:4], [replace(ROW, ground_truth="36")]),
    "reward code": lambda config, folder, reward, *rest: reward.write_text("two"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_all_that_a_run_is_made_of_tells_it_from_others(parts, what):
    before = identity_of(*parts)
    changed = CHANGES[what](*parts)
    after = identity_of(*(changed if isinstance(changed, tuple) else parts))
    assert {key for key in before if after[key] != before[key]} == {what} - {"nothing"}
