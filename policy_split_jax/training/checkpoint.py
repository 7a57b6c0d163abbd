"""Checkpoints with Orbax: the whole train state and the data iterator's position.

The run's settings lie beside them, in config.yaml.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from policy_split_jax.errors import UserError
from policy_split_jax.model.qwen3 import Params, Qwen3Config, abstract_params
from policy_split_jax.model.sharding import placed
from policy_split_jax.policy import Policy, load_policy, model_folder
from policy_split_jax.training.state import TrainState

FORMAT = 1


class Checkpoints:
    """A run's checkpoints, saved asynchronously, the last few kept. Close it to wait for the last save."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, state: TrainState, extra: dict[str, Any]) -> None:
        """Copies the state and returns; it is written while training goes on."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_storable(state)),
                extra=ocp.args.JsonSave({"format": FORMAT, **extra}),
            ),
        )

    def restore(self, like: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The last checkpoint, whatever devices wrote it, on those of `shardings`.

        `like` gives shapes and types, and may be abstract (`jax.eval_shape`). Raises UserError where there is
        no checkpoint or it belongs to another model.
        """
        step = self._manager.latest_step()
        if step is None:
            raise UserError(f"{self._folder}: no checkpoint there")
        # Where each array goes is said here, not read from the file: the checkpoint may come from other devices.
        wanted = placed(jax.eval_shape(_storable, like), shardings._asdict())
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted), extra=ocp.args.JsonRestore()),
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


def latest_step(folder: Path) -> int | None:
    """The last step saved whole in `folder`; None where there is none, or no folder. Changes nothing."""
    if not folder.is_dir():
        return None
    with ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        return manager.latest_step()


def load_run_policy(run: Path) -> Policy:
    """All of a run's model but its weights, with the prompts that it was trained with."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; --checkpoint names a run's folder, such as runs/tiny")
    return load_policy(model_folder(str(run / "model")))


def load_run(run: Path) -> tuple[Policy, Params]:
    """The model of a run's last checkpoint, on the default device."""
    policy = load_run_policy(run)
    return policy, load_checkpoint_params(run / "checkpoints", policy.config)


def load_checkpoint_params(folder: Path, config: Qwen3Config, shardings: Any = None) -> Params:
    """Only the parameters of the last checkpoint in `folder`; the optimizer is not read.

    `shardings` is a tree like the parameters; without it they come to the default device.
    """
    step = latest_step(folder)
    if step is None:
        raise UserError(f"{folder}: no checkpoint there yet")
    shapes = abstract_params(config)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {"params": placed(shapes, shardings or jax.tree.map(lambda _: here, shapes))}
    places = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item=wanted, restore_args=places, partial_restore=True)
            ),
        )
    return found["state"]["params"]
