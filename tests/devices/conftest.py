"""Tests on eight emulated CPU devices; `tests/test_devices.py` runs them in a process of their own."""

import os

import jax
import numpy as np
import pytest

from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import make_mesh

if os.environ.get("JAX_NUM_CPU_DEVICES") != "8":
    collect_ignore_glob = ["test_*"]

MESHES = {"1": (1, 1, 1), "8x1": (8, 1, 1), "1x8": (1, 8, 1), "4x2": (4, 2, 1), "2x2x2": (2, 2, 2)}
"""data, fsdp, tp."""


@pytest.fixture(scope="session")
def config():
    return qwen3.Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
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
    return jax.device_get(params)


@pytest.fixture(scope="session", params=list(MESHES))
def mesh(request):
    sizes = MESHES[request.param]
    return make_mesh(*sizes, jax.devices()[: np.prod(sizes)])
