"""What `policy-split eval` does."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from policy_split_jax.commands import load_chosen, make_sampler, table_console
from policy_split_jax.config import EMBEDDED
from policy_split_jax.data.benchmarks import BENCHMARKS
from policy_split_jax.data.dataset import load_rows
from policy_split_jax.data.embedded import PuzzleConfig
from policy_split_jax.data.formats import Row
from policy_split_jax.errors import UserError
from policy_split_jax.evaluation.evaluate import answer, evaluation_metrics, intervals, left_out, make_scorer
from policy_split_jax.evaluation.journal import append, journal
from policy_split_jax.evaluation.rollout_file import (
    SavedQuestion,
    finished_questions,
    question_batches,
    read_questions,
    rollout_records,
    saved_sums,
)
from policy_split_jax.files import check_output, write_json
from policy_split_jax.model.qwen3 import Params
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.policy import Policy
from policy_split_jax.rewards import GraderPool
from policy_split_jax.rewards.custom import code_digest
from policy_split_jax.rollouts import render_prompts
from policy_split_jax.sampler.batcher import Sampling
from policy_split_jax.training.console import RunDisplay, evaluation_table
from policy_split_jax.training.metrics_log import plain_row

PAPER = Sampling(max_new_tokens=32768, temperature=0.6, top_k=20, top_p=0.95)
"""How the paper samples its benchmarks."""
_QUESTIONS = 256
_MAX_NUMBER = 30
_PUZZLE_OPTIONS = ("task", "numbers", "max_number", "walls")
_COLUMN_OPTIONS = ("question_column", "answer_column")
_FINGERPRINT_VALUES = 64

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A benchmark, or the one file of questions that is not one."""

    rows: list[Row]
    grader: str


def evaluate(options: argparse.Namespace) -> None:
    """`policy-split eval`."""
    _check_options(options)
    output = check_output(Path(options.output), *_files(options))
    tasks = _benchmarks(options) if options.benchmark else _data(options)
    sampling = _sampling(options)
    policy, params = load_chosen(options)
    if options.high_entropy_prompt is not None:
        policy = policy.with_prompts(high_entropy=options.high_entropy_prompt)
    if options.benchmark:
        # Benchmarks bring instructions of their own.
        policy = policy.with_prompts(question_template="{question}")
    for task in tasks.values():
        render_prompts(policy, task.rows, options.max_prompt_tokens)
    rollouts = output.with_name(f"{output.stem}.rollouts.jsonl")
    with _graders(tasks) as pools:
        settings = _settings(options, sampling, policy, params, tasks)
        with journal(rollouts, settings, options.fresh):
            _answer_all(options, rollouts, tasks, pools, sampling, policy, params)
            questions = read_questions(rollouts)
    RunDisplay(1, 0).grader_errors([question for own in questions.values() for question in own])
    show = _show_benchmarks if options.benchmark else _show_data
    result = show(questions, options.k)
    write_json(output, {"settings": settings, **result})
    print(f"written to {output}, every rollout to {rollouts}")


def _check_options(options: argparse.Namespace) -> None:
    """Raises UserError for an option that would do nothing."""
    source = "a benchmark" if options.benchmark else "the embedded task" if options.data == EMBEDDED else "a file"
    own = {"the embedded task": _PUZZLE_OPTIONS, "a file": _COLUMN_OPTIONS}.get(source, ())
    for name in (*_PUZZLE_OPTIONS, *_COLUMN_OPTIONS):
        if name not in own and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} says nothing of {source}; leave it out")


def _files(options: argparse.Namespace) -> list[Path]:
    """Those that questions are read from."""
    if options.benchmark:
        return [Path(text.partition("=")[2]) for text in options.benchmark]
    return [] if options.data == EMBEDDED else [Path(options.data)]


def _benchmarks(options: argparse.Namespace) -> dict[str, Task]:
    """The chosen benchmarks; files of one name are one benchmark, as the two exams of AIME are."""
    tasks: dict[str, Task] = {}
    for text in dict.fromkeys(options.benchmark):
        name, _, file = text.partition("=")
        if name not in BENCHMARKS or not file:
            raise UserError(f"--benchmark {text}: write NAME=FILE; the names are {', '.join(BENCHMARKS)}")
        rows = tasks[name].rows if name in tasks else []
        tasks[name] = Task(rows + BENCHMARKS[name].read(Path(file)), options.grader or BENCHMARKS[name].grader)
    # In one order, in whichever they were given, so that an evaluation that goes on finds its rollouts.
    chosen = {name: tasks[name] for name in BENCHMARKS if name in tasks}
    return {name: Task(task.rows[: options.questions], task.grader) for name, task in chosen.items()}


def _data(options: argparse.Namespace) -> dict[str, Task]:
    count = options.questions or _QUESTIONS
    given = {name: value for name in _PUZZLE_OPTIONS if (value := getattr(options, name)) is not None}
    puzzles = replace(PuzzleConfig(max_number=_MAX_NUMBER), **given)
    rows = load_rows(
        options.data,
        puzzles,
        question_column=options.question_column or "question",
        answer_column=options.answer_column or "answer",
        split="test",
        count=count,
    )
    grader = options.grader or (puzzles.task if options.data == EMBEDDED else "math")
    return {Path(options.data).stem: Task(rows[:count], grader)}


def _sampling(options: argparse.Namespace) -> Sampling:
    """The defaults of what is evaluated, and whatever was given explicitly in their place."""
    defaults = PAPER if options.benchmark else Sampling(16 if options.data == EMBEDDED else 2048)
    given = {name: getattr(options, name) for name in asdict(defaults)}
    return Sampling(**{**asdict(defaults), **{name: value for name, value in given.items() if value is not None}})


def _settings(
    options: argparse.Namespace, sampling: Sampling, policy: Policy, params: Params, tasks: Mapping[str, Task]
) -> dict[str, Any]:
    """All that the rollouts depend on."""
    prompts = asdict(policy.prompts)
    return {
        "model": _fingerprint(params),
        "tokenizer and configuration": policy.digest[:16],
        "stop_ids": policy.stop_ids,
        "high_entropy_prompt": prompts.pop("high_entropy"),
        **prompts,
        "k": options.k,
        "seed": options.seed,
        **asdict(sampling),
        "dtype": options.dtype,
        **{f"questions of {name}": _identity(task) for name, task in tasks.items()},
        **_own_grader(options.grader or ""),
    }


def _identity(task: Task) -> dict[str, Any]:
    content = json.dumps([(row.question, row.ground_truth) for row in task.rows], default=str)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    return {"count": len(task.rows), "sha256": digest, "grader": task.grader}


def _own_grader(grader: str) -> dict[str, str]:
    digest = code_digest(grader)
    return {f"content of {grader.rpartition(':')[0]}": digest[:16]} if digest else {}


def _fingerprint(params: Params) -> str:
    """A hash of some of each weight's values: a training step changes all of them, and all take long to read."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        places = np.linspace(0, leaf.size - 1, _FINGERPRINT_VALUES).astype(np.int64)
        digest.update(f"{leaf.shape}".encode() + np.asarray(leaf[np.unravel_index(places, leaf.shape)]).tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _graders(tasks: Mapping[str, Task]) -> Iterator[dict[str, GraderPool]]:
    """Each grader that a task names, at work while the block lasts."""
    with ExitStack() as stack:
        names = dict.fromkeys(task.grader for task in tasks.values())
        yield {name: stack.enter_context(GraderPool(name)) for name in names}


def _answer_all(
    options: argparse.Namespace,
    path: Path,
    tasks: Mapping[str, Task],
    pools: Mapping[str, GraderPool],
    sampling: Sampling,
    policy: Policy,
    params: Params,
) -> None:
    """Samples, grades, scores and saves the batches that the file has not yet."""
    sizes = {name: len(task.rows) for name, task in tasks.items()}
    done = finished_questions(path, sizes, options.k)
    batches = question_batches(sizes, _questions_at_once(options), done)
    each = len(MODE_NAMES) * options.k
    with RunDisplay(1, 0) as display, display.phase("samples", each * sum(sizes.values())) as progress:
        progress(each * sum(done.values()))
        run = partial(
            answer,
            params,
            policy,
            make_sampler(options, policy),
            make_scorer(policy.config, dtype=options.dtype),
            k=options.k,
            key=jax.random.key(options.seed),
            sampling=sampling,
            progress=progress,
        )
        for batch in batches:
            task = tasks[batch.benchmark]
            rows = task.rows[batch.first : batch.first + batch.count]
            append(path, rollout_records(batch, *run(pool=pools[task.grader], rows=rows, first=batch.first)))


def _questions_at_once(options: argparse.Namespace) -> int:
    """So many that every slot has about 16 answers to give, in which the wait for the last one is little."""
    return options.questions_at_once or max(1, 16 * options.slots // (len(MODE_NAMES) * options.k))


def _metrics(strata: Sequence[Sequence[SavedQuestion]], k: int) -> Metrics:
    """Means over the strata, with their intervals over questions; of what counts, the sum."""
    sums = [[saved_sums(own, mode) for mode in (NORMAL, HIGH_ENTROPY)] for own in strata]
    rows = [evaluation_metrics(own, tokens, k) for own, tokens in zip(strata, sums, strict=True)]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    counts = {name: sum(row[name] for row in rows) for name in ("questions", "grader/failed")}
    each = [[[saved_sums([one], mode) for one in own] for mode in (NORMAL, HIGH_ENTROPY)] for own in strata]
    return mean | counts | {"k": k, "questions_left_out": left_out(strata, k)} | intervals(strata, each, k)


def _show_data(questions: Mapping[str, Sequence[SavedQuestion]], k: int) -> Metrics:
    row = _metrics(list(questions.values()), k)
    Console().print(evaluation_table(row))
    _say_left_out(row)
    return plain_row(row)


def _show_benchmarks(questions: Mapping[str, Sequence[SavedQuestion]], k: int) -> Metrics:
    rows = {name: _metrics([own], k) for name, own in questions.items()}
    strata: dict[str, list[SavedQuestion]] = {}
    for name, own in questions.items():
        strata.setdefault(BENCHMARKS[name].average, []).extend(own)
    mean = {"mean": _metrics(list(strata.values()), k)} if len(rows) > 1 else {}
    table_console().print(_table({**rows, **mean}, k))
    for name, row in rows.items():
        _say_left_out(row, f"{name}: ")
    plain = {name: plain_row(row) for name, row in {**rows, **mean}.items()}
    return {"benchmarks": {name: plain[name] for name in rows}, **{name: plain[name] for name in mean}}


def _say_left_out(row: Metrics, whose: str = "") -> None:
    if row["questions_left_out"]:
        print(
            f"{whose}{row['questions_left_out']} of {row['questions']} questions have fewer than {row['k']} graded "
            f"samples in some mode and do not count in pass@{row['k']}"
        )


def _table(rows: Mapping[str, Metrics], k: int) -> Table:
    """Percentages and bits with their 95 % intervals."""

    def share(figure: str) -> Callable[[Metrics, str], str]:
        return lambda row, mode: (
            f"{row[f'{figure}/{mode}']:.1%}  "
            f"{100 * row[f'{figure}/{mode}/low']:.1f} to {100 * row[f'{figure}/{mode}/high']:.1f}"
        )

    table = Table(title=f"{k} samples of each question in each mode, with 95 % intervals over questions")
    figures = {
        "accuracy": share("accuracy"),
        f"maj@{k}": share(f"maj@{k}"),
        f"pass@{k}": share(f"pass@{k}"),
        "entropy (bits)": lambda row, mode: (
            f"{row[f'entropy_bits/{mode}']:.3f}  "
            f"{row[f'entropy_bits/{mode}/low']:.3f} to {row[f'entropy_bits/{mode}/high']:.3f}"
        ),
        "length": lambda row, mode: f"{row[f'response_length/{mode}']:.1f}",
        "truncated": lambda row, mode: f"{row[f'truncated/{mode}']:.1%}",
    }
    for heading in ("", "mode", "questions", *figures):
        table.add_column(heading, justify="left" if heading in ("", "mode") else "right")
    for name, row in rows.items():
        for mode in MODE_NAMES:
            cells = (shown(row, mode) for shown in figures.values())
            table.add_row(name, mode.replace("_", "-"), str(row["questions"]), *cells)
    return table
