"""One number for each array of a tree, by which a checkpoint that was damaged on its way is known."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped, UInt32

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def fingerprints(tree: PyTree[Shaped[Array, "..."]]) -> PyTree[UInt32[Array, ""]]:
    """The sum over elements of their bits and positions, well mixed, modulo 2³².

    Sums of integers are exact, so that it does not matter over which devices an array is divided. Mixing takes no two
    words to the same one, so that a single element that is wrong always shows; anything else, such as two that are
    exchanged or many signs that are turned, goes unseen with a chance of 2⁻³².
    """
    return jax.tree.map(_fingerprint, tree)


def _fingerprint(values: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(values, _UNSIGNED[values.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(values.shape, jnp.uint32)
    for axis, size in enumerate(values.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, values.shape, axis)
    return jnp.sum(_mixed(bits + position * jnp.uint32(0x9E3779B9)), dtype=jnp.uint32)


def _mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last step of MurmurHash3: every bit of a word bears on every bit of what it becomes."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
