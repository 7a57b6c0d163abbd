"""Fingerprints against the formula in NumPy, and what they notice."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_split_jax.training.fingerprint import fingerprints

TYPES = (np.float32, np.int32, np.uint32, ml_dtypes.bfloat16, np.int8)


def some(kind, shape):
    return np.random.default_rng(0).integers(-100, 100, shape).astype(kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 5)])
def test_it_is_the_sum_of_bits_times_odd_numbers(kind, shape):
    values = some(kind, shape)
    bits = values.reshape(-1).view(f"u{values.itemsize}").astype(object)
    expected = sum(int(bit) * (2 * at + 1) for at, bit in enumerate(bits)) % 2**32
    assert int(fingerprints([jnp.asarray(values)])[0]) == expected


@given(st.integers(0, 23), st.integers(0, 31))
def test_every_single_bit_shows(at, bit):
    values = some(np.float32, (4, 6))
    wrong = values.copy()
    wrong.reshape(-1).view(np.uint32)[at] ^= np.uint32(1 << bit)
    assert int(fingerprints(jnp.asarray(values))) != int(fingerprints(jnp.asarray(wrong)))


def test_order_shows():
    values = jnp.arange(6.0)
    assert int(fingerprints(values)) != int(fingerprints(values[::-1]))
