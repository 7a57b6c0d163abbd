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
def mixed(word):
    """The finalizer of MurmurHash3, of Python's integers."""
    word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
    word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
    return word ^ (word >> 16)


def number(values):
    return int(fingerprints(jnp.asarray(values)))


def test_mixing_is_murmurs():
    """As published: hashes of MurmurHash3_x86_32 of nothing, whose finalizer is all that is left, by their seeds."""
    assert [mixed(seed) for seed in (0, 1, 2**32 - 1)] == [0, 0x514E28B7, 0x81F16F39]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 5)])
def test_it_is_the_sum_of_mixed_bits_and_positions(kind, shape):
    values = some(kind, shape)
    bits = values.reshape(-1).view(f"u{values.itemsize}").astype(object)
    expected = sum(mixed((int(bit) + at * 0x9E3779B9) % 2**32) for at, bit in enumerate(bits)) % 2**32
    assert number(values) == expected


@given(st.integers(0, 23), st.integers(0, 31))
def test_every_single_bit_shows(at, bit):
    values = some(np.float32, (4, 6))
    wrong = values.copy()
    wrong.reshape(-1).view(np.uint32)[at] ^= np.uint32(1 << bit)
    assert number(values) != number(wrong)


@pytest.mark.parametrize("size", [2, 6, 65_536])
def test_turned_signs_show(size):
    values = np.random.default_rng(1).normal(size=size).astype(np.float32)
    assert number(-values) != number(values)
    two = values.copy()
    two[[0, size - 1]] *= -1
    assert number(two) != number(values)


def test_one_constant_in_place_of_another_shows():
    """As many elements as would make any constant's weighted sum 0."""
    zeros = np.zeros(65_536, np.float32)
    assert len({number(zeros), number(-zeros), number(zeros + 1)}) == 3


def test_order_shows():
    values = np.arange(6, dtype=np.float32)
    swapped = values[[0, 4, 2, 3, 1, 5]]
    assert len({number(values), number(values[::-1]), number(swapped)}) == 3
