"""The update of Qwen3-0.6B with work in proportion to the devices, compiled for TPU v5e slices that are not there.

    python benchmarks/weak_scaling.py

Each device has a row of 4,096 tokens in both modes. Needs `pip install -e .[tpu]`.
"""

from policy_split_jax.config import RunConfig, from_dict
from policy_split_jax.planning.plan import (
    QWEN3,
    ProgramPlan,
    chip_of,
    devices_of,
    ignore_devices,
    plan_program,
    workload,
)
from policy_split_jax.planning.programs import abstract_state, update_program
from policy_split_jax.training.loop import run_mesh, update_config

SLICES = {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8"}
MODEL, ROLLOUTS_PER_MODE = QWEN3["0.6B"], 2


def planned(devices: int, topology: str) -> ProgramPlan:
    """The update on a slice, `fsdp` over all of it."""
    rollout = {
        "questions_per_step": devices // (2 * ROLLOUTS_PER_MODE),
        "rollouts_per_mode": ROLLOUTS_PER_MODE,
        "max_prompt_tokens": 1024,
        "max_new_tokens": 3072,
        "slots": devices,
    }
    settings = {"name": "weak", "model": {"dtype": "bfloat16", "remat": "full"}, "rollout": rollout}
    config = from_dict(RunConfig, settings, "weak_scaling.py")
    mesh = run_mesh(config, MODEL, devices_of(topology))
    state = abstract_state(config, MODEL, mesh)
    program = update_program(config, update_config(config), MODEL, mesh, state, workload(config))
    return plan_program(program, chip_of(topology), mesh)


def main() -> None:
    ignore_devices()
    print("| devices | TFLOP | temporaries, GiB | gathered, GB | summed, GB | otherwise sent, GB |")
    print("|---|---|---|---|---|---|")
    for count, topology in SLICES.items():
        update = planned(count, topology)
        sent = update.collectives
        gathered, summed = sent.get("all-gather", 0), sent.get("all-reduce", 0) + sent.get("reduce-scatter", 0)
        rest = sum(sent.values()) - gathered - summed
        print(
            f"| {count} | {update.flops / 1e12:.1f} | {update.temporaries / 2**30:.2f} | {gathered / 1e9:.2f} | "
            f"{summed / 1e9:.2f} | {rest / 1e9:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
