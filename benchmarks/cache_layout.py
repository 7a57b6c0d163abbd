"""Times decode steps with the key/value cache laid out, written and passed on in five ways, and their compilation.

    python benchmarks/cache_layout.py

A random Qwen3 of 4 layers in float32; whatever is compared runs in turn, in each of several rounds.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from common import SMALL, in_turn
from flax import nnx
from jax import Array

from policy_split_jax.model import qwen3
from policy_split_jax.model.attention import attention, decode_attention
from policy_split_jax.model.cache import LayerCache, init_cache, merge_recent
from policy_split_jax.model.qwen3 import Params, Qwen3Config, init_params


def compare(config: Qwen3Config, slots: int, length: int, steps: int, rounds: int) -> None:
    """Prints the table of the five ways."""
    params = init_params(config, jax.random.key(0))
    weights = qwen3.sampling_weights(params, config=config)
    ours = init_cache(config.num_layers, slots, length, config.num_kv_heads, config.head_dim, jnp.float32)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *ours)
    plain = tuple(jax.tree.map(lambda values: values.reshape(slots, length, -1, config.head_dim), ours))
    ways = {
        "an array a layer, written after the last step": (partial(merged_steps, config), weights, ours),
        "the same, written every step": (written_steps(partial(decode_written, config)), weights, ours),
        "the same, positions before heads": (written_steps(partial(decode_positions_first, config)), weights, plain),
        "stacked, carried through a scan": (written_steps(partial(decode_carried, config)), params, stacked),
        "stacked, input and output of a scan": (written_steps(partial(decode_streamed, config)), params, stacked),
    }
    runs, compiling = {}, {}
    for name, (make, given, cache) in ways.items():
        start = time.perf_counter()
        runs[name] = held_run(make, given, cache, slots, length, steps)
        compiling[name] = time.perf_counter() - start
    seconds = in_turn(rounds, runs)
    best = median(next(iter(seconds.values())))
    print(
        f"| cache of {slots} slots x {length} positions, {config.num_layers} layers | step, ms | ratio | compiling, s |"
    )
    print("|---|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {median(times) / steps * 1e3:.1f} | {median(times) / best:.2f} | {compiling[name]:.1f} |")


# Some decode steps from a position on: (weights, cache, its positions, number of steps) -> (cache, last tokens).
Steps = Callable[[Any, Any, Array, int], tuple[Any, Array]]


def held_run(steps_of: Steps, weights: Any, cache: Any, slots: int, length: int, steps: int) -> Callable[[], Any]:
    """Compiles decode steps on a donated cache, and returns a call that runs them again and again."""

    def loop(weights: Any, cache: Any) -> tuple[Any, Array]:
        return steps_of(weights, cache, jnp.full(slots, length - steps), steps)

    compiled = jax.jit(loop, donate_argnums=1).lower(weights, cache).compile()
    held = [jax.tree.map(jnp.copy, cache)]

    def run() -> Array:
        held[0], tokens = compiled(weights, held[0])
        return tokens

    return run


def next_tokens(hidden: Array) -> Array:
    """They depend on this step, so that no step is taken out of the loop."""
    return (hidden[:, 0] > 0).astype(jnp.int32)


def merged_steps(config: Qwen3Config, weights: Any, cache: Any, started: Array, steps: int) -> tuple[Any, Array]:
    """What the engine does."""
    shape = (config.num_layers, len(started), steps, config.num_kv_heads, config.head_dim)

    def body(step: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        recent, tokens = carry
        hidden, recent = qwen3.decode(
            weights, cache, recent, tokens, started, started + step, jnp.int32(step), config=config
        )
        return recent, next_tokens(hidden)

    recent, tokens = jax.lax.fori_loop(0, steps, body, (init_cache(*shape, jnp.float32), jnp.zeros_like(started)))
    pairs = zip(cache, recent, strict=True)
    return tuple(merge_recent(layer, new, started, started + steps) for layer, new in pairs), tokens


def written_steps(decode: Callable[..., tuple[Array, Any]]) -> Steps:
    """Steps that write the cache and pass it on."""

    def run(weights: Any, cache: Any, started: Array, steps: int) -> tuple[Any, Array]:
        def body(step: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            cache, tokens = carry
            hidden, cache = decode(weights, cache, tokens, started + step)
            return cache, next_tokens(hidden)

        return jax.lax.fori_loop(0, steps, body, (cache, jnp.zeros_like(started)))

    return run


def attend_written(
    cache: LayerCache, positions: Array, queries: Array, keys: Array, values: Array
) -> tuple[Array, LayerCache]:
    """Writes one token's keys and values at its position, and attends to everything up to it."""
    rows = jnp.arange(positions.shape[0])
    cache = LayerCache(
        cache.keys.at[rows, :, :, positions].set(keys[:, 0], mode="drop"),
        cache.values.at[rows, :, positions].set(values[:, 0], mode="drop"),
    )
    visible = jnp.arange(cache.length)[None, :] <= positions[:, None]
    return decode_attention(queries, (cache.keys,), (cache.values,), (visible,)), cache


def decode_written(
    config: Qwen3Config, weights: qwen3.SamplingWeights, cache: Any, tokens: Array, positions: Array
) -> tuple[Array, Any]:
    """The engine's step, but every step writes the cache."""
    x, rotary, updated = embedded(weights.ends, tokens), angles(config, positions), []
    for layer_weights, own in zip(weights.layers, cache, strict=True):
        x, own = layer(config, layer_weights)(x, rotary, partial(attend_written, own, positions))
        updated.append(own)
    return x[:, 0], tuple(updated)


def decode_positions_first(
    config: Qwen3Config, weights: qwen3.SamplingWeights, cache: Any, tokens: Array, positions: Array
) -> tuple[Array, Any]:
    """The engine's step on keys and values of [slot, position, head, size]."""
    rows = jnp.arange(tokens.shape[0])

    def attend(own: Any, queries: Array, keys: Array, values: Array) -> tuple[Array, Any]:
        keys = own.keys.at[rows, positions].set(keys[:, 0])
        values = own.values.at[rows, positions].set(values[:, 0])
        visible = jnp.arange(keys.shape[1]) <= positions[:, None]
        return attention(queries, keys, values, visible[:, None]), LayerCache(keys, values)

    x, rotary, updated = embedded(weights.ends, tokens), angles(config, positions), []
    for layer_weights, own in zip(weights.layers, cache, strict=True):
        x, own = layer(config, layer_weights)(x, rotary, partial(attend, own))
        updated.append(own)
    return x[:, 0], tuple(updated)


def decode_carried(
    config: Qwen3Config, params: Params, cache: LayerCache, tokens: Array, positions: Array
) -> tuple[Array, LayerCache]:
    """A scan over layers whose carry holds the caches of all."""
    rotary = angles(config, positions)

    def block(carry: tuple[Array, LayerCache], inputs: tuple[Array, Params]) -> tuple[tuple[Array, LayerCache], None]:
        (x, cache), (at, weights) = carry, inputs
        x, own = layer(config, weights)(
            x, rotary, partial(attend_written, jax.tree.map(lambda leaf: leaf[at], cache), positions)
        )
        return (x, jax.tree.map(lambda all_layers, one: all_layers.at[at].set(one), cache, own)), None

    first = embedded(params, tokens)
    (x, cache), _ = jax.lax.scan(block, (first, cache), (jnp.arange(config.num_layers), params["layers"]))
    return x[:, 0], cache


def decode_streamed(
    config: Qwen3Config, params: Params, cache: LayerCache, tokens: Array, positions: Array
) -> tuple[Array, LayerCache]:
    """A scan over layers that reads each one's cache and gives a new one."""
    rotary = angles(config, positions)

    def block(x: Array, inputs: tuple[LayerCache, Params]) -> tuple[Array, LayerCache]:
        own, weights = inputs
        return layer(config, weights)(x, rotary, partial(attend_written, own, positions))

    x, cache = jax.lax.scan(block, embedded(params, tokens), (cache, params["layers"]))
    return x[:, 0], cache


def layer(config: Qwen3Config, weights: Params) -> qwen3.Layer:
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: qwen3.Layer(config, nnx.Rngs(0)))), weights)


def angles(config: Qwen3Config, positions: Array) -> qwen3.Rotary:
    return qwen3.rotary_embedding(positions[:, None], config.head_dim, config.rope_theta)


def embedded(ends: Params, tokens: Array) -> Array:
    return ends["embed"]["embedding"][tokens[:, None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    compare(replace(SMALL, num_layers=4), slots=16, length=1024, steps=8, rounds=parser.parse_args().rounds)


if __name__ == "__main__":
    main()
