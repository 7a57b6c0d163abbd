"""The embedded model is what its provenance says."""

import json
from pathlib import Path

import jax
import yaml

from policy_split_jax import config as settings
from policy_split_jax.config import RunConfig, SftConfig
from policy_split_jax.data.tiny_tokenizer import build_tiny_tokenizer
from policy_split_jax.model import huggingface
from policy_split_jax.policy import load_policy, model_folder

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = model_folder("embedded")


def test_provenance_is_the_recipe_in_the_project():
    recorded = json.loads((FOLDER / "provenance.json").read_text())
    assert recorded["command"] == "policy-split sft configs/tiny_sft.yaml"
    recipe = settings.load(SftConfig, PROJECT / "configs" / "tiny_sft.yaml")
    assert settings.from_dict(SftConfig, recorded["config"], "provenance.json") == recipe
    assert recorded["seed"] == recipe.train.seed
    assert 0 < recorded["final_loss"] < 1
    assert {"jax", "flax", "optax", "numpy", "python"} <= recorded["versions"].keys()


def test_tokenizer_is_the_one_the_project_builds(tmp_path):
    build_tiny_tokenizer(tmp_path)
    assert (FOLDER / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_the_embedded_configuration_uses_the_prompt_of_the_warm_up():
    config = settings.load(RunConfig, PROJECT / "configs" / "tiny.yaml")
    assert settings.mode_prompts(config.prompt) == load_policy(FOLDER).prompts


def test_size():
    policy = load_policy(FOLDER)
    params = huggingface.load_params(FOLDER, policy.config)
    assert 0.3e6 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 2e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6


def test_every_configuration_file_loads():
    for path in (PROJECT / "configs").glob("*.yaml"):
        kind = SftConfig if "sft" in path.name else RunConfig
        tree = yaml.safe_load(path.read_text())
        assert settings.load(kind, path).output == tree.get("output", "runs")
