"""Gradient accumulation against one batch and against gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.training.accumulate import accumulate_gradients, split_batch

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.float32(0.5)}


def make_data():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(12, 3, 2)), draw.normal(size=(12, 3))
    weights = draw.integers(0, 3, (12, 3)) / 16
    return jnp.float32(x), jnp.float32(y), jnp.float32(weights)


def weighted_squares(params, batch):
    """A sum with weights that were made for the whole batch, as the training losses are."""
    x, y, weights = batch
    error = x @ params["w"] + params["b"] - y
    return jnp.sum(weights * error**2), {"error": error, "first": error[:, 0]}


def by_hand():
    """In NumPy float64: (loss, gradients, errors)."""
    x, y, weights = (np.asarray(values, np.float64) for values in make_data())
    w, b = np.array([1.0, -2.0]), 0.5
    error = x @ w + b - y
    gradient = {"w": np.einsum("ng,ngd->d", 2 * weights * error, x), "b": np.sum(2 * weights * error)}
    return np.sum(weights * error**2), gradient, error


@pytest.mark.parametrize("microbatches", [1, 2, 3, 12])
def test_sums_are_those_of_the_whole_batch(microbatches):
    @jax.jit
    def accumulate(params, batch):
        return accumulate_gradients(weighted_squares, params, batch, microbatches)

    (loss, extra), gradient = accumulate(PARAMS, make_data())
    expected_loss, expected_gradient, error = by_hand()
    # Sums of 36 float32 terms of size 1.
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-5, atol=1e-5)
    # Auxiliary values come back in the batch's order, with its axes.
    np.testing.assert_allclose(extra["error"], error, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(extra["first"], error[:, 0], rtol=1e-5, atol=1e-5)
    assert abs(expected_loss) > 1


def test_accumulation_takes_whole_trees_and_no_auxiliary_value():
    def loss(params, batch):
        values, nothing = batch
        assert nothing is None
        return jnp.sum(params * values["a"]), None

    batch = ({"a": jnp.arange(4.0)}, None)
    (value, extra), gradient = accumulate_gradients(loss, jnp.float32(3.0), batch, 2)
    assert float(value) == 3.0 * (0 + 1 + 2 + 3)
    assert float(gradient) == 6.0
    assert extra is None


def test_a_split_keeps_neighbours_together():
    parts = split_batch({"a": np.arange(6), "b": np.arange(12).reshape(6, 2)}, 3)
    assert parts["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert parts["b"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]


def test_a_split_that_does_not_go_up_fails():
    with pytest.raises((TypeError, ValueError), match="reshape"):
        split_batch(np.arange(5), 2)
