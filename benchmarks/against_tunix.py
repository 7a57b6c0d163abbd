"""Times the sampler against tunix's: both sample with Qwen3 models of the same sizes, in turn, in one process.

    pip install -e . google-tunix   # in an environment of its own
    python benchmarks/against_tunix.py

tunix takes one limit for a whole call. Requests of different lengths therefore run there in batches in the order
in which they came, each as long as its longest request; every length is known in advance and compiled before.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
from common import MODELS, SMALL, in_turn
from flax import nnx
from sampler import NEVER, long_tailed, random_prompts
from tunix.generate.sampler import CacheConfig
from tunix.generate.sampler import Sampler as TunixSampler
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.models.qwen3.model import ModelConfig, Qwen3

from policy_split_jax.model.qwen3 import Qwen3Config, init_params
from policy_split_jax.sampler.batcher import EngineConfig, Sampling
from policy_split_jax.sampler.rollout import Sampler


class Tokens(TokenizerAdapter):
    """Prompts that are tokens already: numbers with spaces between them."""

    def __init__(self) -> None:
        pass

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], **kwargs: Any) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return NEVER[0]

    def pad_id(self) -> int:
        return NEVER[0]

    def dedup_bos_ids(self, ids: list[int]) -> list[int]:
        return ids


def tunix_sampler(config: Qwen3Config, length: int) -> TunixSampler:
    """A sampler of the same sizes, its cache `length` positions long."""
    model = Qwen3(
        ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=1_000_000,
            norm_eps=config.rms_norm_eps,
            use_tied_embedding=config.tie_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )
    return TunixSampler(model, Tokens(), CacheConfig(length, config.num_layers, config.num_kv_heads, config.head_dim))


def tunix_batches(sampler: TunixSampler, prompts: Sequence[Sequence[int]], limits: Sequence[int], batch: int) -> None:
    """Samples each batch of prompts until its longest request has all its tokens."""
    for start in range(0, len(prompts), batch):
        longest = max(limits[start : start + batch])
        texts = [" ".join(map(str, prompt)) for prompt in prompts[start : start + batch]]
        output = sampler(texts, longest, max_prompt_length=32, temperature=1.0, top_p=1.0, return_logprobs=True)
        assert all(len(tokens) == longest for tokens in output.tokens), "tunix stopped early"


def compare(name: str, config: Qwen3Config, limits: Sequence[int], slots: int, rounds: int) -> None:
    """Prints one row: requests of 32 tokens, each with its limit of new tokens, `slots` at a time."""
    prompts = random_prompts(config, len(limits), 32)
    params = init_params(config, jax.random.key(0))
    ours = Sampler(EngineConfig(config, NEVER, slots), max_prompt_tokens=32)
    theirs = tunix_sampler(config, 32 + max(limits))
    texts = [prompt.tokens for prompt in prompts]
    seconds = in_turn(
        rounds,
        {
            "ours": partial(ours, params, prompts, [Sampling(limit) for limit in limits]),
            "tunix": partial(tunix_batches, theirs, texts, limits, slots),
        },
    )
    rates = [sum(limits) / median(times) for times in seconds.values()]
    print(f"| {name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("| | ours, tokens/s | tunix, tokens/s | ratio |\n|---|---|---|---|")
    for name, config in MODELS.items():
        compare(f"{name}, 64 prompts x (32 + 64) tokens", config, [64] * 64, 64, rounds)
    tails = long_tailed(256)
    compare(f"small, 256 long-tailed requests of {sum(tails)} tokens, 32 at a time", SMALL, tails, 32, rounds)


if __name__ == "__main__":
    main()
