"""What the benchmarks share: two models, and runs that are timed in turn."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from policy_split_jax.model.qwen3 import Qwen3Config

SMALL = Qwen3Config(8192, 512, 1536, 8, 8, 4, 64)
TINY = Qwen3Config(512, 128, 384, 4, 4, 2, 32)
MODELS = {"small": SMALL, "tiny": TINY}

Seconds = dict[str, list[float]]


def in_turn(rounds: int, runs: dict[str, Callable[[], Any]]) -> Seconds:
    """Seconds of each run in each round, after one round that compiles."""
    seconds: Seconds = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


PRODUCT_FLOPS = 4 * 2 * 2048**3


def large_product() -> Callable[[], Any]:
    """PRODUCT_FLOPS in products of square matrices: what this machine's cores can do."""
    left, right = jnp.ones((4, 2048, 2048)), jnp.ones((2048, 2048))
    run = jax.jit(lambda left, right: jax.lax.map(lambda x: x @ right, left))
    return lambda: run(left, right)


def transformers_model(config: Qwen3Config) -> Any:
    """A random model of the same sizes by transformers."""
    import transformers

    settings = transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_embeddings,
    )
    return transformers.Qwen3ForCausalLM(settings)
