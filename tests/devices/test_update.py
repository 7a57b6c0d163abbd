"""One training step on several meshes: the same numbers, and arrays where they belong."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from policy_split_jax.config import OptimizerConfig
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import make_mesh
from policy_split_jax.objective.advantages import AdvantageConfig
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.packing import pack_batch
from policy_split_jax.training.state import init_state, state_shardings
from policy_split_jax.training.update import UpdateConfig, make_update

QUESTIONS, GROUP, WIDTH, LENGTH = 4, 4, 12, 7
# Adam divides by the root of the second moment, so that rounding in tiny gradients becomes a whole step: a rate
# of 1e-3 in the parameters. SGD keeps differences in proportion.
SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def batch(config):
    draw = np.random.default_rng(0)
    shape = (QUESTIONS, GROUP)
    lengths = draw.integers(1, LENGTH + 1, shape).astype(np.int32)
    return Batch(
        prompts=draw.integers(0, config.vocab_size, (QUESTIONS, 2, WIDTH)).astype(np.int32),
        prompt_lengths=draw.integers(1, WIDTH + 1, (QUESTIONS, 2)).astype(np.int32),
        responses=draw.integers(0, config.vocab_size, (*shape, LENGTH)).astype(np.int32),
        response_lengths=lengths,
        modes=np.tile(np.array([0, 1], np.int32), (QUESTIONS, GROUP // 2)),
        truncated=lengths == LENGTH,
        rewards=draw.choice([0.0, 1.0], shape).astype(np.float32),
        graded=draw.random(shape) < 0.9,
        sampler_logprobs=draw.normal(-4.0, 0.5, (*shape, LENGTH)).astype(np.float32),
    )


def step(config, params, batch, mesh, optimizer=SGD, rows=0, **settings):
    """The state and the metrics after one step; without a mesh, as on one device."""
    chosen = UpdateConfig(advantage=AdvantageConfig(alpha=0.3, kappa=1.0), score_chunk=3, **settings)
    state = init_state(jax.tree.map(jnp.array, params), optimizer, 0, 0.5)
    if mesh is not None:
        state = jax.device_put(state, state_shardings(config, optimizer, mesh))
    packing = pack_batch(batch, rows=rows, limit=WIDTH + LENGTH, updates=1)[0] if rows else None
    return make_update(config, chosen, optimizer, mesh)(state, batch, packing)


SETTINGS = {
    "fused": {},
    "microbatches": {"microbatch_questions": 2, "remat": "full"},
    "two_pass": {"updates_per_step": 2},
    # Two microbatches of eight rows, some of which hold several rollouts.
    "packed": {"rows": 8, "remat": "full"},
}


@pytest.fixture(scope="module")
def on_one_device(config, params, batch):
    return cache(lambda name: jax.device_get(step(config, params, batch, None, **SETTINGS[name])))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_the_same_on_every_mesh(config, params, batch, mesh, name, on_one_device):
    if name != "fused" and mesh.shape["tp"] == 1:
        pytest.skip("for these one mesh of all three axes serves")
    expected_state, expected = on_one_device(name)
    state, metrics = step(config, params, batch, mesh, **SETTINGS[name])
    # Sums of float32 in another order.
    for key in ("loss", "grad_norm", "kl/high_entropy_to_normal", "entropy/normal", "sampler/kl"):
        np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-5, atol=1e-5, err_msg=key)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0),
        jax.device_get(state.params),
        expected_state.params,
    )
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), jax.device_get(state.params), params)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("mesh", ["1x8", "2x2x2"], indirect=True)
def test_the_state_keeps_its_place(config, params, batch, mesh):
    """Parameters and both moments, before and after a step; each device holds its part alone."""
    optimizer = make_optimizer(OptimizerConfig())
    wanted = state_shardings(config, optimizer, mesh)
    state, _ = step(config, params, batch, mesh, optimizer)
    same = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), state, wanted)
    assert all(jax.tree.leaves(same)), same
    # Chained: clipping, then Adam's moments first.
    adam = state.opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu):
        gate = tree["layers"]["mlp"]["gate"]
        assert gate.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "fsdp", "tp")), gate.ndim)
        assert gate.addressable_shards[0].data.size == gate.size // (mesh.shape["fsdp"] * mesh.shape["tp"])


def test_a_mesh_that_does_not_divide_the_model_is_refused(config):
    mesh = make_mesh(1, 2, 4, jax.devices())
    with pytest.raises(ValueError, match=r"mesh\.tp \(4\) must divide the model's 2 key and value heads"):
        qwen3.param_shardings(config, mesh)
