"""Checkpoints with Orbax: the whole train state, and what else a run goes on from.

The run's settings lie beside them, in config.yaml. Every array's fingerprint is kept with it, so that damage is found
when a checkpoint is read, whatever wrote, moved or stored it.
"""

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from policy_split_jax import processes
from policy_split_jax.errors import UserError
from policy_split_jax.files import PASSING
from policy_split_jax.model.qwen3 import Params, abstract_params
from policy_split_jax.model.sharding import placed
from policy_split_jax.policy import Policy, load_policy, model_folder
from policy_split_jax.training.fingerprint import fingerprints
from policy_split_jax.training.state import TrainState

FORMAT = 3
DAMAGED = "damaged"
"""Where checkpoints are put that could not be read, beside the others."""

# By what a read fails whatever was to be read: as the system numbers it, and as TensorStore and XLA call it.
_HINDRANCES = PASSING | {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_STATUS = {
    "RESOURCE_EXHAUSTED": errno.ENOMEM,
    "UNAVAILABLE": errno.EIO,
    "DEADLINE_EXCEEDED": errno.ETIMEDOUT,
    "PERMISSION_DENIED": errno.EACCES,
}

_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")

Json = dict[str, Any]


class Damaged(Exception):
    """A checkpoint that cannot be read, or holds something else than was saved."""


class Restored(NamedTuple):
    """What a run goes on from."""

    step: int
    state: TrainState
    extra: Json
    damaged: Mapping[int, str]
    """Steps of later checkpoints that could not be used, and why."""


class Checkpoints:
    """A run's checkpoints, saved asynchronously, the last few kept. Close it to wait for the last save."""

    def __init__(self, folder: Path, keep: int, run: Mapping[str, str]):
        """`run` tells a run from others (`run_folder.identity`); a checkpoint of another is refused."""
        self._folder = folder
        self._run = dict(run)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def save(self, step: int, state: TrainState, extra: Json) -> None:
        """Copies the state and returns; it is written while training goes on. Does nothing where it is saved."""
        storable = _storable(state)
        about = {"format": FORMAT, "run": self._run, "fingerprints": _by_path(fingerprints(storable))} | extra
        stored = ocp.args.JsonSave(about | {"digest": digest_of(about)})
        args = ocp.args.Composite(state=ocp.args.StandardSave(storable), extra=stored)
        with self._writing():
            self._manager.save(step, args=args)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """UserError where a save, now or since the last one, found no room; other failures may pass."""
        try:
            yield
        except Exception as error:
            reason = next((text for text in _NO_ROOM if text in str(error)), None)
            if reason is None:
                raise
            remedy = f"make room, and the same command goes on from step {latest_step(self._folder) or 0}"
            raise UserError(f"{self._folder}: a checkpoint could not be written ({reason}); {remedy}") from None

    def restore(self, like: TrainState, shardings: TrainState) -> Restored:
        """The last checkpoint that is whole, whatever devices wrote it, on those of `shardings`.

        `like` gives shapes and types, and may be abstract (`jax.eval_shape`). Later ones that are damaged are moved to
        the folder `damaged`. Raises UserError where none is whole, and where the last one belongs to another run, model
        or version; OSError where one cannot be read for now.
        """
        # Where each array goes is said here, not read from the file: the checkpoint may come from other devices.
        wanted = placed(jax.eval_shape(_storable, like), shardings._asdict())
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, extra = self._read(step, wanted)
            except Damaged as error:
                damaged[step] = str(error)
            else:
                if damaged:
                    self._set_aside(damaged)
                return Restored(step, state, extra, damaged)
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        remedy = "put a copy there, or remove the run's folder"
        raise UserError(f"{self._folder}: no checkpoint there can be read ({reasons}); {remedy}")

    def _read(self, step: int, wanted: Any) -> tuple[TrainState, Json]:
        path = self._folder / str(step)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        with _reader(self._folder) as manager:
            extra = _read_about(manager, path, self._run)
            _check_arrays(path, extra, wanted)
            found = _read_arrays(manager, step, args, extra)
        state = TrainState(**found)
        return state._replace(key=jax.random.wrap_key_data(state.key)), extra

    def _set_aside(self, steps: Iterable[int]) -> None:
        if processes.is_first():
            (self._folder / DAMAGED).mkdir(exist_ok=True)
            for step in steps:
                (self._folder / str(step)).rename(_free_name(self._folder / DAMAGED / str(step)))
        processes.wait_for_all("set aside")
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is written."""
        with self._writing():
            self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _free_name(path: Path) -> Path:
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.partition('-')[0]}-{number}")
    return path


def _storable(state: TrainState) -> dict[str, Any]:
    """Arrays only: a typed key is stored as its data."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


def _by_path(tree: Any) -> dict[str, int]:
    found = jax.device_get(tree)
    return {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(found)}


def _read_about(manager: ocp.CheckpointManager, path: Path, run: Mapping[str, str]) -> Json:
    """What a checkpoint says of itself. Raises UserError where it is another version's or another run's."""
    extra = _agreed(lambda: _read_extra(manager, int(path.name)))
    _check_origin(path, extra, run)
    return extra


def _read_arrays(manager: ocp.CheckpointManager, step: int, args: Any, extra: Json) -> Any:
    """Its arrays, if they are those that were saved."""
    found = _agreed(lambda: _restored(manager, step, args)["state"])
    _agreed(lambda: _check_fingerprints(found, extra))
    return found


def _agreed(read: Callable[[], Any]) -> Any:
    """What this process reads; Damaged where it is for any process, so that all of them go on with the same step."""
    found, reason = None, None
    try:
        found = read()
    except Damaged as error:
        reason = str(error)
    for other in processes.gather(reason):
        if other is not None:
            raise Damaged(other)
    return found


def _restored(manager: ocp.CheckpointManager, step: int, args: Any) -> Any:
    try:
        return manager.restore(step, args=args)
    # What a damaged file does to the libraries that read it is anybody's guess.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if number := _hindrance(error):
            message = f"could not be read ({reason}); nothing was changed, try again"
            raise OSError(number, message, str(manager.directory / str(step))) from error
        raise Damaged(reason) from error


def _hindrance(error: BaseException | None) -> int | None:
    """The number of what kept a checkpoint from being read and says nothing of it; None where it is the checkpoint."""
    if error is None:
        return None
    number = error.errno if isinstance(error, OSError) else _said(error)
    return number if number in _HINDRANCES else _hindrance(error.__cause__ or error.__context__)


def _said(error: BaseException) -> int | None:
    """The system's number in, or for, what a library raised."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if found := re.search(r"os_error_code='(\d+)'", str(error)):
        return int(found[1])
    return next((number for word, number in _STATUS.items() if word in str(error)), None)


def _read_extra(manager: ocp.CheckpointManager, step: int) -> Json:
    extra = _restored(manager, step, ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
    if extra.get("format") == 1:
        return extra
    digest = extra.pop("digest", None)
    if digest != digest_of(extra):
        raise Damaged("extra is not what was saved")
    return extra


def digest_of(content: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_origin(path: Path, extra: Json, run: Mapping[str, str]) -> None:
    """Raises UserError for another version's checkpoint, or another run's."""
    if extra["format"] != FORMAT:
        newer = extra["format"] > FORMAT
        remedy = "use the newer version that wrote it" if newer else "use the older version, or start the run anew"
        raise UserError(f"{path}: has format {extra['format']}, this version reads {FORMAT}; {remedy}")
    for what, digest in run.items():
        if extra["run"].get(what) != digest:
            raise UserError(f"{path}: was saved with other {what}; put back this run's own {what}, or its checkpoints")


def _check_arrays(path: Path, extra: Json, wanted: Any) -> None:
    """Raises UserError where it has other arrays than are wanted."""
    leaves = {jax.tree_util.keystr(at) for at, _ in jax.tree_util.tree_leaves_with_path(wanted)}
    if other := leaves ^ extra["fingerprints"].keys():
        raise UserError(f"{path}: does not fit this model or version: {sorted(other)[0]}")


def _check_fingerprints(found: Any, extra: Json) -> None:
    wrong = [name for name, value in _by_path(fingerprints(found)).items() if value != extra["fingerprints"][name]]
    if wrong:
        raise Damaged(f"{wrong[0]} is not what was saved")


def latest_step(folder: Path) -> int | None:
    """The last step saved whole in `folder`; None where there is none, or no folder. Changes nothing."""
    if not folder.is_dir():
        return None
    with _reader(folder) as manager:
        return manager.latest_step()


def _reader(folder: Path) -> ocp.CheckpointManager:
    """Reads for this process alone: one that fails to must not leave the others waiting in the library."""
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def load_run_policy(run: Path) -> Policy:
    """All of a run's model but its weights, with the prompts that it was trained with."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; --checkpoint names a run's folder, such as runs/tiny")
    return load_policy(model_folder(str(run / "model")))


def load_run(run: Path) -> tuple[Policy, Params]:
    """The model of a run's last checkpoint, on the default device."""
    policy = load_run_policy(run)
    return policy, load_checkpoint_params(run, policy)


def load_checkpoint_params(run: Path, policy: Policy, shardings: Any = None) -> Params:
    """Only the parameters of a run's last checkpoint; the optimizer is not read.

    `shardings` is a tree like the parameters; without it they come to the default device. Raises UserError where there
    is no checkpoint, and where the last one is damaged or belongs to another model or version.
    """
    folder = run / "checkpoints"
    step = latest_step(folder)
    if step is None:
        raise UserError(f"{folder}: no checkpoint there yet")
    shapes = abstract_params(policy.config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {"params": placed(shapes, shardings or jax.tree.map(lambda _: here, shapes))}
    places = ocp.checkpoint_utils.construct_restore_args(wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=places, partial_restore=True)
    with _reader(folder) as manager:
        try:
            extra = _read_about(manager, folder / str(step), {"model files": policy.digest})
            found = _read_arrays(manager, step, ocp.args.Composite(state=args), extra)
        except Damaged as error:
            before = [other for other in manager.all_steps() if other < step]
            remedy = f"move it away to use step {max(before)}" if before else "there is none before it"
            raise UserError(f"{folder}/{step}: damaged ({error}); {remedy}") from None
    return found["params"]
