"""Whether a run fits devices that are not there, and what a step takes on them at best."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from policy_split_jax.config import EMBEDDED, RunConfig
from policy_split_jax.errors import UserError
from policy_split_jax.model import qwen3
from policy_split_jax.model.huggingface import load_config
from policy_split_jax.model.sharding import platform
from policy_split_jax.planning.chips import CHIPS, GPU_TARGETS, Chip
from policy_split_jax.planning.flops import count_flops
from policy_split_jax.planning.hlo import traffic
from policy_split_jax.planning.programs import Program, Workload, programs
from policy_split_jax.policy import model_folder
from policy_split_jax.sampler import engine
from policy_split_jax.training.loop import run_mesh

# Vocabulary, width, MLP width, layers, heads, kv heads, head size, tied: as in their config.json.
QWEN3 = {
    "0.6B": qwen3.Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128),
    "1.7B": qwen3.Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128),
    "4B": qwen3.Qwen3Config(151936, 2560, 9728, 36, 32, 8, 128),
    "8B": qwen3.Qwen3Config(151936, 4096, 12288, 36, 32, 8, 128, tie_embeddings=False),
    "14B": qwen3.Qwen3Config(151936, 5120, 17408, 40, 40, 8, 128, tie_embeddings=False),
    "32B": qwen3.Qwen3Config(151936, 5120, 25600, 64, 64, 8, 128, tie_embeddings=False),
}
_MEAN_PROMPT = 256
# "... HLO temporaries (18.99G) exceeds available HBM (15.75G)", and the like.
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED.*?\(([0-9.]+)([MG])\)", re.DOTALL)
_UNITS = {"M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class ProgramPlan:
    """One program on one device; bytes, operations and seconds are those of a call."""

    name: str
    phase: str
    arguments: int
    """Bytes of what it is given."""
    temporaries: int
    results: int
    """Bytes of results that take no argument's place."""
    besides: int
    """Bytes of what lies in memory meanwhile."""
    total: int
    flops: float
    memory_traffic: int
    """Bytes read from and written to HBM."""
    collectives: dict[str, int]
    """Bytes sent, by kind."""
    seconds: float
    """At best: the largest of the three bounds."""
    bound: str
    """compute, memory or network."""
    calls: float
    """How often a step calls it."""


@dataclass(frozen=True)
class Plan:
    """A run on a topology."""

    topology: str
    chip: Chip
    mesh: dict[str, int]
    model_parameters: int
    programs: list[ProgramPlan]
    state: dict[str, int]
    """Bytes on one device: parameters, optimizer, sampling weights, cache."""
    mean_response: float
    mean_prompt: float

    @property
    def fits(self) -> bool:
        return all(program.total <= self.chip.memory for program in self.programs)

    @property
    def step_seconds(self) -> dict[str, float]:
        """Of each phase of a training step."""
        phases = {"rollout": 0.0, "update": 0.0}
        for program in self.programs:
            if program.phase in phases:
                phases[program.phase] += program.seconds * program.calls
        return phases


def ignore_devices() -> None:
    """Before JAX looks for devices: whatever this machine has stays unused.

    libtpu should neither look for the pod that it is not in nor mind another plan, and XLA should not try out kernels
    on a GPU.
    """
    os.environ.update(
        {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false",
        }
    )
    jax.config.update("jax_platforms", "cpu")


def make_plan(
    config: RunConfig,
    topology: str,
    mean_response: int | None = None,
    report: Callable[[str], None] = lambda name: None,
) -> Plan:
    """Compiles every program of the run for `topology`; `report` is told which one is next.

    `mean_response` is taken to be half of the longest unless given. Raises UserError for a topology that is not
    known or cannot be compiled for here, and for settings that it cannot share.
    """
    chip = chip_of(topology)
    model = model_config(config.model.path)
    mesh = run_mesh(config, model, devices_of(topology))
    work = workload(config, mean_response)
    report("cast weights")
    planned = []
    chosen = programs(config, model, mesh, work)
    for program in chosen:
        report(program.name)
        planned.append(plan_program(program, chip, mesh))
    by_function = {program.run: program for program in chosen}
    cast, generate = by_function[qwen3.sampling_weights], by_function[engine.generate]
    state = {
        "parameters": _bytes(cast.arguments),
        "optimizer": _bytes(cast.besides),
        "sampling weights": _bytes(generate.arguments[0]),
        "cache": _bytes(generate.arguments[1].cache),
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(qwen3.abstract_params(model)))
    return Plan(topology, chip, dict(mesh.shape), size, planned, state, work.mean_response, work.mean_prompt)


def workload(config: RunConfig, mean_response: int | None = None) -> Workload:
    """A training step of the run; responses are half of the longest on average unless said."""
    mean = float(mean_response or config.rollout.max_new_tokens / 2)
    rollouts = config.rollout.questions_per_step * config.rollouts
    return Workload(rollouts, mean, float(min(_MEAN_PROMPT, config.rollout.max_prompt_tokens)))


def chip_of(topology: str) -> Chip:
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"--topology {topology}: no figures of {kind!r}; known are {', '.join(CHIPS)}, as in v5e:4x8")
    return CHIPS[kind]


def model_config(path: str) -> qwen3.Qwen3Config:
    """The sizes of a model folder, or of the published Qwen3 that a path is named after."""
    if path != EMBEDDED and not os.path.isdir(path):
        for name, known in QWEN3.items():
            if path.rstrip("/").endswith(f"Qwen3-{name}"):
                return known
    return load_config(model_folder(path))


def devices_of(topology: str) -> list[Any]:
    """Stand-ins for the devices of a TPU slice or of GPU machines; nothing can run on them."""
    kind, _, sizes = topology.partition(":")
    on_gpus = kind in GPU_TARGETS
    try:
        if on_gpus:
            machines, _, each = sizes.rpartition("x")
            target = {"target_config": GPU_TARGETS[kind], "topology": f"1x{int(machines or 1)}x{int(each)}"}
            return list(topologies.get_topology_desc(platform="cuda", **target).devices)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:  # whatever a compiler or its absence raises
        reason = " ".join(str(error).split())[:160]
        needs = "cuda] and a number of GPUs, such as h100:8 or h100:4x8, four machines of eight"
        if not on_gpus:
            needs = "tpu] and the name of a slice, such as v5e:4x8, v5p:4x4x4 or v6e:8x8"
        raise UserError(
            f"--topology {topology}: cannot be compiled for ({reason}); it needs policy-split-jax[{needs}"
        ) from None


def plan_program(program: Program, chip: Chip, mesh: Mesh) -> ProgramPlan:
    """Compiles one program, or learns from the compiler that it is too large."""
    traced = program.run.trace(*program.arguments, **program.keywords)
    flops = count_flops(traced.jaxpr.jaxpr, program.trips)
    besides = _bytes(program.besides)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(program, str(error), flops / mesh.size, besides)
    memory = compiled.memory_analysis()
    moved = traffic(compiled.as_text(), program.trips)
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    if platform(mesh) == "tpu":
        # There that figure adds up buffers that are never in memory at the same time.
        temporaries = memory.peak_memory_in_bytes - arguments - results
    bounds = {
        "compute": flops / mesh.size / chip.flops,
        "memory": moved.memory / chip.memory_bandwidth,
        "network": sum(moved.collectives.values()) / chip.link_bandwidth,
    }
    bound = max(bounds, key=bounds.__getitem__)
    return ProgramPlan(
        program.name, program.phase, arguments, temporaries, results, besides,
        arguments + temporaries + results + besides + memory.generated_code_size_in_bytes,
        flops / mesh.size, moved.memory, dict(moved.collectives), bounds[bound], bound, program.calls,
    )  # fmt: skip


def _refused(program: Program, message: str, flops: float, besides: int) -> ProgramPlan:
    """A program that the compiler itself finds too large; it says by how much, but makes no program to look at."""
    found = _TOO_LARGE.search(message)
    if found is None:
        raise UserError(f"{program.name} cannot be compiled: {' '.join(message.split())[:300]}") from None
    arguments, temporaries = _bytes(program.arguments), int(float(found[1]) * _UNITS[found[2]])
    return ProgramPlan(
        program.name, program.phase, arguments, temporaries, 0, besides, arguments + temporaries + besides,
        flops, 0, {}, math.inf, "memory", program.calls,
    )  # fmt: skip


def _bytes(tree: Any) -> int:
    """Of the abstract arrays of a tree, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )
