"""A run of verl's trainer as a configuration of ours."""

from itertools import chain
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from policy_split_jax.config import RunConfig, from_dict, known_keys, load
from policy_split_jax.errors import UserError
from policy_split_jax.parity.verl import Conversion, Setting, convert, read_overrides, to_yaml
from policy_split_jax.parity.verl_keys import NO_COUNTERPART, OFF, RULES, rule_of

ACTOR = "actor_rollout_ref.actor."
ROLLOUT = "actor_rollout_ref.rollout."

SCRIPT = r"""#!/usr/bin/env bash
# Don't run this one: it's an example.
set -xeuo pipefail

MODEL_PATH=${MODEL_PATH:-/models/Qwen3-1.7B}
project_name='maths'
exp_name="qwen3-$project_name"
max_prompt_length=$((1024 * 2))
max_response_length=$((1024 * 12))
train_files="['$HOME/data/deepmath.parquet']"
REWARD=(
    custom_reward_function.path=rewards/deepmath.py
    custom_reward_function.name=grade  # the same for both sets
)
if [ -n "${NNODES:-}" ]; then
    nodes=$NNODES
fi

PYTHONUNBUFFERED=1 python3 -m verl.trainer.main_ppo --config-name='ppo_trainer.yaml' \
    algorithm.adv_estimator=grpo \
    algorithm.use_kl_in_reward=False \
    data.train_files="$train_files" \
    data.val_files=/data/math500.parquet \
    data.train_batch_size=256 \
    data.max_prompt_length=$max_prompt_length \
    data.max_response_length=${max_response_length} \
    data.filter_overlong_prompts=True \
    data.truncation='error' \
    data.shuffle=False \
    +data.apply_chat_template_kwargs.enable_thinking=True \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.optim.lr=3e-6 \
    actor_rollout_ref.actor.optim.weight_decay=0.01 \
    actor_rollout_ref.actor.optim.lr_warmup_steps=10 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.top_k=-1 \
    actor_rollout_ref.rollout.val_kwargs.n=8 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=0.6 \
    actor_rollout_ref.rollout.val_kwargs.top_k=20 \
    "${REWARD[@]}" \
    trainer.logger='["console","tensorboard","swanlab"]' \
    trainer.project_name="${project_name}" \
    trainer.experiment_name="$exp_name" \
    trainer.default_local_dir="/runs/$exp_name" \
    trainer.rollout_data_dir=/runs/rollouts \
    trainer.n_gpus_per_node=8 \
    trainer.nnodes=$nodes \
    trainer.save_freq=20 \
    trainer.test_freq=10 \
    trainer.total_training_steps=78 \
    trainer.total_epochs=1 \
    ++trainer.favourite_colour=teal "$@" 2>&1 | tee $HOME/log.txt
"""


def converted(*words: str) -> Conversion:
    return convert(read_overrides(words))


def flat(conversion: Conversion) -> dict:
    return {setting.ours: setting.value for setting in (*conversion.defaults, *conversion.converted)}


def run_config(conversion: Conversion) -> RunConfig:
    return from_dict(RunConfig, conversion.settings, "converted")


def script(folder: Path, text: str) -> Path:
    path = folder / "run.sh"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_script_becomes_our_configuration(tmp_path: Path):
    conversion = convert(read_overrides(script(tmp_path, SCRIPT)))
    assert conversion.settings == {
        "name": "qwen3-maths",
        "output": "/runs",
        "objective": "grpo",
        "model": {"path": "/models/Qwen3-1.7B", "remat": "full", "dtype": "bfloat16"},
        "prompt": {"enable_thinking": True},
        "data": {"train": "$HOME/data/deepmath.parquet", "test": "/data/math500.parquet"},
        "reward": {"grader": "rewards/deepmath.py:grade"},
        "rollout": {
            "questions_per_step": 256,
            "max_prompt_tokens": 2048,
            "max_new_tokens": 12288,
            "long_prompts": "skip",
            "rollouts_per_mode": 4,
            "top_k": 0,
        },
        "loss": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "aggregate": "sequence_mean_token_mean"},
        # 10 steps of 256 / 64 updates.
        "optimizer": {"learning_rate": 3e-6, "weight_decay": 0.01, "warmup_steps": 40},
        "train": {
            "updates_per_step": 4,
            "steps": 78,
            "save_every": 20,
            "eval_every": 10,
            "tensorboard": True,
            "wandb": False,
            "dump_rollouts": True,
        },
        "eval": {"k": 8, "temperature": 0.6, "top_k": 20, "questions": 0},
    }
    assert set(conversion.unsupported) == {"data.shuffle", ACTOR + "use_kl_loss", ACTOR + "kl_loss_coef"}
    assert conversion.unknown == {"trainer.favourite_colour": "teal"}
    assert set(conversion.without_effect) == {
        "--config-name",
        "algorithm.use_kl_in_reward",
        "data.truncation",
        ACTOR + "ppo_micro_batch_size_per_gpu",
        ACTOR + "entropy_coeff",
        ROLLOUT + "name",
        ROLLOUT + "tensor_model_parallel_size",
        ROLLOUT + "gpu_memory_utilization",
        ROLLOUT + "val_kwargs.do_sample",
        "trainer.project_name",
        "trainer.n_gpus_per_node",
        "trainer.nnodes",
        "trainer.total_epochs",
    }


def test_a_converted_script_loads_and_says_where_its_settings_are_from(tmp_path: Path):
    conversion = convert(read_overrides(script(tmp_path, SCRIPT)))
    text = to_yaml(conversion)
    path = tmp_path / "converted.yaml"
    path.write_text(text, encoding="utf-8")
    config = load(RunConfig, path)
    assert (config.rollouts, config.optimizer.warmup_steps, config.loss.dual_clip) == (8, 40, 3.0)
    lines = text.splitlines()
    assert "  learning_rate: 3.0e-06  # actor_rollout_ref.actor.optim.lr" in lines
    assert "  dual_clip: 3.0  # verl's default of actor_rollout_ref.actor.clip_ratio_c" in lines
    assert "# - data.shuffle=false: questions are always shuffled" in lines
    assert "# - trainer.favourite_colour=teal" in lines
    assert "# - of trainer.logger there is no swanlab" in lines
    assert "# - data.train is $HOME/data/deepmath.parquet, which nothing replaces here: write it out" in lines


def test_what_is_not_given_is_as_verl_has_it():
    conversion = convert({})
    assert flat(conversion) == {
        "name": "gsm8k",
        "objective": "grpo",
        "model.dtype": "bfloat16",
        "reward.grader": "math",
        "rollout.questions_per_step": 1024,
        "rollout.max_prompt_tokens": 512,
        "rollout.max_new_tokens": 512,
        "loss.dual_clip": 3.0,
        "loss.aggregate": "token_mean",
        "optimizer.learning_rate": 1e-6,
        "train.updates_per_step": 4,
        "eval.questions": 0,
        "eval.k": 1,
        "eval.temperature": 0.0,
    }
    assert not any((conversion.converted, conversion.without_effect, conversion.unsupported, conversion.unknown))
    assert run_config(conversion).train.updates_per_step == 4
    said = "\n".join(conversion.remarks)
    assert "dual clip is on by default, with c = 3.0" in said
    assert "algorithm.adv_estimator is not given and therefore gae in verl" in said
    assert "rollout.n is not given and therefore 1 in verl: it must be even" in said
    assert "set it to 30 x (number of questions // 1024)" in said


@pytest.mark.parametrize(
    ("words", "ours", "value"),
    [
        (["data.train_files=/a/b.parquet"], "data.train", "/a/b.parquet"),
        (["data.val_files=['/a/b.parquet']"], "data.test", "/a/b.parquet"),
        (["data.train_batch_size=512"], "rollout.questions_per_step", 512),
        (["data.max_prompt_length=4096"], "rollout.max_prompt_tokens", 4096),
        (["data.max_response_length=4096"], "rollout.max_new_tokens", 4096),
        (["data.filter_overlong_prompts=false"], "rollout.long_prompts", "error"),
        (["data.seed=42"], "train.seed", 42),
        (["data.val_max_samples=100"], "eval.questions", 100),
        (["data.val_max_samples=-1"], "eval.questions", 0),
        (["+data.apply_chat_template_kwargs={enable_thinking: false}"], "prompt.enable_thinking", False),
        (["actor_rollout_ref.model.path=/m"], "model.path", "/m"),
        (["actor_rollout_ref.model.enable_gradient_checkpointing=False"], "model.remat", "none"),
        ([ACTOR + "fsdp_config.dtype=fp32"], "model.dtype", "float32"),
        ([ACTOR + "optim.lr=1e-5"], "optimizer.learning_rate", 1e-5),
        ([ACTOR + "optim.weight_decay=0.1"], "optimizer.weight_decay", 0.1),
        ([ACTOR + "optim.betas=[0.9,0.95]"], "optimizer.b2", 0.95),
        ([ACTOR + "optim.betas=[0.8,0.95]"], "optimizer.b1", 0.8),
        ([ACTOR + "optim.clip_grad=0.5"], "optimizer.gradient_clip", 0.5),
        ([ACTOR + "grad_clip=0.3", ACTOR + "optim.clip_grad=0.5"], "optimizer.gradient_clip", 0.3),
        ([ACTOR + "optim.lr_scheduler_type=constant"], "optimizer.decay", "constant"),
        ([ACTOR + "ppo_mini_batch_size=128"], "train.updates_per_step", 8),
        (["data.train_batch_size=64", ACTOR + "ppo_mini_batch_size=16"], "train.updates_per_step", 4),
        ([ACTOR + "clip_ratio=0.1"], "loss.clip_low", 0.1),
        ([ACTOR + "clip_ratio=0.1"], "loss.clip_high", 0.1),
        ([ACTOR + "clip_ratio=0.1", ACTOR + "clip_ratio_high=0.28"], "loss.clip_high", 0.28),
        ([ACTOR + "clip_ratio=0.1", ACTOR + "clip_ratio_low=null"], "loss.clip_low", 0.1),
        ([ACTOR + "clip_ratio_c=10.0"], "loss.dual_clip", 10.0),
        ([ACTOR + "loss_agg_mode=token-mean"], "loss.aggregate", "token_mean"),
        ([ACTOR + "loss_agg_mode=seq-mean-token-sum"], "loss.aggregate", "sequence_mean_token_sum"),
        ([ACTOR + "loss_agg_mode=seq-mean-token-mean"], "loss.aggregate", "sequence_mean_token_mean"),
        ([ACTOR + "loss_agg_mode=seq-mean-token-sum-norm"], "loss.aggregate", "constant"),
        ([ACTOR + "entropy_coeff=0.001"], "objective", "entropy_regularization"),
        ([ACTOR + "entropy_coeff=0.001"], "baseline.entropy_regularization.coefficient", 0.001),
        (["algorithm.adv_estimator=grpo"], "objective", "grpo"),
        (["algorithm.norm_adv_by_std_in_grpo=False"], "advantage.norm_by_std", False),
        ([ROLLOUT + "n=16"], "rollout.rollouts_per_mode", 8),
        ([ROLLOUT + "temperature=0.8"], "rollout.temperature", 0.8),
        ([ROLLOUT + "top_k=-1"], "rollout.top_k", 0),
        ([ROLLOUT + "top_k=50"], "rollout.top_k", 50),
        ([ROLLOUT + "top_p=0.9"], "rollout.top_p", 0.9),
        ([ROLLOUT + "val_kwargs.n=4"], "eval.k", 4),
        ([ROLLOUT + "val_kwargs.temperature=1"], "eval.temperature", 1.0),
        ([ROLLOUT + "val_kwargs.top_k=-1"], "eval.top_k", 0),
        ([ROLLOUT + "val_kwargs.top_p=0.7"], "eval.top_p", 0.7),
        (["custom_reward_function.path=a/b.py"], "reward.grader", "a/b.py:compute_score"),
        (["reward.custom_reward_function.path=a/b.py"], "reward.grader", "a/b.py:compute_score"),
        (["custom_reward_function.name=f", "custom_reward_function.path=b.py"], "reward.grader", "b.py:f"),
        (["trainer.experiment_name=007"], "name", "007"),
        (["trainer.experiment_name=7"], "name", "7"),
        (["trainer.default_local_dir=/ckpt/x", "trainer.experiment_name=x"], "output", "/ckpt"),
        (["trainer.default_local_dir=/ckpt/y", "trainer.experiment_name=x"], "output", "/ckpt/y"),
        (["trainer.default_local_dir=/ckpt/${trainer.experiment_name}"], "output", "/ckpt"),
        (["trainer.total_training_steps=100"], "train.steps", 100),
        (["trainer.save_freq=5"], "train.save_every", 5),
        (["trainer.test_freq=5"], "train.eval_every", 5),
        (["trainer.test_freq=-1"], "train.eval_every", 0),
        (["trainer.max_actor_ckpt_to_keep=2"], "train.keep_checkpoints", 2),
        (["trainer.logger=wandb"], "train.wandb", True),
        (["trainer.logger=[console]"], "train.wandb", False),
        (["trainer.rollout_data_dir=null"], "train.dump_rollouts", False),
    ],
)
def test_a_setting_gets_its_value(words: list[str], ours: str, value: object):
    conversion = converted(*words)
    assert flat(conversion)[ours] == value
    assert type(flat(conversion)[ours]) is type(value)
    assert not conversion.unsupported
    assert not conversion.unknown
    run_config(conversion)


def test_clip_cov_and_kl_cov_bring_their_settings_and_no_dual_clip():
    policy_loss = ACTOR + "policy_loss."
    clip = converted(
        policy_loss + "loss_mode=clip_cov",
        policy_loss + "clip_cov_ratio=0.001",
        policy_loss + "clip_cov_lb=2",
        policy_loss + "clip_cov_ub=6",
        policy_loss + "kl_cov_ratio=0.1",
        ACTOR + "clip_ratio_c=4",
    )
    config = run_config(clip)
    assert config.objective == "clip_cov"
    assert (config.baseline.clip_cov.share, config.baseline.clip_cov.low, config.baseline.clip_cov.high) == (
        0.001,
        2,
        6,
    )
    assert config.loss.dual_clip is None
    assert clip.without_effect == {
        policy_loss + "kl_cov_ratio": "loss_mode is not kl_cov",
        ACTOR + "clip_ratio_c": "clip_cov has no dual clip",
    }
    assert any("leaves out those that are clipped already" in remark for remark in clip.remarks)

    kl = run_config(converted(policy_loss + "loss_mode=kl_cov", policy_loss + "kl_cov_ratio=0.002"))
    # 0.1 is verl's default, 1.0 ours.
    assert (kl.objective, kl.baseline.kl_cov.share, kl.baseline.kl_cov.coefficient) == ("kl_cov", 0.002, 0.1)
    assert kl.loss.dual_clip is None


def test_schedules_are_counted_in_updates_and_need_the_length_of_the_run():
    cosine = [ACTOR + "optim.lr_scheduler_type=cosine", ACTOR + "optim.lr_warmup_steps_ratio=0.1"]
    rest = [ACTOR + "optim.min_lr_ratio=0.2", ACTOR + "ppo_mini_batch_size=512"]
    known = converted(*cosine, *rest, "trainer.total_training_steps=50")
    optimizer = run_config(known).optimizer
    # Of 50 steps of 2 updates, 5 steps of warm-up.
    assert (optimizer.decay, optimizer.warmup_steps, optimizer.decay_steps) == ("cosine", 10, 90)
    assert optimizer.final_fraction == 0.2
    assert Setting(ACTOR + "optim.min_lr_ratio", "optimizer.final_fraction", 0.2) in known.converted
    assert any("moves once a step" in remark for remark in known.remarks)

    unknown = converted(*cosine, ACTOR + "ppo_mini_batch_size=512")
    assert set(unknown.unsupported) == {ACTOR + "optim.lr_scheduler_type", ACTOR + "optim.lr_warmup_steps_ratio"}
    assert "optimizer.warmup_steps counts updates: set it to 0.1 x train.steps x 2" in unknown.remarks
    assert any("(train.steps - steps of the warm-up) x 2" in remark for remark in unknown.remarks)

    older = converted(ACTOR + "optim.warmup_style=cosine", "trainer.total_training_steps=50")
    assert (older.settings["optimizer"]["decay_steps"], older.settings["optimizer"]["final_fraction"]) == (200, 0.0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["algorithm.adv_estimator=gae"], "those of grpo"),
        ([ACTOR + "use_kl_loss=True"], "no reference model"),
        (["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.01"], "no reference model"),
        (["data.shuffle=False"], "always shuffled"),
        (["data.train_files=['/a.parquet','/b.parquet']"], "2 files"),
        (["data.train_max_samples=100"], "all questions"),
        (["data.prompt_key=question"], "column prompt"),
        (["data.truncation=left"], "never truncated"),
        (["data.train_batch_size=lots"], "must be a number"),
        (["data.train_batch_size=2.5"], "whole number"),
        (["data.train_batch_size=$N"], "not known here"),
        ([ACTOR + "ppo_mini_batch_size=100"], "must divide data.train_batch_size, which is 1024"),
        ([ACTOR + "ppo_epochs=2"], "once"),
        ([ACTOR + "shuffle=True"], "no order of mini-batches"),
        ([ACTOR + "clip_ratio_low=1.5"], "below 1"),
        ([ACTOR + "clip_ratio_c=1.0"], "above 1"),
        ([ACTOR + "loss_agg_mode=token-sum"], "losses are summed by token-mean"),
        ([ACTOR + "loss_scale_factor=100", ACTOR + "loss_agg_mode=seq-mean-token-sum-norm"], "max_new_tokens"),
        ([ACTOR + "policy_loss.loss_mode=gspo"], "vanilla, clip_cov and kl_cov"),
        (
            [ACTOR + "entropy_coeff=0.1", ACTOR + "policy_loss.loss_mode=kl_cov"],
            "objective kl_cov has no entropy bonus",
        ),
        ([ACTOR + "optim.optimizer=AdamW8bit"], "AdamW"),
        ([ACTOR + "optim.betas=[0.9]"], "two numbers"),
        ([ACTOR + "optim.lr=-1"], "at least 0"),
        ([ACTOR + "fsdp_config.dtype=float16"], "bfloat16 or float32"),
        (["actor_rollout_ref.model.lora_rank=32"], "no LoRA"),
        ([ROLLOUT + "n=5"], "must be even"),
        ([ROLLOUT + "temperature=0"], "above 0"),
        ([ROLLOUT + "do_sample=False"], "sampled"),
        ([ROLLOUT + "multi_turn.enable=True"], "several turns"),
        ([ROLLOUT + "val_kwargs.do_sample=False", ROLLOUT + "val_kwargs.temperature=0.6"], "greedily"),
        (["reward_model.enable=True"], "no reward model"),
        (["reward.reward_model.enable=True"], "no reward model"),
        (["reward_model.reward_manager=batch"], "by itself"),
        (["trainer.total_epochs=3", "data.train_batch_size=256"], "set it to 3 x (number of questions // 256)"),
        (["trainer.val_before_train=False"], "begins with an evaluation"),
        (["trainer.resume_mode=disable"], "another name"),
        (["algorithm.filter_groups.enable=True"], "no second sampling"),
        (["data.reward_fn_key=source"], "the column data_source"),
        ([ACTOR + "fsdp_config.model_dtype=bf16"], "parameters are float32"),
        ([ACTOR + "optim.lr_decay_style=cosine"], "set optimizer.decay"),
        ([ROLLOUT + "repetition_penalty=1.1"], "no penalty on repetition"),
        (["algorithm.kl_ctrl.kl_coef=0.01", "algorithm.use_kl_in_reward=True"], "no reference model"),
        (["reward_manager.name=batch"], "by itself"),
        (["reward_manager.source=importlib"], "by itself"),
        (["trainer.v1.trainer_mode=separate_async"], "of the present policy"),
        # A switch whose value is not known may be on.
        ([ACTOR + "use_kl_loss=$KL"], f"not known here; {ACTOR}use_kl_loss must be true or false"),
        ([ACTOR + "use_kl_loss=1"], f"{ACTOR}use_kl_loss must be true or false"),
        (["algorithm.use_kl_in_reward=${KL}"], "not known here; algorithm.use_kl_in_reward must be true or false"),
        ([ACTOR + "kl_loss_coef=$C", ACTOR + "use_kl_loss=True"], "not known here; there is no reference model"),
        ([ACTOR + "use_kl_loss=True", ACTOR + "kl_loss_coef=$C"], "there is no reference model"),
        (["data.shuffle=$SHUFFLE"], "not known here; questions are always shuffled"),
        (["trainer.logger=$LOGGER"], "not known here; it must be names of loggers"),
        (["--config-name=gsm8k_multiturn_grpo"], "what that file sets is not read"),
        (["--config-name=$CONFIG"], "not known here; what that file sets is not read"),
        (["--config-path=/my/configs"], "what that file sets is not read"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_reason(words: list[str], reason: str):
    conversion = converted(*words)
    key, _, value = words[0].partition("=")
    assert reason in conversion.unsupported[key].reason
    assert key not in {setting.verl for setting in conversion.converted}
    assert str(conversion.unsupported[key].value).replace(" ", "") == value
    run_config(conversion)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([ROLLOUT + "tensor_model_parallel_size=2"], "the sampler uses the same mesh as training"),
        (["trainer.n_gpus_per_node=8"], "all visible devices are used"),
        (["data.shuffle=True"], "the same here"),
        (["data.seed=null"], "train.seed decides"),
        (["data.truncation=left", "data.filter_overlong_prompts=True"], "rollout.long_prompts decides"),
        (["data.truncation=error"], "rollout.long_prompts decides"),
        (["actor_rollout_ref.model.lora_rank=0"], "off"),
        ([ACTOR + "use_kl_loss=True", ACTOR + "kl_loss_coef=0.0"], "its coefficient is 0"),
        ([ACTOR + "kl_loss_coef=0.001"], "off"),
        ([ACTOR + "clip_ratio=0.3", ACTOR + "clip_ratio_low=0.2", ACTOR + "clip_ratio_high=0.2"], "count"),
        ([ACTOR + "optim.lr_warmup_steps=-1"], "lr_warmup_steps_ratio counts"),
        ([ACTOR + "optim.lr_warmup_steps_ratio=0.1", ACTOR + "optim.lr_warmup_steps=3"], "lr_warmup_steps counts"),
        ([ACTOR + "optim.lr_scheduler_type=constant", ACTOR + "optim.warmup_style=constant"], "warmup_style counts"),
        ([ACTOR + "optim.num_cycles=0.7"], "the learning rate is constant"),
        (["trainer.total_epochs=3", "trainer.total_training_steps=9"], "trainer.total_training_steps counts"),
        (["trainer.save_freq=-1"], "checkpoints are kept all the same"),
        (["critic.optim.lr=1e-5"], "no critic"),
        ([ACTOR + "megatron.tensor_model_parallel_size=4"], "mesh.* is ours"),
        ([ACTOR + "optim._target_=a.b.C"], "a class of verl"),
        (["~trainer.logger"], "deleted there"),
        (["ray_kwargs.ray_init.num_cpus=4"], "one program, without Ray"),
        (["--config-name=ppo_megatron_trainer.yaml"], "one of verl's own"),
        (["--config-path=./config"], "one of verl's own"),
        (["--multirun=1"], "an option of hydra"),
    ],
)
def test_what_needs_no_counterpart_says_why(words: list[str], reason: str):
    conversion = converted(*words)
    key = words[0].partition("=")[0]
    assert reason in conversion.without_effect[key]
    assert key not in conversion.unsupported


def test_a_clip_ratio_that_newer_versions_do_not_read_is_remarked():
    remark = "in newer versions of verl clip_ratio counts only where"
    assert any(remark in said and "0.2" in said for said in converted(ACTOR + "clip_ratio=0.3").remarks)
    assert not any(remark in said for said in converted(ACTOR + "clip_ratio=0.2").remarks)
    both_null = [ACTOR + f"clip_ratio_{side}=null" for side in ("low", "high")]
    assert not any(remark in said for said in converted(ACTOR + "clip_ratio=0.3", *both_null).remarks)


def test_a_name_on_a_hub_is_remarked_and_a_folder_is_not():
    remark = "model.path is a folder here: where Qwen/Qwen3-8B is a name on a hub, download it and give its folder"
    assert remark in converted("actor_rollout_ref.model.path=Qwen/Qwen3-8B").remarks
    assert not any("hub" in said for said in converted("actor_rollout_ref.model.path=/m/Qwen3-8B").remarks)
    home = converted("actor_rollout_ref.model.path=~/Qwen3-8B").remarks
    assert "model.path is ~/Qwen3-8B, which nothing replaces here: write it out" in home


@pytest.mark.parametrize("files", [[], ["data.train_files=['/a.parquet','/b.parquet']"]])
def test_a_run_that_would_use_what_is_embedded_is_remarked(files: list[str]):
    remark = "data.train is not set: without it the run uses what is embedded in the package"
    assert remark in converted("data.val_files=/c.parquet", "actor_rollout_ref.model.path=/m", *files).remarks
    whole = ["data.train_files=/a.parquet", "data.val_files=/c.parquet", "actor_rollout_ref.model.path=/m"]
    assert not any("embedded" in said for said in converted(*whole).remarks)
    assert sum("embedded" in said for said in convert({}).remarks) == 3


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("a.b=1", "a.b", 1),
        ("+a.b=1", "a.b", 1),
        ("++a.b=-1", "a.b", -1),
        ("~a.b", "~a.b", None),
        ("a=1e-6", "a", 1e-6),
        ("a=.5", "a", 0.5),
        ("a=2.", "a", 2.0),
        ("a=True", "a", True),
        ("a=false", "a", False),
        ("a=null", "a", None),
        ("a=None", "a", "None"),
        ("a=", "a", ""),
        ("a=x=y", "a", "x=y"),
        ("a='1'", "a", "1"),
        ('a="x y"', "a", "x y"),
        ("a=['/a/b.parquet']", "a", ["/a/b.parquet"]),
        ('a=["a","b"]', "a", ["a", "b"]),
        ("a=[0.9,1,null]", "a", [0.9, 1, None]),
        ("a=[]", "a", []),
        ("a={}", "a", {}),
        ("a={b: 1, c: {d: x}}", "a.c.d", "x"),
        ("a=$HOME/x", "a", "$HOME/x"),
        ("a=${b.c}/x", "a", "${b.c}/x"),
        ("a=[${b.c}, x]", "a", "[${b.c}, x]"),
        ("a=2024-01-01", "a", "2024-01-01"),
        ("a=10:30", "a", "10:30"),
        ("a=no", "a", "no"),
        ("a=007", "a", "007"),
        ("a=" + "9" * 5000, "a", "9" * 5000),
    ],
)
def test_values_are_read_as_hydra_reads_them(word: str, key: str, value: object):
    found = read_overrides([word])
    assert found[key] == value
    assert type(found[key]) is type(value)


def test_of_a_key_given_twice_the_last_value_counts():
    assert read_overrides(["a=1", "+a=2"]) == {"a": 2}


@pytest.mark.parametrize("word", ["python3", "", "=3", "++=3"])
def test_words_that_are_no_overrides_are_refused(word: str):
    with pytest.raises(UserError, match="is no override of verl's; write key=value"):
        read_overrides([word])


def test_a_configuration_of_verl_is_read_from_yaml(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  train_batch_size: 8\n  custom_cls: {path: null}\nray_kwargs: {}\n")
    assert read_overrides(path) == {"data.train_batch_size": 8, "data.custom_cls.path": None, "ray_kwargs": {}}
    path.write_text("actor_rollout_ref:\n  actor:\n    entropy_coeff: 1e-3\n")
    # YAML reads this number as a text.
    assert converted_settings(path)["baseline.entropy_regularization.coefficient"] == 0.001
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_overrides(tmp_path / "nowhere.yaml")


def converted_settings(path: Path) -> dict:
    return flat(convert(read_overrides(path)))


def test_an_old_key_that_is_null_does_not_hide_its_new_place():
    keys = {"custom_reward_function.path": None, "reward.custom_reward_function.path": "a.py"}
    for given_keys in (keys, dict(reversed(keys.items()))):
        assert convert(given_keys).settings["reward"] == {"grader": "a.py:compute_score"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("python -m verl.trainer.main_ppo a=1 \\\n  b=2\nc=3\n", {"a": 1, "b": 2}),
        ("python -m verl.trainer.main_ppo a=1\\\n2 \\\nb=2", {"a": 12, "b": 2}),
        ("python verl/trainer/main_ppo.py a=1 # b=2", {"a": 1}),
        ("torchrun x.py; python -m verl.trainer.main_ppo a=1; echo b=2", {"a": 1}),
        ("python -m verl.trainer.main_ppo a=b#c d='e # f'", {"a": "b#c", "d": "e # f"}),
        ("N=4\npython -m verl.trainer.main_ppo a=$N b=${N} c=x${N}y", {"a": 4, "b": 4, "c": "x4y"}),
        ("python -m verl.trainer.main_ppo a=$N b=${N:-5} c=${N-6}", {"a": "$N", "b": 5, "c": 6}),
        ("N=\npython -m verl.trainer.main_ppo a=${N:-5}", {"a": 5}),
        ("N=4\nM=${M:-${N}}\npython -m verl.trainer.main_ppo a=$M", {"a": 4}),
        ("N=1\nN+=0\npython -m verl.trainer.main_ppo a=$N", {"a": 10}),
        ("export N=4\npython -m verl.trainer.main_ppo a=$N", {"a": 4}),
        ("declare -i N=4\npython -m verl.trainer.main_ppo a=$N", {"a": 4}),
        ("N=$((2 * 3 + 4))\npython -m verl.trainer.main_ppo a=$N b=$((N * 2))", {"a": 10, "b": 20}),
        ("python -m verl.trainer.main_ppo a=$((N / 2))", {"a": "$((N / 2))"}),
        ("N=1\nif true; then N=2; fi\npython -m verl.trainer.main_ppo a=$N", {"a": "$N"}),
        ("N=1\n[ -d x ] && N=2\npython -m verl.trainer.main_ppo a=$N", {"a": "$N"}),
        ("if true; then N=2; fi\nN=1\npython -m verl.trainer.main_ppo a=$N", {"a": 1}),
        ("f() {\n  N=2\n}\npython -m verl.trainer.main_ppo a=${N:-3}", {"a": "${N:-3}"}),
        ("case x in\n  y) N=2 ;;\nesac\nM=1\npython -m verl.trainer.main_ppo a=$N b=$M", {"a": "$N", "b": 1}),
        ("for n in 4 8; do\n  python -m verl.trainer.main_ppo a=$n\ndone", {"a": "$n"}),
        ('A=(a=1\n  b=2 # it\'s\n)\nA+=(c=3)\npython -m verl.trainer.main_ppo "${A[@]}"', {"a": 1, "b": 2, "c": 3}),
        ('A=(a=1)\nif true; then A+=(b=2); fi\npython -m verl.trainer.main_ppo "${A[@]}"', {"a": 1, "${A[@]}": None}),
        ("A='a=1 b=2'\npython -m verl.trainer.main_ppo $A $B \"$@\" ${@:2}", {"a": 1, "b": 2, "$B": None}),
        ("python -m verl.trainer.main_ppo a=\"['x','y']\" b='[\"x\"]'", {"a": ["x", "y"], "b": ["x"]}),
        ("python -m verl.trainer.main_ppo a=1 > log.txt 2>&1 &", {"a": 1}),
        ("python -m verl.trainer.main_ppo '' a=1 data", {"a": 1}),
        ("python -m verl.trainer.main_ppo a=$(date +%s)", {"a": "$(date +%s)"}),
        ("ray job submit -- python3 -m verl.trainer.main_ppo a=1 ~b.c", {"a": 1, "~b.c": None}),
        ("python -m verl.trainer.main_ppo --config-name mine a=1", {"--config-name": "mine", "a": 1}),
        ("C=mine\npython -m verl.trainer.main_ppo -cn $C a=1", {"--config-name": "mine", "a": 1}),
        ('python -m verl.trainer.main_ppo a=1 --config-path "$C" b=2', {"a": 1, "--config-path": "$C", "b": 2}),
    ],
)
def test_overrides_are_found_in_scripts(tmp_path: Path, text: str, found: dict):
    assert read_overrides(script(tmp_path, text)) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo 1\n", r"run\.sh: starts verl\.trainer\.main_ppo 0 times"),
        ("python -m verl.trainer.main_ppo a=1\n" * 2, r"run\.sh: starts verl\.trainer\.main_ppo 2 times"),
        ("echo 1\npython -m verl.trainer.main_ppo a='1\n", r"run\.sh:2: a quotation mark without its partner"),
    ],
)
def test_scripts_that_cannot_be_read_say_so(tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError, match=message):
        read_overrides(script(tmp_path, text))


def test_files_that_cannot_be_read_say_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"no\.sh: cannot be read"):
        read_overrides(tmp_path / "no.sh")
    (tmp_path / "run.sh").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"run\.sh: not UTF-8 at byte 0"):
        read_overrides(tmp_path / "run.sh")


def test_every_key_of_the_tables_has_one_place():
    lists = [list(RULES), list(OFF), [start + end for _, start, names in NO_COUNTERPART for end in names.split()]]
    keys = list(chain.from_iterable(lists))
    assert len(keys) == len(set(keys))
    assert all(rule_of(key) for key in keys)


KEYS = sorted({*RULES, *OFF, "critic.x", "a.b", "reward.custom_reward_function.path", "~trainer.logger", "~a", ""})
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
LIKELY = st.sampled_from(
    [1, 2, 8, 64, 0.1, 0.5, "cosine", "clip_cov", "kl_cov", "grpo", "/a/b.py", "x\ny", "\x85", True]
)
VALUES = SCALARS | LIKELY | st.lists(SCALARS | LIKELY, max_size=3) | st.just({})


@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=12))
def test_no_given_key_vanishes_and_the_yaml_says_the_same(overrides: dict):
    conversion = convert(overrides)
    converted_keys = {setting.verl for setting in conversion.converted}
    places = [converted_keys, conversion.without_effect, conversion.unsupported, conversion.unknown]
    assert sorted(chain.from_iterable(places)) == sorted(overrides)
    assert {setting.ours for setting in (*conversion.converted, *conversion.defaults)} <= set(known_keys(RunConfig))
    text = to_yaml(conversion)
    assert yaml.safe_load(text) == conversion.settings
    assert all(f"# - {key}=" in text for key in conversion.unknown if key.isprintable())


def test_texts_of_several_lines_stay_in_their_place():
    conversion = convert({"trainer.experiment_name": "x\n\ny: z # a", "b\nc: d": "e\nf: g"})
    assert yaml.safe_load(to_yaml(conversion)) == conversion.settings
    assert conversion.settings["name"] == "x\n\ny: z # a"


def test_settings_come_in_the_order_of_our_configurations():
    conversion = converted("trainer.save_freq=5", "data.train_files=a.parquet", ROLLOUT + "n=4")
    order = list(dict.fromkeys(key.partition(".")[0] for key in known_keys(RunConfig)))
    assert list(conversion.settings) == [section for section in order if section in conversion.settings]


def test_settings_are_named_with_their_keys():
    assert converted("trainer.save_freq=7").converted == (Setting("trainer.save_freq", "train.save_every", 7),)
