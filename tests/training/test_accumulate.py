"""Gradient accumulation against one batch and against gradients by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policy_split_jax.training.accumulate import Microbatches, accumulate_gradients, equal_parts, split_batch

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
    return jnp.sum(weights * error**2), {"errors": jnp.sum(error)}


def by_hand():
    """In NumPy float64: (loss, gradients, errors)."""
    x, y, weights = (np.asarray(values, np.float64) for values in make_data())
    w, b = np.array([1.0, -2.0]), 0.5
    error = x @ w + b - y
    gradient = {"w": np.einsum("ng,ngd->d", 2 * weights * error, x), "b": np.sum(2 * weights * error)}
    return np.sum(weights * error**2), gradient, error


def add(some, others):
    return jax.tree.map(jnp.add, some, others)


def assert_whole_batch(result):
    (loss, extra), gradient = result
    expected_loss, expected_gradient, error = by_hand()
    # Sums of 36 float32 terms of size 1.
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(extra["errors"], error.sum(), rtol=1e-5, atol=1e-5)
    assert abs(expected_loss) > 1


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_sums_are_those_of_the_whole_batch(count):
    @jax.jit
    def accumulate(params, batch):
        return accumulate_gradients(weighted_squares, params, batch, equal_parts(12, count), add)

    assert_whole_batch(accumulate(PARAMS, make_data()))


def test_one_program_serves_any_number_of_unequal_microbatches():
    """12 is nobody; the microbatches behind the used ones would count some twice."""

    @jax.jit
    def accumulate(params, batch, microbatches):
        return accumulate_gradients(weighted_squares, params, batch, microbatches, add)

    # What stands for nobody is zeros: an error of b without a weight, which is no error of the batch.
    nobody = 0.5
    three = Microbatches(jnp.array([[3, 0, 7, 11], [1, 2, 12, 12], [4, 5, 6, 8], [9, 10, 12, 12]]), jnp.int32(4))
    rest = jnp.array([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5]])
    for microbatches, missing in ((three, 4), (Microbatches(rest, jnp.int32(2)), 0)):
        (loss, extra), gradient = accumulate(PARAMS, make_data(), microbatches)
        errors = extra["errors"] - 3 * nobody * missing
        assert_whole_batch(((loss, {"errors": errors}), gradient))


def test_largest_values_join_as_the_caller_says():
    def loss(params, batch):
        return jnp.sum(params * batch["a"]), jnp.max(batch["a"])

    (value, extra), gradient = accumulate_gradients(
        loss, jnp.float32(3.0), {"a": jnp.array([0.0, 5.0, 2.0, 3.0])}, equal_parts(4, 2), jnp.maximum
    )
    assert float(value) == 3.0 * (0 + 5 + 2 + 3)
    assert float(gradient) == 10.0
    assert float(extra) == 5.0


def test_a_split_keeps_neighbours_together():
    parts = split_batch({"a": np.arange(6), "b": np.arange(12).reshape(6, 2)}, 3)
    assert parts["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert parts["b"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]


def test_a_split_that_does_not_go_up_fails():
    with pytest.raises((TypeError, ValueError), match="reshape"):
        split_batch(np.arange(5), 2)
