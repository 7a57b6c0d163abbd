"""A run on eight devices, and its checkpoint on others."""

import json
import shutil

import jax
import numpy as np
import pytest

from policy_split_jax import config as settings
from policy_split_jax.config import RunConfig
from policy_split_jax.errors import UserError
from policy_split_jax.training.loop import train

SETTINGS = {
    "prompt": {"high_entropy": "High-entropy mode."},
    "data": {"numbers": [3], "train_size": 32, "test_size": 8},
    "rollout": {
        "questions_per_step": 8, "rollouts_per_mode": 2, "max_prompt_tokens": 64, "max_new_tokens": 8, "slots": 16,
    },
    "optimizer": {"learning_rate": 1e-3},
    "train": {"save_every": 1},
    "eval": {"questions": 4, "k": 2},
}  # fmt: skip


def run_config(folder, steps, **mesh):
    tree = SETTINGS | {"name": "run", "output": str(folder), "mesh": mesh}
    tree["train"] = SETTINGS["train"] | {"steps": steps}
    return settings.from_dict(RunConfig, tree, "test")


def losses(config):
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two steps on 4 x 2 devices, then one more there."""
    folder = tmp_path_factory.mktemp("first")
    train(run_config(folder, 2, data=4, fsdp=2))
    kept = shutil.copytree(folder, folder.with_name("kept"))
    train(run_config(folder, 3, data=4, fsdp=2))
    return kept, losses(run_config(folder, 3))


@pytest.mark.parametrize(
    ("count", "mesh"),
    [pytest.param(4, {"fsdp": 4}, marks=pytest.mark.slow), (8, {"data": 2, "fsdp": 2, "tp": 2}), (1, {})],
)
def test_a_run_goes_on_with_other_devices(first, tmp_path, monkeypatch, count, mesh):
    kept, expected = first
    folder = shutil.copytree(kept, tmp_path / "run")
    devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *backend: devices[:count])
    config = run_config(folder, 3, **mesh)
    train(config)
    found = losses(config)
    assert list(found) == [1, 2, 3]
    # Sums of float32 in another order; the rollouts of the third step are the same.
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-4, atol=1e-6)
    assert abs(expected[3]) > 1e-3


def test_settings_that_the_devices_cannot_share_are_refused(tmp_path):
    for change, words in (
        ({"mesh": {"tp": 3}}, "there are 8 devices"),
        ({"mesh": {"data": -1}}, "only one of data"),
        ({"mesh": {"tp": 4}}, "must divide the model's 2 key and value heads"),
        ({"rollout": {"questions_per_step": 1}}, "rollouts of a microbatch .*4 is not a multiple of 8"),
        ({"rollout": {"slots": 12}}, r"rollout\.slots: 12 is not a multiple of 8"),
    ):
        tree = {"name": "run", "output": str(tmp_path), **SETTINGS}
        tree |= {section: tree.get(section, {}) | values for section, values in change.items()}
        with pytest.raises(UserError, match=words):
            train(settings.from_dict(RunConfig, tree, "test"))
        assert not (tmp_path / "run").exists()
