"""Buckets and padding against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.padding import bucket, lengths, pad_left, pad_right

rows_of_tokens = st.lists(st.lists(st.integers(1, 151_935), max_size=9), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("length", "limit", "size"),
    [
        (0, 100, 16),
        (1, 100, 16),
        (16, 100, 16),
        (17, 100, 32),
        (64, 100, 64),
        (65, 100, 100),
        (100, 100, 100),
        (3, 5, 5),
        (12_289, 32_768, 16_384),
    ],
)
def test_bucket_is_a_power_of_two_capped_at_the_limit(length, limit, size):
    assert bucket(length, limit) == size


@settings(deadline=None, derandomize=True)
@given(length=st.integers(0, 40_000), spare=st.integers(0, 40_000))
def test_bucket_holds_the_length_and_wastes_less_than_half(length, spare):
    limit = max(length + spare, 1)
    size = bucket(length, limit)
    assert length <= size <= limit
    assert size <= 16 or size < 2 * length


def test_the_number_of_buckets_is_logarithmic():
    assert {bucket(length, 1000) for length in range(1, 1001)} == {16, 32, 64, 128, 256, 512, 1000}


def test_padding_by_hand():
    rows = [[1, 2, 3], [], [4]]
    np.testing.assert_array_equal(pad_right(rows, 4), [[1, 2, 3, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    np.testing.assert_array_equal(pad_left(rows, 4), [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 4]])
    np.testing.assert_array_equal(lengths(rows), [3, 0, 1])
    assert {pad_right(rows, 4).dtype, pad_left(rows, 4).dtype, lengths(rows).dtype} == {np.dtype(np.int32)}


def test_padding_to_the_exact_width_changes_nothing():
    rows = [[1, 2], [3, 4]]
    np.testing.assert_array_equal(pad_right(rows, 2), rows)
    np.testing.assert_array_equal(pad_left(rows, 2), rows)


@settings(deadline=None, derandomize=True)
@given(rows=rows_of_tokens, extra=st.integers(0, 3))
def test_every_row_is_found_again_and_the_rest_is_zero(rows, extra):
    width = max(map(len, rows)) + extra
    right, left, sizes = pad_right(rows, width), pad_left(rows, width), lengths(rows)
    assert right.shape == left.shape == (len(rows), width)
    for at, row in enumerate(rows):
        assert right[at, : sizes[at]].tolist() == left[at, width - sizes[at] :].tolist() == row
        assert not right[at, sizes[at] :].any()
        assert not left[at, : width - sizes[at]].any()


@pytest.mark.parametrize("pad", [pad_left, pad_right])
def test_a_row_that_does_not_fit_is_an_error_never_cut(pad):
    with pytest.raises(ValueError, match="broadcast"):
        pad([[1, 2, 3]], 2)
