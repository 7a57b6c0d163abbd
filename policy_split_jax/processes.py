"""Several processes as one run: how they find each other, and how they tell each other what they have.

Every process does the same with the same data, so that all of them start the same programs, in the same order, each
for its own devices. Only grading is divided, and only the first process writes what the run writes.
"""

import glob
import importlib.util
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from policy_split_jax.errors import UserError

_PIECE = 1 << 26
"""Bytes that one process sends at once."""
_LOOKS = itertools.count(1 << 24)


@dataclass(frozen=True)
class Cluster:
    """Where a process stands among others, said by hand."""

    coordinator: str
    """host:port, where process 0 listens."""
    processes: int
    process_id: int


def join_others(cluster: Cluster | None) -> None:
    """Connects this process with the others of its run, if there are any; before anything uses a device.

    Without `cluster` they are found where SLURM (`srun`), Open MPI or a TPU pod tells of them. Raises UserError
    where what they say makes no sense, and RuntimeError where the others do not answer in time: that may pass.
    """
    try:
        if cluster is not None:
            jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process_id)
        elif method := _detected(os.environ):
            # One process of a node takes all of its devices; with several, each takes the one of its rank.
            alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES", "0")
            jax.distributed.initialize(cluster_detection_method=method, local_device_ids=[] if alone else None)
        elif _has_tpu(os.environ):
            jax.distributed.initialize()
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the processes of this run did not find each other: {reason}") from None


def _detected(environment: Mapping[str, str]) -> str | None:
    """JAX's name for what started this process together with others; None where nothing did."""
    for method, count, rank in (
        ("slurm", "SLURM_NTASKS", "SLURM_STEP_NODELIST"),
        ("ompi", "OMPI_COMM_WORLD_SIZE", "OMPI_MCA_orte_hnp_uri"),
    ):
        if int(environment.get(count, 1)) > 1 and rank in environment:
            return method
    return None


def _has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU host, which may be one of a pod; JAX asks its surroundings for the others."""
    wanted = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] in ("", "tpu")
    present = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    return wanted and present and importlib.util.find_spec("libtpu") is not None


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def asked_to_stop() -> bool:
    """Whether some process of several got SIGTERM, of which JAX tells all of them; True at the same call in each.

    All must call it equally often: the call at which it is True is one that none of them has reached before.
    """
    # Checkpoints are asked about under their steps' numbers, which these do not touch.
    return multihost_utils.reached_preemption_sync_point(next(_LOOKS))


def is_first() -> bool:
    """Whether this process writes what the run writes and shows."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if several():
        multihost_utils.sync_global_devices(what)


def check_same(value: int, message: str) -> None:
    """Raises UserError in every process unless all have the same value."""
    if len({int(other) for other in _everybodys(np.array([value]))[:, 0]}) > 1:
        raise UserError(message)


def share(count: int) -> slice:
    """This process's part of so many things; the parts of all, in order, are all of them."""
    processes, index = jax.process_count(), jax.process_index()
    return slice(count * index // processes, count * (index + 1) // processes)


def gather(value: Any) -> list[Any]:
    """Every process's value, which JSON can hold, in the order of the processes; the same in all of them."""
    if not several():
        return [value]
    return [json.loads(data) for data in _gather_bytes(json.dumps(value).encode())]


def fetch(arrays: Any) -> Any:
    """A tree of arrays as NumPy arrays, whole in every process, whichever devices they lie on."""
    if not several():
        return jax.device_get(arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)


def _gather_bytes(data: bytes) -> list[bytes]:
    """Every process's data, in the order of the processes; sent in pieces, which bounds what devices hold."""
    sizes = _everybodys(np.array([len(data)]))[:, 0]
    pieces: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, int(sizes.max()), _PIECE):
        piece = np.zeros(min(_PIECE, int(sizes.max()) - start), np.uint8)
        own = np.frombuffer(data[start : start + _PIECE], np.uint8)
        piece[: len(own)] = own
        for process, row in enumerate(_everybodys(piece)):
            pieces[process].append(row[: max(0, min(_PIECE, int(sizes[process]) - start))].tobytes())
    return [b"".join(parts) for parts in pieces]


def _everybodys(values: np.ndarray) -> np.ndarray:
    """One row from each process."""
    if not several():
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values))
