"""Sampling on several meshes: the tokens of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from policy_split_jax.model import qwen3
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.batcher import EngineConfig, Prompt, Sampling
from policy_split_jax.sampler.rollout import Sampler, rollout_keys

NEW = 12


@pytest.fixture(scope="module")
def prompts(config):
    draw = np.random.default_rng(0)
    rows = [draw.integers(config.vocab_size, size=size).tolist() for size in (3, 9, 1, 5, 16, 7)]
    keys = rollout_keys(jax.random.key(0), np.arange(len(rows)), np.zeros(len(rows), np.int32), 5)
    return [Prompt(row, keys[at]) for at, row in enumerate(rows)]


def lies(array, mesh, *spec):
    return array.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), array.ndim)


def sampled(config, params, prompts, mesh):
    sampler = Sampler(EngineConfig(config, tuple(range(12)), slots=16, decode_steps=3, mesh=mesh), max_prompt_tokens=16)
    return [rollout for group in sampler(params, prompts, Sampling(NEW)) for rollout in group]


@pytest.fixture(scope="module")
def on_one_device(config, params, prompts):
    return sampled(config, params, prompts, None)


def test_rollouts_are_the_same_on_every_mesh(config, params, prompts, mesh, on_one_device):
    placed = jax.device_put(params, qwen3.param_shardings(config, mesh))
    rollouts = sampled(config, placed, prompts, mesh)
    assert len({len(rollout.tokens) for rollout in on_one_device}) > 3
    for ours, theirs in zip(rollouts, on_one_device, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        # Sums of float32 in another order.
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        assert ours.finish_reason == theirs.finish_reason


def test_slots_and_heads_are_divided(config, mesh):
    state = engine.init_state(config, 16, 32, NEW, jnp.float32, mesh)
    longer = state._replace(cache=tuple(engine.resize(layer, 64, mesh) for layer in state.cache))
    for each in (state, longer):
        assert lies(each.cache[0].keys, mesh, ("data", "fsdp"), "tp")
        assert lies(each.live, mesh, ("data", "fsdp"))
        assert each.cache[0].keys.addressable_shards[0].data.size == each.cache[0].keys.size // mesh.size


def test_a_policy_sampled_from_lies_whole_on_every_replica(config, params, mesh):
    """Only `tp` divides it: no decode step has to gather a weight."""
    placed = jax.device_put(params, qwen3.param_shardings(config, mesh))
    weights = qwen3.sampling_weights(placed, config=config, dtype=jnp.bfloat16, mesh=mesh)
    gate = weights.layers[1]["mlp"]["gate"]
    assert lies(gate, mesh, None, "tp")
    assert gate.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gate, params["layers"]["mlp"]["gate"][1].astype(jnp.bfloat16))


def test_slots_that_the_devices_cannot_share_are_refused(config, mesh):
    if mesh.size == 1:
        EngineConfig(config, (3,), slots=15, mesh=mesh)
        return
    with pytest.raises(ValueError, match=r"slots \(15\) must be a multiple of"):
        EngineConfig(config, (3,), slots=15, mesh=mesh)
