"""Attention over keys and values, with grouped query heads; the one place that computes it.

`make_attend` chooses how whole sequences attend: plain XLA, on a TPU splash attention, on a GPU that of cuDNN, which
never hold a sequence's scores. Decoding and prompts are short of queries and always plain.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from policy_split_jax.model.sharding import BATCH, platform

Mix = Callable[[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]], Float[Array, "B T N H"]]
_SPLASH_LANES = 128
"""Splash attention takes sizes of heads, and cuts sequences into blocks, of multiples of this."""
_SPLASH_BLOCK = 512
_CUDNN_HEAD_DIM = 128
"""The largest head that cuDNN takes on every GPU."""

# A finite stand-in for minus infinity: a row that may attend to nothing gives a uniform average, never NaN.
_MASKED_SCORE = -1e30


def implementation(head_dim: int, mesh: Mesh | None, dtype: DTypeLike) -> Literal["xla", "splash", "cudnn"]:
    """How whole sequences attend on these devices, with activations of this type."""
    kind = platform(mesh)
    if kind == "tpu" and head_dim % _SPLASH_LANES == 0:
        return "splash"
    narrow = jnp.dtype(dtype).itemsize == 2
    if kind in ("gpu", "cuda") and narrow and head_dim % 8 == 0 and head_dim <= _CUDNN_HEAD_DIM:
        return "cudnn"
    return "xla"


class Branches(NamedTuple):
    """Rows in which several responses follow one prompt and do not see each other; sizes in columns."""

    prompt: int
    responses: int
    """How many; each has the same share of the columns behind the prompt."""

    def split(self, x: Array) -> tuple[Array, Array]:
        """A row's prompt [B, S, …], and its responses [B, R, C, …]."""
        return x[:, : self.prompt], x[:, self.prompt :].reshape(x.shape[0], self.responses, -1, *x.shape[2:])


def make_attend(
    valid: Bool[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    branches: Branches | None,
    *,
    head_dim: int,
    mesh: Mesh | None,
    dtype: DTypeLike,
) -> Mix:
    """Attention within whole sequences, as `causal_mask` says; what padding sees is nobody's business.

    Only plain attention has branches (`implementation`).
    """
    kind = implementation(head_dim, mesh, dtype)
    if branches is not None:
        assert kind == "xla", f"{kind} attention has no branches"
        return partial(branched_attention, valid=valid, branches=branches)
    if kind == "splash":
        kinds = valid.astype(jnp.int32) if segments is None else jnp.where(valid, segments, 0)
        return partial(splash_attention, kinds=kinds, mesh=mesh)
    if kind == "cudnn":
        return partial(cudnn_attention, mask=causal_mask(valid, segments), mesh=mesh)
    return partial(attention, mask=causal_mask(valid, segments))


def positions_of(
    valid: Bool[Array, "B T"], segments: Int[Array, "B T"] | None, branches: Branches | None = None
) -> Int[Array, "B T"]:
    """A token's position: how many tokens it sees before itself (0 for padding before any)."""
    if branches is not None:
        prompt, own = branches.split(valid)
        length = jnp.sum(prompt, axis=1)[:, None, None]
        behind = (length + jnp.cumsum(own, axis=2) - 1).reshape(valid.shape[0], -1)
        return jnp.concatenate([positions_of(prompt, None), jnp.maximum(behind, 0)], axis=1)
    seen = jnp.cumsum(valid, axis=1)
    if segments is None:
        return jnp.maximum(seen - 1, 0)
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    before = jax.lax.cummax(jnp.where(begins, seen - valid, 0), axis=1)
    return jnp.maximum(seen - before - 1, 0)


def splash_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    *,
    kinds: Int[Array, "B T"],
    mesh: Mesh | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """The same by the splash kernel of JAX, causal, only among tokens of one kind; no scores are kept.

    `interpret` emulates the kernel, for tests on a CPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = queries.shape[1]
    padded = -(-length // _SPLASH_LANES) * _SPLASH_LANES
    block = next(size for size in (_SPLASH_BLOCK, 256, _SPLASH_LANES) if padded % size == 0)
    sizes = splash.BlockSizes(*[block] * 6, block_q_dq=block, block_kv_dq=block)

    def heads_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N S H"]:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    def attend(queries: Array, keys: Array, values: Array, kinds: Array) -> Any:
        mask = masks.MultiHeadMask([masks.CausalMask((padded, padded))] * queries.shape[1])
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.vmap(kernel)(queries, keys, values, splash.SegmentIds(kinds, kinds))

    attend = _on_mesh(attend, mesh, PartitionSpec(BATCH, "tp"))
    kinds = jnp.pad(kinds, ((0, 0), (0, padded - length)))
    # The kernel does not scale.
    scaled = queries * queries.shape[-1] ** -0.5
    mixed = attend(heads_first(scaled), heads_first(keys), heads_first(values), kinds)
    return mixed.swapaxes(1, 2)[:, :length]


def cudnn_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    *,
    mask: Bool[Array, "B T T"],
    mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
    """The same by cuDNN's kernel, which keeps no scores: of T² there is only the mask, one for all layers and heads.

    The mask is causal, of which the kernel is told so that it passes over the other half.
    """

    def attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
        given = {"mask": mask[:, None], "is_causal": True, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(queries, keys, values, **given)

    return _on_mesh(attend, mesh, PartitionSpec(BATCH, None, "tp"))(queries, keys, values, mask)


def _on_mesh(attend: Callable[..., Any], mesh: Mesh | None, heads: PartitionSpec) -> Callable[..., Any]:
    """A kernel on every device's own rows and heads, which lie as said; its fourth argument has rows alone."""
    if mesh is None:
        return attend
    given = (heads, heads, heads, PartitionSpec(BATCH))
    return jax.shard_map(attend, mesh=mesh, in_specs=given, out_specs=heads, check_vma=False)


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


def branched_attention(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    *,
    valid: Bool[Array, "B T"],
    branches: Branches,
) -> Float[Array, "B T N H"]:
    """The same where responses share their prompt: scores between responses are never computed."""
    (prompt_valid, own_valid), rows = branches.split(valid), valid.shape[0]

    def each(own: Array) -> Array:
        return own.reshape(rows * branches.responses, *own.shape[2:])

    def behind(prompt: Array, own: Array) -> Array:
        return jnp.concatenate([jnp.repeat(prompt, branches.responses, axis=0), each(own)], axis=1)

    (first, own_queries), keys_parts, values_parts = (branches.split(x) for x in (queries, keys, values))
    mixed = attention(first, keys_parts[0], values_parts[0], causal_mask(prompt_valid))
    mask = causal_mask(behind(prompt_valid, own_valid))[:, branches.prompt :]
    own = attention(each(own_queries), behind(*keys_parts), behind(*values_parts), mask)
    return jnp.concatenate([mixed, own.reshape(rows, -1, *own.shape[2:])], axis=1)


def decode_attention(
    queries: Float[Array, "B 1 N H"],
    keys: tuple[Float[Array, "B K H _"], ...],
    values: tuple[Float[Array, "B K _ H"], ...],
    visible: tuple[Bool[Array, "B _"], ...],
) -> Float[Array, "B 1 N H"]:
    """The same for one query a row, over parts of keys and values in the layout of the cache."""
    batch, _, heads, head_dim = queries.shape
    kv_heads = keys[0].shape[1]
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = [jnp.einsum("bkgh,bkhs->bkgs", grouped, part, preferred_element_type=jnp.float32) for part in keys]
    mask = jnp.concatenate(visible, axis=-1)[:, None, None]
    weights = _weights(jnp.concatenate(scores, axis=-1), mask, head_dim).astype(values[0].dtype)
    ends = itertools.accumulate(part.shape[2] for part in values[:-1])
    mixed = [
        jnp.einsum("bkgs,bksh->bkgh", part_weights, part, preferred_element_type=jnp.float32)
        for part_weights, part in zip(jnp.split(weights, list(ends), axis=-1), values, strict=True)
    ]
    return sum(mixed[1:], mixed[0]).astype(queries.dtype).reshape(batch, 1, heads, head_dim)


def _weights(
    scores: Float[Array, "B K G *T S"], mask: Bool[Array, "B 1 1 *T S"], head_dim: int
) -> Float[Array, "B K G *T S"]:
    """softmax(scores / √H) over the keys that may be seen."""
    return jax.nn.softmax(jnp.where(mask, scores * head_dim**-0.5, _MASKED_SCORE), axis=-1)


def causal_mask(valid: Bool[Array, "B T"], segments: Int[Array, "B T"] | None = None) -> Bool[Array, "B T T"]:
    """Each position sees the valid positions up to itself; padding is seen by nobody.

    With `segments`, only those of its own: several sequences in a row.
    """
    length = valid.shape[1]
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
    return mask if segments is None else mask & (segments[:, :, None] == segments[:, None, :])
