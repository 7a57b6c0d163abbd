"""What each command of the command line does."""

import argparse
import json
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from policy_split_jax import config as settings
from policy_split_jax.config import EMBEDDED, RunConfig, SftConfig
from policy_split_jax.data.formats import Row, check_text, check_values, question_of, read_records, rows_of
from policy_split_jax.errors import UserError
from policy_split_jax.files import check_output, whole_file, write_json
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.modes import HIGH_ENTROPY, MODE_NAMES, NORMAL
from policy_split_jax.policy import Policy, load_model, write_prompts
from policy_split_jax.processes import Cluster, join_others

if TYPE_CHECKING:
    from rich.console import Console

_MODES = {"normal": (NORMAL,), "high-entropy": (HIGH_ENTROPY,), "both": (NORMAL, HIGH_ENTROPY)}


def train(options: argparse.Namespace) -> None:
    """`policy-split train CONFIG`."""
    from policy_split_jax.training.allocator import share_arenas
    from policy_split_jax.training.loop import train as run

    share_arenas()
    sources = {"model.path": options.model, "model.checkpoint": options.checkpoint}
    chosen = [f"{key}={json.dumps(value)}" for key, value in sources.items() if value]
    config = settings.load(RunConfig, options.config, [*options.overrides, *chosen])
    join_others(_cluster(options))
    run(config, must_resume=options.resume)


def _cluster(options: argparse.Namespace) -> Cluster | None:
    given = (options.coordinator, options.processes, options.process_id)
    if given == (None, None, None):
        return None
    if None in given:
        raise UserError("--coordinator, --processes and --process-id belong together; give all three")
    host, _, port = options.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {options.coordinator}: write host:port, for example 10.0.0.2:1234")
    if options.process_id >= options.processes:
        raise UserError(f"--process-id {options.process_id}: it must be from 0 to {options.processes - 1}")
    return Cluster(*given)


def sft(options: argparse.Namespace) -> None:
    """`policy-split sft CONFIG`."""
    from policy_split_jax.training.warmup import warm_up

    start = load_chosen(options)[1] if options.model or options.checkpoint else None
    warm_up(settings.load(SftConfig, options.config, options.overrides), start)


def sample(options: argparse.Namespace) -> None:
    """`policy-split sample`."""
    from policy_split_jax.rollouts import sample_groups
    from policy_split_jax.sampler.batcher import Sampling

    rows = None if options.prompts is None else _questions(Path(options.prompts))
    if options.output:
        check_output(Path(options.output), *([Path(options.prompts)] if options.prompts else []))
    policy, params = load_chosen(options)
    if options.high_entropy_prompt is not None:
        policy = policy.with_prompts(high_entropy=options.high_entropy_prompt)
    sampler = make_sampler(options, policy)
    modes = _MODES[options.mode]
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_k, options.top_p)

    def answer(rows: list[Row], key: jax.Array) -> Iterator[dict[str, Any]]:
        groups = sample_groups(
            params, policy, sampler, rows, per_mode=options.n, key=key, sampling=sampling, modes=modes
        )
        for group in groups:
            for at, rollout in enumerate(group.rollouts):
                yield {
                    "question": group.row.question,
                    "mode": MODE_NAMES[group.modes[at]].replace("_", "-"),
                    "index": at % options.n,
                    "text": group.texts[at],
                    "tokens": rollout.tokens.tolist(),
                    "logprobs": rollout.logprobs.tolist(),
                    "finish_reason": rollout.finish_reason,
                }

    key = jax.random.key(options.seed)
    if rows is None:
        _converse(answer, key)
    else:
        _write_rows(options.output, answer(rows, key))


def _questions(path: Path) -> list[Row]:
    return rows_of(path, lambda place, record: Row(question_of(place, record), None, "prompts"))


def _converse(answer: Any, key: jax.Array) -> None:
    """Questions typed by a person, until the input ends."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("A question a line, both modes answer; Ctrl-D ends. Try: Make 35 from 3, 5, 4.")
    number = 0
    while True:
        try:
            question = input("question> " if interactive else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 at byte {error.start} of what was read; type UTF-8") from None
        if question:
            check_text("standard input", "the question", question)
            for row in answer([Row(question, None, "prompt")], jax.random.fold_in(key, number)):
                print(f"{row['mode']:>12}  {row['text']}")
            number += 1


def score(options: argparse.Namespace) -> None:
    """`policy-split score`."""
    from policy_split_jax.evaluation.score_rows import score_answers, score_contexts

    records = list(read_records(Path(options.input)))
    for place, record in records:
        check_values(place, record)
    check_output(Path(options.output), Path(options.input))
    policy, params = load_chosen(options)
    run = score_contexts if options.prompt_tokens else score_answers
    _write_rows(options.output, run(params, policy, records, options.temperature, jnp.dtype(options.dtype)))


def evaluate(options: argparse.Namespace) -> None:
    """`policy-split eval`."""
    from policy_split_jax.evaluation.command import evaluate as run

    run(options)


def diversity(options: argparse.Namespace) -> None:
    """`policy-split diversity FILE`."""
    from rich.markup import escape
    from rich.table import Table

    from policy_split_jax.evaluation.diversity import diversity as run

    output = check_output(Path(options.output), Path(options.input))
    texts: dict[str, dict[str, list[str]]] = {}
    for question, mode, text in read_answers(Path(options.input)):
        texts.setdefault(mode, {}).setdefault(question, []).append(text)
    found = {
        mode: {
            "prompts": len(prompts),
            "samples": sum(map(len, prompts.values())),
            "blank": sum(not text.strip() for samples in prompts.values() for text in samples),
            **run(list(prompts.values())),
        }
        for mode, prompts in texts.items()
    }
    table = Table("", *map(escape, found))
    for name in next(iter(found.values())):
        table.add_row(name, *(f"{figures[name]:.4g}" for figures in found.values()))
    table_console().print(table)
    write_json(output, found)
    print(f"written to {output}")


def judge(options: argparse.Namespace) -> None:
    """`policy-split judge FILE`."""
    from policy_split_jax.evaluation.judge import judge as run

    run(options)


def read_answers(path: Path) -> list[tuple[str, str, str]]:
    """(question, mode, answer) of each row that `policy-split sample` wrote; thoughts are left out."""
    from policy_split_jax.rewards.answers import after_think

    found = []
    for place, record in read_records(path):
        question, mode, text = (_text_of(place, record, key) for key in ("question", "mode", "text"))
        found.append((question, mode, after_think(text)))
    if not found:
        raise UserError(f"{path}: holds no rows; give a file that policy-split sample wrote")
    return found


def _text_of(place: str, record: dict[str, Any], key: str) -> str:
    if not isinstance(record.get(key), str):
        raise UserError(f"{place}: {key} must be there as text; give a file that policy-split sample wrote")
    return record[key]


def export(options: argparse.Namespace) -> None:
    """`policy-split export`."""
    policy, params = load_chosen(options)
    output = Path(options.output)
    huggingface.save_model(
        output,
        params,
        policy.config,
        dtype=options.dtype,
        base_config=huggingface.read_json(policy.folder / "config.json"),
        generation_config=huggingface.read_json(policy.folder / "generation_config.json")
        if (policy.folder / "generation_config.json").is_file()
        else {"eos_token_id": list(policy.stop_ids)},
        tokenizer_files=policy.folder,
    )
    write_prompts(output, policy.prompts)
    print(f"written to {output}")


def serve(options: argparse.Namespace) -> None:
    """`policy-split serve`."""
    try:
        from policy_split_jax.serving.app import Server
        from policy_split_jax.serving.app import serve as run
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}; install 'policy-split-jax[serve]'") from None
    from policy_split_jax.access import required_token
    from policy_split_jax.sampler.batcher import Batcher, EngineConfig
    from policy_split_jax.serving.service import EngineService

    limits = {"max_prompt_tokens": options.max_prompt_tokens, "max_new_tokens": options.max_new_tokens}
    with socket.socket() as bound:
        _bind(bound, options.host, options.port)
        host, port = bound.getsockname()[:2]
        token = required_token(host)
        policy, params = load_chosen(options)
        engine = EngineConfig(policy.config, policy.stop_ids, options.slots, options.decode_steps, options.dtype)
        service = EngineService(
            Batcher(engine, params, **limits),
            max_rollouts=options.slots + options.max_waiting,
            max_seconds=options.max_seconds,
        )
        # The engine has weights of its own.
        del params
        service.start()
        name = options.name or Path(options.checkpoint or options.model or EMBEDDED).resolve().name
        print(f"{name} and {name}:high-entropy at http://{host}:{port}/v1; Ctrl-C ends", flush=True)
        run(Server(policy, service, name, **limits), bound, token)


def _bind(bound: socket.socket, host: str, port: int) -> None:
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port}: {error.strerror}; choose another --host or --port") from None


def report(options: argparse.Namespace) -> None:
    """`policy-split report RUN [RUN …]`, RUN a path or LABEL=PATH,PATH,…"""
    from policy_split_jax.access import required_token
    from policy_split_jax.report.groups import parse_named
    from policy_split_jax.report.page import write_report
    from policy_split_jax.report.watch import Watcher, watch

    runs = [parse_named(run) for run in options.runs]
    if not options.watch:
        print(write_report(runs, Path(options.output or Path(runs[0].paths[0]) / "report.html")))
        return
    if options.output:
        raise UserError("--output and --watch exclude each other: what is watched is served and not written")
    with socket.socket() as bound:
        _bind(bound, options.host, options.port)
        host, port = bound.getsockname()[:2]
        token = required_token(host)
        bound.listen()
        print(f"report at http://{host}:{port}/; Ctrl-C ends", flush=True)
        watch(Watcher(runs), bound, token)


def plan(options: argparse.Namespace) -> int:
    """`policy-split plan CONFIG --topology NAME`; 1 where the run does not fit."""
    from rich.console import Console

    from policy_split_jax.planning.plan import ignore_devices, make_plan
    from policy_split_jax.planning.show import show, to_json

    ignore_devices()
    config = settings.load(RunConfig, options.config, options.overrides)
    progress = Console(stderr=True)
    with progress.status("compiling") as status:
        found = make_plan(
            config, options.topology, options.mean_response, lambda name: status.update(f"compiling {name} ...")
        )
    if options.json:
        print(json.dumps(to_json(found, config), indent=2))
    else:
        show(found, config, table_console())
    return 0 if found.fits else 1


def compare(options: argparse.Namespace) -> int:
    """`policy-split compare step | rollouts | curves`; 1 where a step differs."""
    from policy_split_jax.parity.commands import compare as run

    return run(options)


def from_verl(options: argparse.Namespace) -> None:
    """`policy-split from-verl SOURCE [SOURCE …]`."""
    from policy_split_jax.parity.commands import from_verl as run

    run(options)


def load_chosen(options: argparse.Namespace) -> tuple[Policy, qwen3.Params]:
    """The model that --model or --checkpoint names; the embedded one by default."""
    if options.checkpoint:
        from policy_split_jax.training.checkpoint import load_run

        return load_run(Path(options.checkpoint))
    return load_model(options.model or EMBEDDED)


def table_console() -> "Console":
    """Standard output, on which a table is not cut where nobody looks at a terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def make_sampler(options: argparse.Namespace, policy: Policy) -> Any:
    """The sampler that the options of the engine describe."""
    from policy_split_jax.sampler.batcher import EngineConfig
    from policy_split_jax.sampler.rollout import Sampler

    engine = EngineConfig(policy.config, policy.stop_ids, options.slots, dtype=options.dtype)
    return Sampler(engine, options.max_prompt_tokens)


def _write_rows(output: str | None, rows: Iterable[dict[str, Any]]) -> None:
    """JSONL to a file, whole or not at all, or to standard output."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        sys.stdout.writelines(lines)
        return
    with whole_file(Path(output)) as file:
        file.writelines(lines)
    print(f"written to {output}")
