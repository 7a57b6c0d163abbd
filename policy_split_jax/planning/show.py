"""A plan as a table for people and as JSON for programs."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from policy_split_jax.config import RunConfig
from policy_split_jax.planning.chips import GIB, GPU_TARGETS
from policy_split_jax.planning.plan import Plan, ProgramPlan
from policy_split_jax.planning.programs import PACKED


def to_json(plan: Plan, config: RunConfig) -> dict[str, Any]:
    """Every figure: bytes on one device, operations and seconds of a call."""
    return {
        **asdict(plan),
        "step_seconds": plan.step_seconds,
        "fits": plan.fits,
        "remedies": list(remedies(plan, config)),
        "assumptions": assumptions(plan, config),
    }


def show(plan: Plan, config: RunConfig, console: Console) -> None:
    """The tables, the verdict and what they take for granted."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    console.print(
        f"{config.name} on {plan.topology}: {plan.model_parameters / 1e9:.2f} B parameters, "
        f"{math.prod(plan.mesh.values())} x {plan.chip.name} as {mesh}"
    )
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.state.items())
    console.print(f"on each device, GiB: {parts}")
    console.print(_memory(plan))
    console.print(_time(plan))
    seconds = plan.step_seconds
    console.print(
        f"a step at best: rollout {_duration(seconds['rollout'])}, update {_duration(seconds['update'])}, "
        f"together {_duration(sum(seconds.values()))}"
    )
    for line in assumptions(plan, config):
        console.print(f"  - {line}")
    if plan.fits:
        least = min(plan.chip.memory - program.total for program in plan.programs)
        console.print(f"It fits: {least / GIB:.1f} GiB of each device's {plan.chip.memory / GIB:.1f} are left.")
    for line in remedies(plan, config):
        console.print(line)


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory of one device, GiB")
    for heading in ("program", "arguments", "temporaries", "results", "besides", "total", "fits"):
        table.add_column(heading, justify="left" if heading == "program" else "right")
    for program in plan.programs:
        sizes = (program.arguments, program.temporaries, program.results, program.besides, program.total)
        left = (plan.chip.memory - program.total) / GIB
        verdict = f"{left:.1f} left" if left >= 0 else f"{-left:.1f} too much"
        table.add_row(program.name, *(f"{size / GIB:.2f}" for size in sizes), verdict)
    return table


def _time(plan: Plan) -> Table:
    table = Table(title="Work of one device, in one call")
    for heading in ("program", "TFLOP", "HBM GB", "network GB", "at best", "bound by", "calls a step"):
        table.add_column(heading, justify="left" if heading in ("program", "bound by") else "right")
    for program in plan.programs:
        table.add_row(
            program.name, f"{program.flops / 1e12:.3g}", f"{program.memory_traffic / 1e9:.3g}", _network(program),
            _duration(program.seconds), program.bound, f"{program.calls:.0f}",
        )  # fmt: skip
    return table


def _network(program: ProgramPlan) -> str:
    kinds = (f"{size / 1e9:.3g} {kind}" for kind, size in program.collectives.items() if size >= 1e6)
    return "\n".join(kinds) or "0"


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.1f} µs"


def assumptions(plan: Plan, config: RunConfig) -> list[str]:
    """What the figures take for granted, a sentence each."""
    chip = plan.chip
    said = [
        f"A device does {chip.flops / 1e12:.0f} TFLOP/s in bfloat16, moves {chip.memory_bandwidth / 1e9:.0f} GB/s "
        f"from HBM and {chip.link_bandwidth / 1e9:.0f} GB/s to its neighbours ({chip.source}), all at once and "
        "without a pause: real steps take longer.",
        f"Memory is for prompts and responses of the largest size, time for responses of {plan.mean_response:.0f} and "
        f"prompts of {plan.mean_prompt:.0f} tokens on average (--mean-response).",
        "Slots are full until no rollout waits; the last ones run to the limit. Grading takes no time.",
    ]
    if plan.topology.partition(":")[0] in GPU_TARGETS:
        said.append(
            "Without a GPU, cuBLAS and cuDNN do not say what memory they take while they work; links between machines "
            "are slower than those within one."
        )
    if config.train.microbatch_rows:
        said.append(f"Packed rows hold {PACKED:.0%} tokens.")
    return said


def remedies(plan: Plan, config: RunConfig) -> Iterator[str]:
    """For every phase that does not fit, the setting to change."""
    worst: dict[str, ProgramPlan] = {}
    for program in plan.programs:
        if program.total > max(plan.chip.memory, worst[program.phase].total if program.phase in worst else 0):
            worst[program.phase] = program
    standing = plan.state["parameters"] + plan.state["optimizer"]
    for phase, program in worst.items():
        over = program.total - plan.chip.memory
        yield f"{program.name} does not fit: {over / GIB:.1f} GiB too much on each device. " + (
            "Parameters and optimizer alone are too large: take more devices, or a larger mesh.fsdp or mesh.tp."
            if standing > plan.chip.memory
            else _remedy(phase, over, plan, config)
        )


def _remedy(phase: str, over: int, plan: Plan, config: RunConfig) -> str:
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    if phase == "rollout":
        slot = plan.state["cache"] * shards // config.rollout.slots
        fewer = config.rollout.slots - shards * -(-over // max(slot, 1))
        if fewer >= shards:
            return f"Set rollout.slots={fewer}, or a larger mesh.tp, which divides weights and cache."
        return "Set a larger mesh.tp, which divides weights and cache, or lower rollout.max_new_tokens."
    if phase == "score":
        return "Lower train.score_chunk or eval.k, or set a larger mesh.tp."
    rows = config.train.microbatch_rows
    if rows > max(shards, config.rollouts):
        return f"Set train.microbatch_rows={max(shards, rows // 2 // shards * shards)}, or model.remat=full."
    if config.train.microbatch_questions != 1 and not rows:
        return "Set train.microbatch_questions=1, or train.microbatch_rows, or model.remat=full."
    return "Set model.remat=full, lower train.score_chunk, or set a larger mesh.tp."
