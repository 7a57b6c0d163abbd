"""Attention over keys and values, with grouped query heads; the one place that computes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A finite stand-in for minus infinity: a row that may attend to nothing gives a uniform average, never NaN.
_MASKED_SCORE = -1e30


def attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(QKᵀ/√H)V, each of the K kv heads serving N/K query heads. Softmax in float32.

    `mask[b, t, s]` is true where query t may see key s.
    """
    batch, length, heads, head_dim = queries.shape
    kv_heads = keys.shape[2]
    grouped = queries.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    weights = _weights(scores, mask[:, None, None], head_dim).astype(values.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights, values)
    return mixed.reshape(batch, length, heads, head_dim)


def decode_attention(
    queries: Float[Array, "B 1 N H"],
    keys: Float[Array, "B K H S"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B 1 N H"]:
    """The same for one query a row, over keys and values in the layout of the cache."""
    batch, _, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bkgh,bkhs->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    weights = _weights(scores, visible[:, None, None], head_dim).astype(values.dtype)
    mixed = jnp.einsum("bkgs,bksh->bkgh", weights, values)
    return mixed.reshape(batch, 1, heads, head_dim)


def _weights(
    scores: Float[Array, "B K G *T S"], mask: Bool[Array, "B 1 1 *T S"], head_dim: int
) -> Float[Array, "B K G *T S"]:
    """softmax(scores / √H) over the keys that may be seen."""
    return jax.nn.softmax(jnp.where(mask, scores * head_dim**-0.5, _MASKED_SCORE), axis=-1)


def causal_mask(valid: Bool[Array, "B T"], segments: Int[Array, "B T"] | None = None) -> Bool[Array, "B T T"]:
    """Each position sees the valid positions up to itself; padding is seen by nobody.

    With `segments`, a position sees its own segment and segment 0: several responses after one prompt.
    """
    length = valid.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
    if segments is None:
        return mask
    own = segments[:, :, None] == segments[:, None, :]
    return mask & (own | (segments == 0)[:, None, :])
