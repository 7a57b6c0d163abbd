"""Log-probabilities, entropies and divergences at Qwen3's vocabulary: in chunks, and from logits of everything.

    python benchmarks/scorer.py

Both give the loss and its gradient. Memory is what the compiler reserves for temporaries; time is the median of rounds
that take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from common import in_turn

from policy_split_jax.objective.scorer import score_hidden

MODES, ROWS, LENGTH, WIDTH, VOCABULARY = 2, 1, 128, 256, 151_936


def everything(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As one would write it first: logits [M, B, T, V]."""
    logp = jax.nn.log_softmax(hidden @ head, axis=-1)
    chosen = jnp.take_along_axis(logp, targets[None, ..., None], axis=-1)[..., 0]
    p = jnp.exp(logp)
    return chosen, -jnp.sum(p * logp, axis=-1), jnp.sum(p * (logp - logp[::-1]), axis=-1)


def compiled(score: Callable[..., Any]) -> tuple[Callable[[], Any], int]:
    """Loss and gradient on random states, and the temporaries' bytes."""
    keys = jax.random.split(jax.random.key(0), 3)
    head = jax.random.normal(keys[0], (WIDTH, VOCABULARY)) * WIDTH**-0.5
    hidden = jax.random.normal(keys[1], (MODES, ROWS, LENGTH, WIDTH))
    targets = jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCABULARY)

    def loss(head: jax.Array, hidden: jax.Array) -> tuple[jax.Array, Any]:
        logprobs, *measured = score(head, hidden, targets)
        return logprobs.sum(), jax.lax.stop_gradient(measured)

    program = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(head, hidden).compile()
    return partial(program, head, hidden), program.memory_analysis().temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    scores = {f"chunks of {size}": partial(score_hidden, chunk=size, with_kl=True) for size in (16, 64)}
    programs = {name: compiled(score) for name, score in {"everything": everything, **scores}.items()}
    seconds = {name: median(times) for name, times in in_turn(rounds, {n: p[0] for n, p in programs.items()}).items()}
    whole, first = programs["everything"][1], seconds["everything"]
    print(f"| {MODES} modes x {ROWS} x {LENGTH} tokens, width {WIDTH} | temporaries, GB | ratio | s | ratio |")
    print("|---|---|---|---|---|")
    for name, (_, size) in programs.items():
        time = seconds[name]
        print(f"| {name} | {size / 1e9:.2f} | {size / whole:.2f} | {time:.2f} | {time / first:.2f} |")


if __name__ == "__main__":
    main()
