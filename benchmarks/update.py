"""Times the jitted update of the embedded model on this machine: microbatches, shared prompts, fused and two-pass.

    python benchmarks/update.py

Every variant runs in turn, in each of several rounds; what counts is the ratio of the medians within one call.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policy_split_jax.config import OptimizerConfig
from policy_split_jax.model import huggingface
from policy_split_jax.objective import scorer
from policy_split_jax.policy import load_policy, model_folder
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.state import init_state
from policy_split_jax.training.update import UpdateConfig, make_update

QUESTIONS, GROUP, WIDTH, LENGTH = 64, 8, 32, 12


def random_batch(vocab_size: int, seed: int = 0) -> Batch:
    """A step of the shape of configs/tiny.yaml."""
    draw = np.random.default_rng(seed)
    shape = (QUESTIONS, GROUP)
    return Batch(
        prompts=jnp.asarray(draw.integers(vocab_size, size=(QUESTIONS, 2, WIDTH))),
        prompt_lengths=jnp.asarray(np.tile([21, 31], (QUESTIONS, 1))),
        responses=jnp.asarray(draw.integers(vocab_size, size=(*shape, LENGTH))),
        response_lengths=jnp.asarray(draw.integers(5, 9, size=shape)),
        modes=jnp.asarray(np.tile([0] * (GROUP // 2) + [1] * (GROUP // 2), (QUESTIONS, 1))),
        truncated=jnp.zeros(shape, bool),
        rewards=jnp.asarray(draw.integers(2, size=shape).astype(np.float32)),
        graded=jnp.ones(shape, bool),
        sampler_logprobs=jnp.zeros((*shape, LENGTH)),
    )


def make_step(config: UpdateConfig, per_row: int | None) -> Callable[[], Any]:
    """A compiled update that runs on its own state."""
    policy = load_policy(model_folder("embedded"))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-6))
    params = huggingface.load_params(policy.folder, policy.config)
    batch = random_batch(policy.config.vocab_size)
    held = [init_state(params, optimizer, 0, 0.1)]
    update = make_update(policy.config, config, optimizer)
    rule = scorer.responses_per_row
    if per_row is not None:
        scorer.responses_per_row = lambda *shape: per_row
    try:
        compiled = update.lower(held[0], batch).compile()  # type: ignore[attr-defined]
    finally:
        scorer.responses_per_row = rule

    def step() -> None:
        held[0], _ = jax.block_until_ready(compiled(held[0], batch))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    base = UpdateConfig(microbatch_questions=1)
    variants = {
        "microbatch of 1 question, prompts shared, fused": (base, None),
        "microbatch of 4 questions": (replace(base, microbatch_questions=4), None),
        "microbatch of 16 questions": (replace(base, microbatch_questions=16), None),
        "one batch of 64 questions": (replace(base, microbatch_questions=0), None),
        "every response with its own prompt": (base, 1),
        "two-pass": (replace(base, two_pass=True), None),
    }
    steps = {name: make_step(*variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    first = median(next(iter(seconds.values()))[1:])
    print(f"| update of {QUESTIONS} questions x {GROUP} rollouts x 2 modes | s | ratio |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {median(times[1:]):.2f} | {median(times[1:]) / first:.2f} |")


if __name__ == "__main__":
    main()
