"""A run's folder: whose it is, what it begins with, and that one process at a time uses it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from policy_split_jax import config as settings
from policy_split_jax.config import RunConfig
from policy_split_jax.data.formats import Row
from policy_split_jax.errors import UserError
from policy_split_jax.files import alone, sync, sync_folder, whole_file
from policy_split_jax.policy import Policy, copy_policy_files
from policy_split_jax.rewards.custom import code_digest
from policy_split_jax.training.checkpoint import digest_of, latest_step
from policy_split_jax.training.guard import GuardConfig
from policy_split_jax.training.metrics_log import last_logged

LOCK = ".lock"

# Settings that a resumed run may change: they do not touch what has been computed. (Its folder may have moved.)
_FREE = {"name", "output", "train.steps", "train.save_every", "train.eval_every", "train.keep_checkpoints",
         "train.sample_questions", "train.tensorboard", "train.wandb", "reward.workers", "rollout.slots",
         "rollout.decode_steps", "mesh.data", "mesh.fsdp", "mesh.tp",
         *(f"guard.{item.name}" for item in fields(GuardConfig))}  # fmt: skip


def check_folder(config: RunConfig, started_at: int, must_resume: bool) -> None:
    """Raises UserError unless the run's folder is new, or of this run; changes nothing.

    A run that never reached a checkpoint starts afresh, and may do so with other settings; one whose checkpoints are
    gone is not begun anew.
    """
    folder, path = config.folder, config.folder / "config.yaml"
    if must_resume and not started_at:
        raise UserError(f"{folder}: no checkpoint to resume from; leave --resume out to start the run")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; choose another name (name=...)")
    if not path.is_file():
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise UserError(f"{folder}: not empty and not a run's folder; choose another name (name=...)")
        return
    found, wanted = settings.read_tree(path), settings.to_dict(config)
    if not started_at and (trace := _trace_of_checkpoints(folder, _get(found, "train.save_every"))):
        remedy = "put them back, choose another name (name=...) or remove the folder"
        raise UserError(f"{trace}: this run had checkpoints, and none is in {folder / 'checkpoints'}; {remedy}")
    changed = [key for key in _fixed_keys() if _get(found, key) != _get(wanted, key)]
    if started_at and changed:
        raise UserError(
            f"{path}: this run was started with another {', '.join(changed[:3])}; "
            "choose another name (name=...) or remove the folder"
        )


def _trace_of_checkpoints(folder: Path, save_every: int | None) -> Path | None:
    """The file that says that a run had a checkpoint; None where it may have had none."""
    summary, metrics = folder / "summary.json", folder / "metrics.jsonl"
    if summary.is_file():
        return summary
    # The second save waits until the first is written, and the steps after it come later.
    return metrics if save_every and last_logged(metrics) > 2 * save_every else None


@contextmanager
def locked(config: RunConfig, started_at: int) -> Iterator[None]:
    """Keeps other runs out of the folder, which is made where it is missing, while the block lasts.

    The lock goes with its process, however that ends. Raises UserError where another run has it, or had it since
    `started_at` was found to be the last checkpoint's step.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    remedy = "wait for its end, or choose another name (name=...)"
    with alone(config.folder / LOCK, f"{config.folder}: another run goes on there; {remedy}"):
        if (latest_step(config.folder / "checkpoints") or 0) != started_at:
            raise UserError(f"{config.folder}: another run has just gone on there; start this command again")
        yield


def make_folder(config: RunConfig, policy: Policy) -> None:
    """Writes what a new run's folder begins with: config.yaml first, which marks the folder as a run's."""
    _write_settings(config)
    model = config.folder / "model"
    copy_policy_files(policy, model)
    for path in model.iterdir():
        sync(path)
    sync_folder(model)


def renew_folder(config: RunConfig, step: int) -> None:
    """Writes what changes in the folder of a run that goes on after `step`."""
    _write_settings(config)
    if step < config.train.steps:
        # It would say that the run is over.
        (config.folder / "summary.json").unlink(missing_ok=True)


def _write_settings(config: RunConfig) -> None:
    with whole_file(config.folder / "config.yaml") as file:
        yaml.safe_dump(settings.to_dict(config), file, sort_keys=False, allow_unicode=True)


def identity(config: RunConfig, policy: Policy, train_rows: Sequence[Row], test_rows: Sequence[Row]) -> dict[str, str]:
    """Digests of what a run's checkpoints and figures mean nothing without."""
    tree = settings.to_dict(config)
    return {
        "settings": digest_of({key: _get(tree, key) for key in _fixed_keys()}),
        "model files": policy.digest,
        "stop tokens": digest_of(policy.stop_ids),
        "prompts": digest_of(asdict(policy.prompts)),
        "questions": _digest_of_rows(train_rows),
        "test questions": _digest_of_rows(test_rows),
        "reward code": code_digest(config.reward.grader),
    }


def _digest_of_rows(rows: Sequence[Row]) -> str:
    found = hashlib.sha256()
    for row in rows:
        content = [row.question, row.ground_truth, row.data_source, row.extra_info]
        found.update(json.dumps(content, sort_keys=True, default=str).encode())
    return found.hexdigest()


def _fixed_keys() -> list[str]:
    return [key for key in settings.known_keys(RunConfig) if key not in _FREE]


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
