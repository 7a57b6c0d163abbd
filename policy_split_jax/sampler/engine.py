"""Generation over slots, in JetStream's shape: pure functions of a static, donated state.

`prefill` computes the keys and values of prompts, `insert` puts them into slots (one prompt into as many
slots as it has rollouts), `generate` decodes all slots for a few steps. A slot's rollout depends on its
prompt, key and settings alone: not on its slot, its neighbours, padding or the cache's length. How many steps a
call makes changes the order of sums, and so the last digits.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from policy_split_jax.model import qwen3
from policy_split_jax.model.cache import (
    Cache,
    LayerCache,
    PromptCache,
    PromptLayer,
    init_cache,
    insert_prompt,
    merge_recent,
    resize_layer,
)
from policy_split_jax.model.sharding import BATCH, constrain
from policy_split_jax.sampler.sampling import SamplingSettings, sample, token_keys


class Prefix(NamedTuple):
    """The computed prompts of R rows."""

    kv: PromptCache
    """Keys and values, of each layer [R, S, K, H]."""
    last_tokens: Int[Array, "R"]
    true_lengths: Int[Array, "R"]
    """Tokens of the prompts, the shared ones included."""


class SlotRequest(NamedTuple):
    """What `insert` puts into slots besides the prompt; each array has one entry an insertion."""

    keys: Key[Array, "I"]
    settings: SamplingSettings
    limits: Int[Array, "I"]
    """At most so many new tokens."""


class DecodeState(NamedTuple):
    """All slots. Of its shapes only the cache's length changes: see `resize`."""

    cache: Cache
    last_tokens: Int[Array, "B"]
    """The token to be read next."""
    positions: Int[Array, "B"]
    """Its position."""
    keys: Key[Array, "B"]
    settings: SamplingSettings
    limits: Int[Array, "B"]
    live: Bool[Array, "B"]
    stopped: Bool[Array, "B"]
    """Ended by a stop token, not by its limit."""
    lengths: Int[Array, "B"]
    """New tokens so far, the stop token included."""
    tokens: Int[Array, "B T"]
    logprobs: Float[Array, "B T"]


def _placed(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """Slots divided over the devices, and the heads of their cache."""
    if mesh is None:
        return state
    slots = jax.tree.map(lambda leaf: constrain(leaf, mesh, BATCH), state)
    return slots._replace(cache=jax.tree.map(lambda leaf: constrain(leaf, mesh, BATCH, "tp"), state.cache))


@partial(jax.jit, static_argnames=("config", "slots", "cache_length", "max_new_tokens", "dtype", "mesh"))
def init_state(
    config: qwen3.Qwen3Config,
    slots: int,
    cache_length: int,
    max_new_tokens: int,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Empty slots. `cache_length` holds a prompt and the new tokens that are made before the next `resize`.

    With a mesh the slots, a multiple of `batch_shards(mesh)`, are divided over its devices.
    """
    integers = partial(jnp.zeros, (slots,), jnp.int32)
    state = DecodeState(
        cache=init_cache(config.num_layers, slots, cache_length, config.num_kv_heads, config.head_dim, dtype),
        last_tokens=integers(),
        positions=integers(),
        keys=jax.random.split(jax.random.key(0), slots),
        settings=SamplingSettings(jnp.ones(slots), integers(), jnp.ones(slots)),
        limits=integers(),
        live=jnp.zeros(slots, bool),
        stopped=jnp.zeros(slots, bool),
        lengths=integers(),
        tokens=jnp.zeros((slots, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((slots, max_new_tokens)),
    )
    return _placed(state, mesh)


@partial(jax.jit, static_argnames=("cache_length", "mesh"))
def resize(layer: LayerCache, cache_length: int, mesh: Mesh | None = None) -> LayerCache:
    """One layer of a longer or shorter cache: decoding reads all of it, so it is no longer than needed.

    A live slot needs `positions + n` entries for its next n tokens; what is cut off must be no live slot's.
    """
    return jax.tree.map(lambda leaf: constrain(leaf, mesh, BATCH, "tp"), resize_layer(layer, cache_length))


def no_prefix(config: qwen3.Qwen3Config, dtype: DTypeLike) -> PromptCache:
    """What `prefill` continues from where prompts share nothing."""
    empty = jnp.zeros((0, config.num_kv_heads, config.head_dim), dtype)
    return (PromptLayer(empty, empty),) * config.num_layers


def shared_prefix(prefix: Prefix) -> PromptCache:
    """The keys and values of a prefix of one full row, for prompts that begin with it."""
    return jax.tree.map(lambda leaf: leaf[0], prefix.kv)


@partial(jax.jit, static_argnames=("config", "mesh"))
def prefill(
    weights: qwen3.SamplingWeights,
    tokens: Int[Array, "R S"],
    true_lengths: Int[Array, "R"],
    shared: PromptCache,
    *,
    config: qwen3.Qwen3Config,
    mesh: Mesh | None = None,
) -> Prefix:
    """Computes right-padded prompts, or what follows the beginning that they all share.

    `shared` holds that beginning's keys and values, of each layer [C, K, H]; `true_lengths` counts `tokens`
    alone. Every prompt has at least one token of its own.
    """
    last = jnp.take_along_axis(tokens, true_lengths[:, None] - 1, axis=1)[:, 0]
    kv = qwen3.prefill(weights, tokens, shared, config=config, mesh=mesh)
    # A prompt's slots may lie anywhere.
    kv = jax.tree.map(lambda leaf: constrain(leaf, mesh, None, None, "tp"), kv)
    return Prefix(kv, last, true_lengths + shared[0].keys.shape[0])


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def insert(
    prefix: Prefix,
    state: DecodeState,
    rows: Int[Array, "I"],
    slots: Int[Array, "I"],
    request: SlotRequest,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Copies row `rows[i]` of the prefix into slot `slots[i]`; a slot out of range is dropped.

    The last prompt token is left to the first decode step, which samples the first new token: no logits
    need to be kept with a prefix.
    """

    def put(slot_values: Array, values: Array) -> Array:
        return slot_values.at[slots].set(values, mode="drop")

    cache = tuple(
        insert_prompt(layer, prompt, rows, slots) for layer, prompt in zip(state.cache, prefix.kv, strict=True)
    )
    filled = state._replace(
        cache=cache,
        last_tokens=put(state.last_tokens, prefix.last_tokens[rows]),
        positions=put(state.positions, prefix.true_lengths[rows] - 1),
        keys=put(state.keys, request.keys),
        settings=jax.tree.map(put, state.settings, request.settings),
        limits=put(state.limits, request.limits),
        live=put(state.live, request.limits > 0),
        stopped=put(state.stopped, jnp.zeros(slots.shape, bool)),
        lengths=put(state.lengths, jnp.zeros(slots.shape, jnp.int32)),
    )
    return _placed(filled, mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def release(state: DecodeState, slots: Int[Array, "I"], mesh: Mesh | None = None) -> DecodeState:
    """Ends the rollouts of these slots as they are; a slot out of range is dropped."""
    return _placed(state._replace(live=state.live.at[slots].set(False, mode="drop")), mesh)


@partial(jax.jit, static_argnames=("steps", "config", "mesh"), donate_argnames="state")
def generate(
    weights: qwen3.SamplingWeights,
    state: DecodeState,
    stop_ids: Int[Array, "E"],
    *,
    steps: int,
    config: qwen3.Qwen3Config,
    mesh: Mesh | None = None,
) -> DecodeState:
    """At most `steps` decode steps of every live slot; fewer when all have ended."""

    # The steps read the cache and never write it: see `model/cache.py`.
    cache, started = state.cache, state.positions
    shape = (config.num_layers, len(started), steps, config.num_kv_heads, config.head_dim)
    fresh = state._replace(cache=init_cache(*shape, weights.dtype))

    def unfinished(carry: tuple[Int[Array, ""], DecodeState]) -> Bool[Array, ""]:
        done, current = carry
        return (done < steps) & jnp.any(current.live)

    def body(carry: tuple[Int[Array, ""], DecodeState]) -> tuple[Int[Array, ""], DecodeState]:
        done, current = carry
        hidden, recent = qwen3.decode(
            weights,
            cache,
            current.cache,
            current.last_tokens,
            started,
            current.positions,
            done,
            config=config,
            mesh=mesh,
        )
        logits = constrain(qwen3.logits(weights.ends, hidden, config), mesh, BATCH, "tp")
        keys = token_keys(current.keys, current.lengths)
        tokens, logprobs = sample(logits, keys, current.settings)
        return done + 1, _placed(_advance(current._replace(cache=recent), tokens, logprobs, stop_ids), mesh)

    _, last = jax.lax.while_loop(unfinished, body, (jnp.int32(0), _placed(fresh, mesh)))
    merged = tuple(
        merge_recent(layer, recent, started, last.positions) for layer, recent in zip(cache, last.cache, strict=True)
    )
    return _placed(last._replace(cache=merged), mesh)


def _advance(
    state: DecodeState, tokens: Int[Array, "B"], logprobs: Float[Array, "B"], stop_ids: Int[Array, "E"]
) -> DecodeState:
    """Writes the sampled tokens of live slots and ends those that stopped or reached their limit."""
    live = state.live
    rows = jnp.arange(live.shape[0])
    # Ended slots write out of range, which drops the write.
    column = jnp.where(live, state.lengths, state.tokens.shape[1])
    lengths = state.lengths + live
    stopped = live & jnp.any(tokens[:, None] == stop_ids[None], axis=1)
    return state._replace(
        last_tokens=jnp.where(live, tokens, state.last_tokens),
        positions=state.positions + live,
        live=live & ~stopped & (lengths < state.limits),
        stopped=state.stopped | stopped,
        lengths=lengths,
        tokens=state.tokens.at[rows, column].set(tokens, mode="drop"),
        logprobs=state.logprobs.at[rows, column].set(logprobs, mode="drop"),
    )
