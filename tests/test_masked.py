"""Masked reductions against NumPy float64 on the true positions alone, garbage everywhere else."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax import masked

GARBAGE = np.array([np.nan, np.inf, -np.inf, 3e38, -7.0], np.float32)
# Float32 against float64 on at most 60 numbers below 5: sums are off by about 1e-6, relative to their size.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
AXES = [None, 0, 1, -1, (0, 2), (1, 2)]
REDUCTIONS = {"count": masked.count, "total": masked.total, "mean": masked.mean, "std": masked.std,
              "extent": masked.extent}  # fmt: skip
seeds = st.integers(0, 2**32 - 1)
quantile = jax.jit(masked.quantile, static_argnames="q")
few = settings(max_examples=20, deadline=None, derandomize=True)


def oracle(name, chosen):
    """The reduction of a plain list of numbers."""
    number = len(chosen)
    if name == "count":
        return float(number)
    if name == "total":
        return float(np.sum(chosen))
    if number == 0 or (name == "std" and number < 2):
        return 0.0
    return {"mean": np.mean, "std": lambda x: np.std(x, ddof=1), "extent": np.ptp}[name](chosen)


def by_loops(name, values, mask, axis, keepdims):
    axes = range(values.ndim) if axis is None else np.atleast_1d(axis) % values.ndim
    kept = [1 if at in axes else size for at, size in enumerate(values.shape)]
    result = np.zeros(kept)
    for index in np.ndindex(*kept):
        window = tuple(slice(None) if at in axes else slice(i, i + 1) for at, i in enumerate(index))
        result[index] = oracle(name, values[window][mask[window]].astype(np.float64))
    return result if keepdims else result.squeeze(tuple(axes))


def random_case(seed):
    """Values with garbage where the mask is false; the first rows are empty and of one and two entries."""
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 4, 5)) < 0.6
    mask[0, :3] = False
    mask[0, 1, 2] = mask[0, 2, 0] = mask[0, 2, 4] = True
    values = rng.normal(0, 2, mask.shape).astype(np.float32)
    return np.where(mask, values, rng.choice(GARBAGE, mask.shape)), mask


def reduce(name, values, mask, **kwargs):
    return masked.count(mask, **kwargs) if name == "count" else REDUCTIONS[name](values, mask, **kwargs)


@partial(jax.jit, static_argnames=("name", "variants"))
def reduced(values, mask, name, variants):
    """The reduction over several choices of axes, in one compiled program."""
    return [reduce(name, values, mask, axis=axis, keepdims=keepdims) for axis, keepdims in variants]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_equal_plain_loops(name):
    values, mask = random_case(0)
    variants = tuple(itertools.product(AXES, (False, True)))
    for result, (axis, keepdims) in zip(reduced(values, mask, name, variants), variants, strict=True):
        expected = by_loops(name, values, mask, axis, keepdims)
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, **TOLERANCE, err_msg=f"axis {axis}")


@few
@given(seed=seeds)
def test_reductions_equal_plain_loops_on_random_masks(seed):
    values, mask = random_case(seed)
    for name in REDUCTIONS:
        (result,) = reduced(values, mask, name, ((-1, False),))
        np.testing.assert_allclose(result, by_loops(name, values, mask, -1, False), **TOLERANCE)


@pytest.mark.parametrize("name", ["total", "mean", "std", "extent"])
def test_the_mask_broadcasts(name):
    values, _ = random_case(1)
    values = np.nan_to_num(values, nan=1.0, posinf=2.0, neginf=-2.0).clip(-9, 9)
    mask = np.array([[True], [False], [True], [True]])
    result = reduce(name, jnp.array(values), jnp.array(mask), axis=(1, 2))
    whole = np.broadcast_to(mask, values.shape)
    np.testing.assert_allclose(result, by_loops(name, values, whole, (1, 2), False), **TOLERANCE)


@pytest.mark.parametrize("name", ["total", "mean", "std", "extent"])
@pytest.mark.parametrize("axis", [None, 1])
def test_an_empty_mask_gives_zero_with_a_finite_gradient(name, axis):
    values = jnp.array(np.resize(GARBAGE, (2, 5)))
    mask = jnp.zeros((2, 5), bool)

    def summed(values):
        return jnp.sum(reduce(name, values, mask, axis=axis))

    value, gradient = jax.jit(jax.value_and_grad(summed))(values)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 5)))


@pytest.mark.parametrize("name", ["total", "mean", "std", "extent"])
def test_gradients_are_those_of_the_true_positions(name):
    values, mask = random_case(2)
    # Random values: a row of equal ones, whose std has no derivative, has a test of its own.
    weights = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)

    def weighted(values):
        return jnp.sum(weights * reduce(name, values, jnp.array(mask), axis=-1))

    gradient = np.asarray(jax.jit(jax.grad(weighted))(values))
    assert np.isfinite(gradient).all()
    assert (gradient[~mask] == 0).all()
    clean = np.where(mask, values, 0).astype(np.float64)
    step = 1e-6
    for index in np.argwhere(mask):
        up, down = clean.copy(), clean.copy()
        up[tuple(index)] += step
        down[tuple(index)] -= step
        slope = sum(
            sign * np.sum(weights * by_loops(name, moved, mask, -1, False))
            for sign, moved in ((0.5 / step, up), (-0.5 / step, down))
        )
        # Central differences in float64 are good to about 1e-9; the rest is the float32 gradient's rounding.
        np.testing.assert_allclose(gradient[tuple(index)], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entries", [1, 4])
def test_std_without_spread_has_gradient_zero_not_nan(entries):
    values = jnp.array([2.0, 2.0, 2.0, 2.0, jnp.nan])
    mask = jnp.arange(5) < entries
    value, gradient = jax.value_and_grad(lambda x: masked.std(x, mask))(values)
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(5))


def test_std_of_two_by_hand():
    values = jnp.array([1.0, jnp.inf, 4.0])
    # Unbiased: sqrt(((1 - 2.5)^2 + (4 - 2.5)^2) / 1).
    np.testing.assert_allclose(masked.std(values, jnp.array([True, False, True])), 4.5**0.5, rtol=1e-6)


@pytest.mark.parametrize(("fill", "dtype"), [(0.0, np.float32), (-np.inf, np.float32), (-1.0, np.int32)])
def test_where_keeps_the_type_and_fills(fill, dtype):
    values = jnp.array([1, 2, 3], dtype)
    result = masked.where(jnp.array([True, False, True]), values, fill)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, [1, fill, 3])


def test_where_passes_no_gradient_to_what_is_masked():
    mask = jnp.array([True, False])
    gradient = jax.grad(lambda x: jnp.sum(jnp.log(masked.where(mask, x, 1.0))))(jnp.array([2.0, 0.0]))
    np.testing.assert_array_equal(gradient, [0.5, 0.0])


@few
@given(seed=seeds, q=st.one_of(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), st.floats(0, 1)))
def test_quantile_equals_numpy(seed, q):
    rng = np.random.default_rng(seed)
    mask = rng.random(17) < 0.6
    mask[rng.integers(17)] = True
    values = np.where(mask, rng.normal(0, 2, 17), rng.choice(GARBAGE, 17)).astype(np.float32)
    result = quantile(values, mask, q)
    # The place q * (n - 1) is rounded to float32 (1e-6 of at most 16), between values at most about 8 apart.
    expected = np.quantile(values[mask].astype(np.float64), q)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
def test_quantile_of_one_and_of_none(q):
    values = jnp.array([jnp.nan, 3.0, jnp.inf])
    assert masked.quantile(values, jnp.array([False, True, False]), q) == 3
    empty = jnp.zeros(3, bool)
    assert masked.quantile(values, empty, q) == 0
    np.testing.assert_array_equal(jax.grad(lambda x: masked.quantile(x, empty, q))(values), np.zeros(3))


def test_count_is_a_float_that_counts_beyond_bfloat16():
    result = masked.count(jnp.ones((300, 3), bool))
    assert result.dtype == jnp.float32
    assert result == 900
