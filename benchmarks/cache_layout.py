"""Times decode steps with the key/value cache laid out and passed on in four ways, and their compilation.

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
from flax import nnx
from jax import Array
from sampler import SMALL, in_turn

from policy_split_jax.model import qwen3
from policy_split_jax.model.attention import attention
from policy_split_jax.model.cache import LayerCache, attend_cached, init_cache
from policy_split_jax.model.qwen3 import Params, Qwen3Config, init_params


def compare(config: Qwen3Config, slots: int, length: int, steps: int, rounds: int) -> None:
    """Prints the table of the four ways."""
    params = init_params(config, jax.random.key(0))
    weights = qwen3.sampling_weights(params, config=config)
    ours = init_cache(config.num_layers, slots, length, config.num_kv_heads, config.head_dim, jnp.float32)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *ours)
    plain = tuple(jax.tree.map(lambda values: values.reshape(slots, length, -1, config.head_dim), ours))
    ways = {
        "an array a layer, layers unrolled": (partial(qwen3.decode, config=config), weights, ours),
        "the same, positions before heads": (partial(decode_positions_first, config), weights, plain),
        "stacked, carried through a scan": (partial(decode_carried, config), params, stacked),
        "stacked, input and output of a scan": (partial(decode_streamed, config), params, stacked),
    }
    runs, compiling = {}, {}
    for name, (decode, given, cache) in ways.items():
        start = time.perf_counter()
        runs[name] = held_run(decode, given, cache, slots, length, steps)
        compiling[name] = time.perf_counter() - start
    seconds = in_turn(rounds, runs)
    best = median(seconds["an array a layer, layers unrolled"])
    print(
        f"| cache of {slots} slots x {length} positions, {config.num_layers} layers | step, ms | ratio | compiling, s |"
    )
    print("|---|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {median(times) / steps * 1e3:.1f} | {median(times) / best:.2f} | {compiling[name]:.1f} |")


Decode = Callable[[Any, Any, Array, Array], tuple[Array, Any]]


def held_run(decode: Decode, weights: Any, cache: Any, slots: int, length: int, steps: int) -> Callable[[], Any]:
    """Compiles a loop of `steps` decode steps on a donated cache, and returns a call that runs it again and again."""

    def loop(weights: Any, cache: Any) -> tuple[Any, Array]:
        def body(step: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            cache, tokens = carry
            hidden, cache = decode(weights, cache, tokens, jnp.full(slots, length - steps) + step)
            # The next token depends on this step, so that no step is taken out of the loop.
            return cache, (hidden[:, 0] > 0).astype(jnp.int32)

        return jax.lax.fori_loop(0, steps, body, (cache, jnp.zeros(slots, jnp.int32)))

    compiled = jax.jit(loop, donate_argnums=1).lower(weights, cache).compile()
    held = [jax.tree.map(jnp.copy, cache)]

    def run() -> Array:
        held[0], tokens = compiled(weights, held[0])
        return tokens

    return run


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
            x, rotary, partial(attend_cached, jax.tree.map(lambda leaf: leaf[at], cache), positions)
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
        return layer(config, weights)(x, rotary, partial(attend_cached, own, positions))

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
