"""The update of Qwen3-0.6B with work in proportion to the devices, compiled for TPU v5e slices that are not there.

    python benchmarks/weak_scaling.py

Each device has a row of 4,096 tokens in both modes. Needs `pip install -e .[tpu]`.
"""

import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from policy_split_jax.config import OptimizerConfig
from policy_split_jax.model import qwen3
from policy_split_jax.model.sharding import make_mesh, placed, replicated
from policy_split_jax.planning.flops import count_flops
from policy_split_jax.planning.hlo import traffic
from policy_split_jax.planning.plan import QWEN3
from policy_split_jax.training.batch import Batch
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.state import init_state, state_shardings
from policy_split_jax.training.update import UpdateConfig, make_update

SLICES = {4: "v5e:2x2", 8: "v5e:2x4", 16: "v5e:4x4", 32: "v5e:4x8", 64: "v5e:8x8"}
MODEL, GROUP, PROMPT, RESPONSE = QWEN3["0.6B"], 4, 1024, 3072


def compiled(topology: str) -> tuple[Any, float]:
    """The update on a slice, `fsdp` over all of it, and its operations."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(1, -1, 1, devices)
    optimizer = make_optimizer(OptimizerConfig())
    start = partial(init_state, optimizer=optimizer, seed=0, eta=0.03)
    shapes = jax.eval_shape(start, qwen3.abstract_params(MODEL))
    state = placed(shapes, state_shardings(MODEL, optimizer, mesh))
    update: Any = make_update(MODEL, UpdateConfig(dtype="bfloat16", remat="full"), optimizer, mesh)
    traced = update.trace(state, batch(mesh, mesh.size // GROUP))
    return traced.lower().compile(), count_flops(traced.jaxpr.jaxpr)


def batch(mesh: Any, questions: int) -> Batch:
    def whole(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((questions, *shape), dtype, sharding=replicated(mesh))

    integers, floats, flags = (partial(whole, dtype) for dtype in (jnp.int32, jnp.float32, jnp.bool_))
    return Batch(
        prompts=integers(2, PROMPT), prompt_lengths=integers(2), responses=integers(GROUP, RESPONSE),
        response_lengths=integers(GROUP), modes=integers(GROUP), truncated=flags(GROUP), rewards=floats(GROUP),
        graded=flags(GROUP), sampler_logprobs=floats(GROUP, RESPONSE),
    )  # fmt: skip


def main() -> None:
    print("| devices | TFLOP | temporaries, GiB | gathered, GB | summed, GB | otherwise sent, GB |")
    print("|---|---|---|---|---|---|")
    for count, topology in SLICES.items():
        program, flops = compiled(topology)
        memory, sent = program.memory_analysis(), traffic(program.as_text()).collectives
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.peak_memory_in_bytes - memory.argument_size_in_bytes - results
        gathered, summed = sent["all-gather"], sent["all-reduce"] + sent["reduce-scatter"]
        rest = sum(sent.values()) - gathered - summed
        print(
            f"| {count} | {flops / count / 1e12:.1f} | {temporaries / 2**30:.2f} | {gathered / 1e9:.2f} | "
            f"{summed / 1e9:.2f} | {rest / 1e9:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
