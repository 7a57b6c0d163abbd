"""Checkpoints with Orbax: the whole train state, the data iterator's position and the run's settings."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from policy_split_jax.errors import UserError
from policy_split_jax.model.qwen3 import Params, Qwen3Config, abstract_params
from policy_split_jax.training.state import TrainState

FORMAT = 1


class Checkpoints:
    """A run's checkpoints, saved asynchronously, the last few kept. Close it to wait for the last save."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """The last step saved whole; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Copies the state and returns; it is written while training goes on."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_storable(state)),
                extra=ocp.args.JsonSave({"format": FORMAT, **extra}),
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The last checkpoint; `like` gives shapes, types and shardings.

        Raises UserError where there is none or it belongs to another model.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{self._folder}: no checkpoint there")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore()),
            )
        except (ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self._folder}/{step}: does not fit this model or version: {reason}") from error
        state = TrainState(**found["state"])
        return state._replace(key=jax.random.wrap_key_data(state.key)), found["extra"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


def _storable(state: TrainState) -> dict[str, Any]:
    """Arrays only: a typed key is stored as its data."""
    return state._replace(key=jax.random.key_data(state.key))._asdict()


def load_checkpoint_params(folder: Path, config: Qwen3Config) -> Params:
    """Only the parameters of the last checkpoint in `folder`; the optimizer is not read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --checkpoint names a run's folder, such as runs/tiny")
    manager = ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(read_only=True))
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{folder}: no checkpoint there yet")
    # Where each array goes is said here, not read from the file: the checkpoint may come from other devices.
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        "params": jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract_params(config)
        )
    }
    places = ocp.checkpoint_utils.construct_restore_args(wanted)
    with manager:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item=wanted, restore_args=places, partial_restore=True)
            ),
        )
    return found["state"]["params"]
