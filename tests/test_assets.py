"""The embedded models are what their provenance says."""

import json
from pathlib import Path

import jax
import pytest
import yaml

from policy_split_jax import config as settings
from policy_split_jax.config import RunConfig, SftConfig
from policy_split_jax.data.embedded import TASKS
from policy_split_jax.data.tiny_tokenizer import build_tiny_tokenizer
from policy_split_jax.model import huggingface
from policy_split_jax.policy import load_policy, model_folder

PROJECT = Path(__file__).resolve().parents[1]
MODELS = {"embedded": "tiny", "embedded-walk": "walk"}
each_model = pytest.mark.parametrize(("model", "name"), MODELS.items())


@each_model
def test_provenance_is_the_recipe_in_the_project(model, name):
    recorded = json.loads((model_folder(model) / "provenance.json").read_text())
    assert recorded["command"] == f"policy-split sft configs/{name}_sft.yaml"
    recipe = settings.load(SftConfig, PROJECT / "configs" / f"{name}_sft.yaml")
    assert settings.from_dict(SftConfig, recorded["config"], "provenance.json") == recipe
    assert recorded["seed"] == recipe.train.seed
    assert 0 < recorded["final_loss"] < 1
    assert {"jax", "flax", "optax", "numpy", "python"} <= recorded["versions"].keys()


@each_model
def test_tokenizer_is_the_one_the_project_builds(model, name, tmp_path):
    task = settings.load(RunConfig, PROJECT / "configs" / f"{name}.yaml").data.task
    build_tiny_tokenizer(tmp_path, TASKS[task].WORDS)
    assert (model_folder(model) / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@each_model
def test_the_configuration_is_of_the_model_and_of_the_warm_up(model, name):
    config = settings.load(RunConfig, PROJECT / "configs" / f"{name}.yaml")
    recipe = settings.load(SftConfig, PROJECT / "configs" / f"{name}_sft.yaml")
    assert config.model.path == model
    assert settings.mode_prompts(config.prompt) == load_policy(model_folder(model)).prompts
    assert config.data.task == config.reward.grader == recipe.data.task


@each_model
def test_size(model, name):
    folder = model_folder(model)
    policy = load_policy(folder)
    params = huggingface.load_params(folder, policy.config)
    assert 0.3e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 2e6
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6


def test_every_configuration_file_loads():
    for path in (PROJECT / "configs").glob("*.yaml"):
        kind = SftConfig if "sft" in path.name else RunConfig
        tree = yaml.safe_load(path.read_text())
        assert settings.load(kind, path).output == tree.get("output", "runs")
