"""A training step of Policy Split and one of GRPO with as many rollouts, by the plan, on devices that are not there.

    python benchmarks/against_grpo.py configs/qwen3_1p7b.yaml v5e:4x8

The rollouts are the same programs; GRPO trains one mode on them. Needs `pip install -e .[tpu]`.
"""

import argparse
import os
from dataclasses import replace
from unittest import mock

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from policy_split_jax.config import RunConfig, load
from policy_split_jax.planning import programs
from policy_split_jax.planning.plan import make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("topology")
    parser.add_argument("--mean-response", type=int, default=6000)
    options = parser.parse_args()
    config = load(RunConfig, options.config)
    split = make_plan(config, options.topology, options.mean_response).step_seconds
    settings, whole = programs.update_config, programs.programs
    with (
        mock.patch.object(programs, "update_config", lambda config: replace(settings(config), objective="grpo")),
        # The rollouts are planned already.
        mock.patch("policy_split_jax.planning.plan.programs", lambda *given: whole(*given)[:1] + whole(*given)[4:]),
    ):
        update = make_plan(config, options.topology, options.mean_response).step_seconds["update"]
    print(f"| {config.name} on {options.topology}, s at best | rollout | update | step |\n|---|---|---|---|")
    for name, seconds in (("GRPO", update), ("Policy Split", split["update"])):
        print(f"| {name} | {split['rollout']:.0f} | {seconds:.1f} | {split['rollout'] + seconds:.0f} |")
    print(f"ratio {(split['rollout'] + split['update']) / (split['rollout'] + update):.3f}")


if __name__ == "__main__":
    main()
