"""The key/value cache of decoding: one pair of arrays per layer.

A layer's cache is an array of its own, not a slice of one stacked array: a decode step then updates it in
place, where a scan over layers would carry the stacked cache through every layer. Positions are the last axis
of the keys, since a query meets all of them, and the last but one of the values: each product of a decode step
then reads memory in its order (docs/performance.md). Decode steps only read it: what they make goes to a small
cache of recent entries, which is merged after some steps. Writing at each slot's own position every step made a
TPU turn the whole cache around, back and forth (docs/scaling.md).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from policy_split_jax.model.attention import decode_attention


class PromptLayer(NamedTuple):
    """Keys and values of computed prompts in one layer."""

    keys: Float[Array, "*rows S K H"]
    values: Float[Array, "*rows S K H"]


class LayerCache(NamedTuple):
    """Keys and values of one layer; row b holds slot b's tokens at their positions."""

    keys: Float[Array, "B K H S"]
    values: Float[Array, "B K S H"]

    @property
    def length(self) -> int:
        """How many positions there are."""
        return self.keys.shape[-1]


Cache = tuple[LayerCache, ...]
PromptCache = tuple[PromptLayer, ...]


def init_cache(layers: int, slots: int, length: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> Cache:
    """A cache of zeros. What a slot held before is never cleared: `attend_cached` masks it."""
    keys, values = (slots, kv_heads, head_dim, length), (slots, kv_heads, length, head_dim)
    return tuple(LayerCache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(layers))


def resize_layer(layer: LayerCache, length: int) -> LayerCache:
    """The same entries in a longer or shorter cache."""
    kept = min(length, layer.length)
    added = [(0, 0), (0, 0), (0, 0), (0, length - kept)]
    return LayerCache(
        jnp.pad(layer.keys[..., :kept], added),
        jnp.pad(layer.values[:, :, :kept], [added[at] for at in (0, 1, 3, 2)]),
    )


def insert_prompt(cache: LayerCache, prompt: PromptLayer, rows: Int[Array, "I"], slots: Int[Array, "I"]) -> LayerCache:
    """Copies row `rows[i]` of the prompts into slot `slots[i]`; a slot out of range is dropped."""
    # A prompt may be padded beyond the cache.
    width = min(prompt.keys.shape[1], cache.length)
    keys, values = prompt.keys[rows, :width], prompt.values[rows, :width]
    return LayerCache(
        cache.keys.at[slots, :, :, :width].set(keys.transpose(0, 2, 3, 1), mode="drop"),
        cache.values.at[slots, :, :width].set(values.transpose(0, 2, 1, 3), mode="drop"),
    )


def attend_cached(
    cache: LayerCache,
    recent: LayerCache,
    started: Int[Array, "B"],
    step: Int[Array, ""],
    queries: Float[Array, "B 1 N H"],
    keys: Float[Array, "B 1 K H"],
    values: Float[Array, "B 1 K H"],
) -> tuple[Float[Array, "B 1 N H"], LayerCache]:
    """Attends to the `started` first entries of the cache and to everything recent, this step's token included.

    Returns what is recent now: entry i is of step i, in every slot alike.
    """
    recent = LayerCache(
        jax.lax.dynamic_update_slice_in_dim(recent.keys, keys.transpose(0, 2, 3, 1), step, axis=3),
        jax.lax.dynamic_update_slice_in_dim(recent.values, values.transpose(0, 2, 1, 3), step, axis=2),
    )
    visible = jnp.arange(cache.length)[None, :] < started[:, None]
    now = jnp.broadcast_to(jnp.arange(recent.length) <= step, (len(started), recent.length))
    return decode_attention(queries, (cache.keys, recent.keys), (cache.values, recent.values), (visible, now)), recent


def merge_recent(cache: LayerCache, recent: LayerCache, started: Int[Array, "B"], ended: Int[Array, "B"]) -> LayerCache:
    """The cache with each slot's recent entries at its positions `started` to `ended`."""
    rows = jnp.arange(started.shape[0])[:, None]
    positions = started[:, None] + jnp.arange(recent.length)
    # The entries of a slot that ended early are nobody's; out of range, they are dropped.
    positions = jnp.where(positions < ended[:, None], positions, cache.length)
    return LayerCache(
        cache.keys.at[rows, :, :, positions].set(recent.keys.transpose(0, 3, 1, 2), mode="drop"),
        cache.values.at[rows, :, positions].set(recent.values.transpose(0, 2, 1, 3), mode="drop"),
    )
