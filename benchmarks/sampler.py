"""Times the sampler on this machine: against transformers, against the machine's limit, and against itself.

    python benchmarks/sampler.py [equal limit tails prefill]

Random Qwen3 models in float32. Whatever is compared runs in turn, in each of several rounds; what counts is the
ratio of the medians within one call. Needs `pip install -e .[test]` (PyTorch, for `equal`).
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import MODELS, SMALL, in_turn, transformers_model

from policy_split_jax.model import qwen3
from policy_split_jax.model.qwen3 import Params, Qwen3Config, init_params
from policy_split_jax.sampler import engine
from policy_split_jax.sampler.batcher import Batcher, EngineConfig, Prompt, Sampling
from policy_split_jax.sampler.rollout import Sampler, rollout_keys
from policy_split_jax.sampler.sampling import SamplingSettings

# An id outside the vocabulary: nothing stops, so that all make the same number of tokens.
NEVER = (-1,)


def random_prompts(config: Qwen3Config, count: int, length: int, samples: int = 1) -> list[Prompt]:
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(count, length)).tolist()
    keys = rollout_keys(jax.random.key(0), np.arange(count), np.zeros(count, np.int32), samples)
    return [Prompt(row, keys[at]) for at, row in enumerate(tokens)]


def long_tailed(count: int) -> list[int]:
    """New tokens of each request: lognormal, mean 64, at most 512."""
    draws = np.random.default_rng(0).lognormal(sigma=1.0, size=count)
    return np.clip(np.round(draws / draws.mean() * 64), 1, 512).astype(int).tolist()


def equal(rounds: int) -> None:
    """64 prompts of 32 tokens, 64 new tokens each: tokens a second, and transformers' `generate`."""
    print("| 64 prompts x (32 + 64) tokens | ours, tokens/s | transformers, tokens/s | ratio |\n|---|---|---|---|")
    for name, config in MODELS.items():
        prompts = random_prompts(config, 64, 32)
        params = init_params(config, jax.random.key(0))
        sampler = Sampler(EngineConfig(config, NEVER, slots=64), max_prompt_tokens=32)
        seconds = in_turn(
            rounds,
            {
                "ours": partial(sampler, params, prompts, Sampling(64)),
                "transformers": transformers_generate(config, [prompt.tokens for prompt in prompts], 64),
            },
        )
        ours, theirs = (64 * 64 / median(times) for times in seconds.values())
        print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |")


def transformers_generate(config: Qwen3Config, prompts: Sequence[Sequence[int]], new_tokens: int) -> Callable[[], Any]:
    """The same work by transformers: a model of the same sizes, sampling at temperature 1."""
    import torch

    model = transformers_model(config).eval()
    ids = torch.tensor(prompts)
    sampling = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}

    def run() -> None:
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **sampling)
        assert output.shape[1] == ids.shape[1] + new_tokens

    return run


def limit(rounds: int) -> None:
    """A decode step of 64 slots against what the machine can do at best: matrix products, or reading memory."""
    print("| 64 slots, 96 positions | step, ms | matrix products at best, ms | memory at best, ms | share |")
    print("|---|---|---|---|---|")
    for name, config in MODELS.items():
        slots, length, steps = 64, 96, 16
        params = init_params(config, jax.random.key(0))
        decode, settle = decoding(config, params, slots, length, steps)
        alone = products(config, slots)
        total = sum(flops * times for _, flops, times in alone)
        runs = {"decode": decode, "copy": copying(), **{str(at): run for at, (run, *_) in enumerate(alone)}}
        seconds = {key: median(times) for key, times in in_turn(rounds, runs).items()}
        settle()
        step = seconds["decode"] / steps
        peak = max(flops * REPEATS / seconds[str(at)] for at, (_, flops, _) in enumerate(alone))
        weights = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
        cache = 2 * config.num_layers * slots * length * config.num_kv_heads * config.head_dim * 4
        products_best, memory_best = total / peak, (weights + cache) / (2 * COPIED / seconds["copy"])
        share = max(products_best, memory_best) / step
        print(
            f"| {name} | {step * 1e3:.2f} | {products_best * 1e3:.2f} ({peak / 1e9:.0f} GFLOP/s) | "
            f"{memory_best * 1e3:.2f} ({2 * COPIED / seconds['copy'] / 1e9:.0f} GB/s) | {share:.2f} |"
        )


REPEATS, COPIED = 20, 2**28


def products(config: Qwen3Config, slots: int) -> list[tuple[Callable[[], Any], int, int]]:
    """The matrix products of a decode step: each REPEATS times alone, its FLOPs, and how often a step has it."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    model, hidden, layers = config.hidden_size, config.intermediate_size, config.num_layers
    shapes = [(model, heads, layers), (model, kv_heads, 2 * layers), (heads, model, layers),
              (model, hidden, 2 * layers), (hidden, model, layers), (model, config.vocab_size, 1)]  # fmt: skip

    def repeated(inner: int, outer: int) -> Callable[[], Any]:
        left, right = jnp.ones((REPEATS, slots, inner)), jnp.ones((inner, outer))
        run = jax.jit(lambda left, right: jax.lax.map(lambda x: x @ right, left))
        return partial(run, left, right)

    return [(repeated(inner, outer), 2 * slots * inner * outer, times) for inner, outer, times in shapes]


def copying() -> Callable[[], Any]:
    """Reads and writes COPIED bytes each."""
    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    return lambda: np.copyto(target, source)


def decoding(
    config: Qwen3Config, params: Params, slots: int, length: int, steps: int
) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A call of `generate` that makes `steps` tokens in every slot, again and again at the cache's end."""
    request = free_running(slots)
    prompts = np.ones((slots, length - steps), np.int32)
    weights = qwen3.sampling_weights(params, config=config)
    prefix = engine.prefill(
        weights, prompts, np.full(slots, length - steps), engine.no_prefix(config, jnp.float32), config=config
    )
    places = jnp.arange(slots)
    held = [
        engine.insert(prefix, engine.init_state(config, slots, length, steps, jnp.float32), places, places, request)
    ]

    def run() -> Any:
        again = held[0]._replace(positions=jnp.full(slots, length - steps - 1), lengths=jnp.zeros(slots, jnp.int32))
        held[0] = engine.generate(weights, again, jnp.array(NEVER), steps=steps, config=config)
        return held[0].tokens

    return run, held.clear


def free_running(slots: int) -> engine.SlotRequest:
    """Sampling at temperature 1 without an end."""
    settings = SamplingSettings(jnp.ones(slots), jnp.zeros(slots, jnp.int32), jnp.ones(slots))
    return engine.SlotRequest(jax.random.split(jax.random.key(0), slots), settings, jnp.full(slots, 1_000_000))


def tails(rounds: int) -> None:
    """256 requests of long-tailed lengths (lognormal, mean 64, at most 512) on 32 slots."""
    config, slots = SMALL, 32
    sizes = long_tailed(256)
    prompts = random_prompts(config, len(sizes), 32)
    params = init_params(config, jax.random.key(0))
    sampler = Sampler(EngineConfig(config, NEVER, slots), max_prompt_tokens=32)
    each = [Sampling(size) for size in sizes]

    def static() -> None:
        for start in range(0, len(sizes), slots):
            sampler(params, prompts[start : start + slots], each[start : start + slots])

    seconds = in_turn(rounds, {"static": static, "continuous": lambda: sampler(params, prompts, each)})
    rates = {name: sum(sizes) / median(times) for name, times in seconds.items()}
    print(f"\n256 requests of {sum(sizes)} tokens, the longest {max(sizes)}, on {slots} slots, tokens/s: "
          f"static batches {rates['static']:,.0f}, continuous {rates['continuous']:,.0f}, "
          f"ratio {rates['continuous'] / rates['static']:.2f}")  # fmt: skip
    print(f"slots in use: {occupancy(params, prompts, each, slots):.2f} of the decode steps' slots, "
          f"{occupancy(params, prompts, each, slots, waiting=True):.2f} while requests wait")  # fmt: skip


def occupancy(
    params: Params, prompts: Sequence[Prompt], each: Sequence[Sampling], slots: int, waiting: bool = False
) -> float:
    """Tokens made over what the slots could have made, in all or until the last request has a slot."""
    batcher = Batcher(EngineConfig(SMALL, NEVER, slots), params, max_prompt_tokens=32, max_new_tokens=512)
    for at, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
        batcher.add(at, prompt, own)
    made = possible = 0
    while batcher.busy:
        before = {place: len(rollout.tokens) for place, rollout in batcher.partial()}
        ended = batcher.step()
        if waiting and batcher.running < slots and not ended:
            break
        after = {place: len(rollout.tokens) for place, rollout in [*batcher.partial(), *ended]}
        grown = [size - before.get(place, 0) for place, size in after.items()]
        made += sum(grown)
        possible += max(grown) * slots
    return made / possible


def prefill(rounds: int) -> None:
    """8 samples of each of 16 prompts of 128 tokens in each mode: one prefill a prompt, or one a sample."""
    config, samples, rows, length = SMALL, 8, 16, 128
    prompts, slots = 2 * rows, 2 * rows * samples
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(prompts, length))
    weights, nothing = qwen3.sampling_weights(params, config=config), engine.no_prefix(config, jnp.float32)
    requests = {share: free_running(rows * share) for share in (1, samples)}
    state = [engine.init_state(config, slots, length + 1, 1, jnp.float32)]

    def filled(times: int) -> Any:
        """Each prompt computed `times` times, for its share of the slots."""
        for start in range(0, prompts * times, rows):
            chosen = np.arange(start, start + rows) // times
            prefix = engine.prefill(weights, tokens[chosen], np.full(rows, length), nothing, config=config)
            share = samples // times
            places = np.repeat(np.arange(rows), share)
            own = start * share + np.arange(rows * share)
            state[0] = engine.insert(prefix, state[0], places, own, requests[share])
        return state[0].cache

    seconds = in_turn(rounds, {"group": partial(filled, 1), "single": partial(filled, samples)})
    group, single = (median(times) for times in seconds.values())
    print(
        f"\n16 prompts of {length} tokens in 2 modes, {samples} samples of each, computed and in their slots: "
        f"one prefill a prompt {group:.2f} s, one a sample {single:.2f} s, ratio {single / group:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"equal": equal, "limit": limit, "tails": tails, "prefill": prefill}
    parser.add_argument("measures", nargs="*", metavar="measure", help="all of them when none is named")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in options.measures or measures:
        measures[name](options.rounds)


if __name__ == "__main__":
    main()
