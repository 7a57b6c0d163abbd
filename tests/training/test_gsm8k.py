"""GSM8K in verl's layout, Qwen3's own tokenizer, a small random Qwen3: two steps of a converted run."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy_split_jax.cli import main

# Third-party code of the checkpoint library warns about its own deprecations.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]

VOCABULARY = 151_936


@pytest.fixture
def model(shared, tmp_path):
    """One layer, all the words of Qwen3."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = Qwen3Config(vocab_size=VOCABULARY, eos_token_id=151_645, **sizes, **heads)
    folder = tmp_path / "model"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in (shared / "data" / "qwen3_tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def parquet(shared, tmp_path):
    """The first questions of each split, as verl's script for GSM8K lays them out."""

    def write(split, count):
        lines = (shared / "data" / "gsm8k" / f"{split}.jsonl").read_text().splitlines()[:count]
        rows = [
            {
                "data_source": "openai/gsm8k",
                "prompt": [{"role": "user", "content": row["question"]}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": row["answer"].rpartition("#### ")[2]},
                "extra_info": {"split": split, "index": index},
            }
            for index, row in enumerate(map(json.loads, lines))
        ]
        path = tmp_path / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    return {"train": write("train", 8), "test": write("test", 2)}


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("preset", ["paper", pytest.param("released", marks=pytest.mark.slow)])
def test_a_converted_run_trains_two_steps(model, parquet, tmp_path, preset, capsys):
    given = {
        "data.train_files": parquet["train"],
        "data.val_files": parquet["test"],
        "data.train_batch_size": 4,
        "data.max_prompt_length": 256,
        "data.max_response_length": 8,
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.actor.optim.lr": 1e-4,
        "actor_rollout_ref.rollout.n": 4,
        "trainer.experiment_name": "gsm8k",
        "trainer.default_local_dir": tmp_path / "runs" / "gsm8k",
    }
    converted = tmp_path / "run.yaml"
    assert main(["from-verl", *(f"{key}={value}" for key, value in given.items()), "--output", str(converted)]) == 0
    assert "unsupported and 0 unknown" in capsys.readouterr().out
    small = ["rollout.slots=16", "eval.questions=2", "eval.k=1", "train.steps=2", "train.microbatch_questions=1"]
    ours = ["objective=policy_split", f"preset={preset}", "train.dump_rollouts=true", *small]
    if preset == "released":
        ours.append("train.updates_per_step=4")
    assert main(["train", str(converted), *ours]) == 0
    folder = tmp_path / "runs" / "gsm8k"
    steps = [row for row in records(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        assert np.isfinite(row["loss"])
        assert row["grader/failed"] == 0
        # Random weights know nothing: every word is as likely as any.
        assert row["entropy/normal"] == pytest.approx(np.log(VOCABULARY), rel=0.01)
    prompts = {row["input"] for row in records(folder / "rollouts" / "1.jsonl")}
    assert len(prompts) == (12 if preset == "released" else 8)
