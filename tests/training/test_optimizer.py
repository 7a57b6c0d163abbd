"""Learning-rate schedules at steps worked out by hand, and AdamW against PyTorch's."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from policy_split_jax.config import OptimizerConfig, RunConfig, from_dict
from policy_split_jax.training.optimizer import make_optimizer, make_schedule, next_rate

CASES = {
    "constant": (OptimizerConfig(learning_rate=2.0), {0: 2.0, 1: 2.0, 10**6: 2.0}),
    "warm-up": (
        OptimizerConfig(learning_rate=2.0, warmup_steps=4),
        {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 100: 2.0},
    ),
    "warm-up of one step": (OptimizerConfig(learning_rate=2.0, warmup_steps=1), {0: 2.0, 1: 2.0, 2: 2.0}),
    "linear": (
        OptimizerConfig(learning_rate=2.0, decay="linear", decay_steps=10, final_fraction=0.1),
        {0: 2.0, 5: 1.1, 10: 0.2, 11: 0.2, 1000: 0.2},
    ),
    # 0.1 + 0.9 · (1 + cos(π·s/12)) / 2 of the rate.
    "cosine": (
        OptimizerConfig(learning_rate=2.0, decay="cosine", decay_steps=12, final_fraction=0.1),
        {0: 2.0, 4: 0.2 + 1.8 * 0.75, 6: 1.1, 8: 0.2 + 1.8 * 0.25, 12: 0.2, 13: 0.2, 1000: 0.2},
    ),
    "warm-up, then cosine": (
        OptimizerConfig(learning_rate=2.0, warmup_steps=2, decay="cosine", decay_steps=12, final_fraction=0.0),
        {0: 1.0, 1: 2.0, 2: 2.0, 8: 1.0, 14: 0.0, 1000: 0.0},
    ),
}


@pytest.mark.parametrize(("config", "rates"), CASES.values(), ids=CASES.keys())
def test_rates_by_hand(config, rates):
    schedule = make_schedule(config)
    # float32 in the schedule, a cosine among it.
    assert {step: float(schedule(step)) for step in rates} == pytest.approx(rates, abs=1e-6)


def test_the_first_update_already_moves():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.4, warmup_steps=4, weight_decay=0.0))
    params = jnp.array([1.0, 2.0])
    changes, _ = optimizer.update(jnp.array([0.3, -0.2]), optimizer.init(params), params)
    # AdamW's first step has the size of the rate, here a quarter of 0.4; its ε of 1e-8 is not seen.
    np.testing.assert_allclose(changes, [-0.1, 0.1], rtol=1e-5)


def test_the_next_rate_is_that_of_updates_made():
    config = OptimizerConfig(learning_rate=0.4, warmup_steps=4)
    optimizer = make_optimizer(config)
    params = jnp.array([1.0, 2.0])
    before = optimizer.init(params)
    _, after = optimizer.update(jnp.array([0.3, -0.2]), before, params)
    assert (next_rate(config, before), next_rate(config, after)) == pytest.approx((0.1, 0.2), rel=1e-6)


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_a_schedule_does_not_depend_on_the_length_of_the_run(decay):
    settings = {"warmup_steps": 3, "decay": decay, "decay_steps": 20}
    rates = []
    for steps in (1, 10, 1000):
        run = from_dict(RunConfig, {"name": "x", "train": {"steps": steps}, "optimizer": settings}, "test")
        schedule = make_schedule(run.optimizer)
        rates.append([float(schedule(step)) for step in (0, 2, 3, 10, 23, 500)])
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][-1] == pytest.approx(3e-6 * (1.0 if decay == "constant" else 0.1))


@pytest.mark.parametrize("gradient_clip", [0.5, 100.0])
def test_five_steps_are_those_of_pytorch(gradient_clip):
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=3, weight_decay=0.2, b1=0.8, b2=0.95, gradient_clip=gradient_clip
    )
    start = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    gradients = np.random.default_rng(1).normal(size=(5, 3, 4)).astype(np.float32)
    optimizer, ours = make_optimizer(config), jnp.asarray(start)
    state = optimizer.init(ours)
    weight = torch.nn.Parameter(torch.tensor(start))
    theirs = torch.optim.AdamW([weight], betas=(config.b1, config.b2), weight_decay=config.weight_decay)
    for step, gradient in enumerate(gradients):
        changes, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, changes)
        weight.grad = torch.tensor(gradient)
        norm = torch.nn.utils.clip_grad_norm_([weight], gradient_clip)
        assert (float(norm) > gradient_clip) == (gradient_clip == 0.5)
        theirs.param_groups[0]["lr"] = 0.1 * min(step + 1, 3) / 3
        theirs.step()
    # PyTorch adds 1e-6 to the norm it clips by; float32 otherwise.
    np.testing.assert_allclose(ours, weight.detach().numpy(), atol=1e-5, rtol=0)
    assert float(jnp.max(jnp.abs(ours - start))) > 0.1


def test_clipping_is_by_the_norm_of_everything():
    """Adam hides the scale of its first gradient: clipping shows in the second moment."""
    config = OptimizerConfig(learning_rate=0.1, gradient_clip=1.0, b2=0.9)
    optimizer = make_optimizer(config)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    _, state = optimizer.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, optimizer.init(params), params)
    # 3 and 4 have the norm 5: 0.6 and 0.8 are left; ν = 0.1 · g².
    second = optax.tree.get(state, "nu")
    np.testing.assert_allclose([second["a"][0], second["b"][0]], [0.1 * 0.36, 0.1 * 0.64], rtol=1e-5)


def test_weights_decay_without_a_gradient():
    config = replace(OptimizerConfig(), learning_rate=0.5, weight_decay=0.1)
    optimizer, params = make_optimizer(config), jnp.array([2.0, -4.0])
    changes, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
    np.testing.assert_allclose(changes, [-0.1, 0.2], rtol=1e-6)  # −rate · decay · weight


def test_a_narrow_first_moment_moves_almost_alike():
    """bfloat16 keeps 8 bits: each of ten steps is off by at most some 2⁻⁸ of itself."""
    draw, ends = np.random.default_rng(0), {}
    gradients = jnp.asarray(draw.normal(size=(10, 64)), jnp.float32)
    for kind in ("float32", "bfloat16"):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, first_moment=kind))
        params, state = jnp.ones(64), optimizer.init(jnp.ones(64))
        for gradient in gradients:
            changes, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, changes)
        ends[kind] = params
        assert optax.tree.get(state, "mu").dtype == kind
        assert optax.tree.get(state, "nu").dtype == "float32"
    moved = jnp.abs(ends["float32"] - 1)
    off = jnp.abs(ends["bfloat16"] - ends["float32"])
    assert 0 < jnp.max(off) < 10 * 0.1 * 2**-7
    assert jnp.mean(off) < 0.01 * jnp.mean(moved)
