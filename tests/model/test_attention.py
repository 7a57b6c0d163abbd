"""Splash attention against plain attention, and positions against the mask that defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.model.attention import (
    Branches,
    attention,
    branched_attention,
    causal_mask,
    cudnn_attention,
    implementation,
    positions_of,
    splash_attention,
)
from policy_split_jax.model.sharding import make_mesh


@pytest.fixture(scope="module")
def inputs():
    """Four query heads to two of keys; a row padded on both sides, one that is full."""
    draw = np.random.default_rng(0)
    length, head_dim = 150, 128
    queries = draw.normal(size=(2, length, 4, head_dim)).astype(np.float32)
    keys, values = draw.normal(size=(2, 2, length, 2, head_dim)).astype(np.float32)
    valid = np.ones((2, length), bool)
    valid[0, :40] = valid[0, 120:] = False
    return jnp.array(queries), jnp.array(keys), jnp.array(values), jnp.array(valid)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_splash_attention_equals_plain_attention(inputs, on_mesh):
    """Values, and gradients of everything, at the real tokens; the kernel is emulated."""
    *arrays, valid = inputs
    mesh = make_mesh(1, 1, 1, jax.devices()[:1]) if on_mesh else None
    weights = jnp.where(valid[..., None, None], jnp.sin(jnp.arange(128.0)), 0.0)
    # The second row holds three sequences, the first a single one.
    column = jnp.arange(valid.shape[1])
    segments = jnp.where(valid, 1 + jnp.stack([0 * column, (column > 20) + (column > 90)]), 0)

    def plain(queries, keys, values):
        mixed = attention(queries, keys, values, causal_mask(valid, segments))
        return jnp.sum(mixed * weights), mixed

    def splash(queries, keys, values):
        mixed = splash_attention(queries, keys, values, kinds=segments, mesh=mesh, interpret=True)
        return jnp.sum(mixed * weights), mixed

    expected_gradients, expected = jax.grad(plain, argnums=(0, 1, 2), has_aux=True)(*arrays)
    gradients, found = jax.grad(splash, argnums=(0, 1, 2), has_aux=True)(*arrays)
    # Both sum in float32, in another order.
    np.testing.assert_allclose(found[valid], expected[valid], atol=2e-5)
    assert np.abs(expected[valid]).max() > 0.5
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_cpus_attend_by_xla():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert implementation(128, None, dtype) == "xla"
        assert implementation(128, make_mesh(1, 1, 1, jax.devices()[:1]), dtype) == "xla"


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "expected"),
    [
        ("tpu", 128, "float32", "splash"),
        ("tpu", 64, "bfloat16", "xla"),
        ("gpu", 128, "bfloat16", "cudnn"),
        ("gpu", 128, "float32", "xla"),
        ("gpu", 20, "bfloat16", "xla"),
        ("gpu", 256, "bfloat16", "xla"),
    ],
)
def test_accelerators_attend_by_the_kernels_that_they_have(monkeypatch, platform, head_dim, dtype, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert implementation(head_dim, None, dtype) == expected


def test_cudnn_attention_is_asked_for_the_same(monkeypatch, inputs):
    """No CPU has cuDNN: the same call by XLA."""
    *arrays, valid = inputs
    asked = jax.nn.dot_product_attention

    def by_xla(*arguments, implementation, **settings):
        assert implementation == "cudnn"
        return asked(*arguments, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    mask = causal_mask(valid)
    for mesh in (None, make_mesh(1, 1, 1, jax.devices()[:1])):
        found = cudnn_attention(*arrays, mask=mask, mesh=mesh)
        np.testing.assert_allclose(found[valid], attention(*arrays, mask)[valid], atol=2e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_a_position_is_the_number_of_tokens_seen_before(tokens):
    """Any padding, and sequences of any lengths in a row."""
    valid = jnp.array([[real for real, _ in tokens]])
    # As sequences lie in packed rows: none goes on behind padding.
    packed = jnp.where(valid, 1 + jnp.cumsum(jnp.array([[begins or not real for real, begins in tokens]]), axis=1), 0)
    for chosen in (None, packed):
        seen = causal_mask(valid, chosen)
        expected = jnp.maximum(jnp.sum(seen, axis=-1) - 1, 0)
        found = positions_of(valid, chosen)
        np.testing.assert_array_equal(found[valid], expected[valid])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 3), st.lists(st.booleans(), min_size=40, max_size=40))
def test_branches_see_the_prompt_and_not_each_other(prompt, own, count, real):
    """Any padding anywhere: attention and positions, against a mask written down column by column."""
    width = prompt + count * own
    valid = np.array(real[: 2 * width]).reshape(2, width)
    branches = Branches(prompt, count)
    # 0 is the prompt, 1, 2, … the responses.
    branch = np.array([0] * prompt + [1 + at // own for at in range(count * own)])
    related = (branch[:, None] == branch[None]) | (branch[None] == 0)
    mask = np.tril(np.ones((width, width), bool)) & related & valid[:, None, :]
    draw = np.random.default_rng(0)
    queries, keys, values = (jnp.asarray(draw.normal(size=(2, width, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    found = branched_attention(queries, keys, values, valid=jnp.asarray(valid), branches=branches)
    expected = attention(queries, keys, values, jnp.asarray(mask))
    np.testing.assert_allclose(found[valid], expected[valid], rtol=1e-5, atol=1e-6)
    positions = positions_of(jnp.asarray(valid), None, branches)
    np.testing.assert_array_equal(positions[valid], mask.sum(axis=-1)[valid] - 1)
