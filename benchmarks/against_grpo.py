"""A training step of Policy Split and one of GRPO with as many rollouts, by the plan, on devices that are not there.

    python benchmarks/against_grpo.py configs/qwen3_1p7b.yaml v5e:4x8

The rollouts are the same programs; GRPO trains one mode on them. Needs `pip install -e .[tpu]`.
"""

import argparse
from dataclasses import replace

from policy_split_jax.config import RunConfig, load
from policy_split_jax.planning.plan import (
    chip_of,
    devices_of,
    ignore_devices,
    make_plan,
    model_config,
    plan_program,
    workload,
)
from policy_split_jax.planning.programs import abstract_state, update_program
from policy_split_jax.training.loop import run_mesh, update_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("topology")
    parser.add_argument("--mean-response", type=int, default=6000)
    options = parser.parse_args()
    ignore_devices()
    config = load(RunConfig, options.config)
    model, work = model_config(config.model.path), workload(config, options.mean_response)
    mesh = run_mesh(config, model, devices_of(options.topology))
    split = make_plan(config, options.topology, options.mean_response).step_seconds
    settings = replace(update_config(config), objective="grpo")
    program = update_program(config, settings, model, mesh, abstract_state(config, model, mesh), work)
    update = plan_program(program, chip_of(options.topology), mesh).seconds
    print(f"| {config.name} on {options.topology}, s at best | rollout | update | step |\n|---|---|---|---|")
    for name, seconds in (("GRPO", update), ("Policy Split", split["update"])):
        print(f"| {name} | {split['rollout']:.0f} | {seconds:.1f} | {split['rollout'] + seconds:.0f} |")
    print(f"ratio {(split['rollout'] + split['update']) / (split['rollout'] + update):.3f}")


if __name__ == "__main__":
    main()
