"""What a run shows while it goes: a progress bar, one line a step, a table at the end."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from policy_split_jax.modes import MODE_NAMES
from policy_split_jax.rollouts import Graded
from policy_split_jax.rollouts import Progress as Report

_TABLE = (
    ("accuracy, normal", "accuracy/normal", "{:.1%}"),
    ("accuracy, high-entropy", "accuracy/high_entropy", "{:.1%}"),
    ("entropy, normal (nats/token)", "entropy/normal", "{:.3f}"),
    ("entropy, high-entropy (nats/token)", "entropy/high_entropy", "{:.3f}"),
    ("KL(high-entropy ‖ normal) (nats/token)", "kl/high_entropy_to_normal", "{:.4f}"),
    ("KL(normal ‖ high-entropy) (nats/token)", "kl/normal_to_high_entropy", "{:.4f}"),
    ("best of k, normal", "best_of_k/normal", "{:.1%}"),
    ("best of k, high-entropy", "best_of_k/high_entropy", "{:.1%}"),
    ("pass@k, half of k from each mode", "pass@{k}/both", "{:.1%}"),
    ("distinct right answers, normal", "distinct_correct/normal", "{:.2f}"),
    ("distinct right answers, high-entropy", "distinct_correct/high_entropy", "{:.2f}"),
    ("response length, normal (tokens)", "response_length/normal", "{:.1f}"),
    ("response length, high-entropy (tokens)", "response_length/high_entropy", "{:.1f}"),
)


def _pair(row: Mapping[str, Any], name: str, form: str) -> str:
    """A figure of each mode that has one."""
    keys = (f"{name}/{mode}" for mode in MODE_NAMES)
    return " ".join(format(row[key], form) for key in keys if key in row)


class RunDisplay:
    """The progress bar of a run, and the lines above it."""

    def __init__(self, steps: int, done: int, quiet: bool = False):
        self.console = Console(highlight=False, quiet=quiet)
        self._steps = steps
        self._progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._run = self._progress.add_task("training", total=steps, completed=done)
        # One for all phases: columns keep what they last showed of every task, also of those that are gone.
        self._phase = self._progress.add_task("", visible=False)

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Report]:
        """A second bar for what is under way; yields the function that moves it."""
        self._progress.reset(self._phase, description=name, total=total, visible=True)
        try:
            yield lambda finished: self._progress.advance(self._phase, finished)
        finally:
            self._progress.update(self._phase, visible=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar of the run."""
        self._progress.update(self._run, completed=step)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        """The line of a training step: normal first, high-entropy second."""
        self.advance(step)
        self.say(
            f"step {step:>{len(str(self._steps))}}/{self._steps}  "
            f"reward {_pair(row, 'reward', '.2f')}  entropy {_pair(row, 'entropy', '.3f')}  "
            + (f"KL {row['kl/high_entropy_to_normal']:.4f}  eta {row['eta']:.3f}  " if "eta" in row else "")
            + f"length {_pair(row, 'response_length', '.1f')}  {row['time/step']:.1f} s"
        )

    def grader_errors(self, groups: Sequence[Graded]) -> None:
        """Says how many rollouts have no grade, and why the first has none."""
        errors = [grade.error for group in groups for grade in group.grades if grade.score is None]
        if errors:
            self.say(f"no grade for {len(errors)} rollouts, which count nowhere; the first: {errors[0]}")

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        self.say(
            f"eval at step {step}: accuracy {row['accuracy/normal']:.3f} {row['accuracy/high_entropy']:.3f}  "
            f"entropy {row['entropy/normal']:.3f} {row['entropy/high_entropy']:.3f}  "
            f"KL {row['kl/high_entropy_to_normal']:.4f}  "
            f"best of {row['k']} {row['best_of_k/normal']:.3f} {row['best_of_k/high_entropy']:.3f}  "
            f"{row['time/eval']:.1f} s   (normal, high-entropy)"
        )

    def summary(self, start: Mapping[str, Any], end: Mapping[str, Any]) -> None:
        """The table at the end."""
        self.console.print(change_table(start, end))


def change_table(start: Mapping[str, Any], end: Mapping[str, Any]) -> Table:
    """First and last evaluation side by side."""
    table = Table(title=f"Both modes on {end['questions']} test questions, {end['k']} samples each")
    for heading in ("", "start", "end"):
        table.add_column(heading, justify="right" if heading else "left")
    for label, key, form in _TABLE:
        name = key.format(k=end["k"])
        if name in end:
            table.add_row(label.replace(" k", f" {end['k']}"), _shown(start, name, form), _shown(end, name, form))
    return table


def evaluation_table(row: Mapping[str, Any]) -> Table:
    """One evaluation: the modes as columns."""
    table = Table(title=f"{row['questions']} questions, {row['k']} samples each")
    for heading in ("", "normal", "high-entropy", "both"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in dict.fromkeys(key.split("/")[0] for key in row if "/" in key and not key.startswith(("time", "kl"))):
        cells = [_with_interval(row, f"{name}/{mode}") for mode in ("normal", "high_entropy", "both")]
        if any(cells):
            table.add_row(name.replace("_", " "), *cells)
    table.add_row("KL to the other mode (nats/token)", _shown(row, "kl/normal_to_high_entropy", "{:.4f}"),
                  _shown(row, "kl/high_entropy_to_normal", "{:.4f}"), "")  # fmt: skip
    return table


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    """A figure, and where the row has it its interval."""
    figure, *ends = _shown(row, key, "{:.4f}"), *(_shown(row, f"{key}/{end}", "{:.3f}") for end in ("low", "high"))
    return f"{figure}  {' to '.join(ends)}" if all(ends) else figure


def _shown(row: Mapping[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None or math.isnan(value) else form.format(value)
