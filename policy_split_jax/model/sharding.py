"""Where arrays lie: one mesh of devices, and one table from the names of axes to the mesh's.

Three axes, any of which may be 1. Sequences are divided over `data` and `fsdp`; parameters and the optimizer's
moments over `fsdp`, gathered layer by layer as they are needed, and over `tp`, which divides heads, hidden units
and the vocabulary of every layer's work. XLA puts in the communication.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

BATCH = ("data", "fsdp")
"""The mesh axes that divide sequences, slots and questions."""
MESH_AXES = (*BATCH, "tp")

Rules = Mapping[str, str | None]
TRAINING_RULES: Rules = {
    "vocab": "tp",
    "embed": "fsdp",
    "heads": "tp",
    "kv_heads": "tp",
    "mlp": "tp",
    "norm": None,
    "head_dim": None,
    "layers": None,
}
"""Logical axes of parameters, as `qwen3.logical_axes` names them, to mesh axes."""
SAMPLING_RULES: Rules = {**TRAINING_RULES, "embed": None}
"""A decode step reads every weight for a single token of each slot: gathering them each time would cost more."""


def make_mesh(data: int, fsdp: int, tp: int, devices: Sequence[Any]) -> Mesh:
    """A mesh of these devices; one size may be -1, which takes what is left. Neighbours share a `tp` group.

    Raises ValueError where the sizes do not make up the devices.
    """
    sizes = [data, fsdp, tp]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh: only one of data ({data}), fsdp ({fsdp}) and tp ({tp}) may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: data x fsdp x tp is {' x '.join(map(str, sizes))}, but there are {len(devices)} devices"
        )
    # A process's devices side by side, so that a `tp` group stays within it.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered, dtype=object).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def platform(mesh: Mesh | None) -> str:
    """What kind of devices a program runs on: cpu, gpu or cuda, tpu."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def compiler_options(mesh: Mesh | None) -> dict[str, Any] | None:
    """What the compiler of a training program is told.

    A TPU's would gather weights piece by piece between products of the pieces, each of which passes over its whole
    result in memory: with `fsdp` of 32, of which a piece has 64 rows, ten times the traffic. A CPU's would give sums
    and what is element by element to its library of kernels too, which is quicker than XLA with products alone.
    """
    kind = platform(mesh)
    if kind == "tpu":
        return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
    if kind == "cpu":
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
    return None


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts sequences are divided."""
    return _parts(mesh, BATCH) if mesh else 1


def named_shardings(axes: Any, mesh: Mesh, rules: Rules) -> Any:
    """A tree of shardings from a tree of tuples of logical axes."""

    def sharding(names: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(rules[name] for name in names)))

    return jax.tree.map(sharding, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def placed(tree: Any, shardings: Any) -> Any:
    """Arrays or their shapes as `jax.ShapeDtypeStruct`s that lie as the tree of shardings says."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: Array, mesh: Mesh | None, *spec: str | tuple[str, ...] | None) -> Array:
    """Tells XLA how an intermediate array lies; without a mesh the array as it is.

    An axis that the mesh does not divide evenly is whole on every device: XLA's padding of uneven parts has been
    seen to change results.
    """
    if mesh is None:
        return x
    even = [axes if size % _parts(mesh, axes) == 0 else None for size, axes in zip(x.shape, spec, strict=False)]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*even)))


def _parts(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def pinned(tree: Any, shardings: Any) -> Any:
    """Tells XLA how a whole tree lies; without shardings the tree as it is."""
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)
