"""Times the jitted update on this machine: its own variants, other objectives, and the same step in PyTorch.

    python benchmarks/update.py [variants modes torch]

Random batches in float32. Whatever is compared runs in turn, in each of several rounds; what counts is the ratio of
the medians within one call. Needs `pip install -e .[test]` (PyTorch, for `torch`).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import PRODUCT_FLOPS, SMALL, TINY, in_turn, large_product, transformers_model

from policy_split_jax.config import OptimizerConfig
from policy_split_jax.model.qwen3 import Qwen3Config, init_params
from policy_split_jax.objective import scorer
from policy_split_jax.planning.flops import count_flops
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.state import init_state
from policy_split_jax.training.update import UpdateConfig, make_update

GROUP = 8


@dataclass(frozen=True)
class Size:
    """A model, and a step's batch in padded tokens."""

    model: Qwen3Config
    questions: int
    prompt: int
    response: int
    together: tuple[int, ...]
    """Questions of a microbatch that are worth a try."""
    variable: bool
    """Whether lengths vary, as in configs/tiny.yaml."""


SIZES = {
    "tiny": Size(TINY, 64, 32, 12, (2, 4, 16), variable=True),
    "small": Size(SMALL, 2, 64, 192, (1, 2), variable=False),
}


def random_batch(size: Size, seed: int = 0) -> Batch:
    """Half of the rollouts of each mode, half of them right."""
    draw = np.random.default_rng(seed)
    shape, questions = (size.questions, GROUP), size.questions
    short = [21, 31] if size.variable else [size.prompt] * 2
    lengths = draw.integers(5, 9, size=shape) if size.variable else np.full(shape, size.response)
    return Batch(
        prompts=jnp.asarray(draw.integers(size.model.vocab_size, size=(questions, 2, size.prompt))),
        prompt_lengths=jnp.asarray(np.tile(short, (questions, 1))),
        responses=jnp.asarray(draw.integers(size.model.vocab_size, size=(*shape, size.response))),
        response_lengths=jnp.asarray(lengths),
        modes=jnp.asarray(np.tile([0] * (GROUP // 2) + [1] * (GROUP // 2), (questions, 1))),
        truncated=jnp.zeros(shape, bool),
        rewards=jnp.asarray(draw.integers(2, size=shape).astype(np.float32)),
        graded=jnp.ones(shape, bool),
        sampler_logprobs=jnp.zeros((*shape, size.response)),
    )


def make_step(size: Size, config: UpdateConfig, per_row: int | None = None) -> tuple[Callable[[], Any], int]:
    """A compiled update that runs on its own state, and its FLOPs."""
    optimizer, batch = make_optimizer(OptimizerConfig(learning_rate=1e-6)), random_batch(size)
    held = [init_state(init_params(size.model, jax.random.key(0)), optimizer, 0, 0.1)]
    update: Any = make_update(size.model, config, optimizer)
    rule = scorer.responses_per_row
    if per_row is not None:
        scorer.responses_per_row = lambda *shape: per_row
    try:
        traced = update.trace(held[0], batch)
    finally:
        scorer.responses_per_row = rule
    flops = count_flops(traced.jaxpr.jaxpr, size.questions // (config.microbatch_questions or size.questions))
    compiled = traced.lower().compile()

    def step() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return step, flops


def variants(rounds: int) -> None:
    """Microbatches, shared prompts, and a scoring pass of its own, for the embedded model's size."""
    size, base = SIZES["tiny"], UpdateConfig(microbatch_questions=2)
    chosen = {
        "microbatch of 2 questions, prompts shared, fused": (base, None),
        "microbatch of 1 question": (replace(base, microbatch_questions=1), None),
        "microbatch of 4 questions": (replace(base, microbatch_questions=4), None),
        "microbatch of 16 questions": (replace(base, microbatch_questions=16), None),
        "one batch of 64 questions": (replace(base, microbatch_questions=0), None),
        "every response with its own prompt": (base, 1),
    }
    seconds = in_turn(rounds, {name: make_step(size, *variant)[0] for name, variant in chosen.items()})
    first = median(next(iter(seconds.values())))
    print(f"| update of {size.questions} questions x {GROUP} rollouts x 2 modes | s | ratio |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {median(times):.2f} | {median(times) / first:.2f} |")


def modes(rounds: int) -> None:
    """Policy Split against GRPO on the same rollouts, and fused against two-pass."""
    print("| update | GRPO, s | Policy Split, s | two-pass, s | Policy Split / GRPO | fused / two-pass |")
    print("|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        split = UpdateConfig(microbatch_questions=size.together[0])
        runs = {"grpo": replace(split, objective="grpo"), "split": split, "two-pass": replace(split, two_pass=True)}
        seconds = in_turn(rounds, {key: make_step(size, config)[0] for key, config in runs.items()})
        grpo, fused, twice = (median(times) for times in seconds.values())
        print(f"| {name} | {grpo:.2f} | {fused:.2f} | {twice:.2f} | {fused / grpo:.2f} | {fused / twice:.2f} |")


def against_torch(rounds: int) -> None:
    """The same step in PyTorch, eager and compiled, each with its quickest microbatch; and the cores' own speed."""
    from torch_update import make_update as torch_update

    print("| update | ours, s | eager, s | torch.compile, s | eager / ours | compile / ours | GFLOP/s | of peak |")
    print("|---|---|---|---|---|---|---|---|")
    for name, size in SIZES.items():
        batch, runs, flops = random_batch(size), {"peak": large_product()}, {}
        for questions in size.together:
            step, flops[questions] = make_step(size, UpdateConfig(microbatch_questions=questions))
            runs[f"ours {questions}"] = step
            for kind in ("eager", "compile"):
                model = transformers_model(size.model)
                runs[f"{kind} {questions}"] = torch_update(model, batch, questions, kind == "compile")
        seconds = {key: median(times) for key, times in in_turn(rounds, runs).items()}
        ours, eager, compiled = (
            min((seconds[f"{kind} {count}"], count) for count in size.together) for kind in ("ours", "eager", "compile")
        )
        peak, speed = PRODUCT_FLOPS / seconds["peak"], flops[ours[1]] / ours[0]
        print(
            f"| {name} | {ours[0]:.2f} | {eager[0]:.2f} | {compiled[0]:.2f} | {eager[0] / ours[0]:.2f} | "
            f"{compiled[0] / ours[0]:.2f} | {speed / 1e9:.0f} | {speed / peak:.2f} of {peak / 1e9:.0f} |"
        )


PARTS = {"variants": variants, "modes": modes, "torch": against_torch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; all unless given")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.rounds)


if __name__ == "__main__":
    main()
