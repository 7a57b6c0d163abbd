"""The whole job on the embedded model: does the run of configs/tiny.yaml split the policy, whatever the seed?

bash launch/test.sh -m slow tests/test_split.py
"""

import json
from pathlib import Path

import pytest

from policy_split_jax.cli import main

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_embedded_run_splits(seed, tmp_path):
    config = PROJECT / "configs" / "tiny.yaml"
    assert main(["train", str(config), f"output={tmp_path}", "name=run", f"train.seed={seed}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    start, end = summary["start"], summary["end"]
    kl = "kl/high_entropy_to_normal"
    assert end[kl] >= 0.1
    assert end[kl] >= 10 * start[kl]
    assert end["entropy/high_entropy"] >= 1.2 * end["entropy/normal"]
    assert end["accuracy/normal"] >= start["accuracy/normal"] + 0.05
