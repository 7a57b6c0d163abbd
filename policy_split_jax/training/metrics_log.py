"""A run's metrics.jsonl and samples.jsonl; TensorBoard and Weights & Biases where switched on."""

import json
import math
import secrets
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from policy_split_jax.errors import UserError
from policy_split_jax.files import sync, sync_folder, whole_file


class _Sink(Protocol):
    """Another place that rows go to."""

    def write(self, kind: str, step: int, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends rows to a run's files. A resumed run first drops what lies after its checkpoint.

    Use it with `with`: TensorBoard and Weights & Biases write in the background and have to be closed.
    """

    def __init__(
        self, folder: Path, name: str, *, last_step: int, evaluated: bool = True, tensorboard: bool, wandb: bool
    ):
        """`last_step` is the step that the run goes on from, and whether its evaluation is a part of that; what came
        later is dropped, all of it when −1."""
        for switch, wanted, package in (("tensorboard", tensorboard, "tensorboardX"), ("wandb", wandb, "wandb")):
            if wanted and not _installed(package):
                raise UserError(f"train.{switch} needs {package}: pip install 'policy-split-jax[{switch}]'")
        self._metrics = folder / "metrics.jsonl"
        self._samples = folder / "samples.jsonl"
        for path in (self._metrics, self._samples):
            _keep_until(path, last_step, evaluated)
        self._sinks: list[_Sink] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(folder, last_step + 1))
        if wandb:
            self._sinks.append(_Wandb(folder, name, goes_on=last_step >= 0))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def row(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics."""
        row = {"kind": kind, "step": step, **plain_row(values)}
        _append(self._metrics, [row])
        for sink in self._sinks:
            sink.write(kind, step, row)

    def samples(self, kind: str, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rollouts worth reading."""
        _append(self._samples, [{"step": step, "kind": kind, **row} for row in rows])

    def sync(self) -> None:
        """Returns when all rows so far will outlast the machine."""
        for path in (self._metrics, self._samples):
            if path.is_file():
                sync(path)
        sync_folder(self._metrics.parent)


def last_logged(path: Path) -> float:
    """The last step that a run's metrics.jsonl has a row of; 0 where there is none."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return max((step for step, _ in map(_place_of, lines) if step < math.inf), default=0)


def plain_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: what is not finite becomes null."""
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, str | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _keep_until(path: Path, last_step: int, evaluated: bool) -> None:
    """Drops the rows after `last_step`, those of its evaluation too unless `evaluated`, and a line that was cut off."""
    if not path.is_file():
        return
    last = (last_step, evaluated)
    with whole_file(path) as file:
        # Split as they were written: a text may hold other line breaks, and a cut may fall inside a character.
        for line in path.read_bytes().split(b"\n"):
            if _place_of(line) <= last:
                file.write(line.decode() + "\n")


def _place_of(line: bytes) -> tuple[float, bool]:
    """A row's step, and whether it is of its evaluation, which comes last; beyond all others where it is no row."""
    try:
        row = json.loads(line)
        return float(row["step"]), row["kind"] == "eval"
    except (ValueError, KeyError, TypeError):
        return math.inf, True


def _installed(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True


class _TensorBoard:
    """Scalars in the run's folder `tensorboard`; of those that are there none from `first_step` on is shown."""

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10, purge_step=first_step)

    def write(self, kind: str, step: int, row: Mapping[str, Any]) -> None:
        for key, value in _scalars(row):
            self._writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of the project policy-split-jax, gone on with when the run is resumed."""

    def __init__(self, folder: Path, name: str, goes_on: bool):
        import wandb  # type: ignore[import-not-found]

        # Not the name, which runs of other folders may have too.
        path = folder / "wandb_id"
        if not (goes_on and path.is_file()):
            with whole_file(path) as file:
                file.write(secrets.token_hex(8))
        found = path.read_text()
        self._run = wandb.init(project="policy-split-jax", name=name, dir=str(folder), resume="allow", id=found)

    def write(self, kind: str, step: int, row: Mapping[str, Any]) -> None:
        self._run.log({f"{kind}/{key}": value for key, value in _scalars(row)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _scalars(row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    return ((key, value) for key, value in row.items() if isinstance(value, int | float) and key != "step")
