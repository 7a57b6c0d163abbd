"""Qwen3 dense (https://arxiv.org/abs/2505.09388): the only Flax file.

Each weight is declared once, in an NNX module, with its shape, logical axes and initialiser. Outside this
file parameters are a plain nested dict of arrays with the layers stacked on axis 0, and the functions below
are pure: `forward` for training, `prefill` and `decode` for sampling. The language-model head stays outside
them, so that nobody builds logits of a whole batch by accident.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from policy_split_jax.model.attention import Branches, attention, causal_mask, make_attend, positions_of
from policy_split_jax.model.cache import Cache, PromptCache, PromptLayer, attend_cached
from policy_split_jax.model.sharding import (
    BATCH,
    SAMPLING_RULES,
    TRAINING_RULES,
    Rules,
    constrain,
    named_shardings,
    pinned,
    platform,
)

Params = Mapping[str, Any]
Rotary = tuple[Float[Array, "B T 1 J"], Float[Array, "B T 1 J"]]
# Attention as a layer sees it: (queries, keys, values) -> (mixed values, whatever the caller keeps).
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a dense Qwen3 model, named as in Hugging Face's config.json where it has a name."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embeddings pair its halves")


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> nnx.Param:
    """A matrix, drawn from a normal distribution of standard deviation fan_in^-1/2."""
    return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5, axes=axes)


def _scale(size: int, axis: str) -> nnx.Param:
    return nnx.Param(jnp.ones((size,)), axes=(axis,))


class Norm(nnx.Module):
    """RMS normalisation over the model dimension."""

    def __init__(self, config: Qwen3Config):
        self.scale = _scale(config.hidden_size, "norm")
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """Grouped-query attention with RMS-normalised queries and keys."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        model, heads, kv_heads, head = (
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.q = _weight(rngs, (model, heads, head), ("embed", "heads", "head_dim"), model)
        self.k = _weight(rngs, (model, kv_heads, head), ("embed", "kv_heads", "head_dim"), model)
        self.v = _weight(rngs, (model, kv_heads, head), ("embed", "kv_heads", "head_dim"), model)
        self.o = _weight(rngs, (heads, head, model), ("heads", "head_dim", "embed"), heads * head)
        self.q_norm = _scale(head, "head_dim")
        self.k_norm = _scale(head, "head_dim")
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "B T D"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "B T D"], Any]:
        queries = jnp.einsum("btd,dnh->btnh", x, self.q[...])
        keys = jnp.einsum("btd,dkh->btkh", x, self.k[...])
        values = jnp.einsum("btd,dkh->btkh", x, self.v[...])
        queries = rotate(rms_norm(queries, self.q_norm[...], self.eps), rotary)
        keys = rotate(rms_norm(keys, self.k_norm[...], self.eps), rotary)
        mixed, kept = attend(queries, keys, values)
        return jnp.einsum("btnh,nhd->btd", mixed, self.o[...]), kept


class MLP(nnx.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        model, hidden = config.hidden_size, config.intermediate_size
        self.gate = _weight(rngs, (model, hidden), ("embed", "mlp"), model)
        self.up = _weight(rngs, (model, hidden), ("embed", "mlp"), model)
        self.down = _weight(rngs, (hidden, model), ("mlp", "embed"), hidden)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Layer(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.attn_norm = Norm(config)
        self.attn = Attention(config, rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: Float[Array, "B T D"], rotary: Rotary, attend: Attend) -> tuple[Float[Array, "B T D"], Any]:
        mixed, kept = self.attn(self.attn_norm(x), rotary, attend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), kept


class Embed(nnx.Module):
    """The token embedding; also the head of a model with tied embeddings."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = _weight(rngs, shape, ("vocab", "embed"), config.hidden_size)


class Head(nnx.Module):
    """The language-model head of a model with untied embeddings."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        shape = (config.hidden_size, config.vocab_size)
        self.kernel = _weight(rngs, shape, ("embed", "vocab"), config.hidden_size)


class Ends(nnx.Module):
    """What stands before and after the layers."""

    def __init__(self, config: Qwen3Config, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs)
        self.final_norm = Norm(config)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs)


def rms_norm(x: Float[Array, "... H"], scale: Float[Array, "H"], eps: float) -> Float[Array, "... H"]:
    """Root-mean-square normalisation, in float32 (https://arxiv.org/abs/1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale


def rotary_embedding(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Rotary:
    """Cosines and sines of the rotary embedding (https://arxiv.org/abs/2104.09864), in float32."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], rotary: Rotary) -> Float[Array, "B T N H"]:
    """Rotates each pair (i, i + H/2) of a head by its position's angle."""
    cosine, sine = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


@cache
def _layer_graph(config: Qwen3Config) -> nnx.GraphDef:
    """The static half of one layer; its weights are joined to it where it is applied."""
    return nnx.graphdef(nnx.eval_shape(lambda: Layer(config, nnx.Rngs(0))))


@cache
def _final_norm_graph(config: Qwen3Config) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Norm(config)))


def init_params(config: Qwen3Config, key: Key[Array, ""]) -> dict[str, Any]:
    """Random parameters in float32; the tree's shapes are those of `abstract_params`."""
    ends_key, layers_key = jax.random.split(key)
    ends = nnx.to_pure_dict(nnx.state(Ends(config, nnx.Rngs(params=ends_key))))

    def layer(layer_key: Key[Array, ""]) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(Layer(config, nnx.Rngs(params=layer_key))))

    return {**ends, "layers": jax.vmap(layer)(jax.random.split(layers_key, config.num_layers))}


def abstract_params(config: Qwen3Config) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`: no memory, no computation."""
    return jax.eval_shape(partial(init_params, config), jax.random.key(0))


def logical_axes(config: Qwen3Config) -> dict[str, Any]:
    """The parameter tree with each array's logical axes: vocab, embed, norm, heads, kv_heads, head_dim, mlp, layers."""

    def axes(module: Callable[[], nnx.Module], prefix: tuple[str, ...]) -> dict[str, Any]:
        state = nnx.state(nnx.eval_shape(module))
        named = jax.tree.map(
            lambda variable: nnx.Variable(prefix + variable.axes),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return nnx.to_pure_dict(named)

    ends = axes(lambda: Ends(config, nnx.Rngs(0)), ())
    return {**ends, "layers": axes(lambda: Layer(config, nnx.Rngs(0)), ("layers",))}


def param_shardings(config: Qwen3Config, mesh: Mesh, rules: Rules = TRAINING_RULES) -> dict[str, Any]:
    """Where each parameter lies. Raises ValueError where the mesh does not divide an axis."""
    for size, axis, name in (
        (config.num_kv_heads, "tp", "key and value heads"),
        (config.intermediate_size, "tp", "hidden units"),
        (config.vocab_size, "tp", "tokens of the vocabulary"),
        (config.hidden_size, "fsdp", "model dimensions"),
    ):
        if size % mesh.shape[axis]:
            raise ValueError(f"mesh.{axis} ({mesh.shape[axis]}) must divide the model's {size} {name}")
    return named_shardings(logical_axes(config), mesh, rules)


def _by_token(x: Shaped[Array, "B T *N"], mesh: Mesh | None) -> Shaped[Array, "B T *N"]:
    """In training `tp` divides the tokens of a sequence everywhere but in attention, which it divides by heads.

    Of what a layer keeps for the backward pass every device then has its tokens' part
    (https://arxiv.org/abs/2309.14509).
    """
    return constrain(x, mesh, BATCH, "tp")


def _by_sequence(x: Float[Array, "B T D"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """In sampling a call has few tokens: `tp` divides the work on each of them."""
    return constrain(x, mesh, BATCH)


def _embed(params: Params, tokens: Int[Array, "B T"], dtype: DTypeLike, mesh: Mesh | None) -> Float[Array, "B T D"]:
    """Every device looks up its own columns for all sequences; then columns and sequences change places."""
    columns = params["embed"]["embedding"].astype(dtype)[tokens]
    return _by_token(constrain(columns, mesh, "data", None, "fsdp"), mesh)


def _embed_sampled(weights: "SamplingWeights", tokens: Int[Array, "B T"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """The rows of a sampling table are whole."""
    return _by_sequence(weights.ends["embed"]["embedding"][tokens], mesh)


def _cast(params: Any, dtype: DTypeLike) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _final_norm(params: Params, x: Float[Array, "B T D"], config: Qwen3Config) -> Float[Array, "B T D"]:
    weights = _cast(params["final_norm"], x.dtype)
    return nnx.merge(_final_norm_graph(config), weights)(x)


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    config: Qwen3Config,
    valid: Bool[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    branches: Branches | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Final hidden states of whole sequences, for training and scoring.

    `valid` marks real tokens; padding may stand anywhere, takes no position and is seen by nobody. A row may hold
    several sequences, told apart by `segments`, or with `branches` several responses behind one prompt. `dtype` is
    the activations' type; norms and softmax are in float32. `remat` says what the backward pass computes
    again of each layer: "none" nothing, "dots" all but the matrix products, "full" the whole layer.
    """
    rotary = rotary_embedding(positions_of(valid, segments, branches), config.head_dim, config.rope_theta)
    mix = make_attend(valid, segments, branches, head_dim=config.head_dim, mesh=mesh, dtype=dtype)

    def attend(*heads: Array) -> tuple[Array, None]:
        return _by_token(mix(*(_by_token(part, mesh) for part in heads)), mesh), None

    @partial(jax.checkpoint, policy=REMAT_POLICIES[remat])
    def block(x: Array, weights: Params) -> tuple[Array, None]:
        layer = nnx.merge(_layer_graph(config), _cast(weights, dtype))
        x, kept = layer(x, rotary, attend)
        return _by_token(x, mesh), kept

    # A CPU spends up to a fifth of an update on stacking what the layers keep.
    unrolled = platform(mesh) == "cpu"
    x, _ = jax.lax.scan(block, _embed(params, tokens, dtype, mesh), params["layers"], unroll=unrolled)
    return _final_norm(params, x, config)


class SamplingWeights(NamedTuple):
    """A policy as the sampler reads it: of one type, and layer by layer, so that no step casts or slices."""

    ends: Params
    """What stands before and after the layers."""
    layers: tuple[Params, ...]

    @property
    def dtype(self) -> jnp.dtype:
        """The type of the weights, and of the activations."""
        return self.ends["final_norm"]["scale"].dtype


@partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def sampling_weights(
    params: Params, *, config: Qwen3Config, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> SamplingWeights:
    """Made once a policy version. On a mesh they lie by `SAMPLING_RULES`."""
    cast = _cast(params, dtype)
    cast = pinned(cast, mesh and param_shardings(config, mesh, SAMPLING_RULES))
    layers = cast.pop("layers")
    return SamplingWeights(
        cast, tuple(jax.tree.map(lambda leaf, at=at: leaf[at], layers) for at in range(config.num_layers))
    )


def prefill(
    weights: SamplingWeights,
    tokens: Int[Array, "B T"],
    shared: PromptCache,
    *,
    config: Qwen3Config,
    mesh: Mesh | None = None,
) -> PromptCache:
    """Keys and values of right-padded prompts, of each layer [B, C + T, K, H].

    All prompts continue the same C tokens, whose keys and values are `shared`, of each layer [C, K, H]. What
    follows a prompt's true length is garbage that decoding never sees.
    """
    rows, width = tokens.shape
    before = shared[0].keys.shape[0]
    positions = jnp.broadcast_to(before + jnp.arange(width), tokens.shape)
    rotary = rotary_embedding(positions, config.head_dim, config.rope_theta)
    own = causal_mask(jnp.ones(tokens.shape, bool))
    mask = jnp.concatenate([jnp.ones((rows, width, before), bool), own], axis=-1)

    def attend(start: PromptLayer, queries: Array, keys: Array, values: Array) -> tuple[Array, PromptLayer]:
        full = PromptLayer(_continued(start.keys, keys), _continued(start.values, values))
        return attention(queries, full.keys, full.values, mask), full

    x, kept = _embed_sampled(weights, tokens, mesh), []
    for layer_weights, start in zip(weights.layers, shared, strict=True):
        x, full = nnx.merge(_layer_graph(config), layer_weights)(x, rotary, partial(attend, start))
        x = _by_sequence(x, mesh)
        kept.append(full)
    return tuple(kept)


def _continued(shared: Float[Array, "C K H"], own: Float[Array, "B T K H"]) -> Float[Array, "B S K H"]:
    return jnp.concatenate([jnp.broadcast_to(shared, (own.shape[0], *shared.shape)), own], axis=1)


def decode(
    weights: SamplingWeights,
    cache: Cache,
    recent: Cache,
    tokens: Int[Array, "B"],
    started: Int[Array, "B"],
    positions: Int[Array, "B"],
    step: Int[Array, ""],
    *,
    config: Qwen3Config,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """One token of each slot, at its position: its final hidden state, and what is recent now.

    The cache holds `started` tokens of each slot; `recent`, those of the steps before this one. The loop over
    layers is unrolled: see `model/cache.py`.
    """
    rotary = rotary_embedding(positions[:, None], config.head_dim, config.rope_theta)
    x = _embed_sampled(weights, tokens[:, None], mesh)
    updated = []
    for layer_weights, layer_cache, layer_recent in zip(weights.layers, cache, recent, strict=True):
        layer = nnx.merge(_layer_graph(config), layer_weights)
        x, layer_recent = layer(x, rotary, partial(attend_cached, layer_cache, layer_recent, started, step))
        x = _by_sequence(x, mesh)
        updated.append(layer_recent)
    return _final_norm(weights.ends, x, config)[:, 0], tuple(updated)


def lm_head(params: Params, config: Qwen3Config) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    if config.tie_embeddings:
        return params["embed"]["embedding"].T
    return params["lm_head"]["kernel"]


def logits(params: Params, hidden: Float[Array, "... D"], config: Qwen3Config) -> Float[Array, "... V"]:
    """Logits in float32. Training never calls this for a whole batch: see `objective/scorer.py`."""
    head = lm_head(params, config).astype(hidden.dtype)
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
