"""The keys of verl's PPO and GRPO trainer, each with its rule.

They are those of `verl/trainer/config/ppo_trainer.yaml` in https://github.com/volcengine/verl, of several versions.
"""

from typing import Any

from policy_split_jax.limits import MAX_SEED
from policy_split_jax.parity import verl_rules as rules
from policy_split_jax.parity.verl_rules import ACTOR, MODEL, OPTIM, POLICY_LOSS, REWARD, ROLLOUT, VALIDATION

_SEED = "train.seed seeds all of a run; neither order nor samples are verl's"
_PROMPT_KEY = (
    "chat messages are read from the column prompt: rename it; or where it holds plain text, set data.question_column "
    "and data.answer_column"
)
_ALONE = "every answer is graded by itself"
_OTHER_FILE = "what that file sets is not read: give verl's resolved configuration as YAML"
_OWN_FILE = "one of verl's own"
_OWN_NAMES = tuple(f"ppo_{kind}trainer{end}" for kind in ("", "megatron_") for end in ("", ".yaml"))
_MANAGER = rules.only(("naive", "prime", "dapo", None), _ALONE, _ALONE)

RULES: dict[str, rules.Rule] = {
    # Data.
    "data.train_files": rules.to("data.train", rules.one_file),
    "data.val_files": rules.to("data.test", rules.one_file),
    "data.train_batch_size": rules.to("rollout.questions_per_step", rules.whole(1)),
    "data.max_prompt_length": rules.to("rollout.max_prompt_tokens", rules.whole(1)),
    "data.max_response_length": rules.to("rollout.max_new_tokens", rules.whole(1)),
    "data.filter_overlong_prompts": rules.to(
        "rollout.long_prompts", lambda value: "skip" if rules.flag(value) else "error"
    ),
    "data.truncation": rules.truncation,
    "data.seed": rules.unless_null("train.seed decides", rules.to("train.seed", rules.whole(0, MAX_SEED), _SEED)),
    "data.shuffle": rules.only((True,), "questions are always shuffled"),
    "data.prompt_key": rules.only(("prompt",), _PROMPT_KEY, "verl's layout is read as it is"),
    "data.reward_fn_key": rules.only(("data_source",), "the grader is told the column data_source: rename it"),
    "data.train_max_samples": rules.only((-1, None), "all questions are used: write a smaller file"),
    "data.val_max_samples": rules.to("eval.questions", lambda value: 0 if value == -1 else rules.whole(1)(value)),
    "data.apply_chat_template_kwargs.enable_thinking": rules.to("prompt.enable_thinking", rules.flag),
    # The model.
    MODEL + "path": rules.to("model.path", rules.text),
    MODEL + "enable_gradient_checkpointing": rules.to(
        "model.remat", lambda value: "full" if rules.flag(value) else "none"
    ),
    ACTOR + "fsdp_config.dtype": rules.to("model.dtype", rules.dtype),
    ACTOR + "fsdp_config.model_dtype": rules.only(("fp32", "float32"), "parameters are float32"),
    # The optimizer.
    OPTIM + "lr": rules.to("optimizer.learning_rate", rules.not_negative),
    OPTIM + "lr_warmup_steps": rules.warmup,
    OPTIM + "lr_warmup_steps_ratio": rules.warmup_ratio,
    OPTIM + "lr_scheduler_type": rules.newer_scheduler,
    OPTIM + "warmup_style": rules.unless_null("lr_scheduler_type counts", rules.scheduler),
    OPTIM + "min_lr_ratio": rules.if_cosine(
        lambda value, run: rules.Converted({"optimizer.final_fraction": rules.lowest(run)})
    ),
    OPTIM + "num_cycles": rules.if_cosine(rules.only((0.5,), "a cosine decays once, over half a cycle")),
    OPTIM + "lr_decay_style": rules.only(("constant",), "Megatron's decays are not converted: set optimizer.decay"),
    OPTIM + "weight_decay": rules.to("optimizer.weight_decay", rules.not_negative),
    OPTIM + "betas": rules.betas,
    OPTIM + "clip_grad": rules.clip_grad,
    OPTIM + "optimizer": rules.only(("AdamW", "adamw", "adam"), "the optimizer is AdamW"),
    # The loss.
    ACTOR + "grad_clip": rules.unless_null(
        "optim.clip_grad counts", rules.to("optimizer.gradient_clip", rules.positive)
    ),
    ACTOR + "ppo_mini_batch_size": rules.mini_batch,
    ACTOR + "ppo_epochs": rules.only((1,), "rollouts are used once"),
    ACTOR + "clip_ratio": rules.clip_ratio,
    ACTOR + "clip_ratio_low": rules.unless_null("clip_ratio counts", rules.to("loss.clip_low", rules.below_1)),
    ACTOR + "clip_ratio_high": rules.unless_null("clip_ratio counts", rules.to("loss.clip_high", rules.not_negative)),
    ACTOR + "clip_ratio_c": rules.dual_clip,
    ACTOR + "loss_agg_mode": rules.aggregate,
    ACTOR + "loss_scale_factor": rules.scale_factor,
    ACTOR + "entropy_coeff": rules.entropy,
    ACTOR + "use_kl_loss": rules.penalty(ACTOR + "use_kl_loss", ACTOR + "kl_loss_coef"),
    ACTOR + "kl_loss_coef": rules.penalty(ACTOR + "use_kl_loss", ACTOR + "kl_loss_coef"),
    POLICY_LOSS + "loss_mode": rules.policy_loss,
    POLICY_LOSS + "clip_cov_ratio": rules.of_loss("clip_cov", "share", rules.share),
    POLICY_LOSS + "clip_cov_lb": rules.of_loss("clip_cov", "low", rules.real),
    POLICY_LOSS + "clip_cov_ub": rules.of_loss("clip_cov", "high", rules.real),
    POLICY_LOSS + "kl_cov_ratio": rules.of_loss("kl_cov", "share", rules.share),
    POLICY_LOSS + "ppo_kl_coef": rules.of_loss("kl_cov", "coefficient", rules.not_negative),
    # Rollouts and validation.
    ROLLOUT + "n": rules.rollouts,
    ROLLOUT + "temperature": rules.to("rollout.temperature", rules.positive),
    ROLLOUT + "top_k": rules.to("rollout.top_k", rules.top_k),
    ROLLOUT + "top_p": rules.to("rollout.top_p", rules.share),
    ROLLOUT + "do_sample": rules.only((True,), "rollouts are sampled"),
    ROLLOUT + "repetition_penalty": rules.only((1, None), "there is no penalty on repetition"),
    VALIDATION + "n": rules.to("eval.k", rules.whole(1)),
    VALIDATION + "temperature": rules.to("eval.temperature", rules.not_negative),
    VALIDATION + "top_k": rules.to("eval.top_k", rules.top_k),
    VALIDATION + "top_p": rules.to("eval.top_p", rules.share),
    VALIDATION + "do_sample": rules.validation_mode,
    # The algorithm.
    "algorithm.adv_estimator": rules.estimator,
    "algorithm.norm_adv_by_std_in_grpo": rules.to("advantage.norm_by_std", rules.flag),
    "algorithm.use_kl_in_reward": rules.penalty("algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef"),
    "algorithm.kl_ctrl.kl_coef": rules.penalty("algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef"),
    # Rewards.
    REWARD + "path": rules.grader_file,
    REWARD + "name": rules.grader,
    "reward_model.reward_manager": _MANAGER,
    "reward_manager.name": _MANAGER,
    "reward_manager.source": rules.only(("register", None), _ALONE),
    # The trainer.
    "--config-name": rules.only(_OWN_NAMES, _OTHER_FILE, _OWN_FILE),
    "--config-path": rules.only(("config", "./config", "verl/trainer/config"), _OTHER_FILE, _OWN_FILE),
    "trainer.experiment_name": rules.to("name", rules.text),
    "trainer.default_local_dir": rules.output,
    "trainer.total_training_steps": rules.unless_null(
        "trainer.total_epochs counts", rules.to("train.steps", rules.whole(1))
    ),
    "trainer.total_epochs": rules.epochs,
    "trainer.save_freq": rules.every("train.save_every", rules.WithoutEffect("checkpoints are kept all the same")),
    "trainer.test_freq": rules.every("train.eval_every", rules.Converted({"train.eval_every": 0})),
    "trainer.max_actor_ckpt_to_keep": rules.unless_null(
        "train.keep_checkpoints decides", rules.to("train.keep_checkpoints", rules.whole(1))
    ),
    "trainer.logger": rules.logger,
    "trainer.rollout_data_dir": rules.dump,
    "trainer.val_before_train": rules.only((True,), "a run always begins with an evaluation"),
    "trainer.resume_mode": rules.only(
        ("auto",), "a run goes on from its folder's last checkpoint: choose another name"
    ),
    "trainer.v1.trainer_mode": rules.only(("sync",), "rollouts are always those of the present policy"),
}

OFF: dict[str, str] = {
    "data.apply_chat_template_kwargs": "argument of the chat template but prompt.enable_thinking",
    "data.tokenizer": "tokenizer but the model's own",
    "data.custom_cls.path": "data class but ours",
    "data.sampler.class_path": "order of questions but a random one",
    "data.datagen.path": "generated data",
    "data.tool_config_path": "use of tools",
    "data.function_tool_path": "use of tools",
    MODEL + "tokenizer_path": "tokenizer but the model's own",
    MODEL + "hf_config_path": "configuration but the model's own",
    MODEL + "custom_chat_template": "chat template but the model's own",
    MODEL + "external_lib": "model but Qwen3",
    MODEL + "override_config": "change to a model's configuration",
    MODEL + "lora_rank": "LoRA: all parameters are trained",
    MODEL + "lora.rank": "LoRA: all parameters are trained",
    MODEL + "lora_adapter_path": "LoRA: all parameters are trained",
    MODEL + "mtp.enable": "multi-token prediction",
    OPTIM + "override_optimizer_config": "further setting of the optimizer",
    ACTOR + "shuffle": "order of mini-batches but that of the questions",
    ACTOR + "use_rollout_log_probs": "loss on the sampler's own log-probabilities",
    ACTOR + "fsdp_config.qat.enable": "quantization",
    ACTOR + "qat.enable": "quantization",
    ROLLOUT + "ignore_eos": "way to go on after the stop token",
    ROLLOUT + "multi_turn.enable": "conversation of several turns",
    ROLLOUT + "quantization": "quantization",
    ROLLOUT + "skip_rollout": "use of another run's rollouts",
    ROLLOUT + "over_sample_rate": "rollout that is not trained on",
    "skip.rollout.enable": "use of another run's rollouts",
    "distillation.enabled": "distillation",
    "algorithm.use_pf_ppo": "reweighting of rollouts",
    "algorithm.filter_groups.enable": "second sampling of questions whose rewards are all equal",
    "algorithm.rollout_correction": "correction for the sampler's log-probabilities",
    "algorithm.rollout_correction.rollout_is": "correction for the sampler's log-probabilities",
    "algorithm.rollout_correction.rollout_rs": "correction for the sampler's log-probabilities",
    "algorithm.rollout_correction.bypass_mode": "loss on the sampler's own log-probabilities",
    "reward_model.enable": "reward model: graders are functions",
    "reward_model.overlong_buffer.enable": "penalty on long answers: write it into a reward function",
    "reward_model.reward_kwargs.overlong_buffer_cfg.enable": "penalty on long answers: write it into a reward function",
    "reward.reward_kwargs.overlong_buffer_cfg.enable": "penalty on long answers: write it into a reward function",
    "reward_model.sandbox_fusion.url": "sandbox for code",
    "reward.sandbox_fusion.url": "sandbox for code",
    "sandbox_fusion.url": "sandbox for code",
    "trainer.val_only": "run that only evaluates: policy-split eval does",
    "trainer.resume_from_path": "reader of verl's checkpoints: make a Hugging Face folder of them for model.path",
    "trainer.default_hdfs_dir": "HDFS",
}
"""What there is not, and must therefore be off in verl."""

NO_COUNTERPART: tuple[tuple[str, str, str], ...] = (
    (
        "memory and speed only: train.microbatch_rows and train.microbatch_questions are ours",
        ACTOR,
        "ppo_micro_batch_size ppo_micro_batch_size_per_gpu use_dynamic_bsz ppo_max_token_len_per_gpu "
        "ppo_infer_micro_batch_size_per_gpu ppo_infer_max_token_len_per_gpu",
    ),
    (
        "memory and speed only",
        ACTOR,
        "strategy use_torch_compile use_fused_kernels use_remove_padding use_prefix_grouper rollout_n load_weight "
        "ulysses_sequence_parallel_size entropy_from_logits_with_chunking entropy_from_logits_chunk_size "
        "entropy_checkpointing pad_to_length calculate_entropy data_loader_seed calculate_sum_pi_squared "
        "sum_pi_squared_checkpointing profiler.",
    ),
    ("mesh.* is ours", ACTOR, "fsdp_config. megatron. veomni."),
    ("checkpoints are Orbax's", ACTOR, "checkpoint."),
    (
        "of another loss or another kind of model",
        ACTOR,
        "tau_pos tau_neg dro_beta freeze_vision_tower router_replay. qat.",
    ),
    ("of another loss or another kind of model", POLICY_LOSS, "dro_beta"),
    ("a run's own length counts", OPTIM, "total_training_steps lr_decay_steps lr_warmup_init min_lr zero_indexed_step"),
    (
        "the optimizer is optax's AdamW",
        OPTIM,
        "optimizer_impl weight_decay_incr_style lr_wsd_decay_style lr_wsd_decay_steps "
        "use_checkpoint_opt_param_scheduler",
    ),
    (
        "memory and speed only",
        MODEL,
        "use_remove_padding use_liger use_fused_kernels enable_activation_offload use_shm trust_remote_code "
        "override_config.attn_implementation fused_kernel_options. tiled_mlp.",
    ),
    ("off", MODEL, "lora_alpha target_modules exclude_modules lora. mtp."),
    (
        "the sampler uses the same mesh as training",
        ROLLOUT,
        "tensor_model_parallel_size data_parallel_size expert_parallel_size pipeline_model_parallel_size nnodes "
        "n_gpus_per_node",
    ),
    (
        "memory and speed only: rollout.slots is ours, for all devices together",
        ROLLOUT,
        "max_num_seqs gpu_memory_utilization max_num_batched_tokens max_model_len",
    ),
    ("data.max_prompt_length and data.max_response_length count", ROLLOUT, "prompt_length response_length"),
    (
        "the sampler is ours",
        ROLLOUT,
        "name mode dtype load_format layered_summon skip_dump_dir enforce_eager free_cache_engine disable_log_stats "
        "enable_chunked_prefill enable_prefix_caching cudagraph_capture_sizes scheduling_policy multi_stage_wake_up "
        "skip_tokenizer_init logprobs_mode calculate_log_probs log_prob_micro_batch_size mtp qat full_determinism seed "
        "log_prob_micro_batch_size_per_gpu log_prob_use_dynamic_bsz log_prob_max_token_len_per_gpu "
        "enable_rollout_routing_replay quantization_config_file moe_load_balance_metrics_interval engine_kwargs "
        "engine_kwargs. multi_turn. agent. checkpoint_engine. trace. profiler. prometheus. disaggregation. mtp. qat.",
    ),
    (
        "reading of data only",
        "data.",
        "val_batch_size gen_batch_size dataloader_num_workers filter_overlong_prompts_workers return_raw_input_ids "
        "return_raw_chat return_full_prompt return_multi_modal_inputs image_key video_key audio_key image_patch_size "
        "trust_remote_code use_shm validation_shuffle mm_processor_kwargs custom_cls.name sampler.class_name "
        "datagen.name",
    ),
    ("grpo does not use it", "algorithm.", "gamma lam"),
    (
        rules.NO_REFERENCE,
        "",
        "actor_rollout_ref.ref. actor_rollout_ref.actor.kl_loss_type algorithm.kl_penalty algorithm.kl_ctrl.",
    ),
    ("off", "algorithm.", "pf_ppo. filter_groups. rollout_correction."),
    (
        "off, or none of our graders' settings",
        "",
        "reward_model. reward_manager. sandbox_fusion. reward.sandbox_fusion. "
        "reward.reward_kwargs.overlong_buffer_cfg.",
    ),
    ("reward.workers is ours", "", "reward.num_workers"),
    ("the project in Weights & Biases is policy-split-jax", "trainer.", "project_name"),
    ("all visible devices are used", "trainer.", "nnodes n_gpus_per_node device"),
    ("no critic", "", "critic. trainer.critic_warmup trainer.max_critic_ckpt_to_keep"),
    (
        "no counterpart is needed",
        "trainer.",
        "balance_batch log_val_generations validation_data_dir esi_redundant_time del_local_ckpt_after_load "
        "ray_wait_register_center_timeout use_legacy_worker_impl use_v1 v1.",
    ),
    ("off", "", "distillation. skip."),
    ("profiling only", "", "global_profiler. profiler."),
    (
        "one program, without Ray",
        "",
        "ray_kwargs. ray_init. transfer_queue. model_engine actor_rollout_ref.hybrid_engine "
        "actor_rollout_ref.nccl_timeout",
    ),
    ("an option of hydra", "", "hydra. --"),
)
"""(Reason, beginning of the keys, ends): what there is nothing to set for. `section.` is all of a section."""

MOVED = {
    f"reward.{section}.": f"{section}." for section in ("custom_reward_function", "reward_model", "reward_manager")
}
"""Newer places of the same keys."""

DEFAULTS: dict[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.val_max_samples": -1,
    OPTIM + "lr": 1e-6,
    ACTOR + "ppo_mini_batch_size": 256,
    ACTOR + "clip_ratio_c": 3.0,
    ACTOR + "loss_agg_mode": "token-mean",
    ACTOR + "fsdp_config.dtype": "bfloat16",
    POLICY_LOSS + "loss_mode": "vanilla",
    POLICY_LOSS + "ppo_kl_coef": 0.1,
    ROLLOUT + "n": 1,
    VALIDATION + "n": 1,
    VALIDATION + "temperature": 0.0,
    VALIDATION + "do_sample": False,
    "algorithm.adv_estimator": "gae",
    REWARD + "path": None,
    "trainer.experiment_name": "gsm8k",
    "trainer.total_epochs": 30,
}
"""What verl does unless told otherwise where we do something else unless told otherwise."""


def present_key(key: str) -> str:
    """The key under which RULES and DEFAULTS have it."""
    for new, old in MOVED.items():
        if key.startswith(new):
            return old + key.removeprefix(new)
    return key


def rule_of(key: str) -> rules.Rule | None:
    """The rule for one of verl's keys; None for an unknown one."""
    if key in RULES:
        return RULES[key]
    if key in OFF:
        return rules.only((False, None, 0, "", [], {}), f"there is no {OFF[key]}", "off")
    if key.endswith("._target_"):
        return rules.nothing("a class of verl")
    ends = ((reason, start + end) for reason, start, names in NO_COUNTERPART for end in names.split())
    known = (reason for reason, end in ends if key == end or (end[-1] in ".-" and key.startswith(end)))
    return rules.nothing(reason) if (reason := next(known, None)) else None
