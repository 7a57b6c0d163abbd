"""The key/value cache of decoding: one pair of arrays per layer.

A layer's cache is an array of its own, not a slice of one stacked array: a decode step then updates it in
place, where a scan over layers would carry the stacked cache through every layer.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from policy_split_jax.model.attention import attention


class LayerCache(NamedTuple):
    """Keys and values of one layer; row b holds slot b's tokens at their positions."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


Cache = tuple[LayerCache, ...]


def init_cache(layers: int, slots: int, length: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> Cache:
    """A cache of zeros. What a slot held before is never cleared: `attend_cached` masks it."""
    shape = (slots, length, kv_heads, head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def attend_cached(
    cache: LayerCache,
    positions: Int[Array, "B"],
    queries: Float[Array, "B 1 N H"],
    keys: Float[Array, "B 1 K H"],
    values: Float[Array, "B 1 K H"],
) -> tuple[Float[Array, "B 1 N H"], LayerCache]:
    """Writes one token's keys and values at its position, and attends to everything up to it."""
    slots, length = cache.keys.shape[:2]
    rows = jnp.arange(slots)
    cache = LayerCache(
        cache.keys.at[rows, positions].set(keys[:, 0], mode="drop"),
        cache.values.at[rows, positions].set(values[:, 0], mode="drop"),
    )
    visible: Bool[Array, "B 1 S"] = (jnp.arange(length)[None, :] <= positions[:, None])[:, None]
    return attention(queries, cache.keys, cache.values, visible), cache
