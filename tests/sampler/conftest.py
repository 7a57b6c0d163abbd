"""A tiny random Qwen3 for the tests of this folder."""

import jax
import pytest

from policy_split_jax.model import qwen3


@pytest.fixture(scope="session")
def config():
    return qwen3.Qwen3Config(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
    )


@pytest.fixture(scope="session")
def params(config):
    params = qwen3.init_params(config, jax.random.key(0))
    # Sharper than random logits are, so that a token depends on its context.
    params["final_norm"]["scale"] *= 2.0
    return params
