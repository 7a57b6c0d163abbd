"""The command line: `policy-split train | sft | sample | score | eval | diversity | judge | serve | export | report |
plan | compare | from-verl`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import policy_split_jax
from policy_split_jax.access import TOKEN
from policy_split_jax.errors import UserError
from policy_split_jax.files import PASSING
from policy_split_jax.limits import MAX_SEED, SMALLEST_TEMPERATURE, TEMPERATURES, is_temperature

_RUN_HELP = "PATH, or LABEL=PATH,PATH,... for runs that differ in their seed alone"
_MODES = ("normal", "high-entropy", "both")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for bad input, 130 when interrupted, 143 after SIGTERM, and 1 for a plan
    that does not fit or a comparison that fails."""
    options = _parse(arguments)
    # Models are local folders; nothing is ever looked up on a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # transformers reads tokenizers here; that it has no PyTorch is nothing to advise about.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from absl import logging

    from policy_split_jax import commands
    from policy_split_jax.training.stop import Stopped

    # The checkpoint library warns where it is asked to read only, and logs what it raises as well.
    logging.set_verbosity(logging.FATAL)
    try:
        run = {
            "train": commands.train,
            "sft": commands.sft,
            "sample": commands.sample,
            "score": commands.score,
            "eval": commands.evaluate,
            "diversity": commands.diversity,
            "judge": commands.judge,
            "serve": commands.serve,
            "export": commands.export,
            "report": commands.report,
            "plan": commands.plan,
            "compare": commands.compare,
            "from-verl": commands.from_verl,
        }[options.command]
        return run(options) or 0
    except UserError as error:
        print(f"policy-split: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        remedies = {
            "train": "from the last checkpoint",
            "eval": "after the last questions that were saved",
            "judge": "after the last verdict",
        }
        goes_on = remedies.get(options.command)
        remedy = f"; the same command goes on {goes_on}" if goes_on else ""
        print(f"policy-split: interrupted{remedy}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Stopped as stopped:
        saved = f"after step {stopped.step}, which is saved; the same command goes on from there"
        print(f"policy-split: stopped {saved if stopped.step else 'before the first step'}", file=sys.stderr)
        return stopped.exit_code
    except OSError as error:
        # A full disk, a folder without permission: nothing that a traceback would explain.
        place = f"{error.filename}: " if error.filename else ""
        print(f"policy-split: error: {place}{error.strerror or error}", file=sys.stderr)
        return 1 if error.errno in PASSING else 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; settings may stand before or after options, which argparse alone refuses."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = getattr(options, "overrides", None)
    unknown = [text for text in rest if overrides is None or text.startswith("-") or "=" not in text]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides is not None:
        overrides.extend(rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="policy-split",
        description="Policy Split (arXiv 2604.11510) in JAX: one Qwen3 model with a normal and a high-entropy mode.",
    )
    parser.add_argument("--version", action="version", version=policy_split_jax.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train(commands)
    _sft(commands)
    _sample(commands)
    _score(commands)
    _eval(commands)
    _diversity(commands)
    _judge(commands)
    _serve(commands)
    _export(commands)
    _report(commands)
    _plan(commands)
    _compare(commands)
    _from_verl(commands)
    return parser


def _config_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, for example {example}")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")


def _model_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="DIR", help="a Hugging Face folder of a Qwen3 model, or 'embedded' (default)"
    )
    source.add_argument("--checkpoint", metavar="DIR", help="a run's folder: its last checkpoint")


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=_positive, default=64, help="rollouts decoded at once (default 64)")
    parser.add_argument("--max-prompt-tokens", type=_positive, default=2048, help="longest prompt (default 2048)")
    _dtype_option(parser)


def _dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the activations")


def _output_option(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--output", metavar="FILE", default=default, help=f"file to write (default {default})")


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=_temperature, default=1.0, help="0 is greedy (default 1.0)")
    parser.add_argument("--top-k", type=_count, default=0, help="0 is off (default)")
    parser.add_argument("--top-p", type=_share, default=1.0, help="1 is off (default)")
    parser.add_argument("--seed", type=_seed, default=0)


def _prompt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--high-entropy-prompt",
        type=_text,
        metavar="TEXT",
        help="system prompt of the high-entropy mode (default: the one that the model was trained with)",
    )


def _train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="train both modes; goes on by itself where a run of that name stopped",
        description="Trains both modes as CONFIG says, and writes metrics, checkpoints and report.html to runs/NAME.",
    )
    _config_arguments(parser, "configs/tiny.yaml")
    parser.add_argument("--resume", action="store_true", help="fail unless there is a checkpoint to resume from")
    _model_options(parser)
    cluster = parser.add_argument_group(
        "several processes", "Needed only where neither SLURM, Open MPI nor a TPU pod tells of the other processes."
    )
    cluster.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    cluster.add_argument("--processes", type=_positive, metavar="N", help="how many there are")
    cluster.add_argument("--process-id", type=_count, metavar="I", help="which one this is, from 0")


def _sft(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sft",
        help="make a tiny Qwen3 and warm it up on the embedded task",
        description="Supervised learning of the embedded task; this is how the embedded model was made.",
    )
    _config_arguments(parser, "configs/tiny_sft.yaml")
    parser.add_argument("--model", metavar="DIR", help="start from this Hugging Face folder, not from random weights")
    parser.add_argument("--checkpoint", metavar="DIR", help="start from a run's last checkpoint")


def _sample(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "sample",
        help="answer questions in one or both modes",
        description="Samples answers to the questions of a JSONL file; without --prompts it asks for questions.",
    )
    _model_options(parser)
    parser.add_argument("--prompts", metavar="FILE", help="JSONL; each row has a question")
    parser.add_argument("--mode", choices=_MODES, default="both")
    parser.add_argument("--n", type=_positive, default=1, help="answers to each question in each mode (default 1)")
    parser.add_argument("--max-new-tokens", type=_positive, default=256)
    parser.add_argument("--output", metavar="FILE", help="JSONL to write; without it rows go to standard output")
    _prompt_option(parser)
    _sampling_options(parser)
    _engine_options(parser)


def _score(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "score",
        help="log-probabilities, entropies and inter-mode KL of given answers",
        description="Scores answers token by token. Rows with question and response are scored under both modes, "
        "rows with prompt_tokens and response_tokens in that one context.",
    )
    _model_options(parser)
    parser.add_argument("--input", metavar="FILE", required=True, help="JSONL to read")
    parser.add_argument("--output", metavar="FILE", required=True, help="JSONL to write")
    parser.add_argument(
        "--prompt-tokens", action="store_true", help="rows carry prompt_tokens and response_tokens, taken as they are"
    )
    parser.add_argument(
        "--temperature", type=_scoring_temperature, default=1.0, help="of the distributions (default 1.0)"
    )
    _dtype_option(parser)


def _eval(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy, pass@k, entropy and inter-mode KL of both modes",
        description="Samples k answers to each question in both modes, grades and scores them. The same command goes "
        "on where it was interrupted.",
    )
    _model_options(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", default="embedded", metavar="FILE", help="JSONL, parquet or CSV, or 'embedded' (default)"
    )
    source.add_argument(
        "--benchmark",
        action="append",
        metavar="NAME=FILE",
        help="math500, aime24, aime25, gpqa_diamond or mmlu_pro, sampled as in the paper; repeatable",
    )
    parser.add_argument("--question-column", help="of a file (default question)")
    parser.add_argument("--answer-column", help="of a file (default answer)")
    parser.add_argument("--task", choices=("countdown", "walk"), help="the embedded task (default countdown)")
    parser.add_argument("--numbers", type=_several(_positive), help="countdown: numbers of a puzzle (default 3)")
    parser.add_argument("--max-number", type=_positive, help="countdown: largest number (default 30)")
    parser.add_argument("--walls", type=_several(_count), help="walk: walls of a puzzle (default 4)")
    parser.add_argument("--questions", type=_positive, help="at most so many questions (default 256; benchmarks: all)")
    parser.add_argument(
        "--questions-at-once",
        type=_positive,
        metavar="N",
        help="sampled and saved together (default: 16 answers a slot, 64 with --k 8 and --slots 64)",
    )
    parser.add_argument(
        "--grader",
        help="the task's (embedded), math (files), letter (multiple choice), exact, or your own function",
    )
    parser.add_argument("--k", type=_positive, default=8, help="samples of each question in each mode (default 8)")
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        help="longest answer (default 16 for the embedded task, 2048 for files, 32768 for benchmarks)",
    )
    parser.add_argument("--temperature", type=_temperature, help="0 is greedy (default 1.0; benchmarks: 0.6)")
    parser.add_argument("--top-k", type=_count, help="0 is off (default 0; benchmarks: 20)")
    parser.add_argument("--top-p", type=_share, help="1 is off (default 1.0; benchmarks: 0.95)")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument(
        "--fresh", action="store_true", help="begin again; the rollouts beside the output are kept as *.before"
    )
    _prompt_option(parser)
    _output_option(parser, "eval.json")
    _engine_options(parser)


def _diversity(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "diversity",
        help="how varied the answers of either mode are",
        description="Div-2-gram, Div-BLEU and distinct openings of answers, for creative writing. Reads what sample "
        "writes (--n 8 gives the paper's eight samples of each prompt). Needs the writing extra.",
    )
    parser.add_argument("input", metavar="FILE", help="JSONL; rows have question, mode and text")
    _output_option(parser, "diversity.json")


def _judge(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "judge",
        help="what a language model thinks of the answers of either mode",
        description="Asks a model behind an OpenAI-compatible endpoint to score stories from 0 to 10 for creativity, "
        "originality, narrative flow, emotional impact and imagery. Reads what sample writes. The same command goes on "
        "where it was interrupted. OPENAI_API_KEY is sent where it is set. Needs the writing extra.",
    )
    parser.add_argument("input", metavar="FILE", help="JSONL; rows have question, mode and text")
    parser.add_argument("--url", required=True, help="of the endpoint, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", metavar="NAME", required=True, help="the judge, as the endpoint calls it")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="of the judge (default 0)")
    parser.add_argument("--concurrency", type=_positive, default=8, help="requests at a time (default 8)")
    parser.add_argument("--fresh", action="store_true", help="drop the verdicts beside the output and begin again")
    _output_option(parser, "judge.json")


def _serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible HTTP server of both modes",
        description="Serves both modes over HTTP as the OpenAI API does; the model's name chooses the mode: NAME or "
        "NAME:high-entropy.",
    )
    _model_options(parser)
    parser.add_argument("--name", help="of the model (default: its folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help=f"0.0.0.0 for all who know {TOKEN} (default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--max-new-tokens", type=_positive, default=2048, help="longest answer (default 2048)")
    parser.add_argument("--decode-steps", type=_positive, default=4, help="tokens between two messages (default 4)")
    parser.add_argument("--max-waiting", type=_count, default=2048, help="answers without a slot (default 2048)")
    parser.add_argument(
        "--max-seconds", type=_above_zero, default=600.0, help="for an answer, its wait included (default 600)"
    )
    _engine_options(parser)


def _export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="write a Hugging Face folder",
        description="Writes a Hugging Face folder that transformers, vLLM and others load.",
    )
    _model_options(parser)
    parser.add_argument("--output", metavar="HFDIR", required=True, help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")


def _report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="one HTML page about one or several runs",
        description="Writes one self-contained HTML page about one or several runs; with --watch serves it instead, "
        "and renews it as the runs go on.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN_HELP)
    parser.add_argument("--output", metavar="FILE", help="page to write (default: report.html in the first run)")
    parser.add_argument("--watch", action="store_true", help="serve the page, and renew it as the runs go on")
    parser.add_argument("--host", default="127.0.0.1", help=f"of --watch; 0.0.0.0 for all who know {TOKEN}")
    parser.add_argument("--port", type=_port, default=8765, help="of --watch (default 8765; 0 takes a free one)")


def _plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="whether a run fits a TPU slice or GPUs, and what a step takes there at best",
        description="Compiles every program of a run for hardware that is not there, and adds up memory and time. "
        "Exits with 1 when it does not fit. Needs the tpu or the cuda extra, and neither TPU nor GPU.",
    )
    _config_arguments(parser, "configs/qwen3_1p7b.yaml")
    parser.add_argument("--topology", metavar="NAME", required=True, help="v5e:4x8, v5p:4x4x4, v6e:8x8, h100:8, ...")
    parser.add_argument(
        "--mean-response", type=_positive, metavar="N", help="tokens of a mean response (default: half of the longest)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def _compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "compare",
        help="this implementation against PyTorch, and runs against each other",
        description="Compares with PyTorch on the same rollouts, with rollouts that the authors' trainer wrote, or the "
        "curves of runs.",
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _compare_step(kinds)
    _compare_rollouts(kinds)
    _compare_curves(kinds)


def _compare_step(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = kinds.add_parser(
        "step",
        help="training steps in PyTorch and here, number by number",
        description="Runs the same training steps in PyTorch and here, and compares what both compute: from logits to "
        "parameters. Exits with 1 where a difference is larger than its tolerance. Needs the torch extra.",
    )
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face folder (default: a small random Qwen3)")
    parser.add_argument(
        "--rollouts", metavar="FILE", help="rollouts as train.dump_rollouts writes them (default: sampled now)"
    )
    parser.add_argument("--questions", type=_positive, default=4, help="how many; a multiple of 4 (default 4)")
    parser.add_argument(
        "--variant", action="append", metavar="NAME", help="paper, released or a baseline; repeatable (default all)"
    )
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16"), help="of the activations (default both)"
    )
    parser.add_argument("--steps", type=_positive, default=3, help="optimizer steps (default 3)")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights and rollouts")
    _output_option(parser, "compare-step.json")


def _compare_rollouts(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = kinds.add_parser(
        "rollouts",
        help="a dump of the authors' trainer, scored again",
        description="Reads rollouts as the authors' trainer dumps them, scores them again, and reports what that "
        "trainer would log, by quarter, and the same under the right prompts.",
    )
    parser.add_argument("file", metavar="FILE", help="JSONL, as train.dump_rollouts writes it too")
    _model_options(parser)
    parser.add_argument(
        "--preset", choices=("released", "paper"), default="released", help="whose advantages (default released)"
    )
    parser.add_argument(
        "--max-new-tokens", type=_positive, help="that trainer's limit; responses of that length have no stop token"
    )
    parser.add_argument("--padding", action="store_true", help="it ran without use_remove_padding")
    _dtype_option(parser)
    _output_option(parser, "compare-rollouts.json")


def _compare_curves(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = kinds.add_parser(
        "curves",
        help="one page that lays the curves of runs over each other",
        description="Lays the curves of runs over each other: folders of this trainer, JSONL and console logs of "
        "verl's, exports of W&B or TensorBoard. The first is what the others are measured against.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN_HELP)
    parser.add_argument("--names", metavar="FILE", help="YAML with lines of `their name: our name`")
    _output_option(parser, "compare-curves.html")


def _from_verl(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "from-verl",
        help="a configuration from verl's overrides",
        description="Writes the configuration of a run of verl's trainer as one of ours. Keys without a counterpart "
        "are listed at its end, each with the reason.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a script that starts the trainer (.sh), a configuration of it (.yaml), or KEY=VALUE",
    )
    parser.add_argument("--output", metavar="FILE", help="YAML to write; without it standard output")


def _number(text: str, kind: Callable[[str], Any], rule: str, holds: Callable[[Any], bool]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not holds(value):
        raise argparse.ArgumentTypeError(f"{text} must be {rule}")
    return value


def _positive(text: str) -> int:
    return _number(text, int, "at least 1", lambda value: value >= 1)


def _count(text: str) -> int:
    return _number(text, int, "at least 0", lambda value: value >= 0)


def _port(text: str) -> int:
    return _number(text, int, "from 0 to 65535", lambda value: 0 <= value < 2**16)


def _seed(text: str) -> int:
    return _number(text, int, f"from 0 to {MAX_SEED}", lambda value: 0 <= value <= MAX_SEED)


def _temperature(text: str) -> float:
    return _number(text, float, TEMPERATURES, is_temperature)


def _scoring_temperature(text: str) -> float:
    return _number(text, float, f"at least {SMALLEST_TEMPERATURE:g}", lambda value: value >= SMALLEST_TEMPERATURE)


def _above_zero(text: str) -> float:
    return _number(text, float, "above 0", lambda value: value > 0)


def _share(text: str) -> float:
    return _number(text, float, "in (0, 1]", lambda value: 0 < value <= 1)


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is blank")
    return text


def _several(one: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(one(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
