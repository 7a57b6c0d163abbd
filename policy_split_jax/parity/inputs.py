"""What `policy-split compare step` compares on unless told otherwise: a small random Qwen3 and its own rollouts."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from policy_split_jax.config import EMBEDDED
from policy_split_jax.data.dataset import load_rows
from policy_split_jax.model import qwen3
from policy_split_jax.policy import Policy, load_policy, model_folder
from policy_split_jax.rewards import Grade
from policy_split_jax.rollouts import Group, sample_groups
from policy_split_jax.sampler.batcher import EngineConfig, Sampling
from policy_split_jax.sampler.rollout import Sampler


def random_model(seed: int = 0) -> tuple[Policy, qwen3.Params]:
    """Two layers, two query heads to a key head, tied embeddings, the embedded model's tokenizer.

    Weights are as large as trained ones: fresh ones are so small that every distribution is nearly uniform.
    """
    policy = load_policy(model_folder(EMBEDDED))
    config = qwen3.Qwen3Config(
        vocab_size=policy.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
    )
    draw = np.random.default_rng(seed)

    def weight(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = draw.normal(size=leaf.shape)
        norm = "norm" in jax.tree_util.keystr(path)
        return jax.numpy.asarray(1 + 0.3 * noise if norm else noise * config.hidden_size**-0.5, leaf.dtype)

    return replace(policy, config=config), jax.tree.map_with_path(weight, qwen3.abstract_params(config))


def sampled_groups(
    policy: Policy, params: qwen3.Params, modes: Sequence[int], questions: int, rollouts: int, seed: int = 0
) -> list[Group]:
    """Rollouts of embedded puzzles. Rewards are drawn, so that groups have right and wrong ones whatever the model."""
    rows = load_rows(EMBEDDED, count=questions, seed=seed)
    sampler = Sampler(EngineConfig(policy.config, policy.stop_ids, slots=16), max_prompt_tokens=512)
    groups = sample_groups(
        params,
        policy,
        sampler,
        rows,
        per_mode=rollouts // len(modes),
        key=jax.random.key(seed),
        sampling=Sampling(max_new_tokens=10),
        modes=modes,
    )
    draw = np.random.default_rng(seed)
    for group in groups:
        group.grades = [Grade(float(draw.integers(2))) for _ in group.rollouts]
    return groups
