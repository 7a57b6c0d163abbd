"""How an embedded model is made: a random tiny Qwen3, taught part of an embedded task in both modes."""

import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import policy_split_jax
from policy_split_jax import config as settings
from policy_split_jax.config import EMBEDDED, SftConfig, WarmupConfig
from policy_split_jax.data.dataset import load_rows
from policy_split_jax.data.embedded import TASKS, puzzles
from policy_split_jax.data.tiny_tokenizer import build_tiny_tokenizer
from policy_split_jax.errors import UserError
from policy_split_jax.evaluation.evaluate import answer, make_scorer, scored_metrics
from policy_split_jax.files import write_json
from policy_split_jax.model import huggingface, qwen3
from policy_split_jax.modes import ModePrompts, render_both
from policy_split_jax.padding import lengths, pad_left, pad_right
from policy_split_jax.policy import load_policy, write_prompts
from policy_split_jax.rewards import GraderPool
from policy_split_jax.sampler.batcher import EngineConfig, Sampling
from policy_split_jax.sampler.rollout import Sampler
from policy_split_jax.training.console import RunDisplay, evaluation_table
from policy_split_jax.training.optimizer import make_optimizer
from policy_split_jax.training.sft import SftBatch, SftState, make_sft_update

PROVENANCE = "provenance.json"
_MAX_NEW_TOKENS = 16
_MICROBATCH = 16
_WRONG_ANSWERS = 8


class Lesson(NamedTuple):
    """A question under both modes' prompts, right answers, and some wrong ones."""

    prompts: tuple[list[int], list[int]]
    answers: list[list[int]]
    wrong: list[list[int]]


def warm_up(config: SftConfig, start: qwen3.Params | None = None) -> Path:
    """Trains as `config` says, from `start` or from random weights, and writes a Hugging Face folder.

    Raises UserError when the folder exists (nothing is overwritten) and when `start` is of another size.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"{output}: exists already; choose another output=... or remove it")
    prompts = settings.mode_prompts(config.prompt)
    with tempfile.TemporaryDirectory() as scratch:
        vocab_size = build_tiny_tokenizer(scratch, TASKS[config.data.task].WORDS)
        tokenizer = huggingface.load_tokenizer(Path(scratch))
        model = qwen3.Qwen3Config(vocab_size=vocab_size, **asdict(config.size))
        params = start if start is not None else qwen3.init_params(model, jax.random.key(config.train.seed))
        huggingface.check_params(params, model)
        lessons = _lessons(config, tokenizer, prompts)
        params, losses = _train(config, model, params, lessons)
        huggingface.save_model(
            output,
            params,
            model,
            dtype="float32",
            generation_config={
                "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
                "pad_token_id": tokenizer.pad_token_id,
                "temperature": 1.0,
            },
            tokenizer_files=Path(scratch),
        )
    write_prompts(output, prompts)
    row = _evaluate(config, output, params)
    write_json(output / PROVENANCE, _provenance(config, losses, row))
    return output


def _lessons(config: SftConfig, tokenizer: Any, prompts: ModePrompts) -> list[Lesson]:
    task = TASKS[config.data.task]
    shown = puzzles(config.data, "train", count=config.data.train_size)
    end = [tokenizer.eos_token_id]

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) + end

    rendered = render_both(tokenizer, [task.render(puzzle) for puzzle in shown], prompts)
    wrong = _WRONG_ANSWERS if config.train.wrong_fraction else 0
    return [
        Lesson(
            both,
            [encode(answer) for answer in task.right_answers(puzzle)],
            [encode(answer) for answer in task.wrong_answers(puzzle, wrong)],
        )
        for both, puzzle in zip(rendered, shown, strict=True)
    ]


def _batches(lessons: Sequence[Lesson], config: SftConfig) -> Iterator[SftBatch]:
    """Endless shuffled epochs; each time a question comes up it gets one of its answers and one of its prompts."""
    draw = random.Random(config.train.seed)
    width = max(len(prompt) for lesson in lessons for prompt in lesson.prompts)
    length = max(len(answer) for lesson in lessons for answer in lesson.answers + lesson.wrong)
    order: list[Lesson] = []
    while True:
        while len(order) < config.train.batch_size:
            epoch = list(lessons)
            draw.shuffle(epoch)
            order += epoch
        chosen, order = order[: config.train.batch_size], order[config.train.batch_size :]
        prompts = [lesson.prompts[draw.random() < config.train.high_entropy_fraction] for lesson in chosen]
        answers = [_answer(lesson, config.train, draw) for lesson in chosen]
        yield SftBatch(
            jnp.asarray(pad_left(prompts, width)[:, None]),
            jnp.asarray(lengths(prompts)[:, None]),
            jnp.asarray(pad_right(answers, length)[:, None]),
            jnp.asarray(lengths(answers)[:, None]),
        )


def _answer(lesson: Lesson, config: WarmupConfig, draw: random.Random) -> list[int]:
    """Any of the question's right answers, or now and then a wrong one."""
    wrong = lesson.wrong and draw.random() < config.wrong_fraction
    return draw.choice(lesson.wrong if wrong else lesson.answers)


def _train(
    config: SftConfig, model: qwen3.Qwen3Config, params: qwen3.Params, lessons: Sequence[Lesson]
) -> tuple[qwen3.Params, list[float]]:
    """The trained parameters and the loss of each step (nats per token)."""
    optimizer = make_optimizer(config.optimizer)
    state = SftState(params, optimizer.init(params))
    update = make_sft_update(model, optimizer, config.train.batch_size // _MICROBATCH)
    losses: list[float] = []
    batches = _batches(lessons, config)
    started = time.perf_counter()
    with RunDisplay(config.train.steps, 0) as display:
        for step in range(1, config.train.steps + 1):
            state, loss = update(state, next(batches))
            losses.append(float(loss))
            display.advance(step)
            if step % config.train.log_every == 0 or step == config.train.steps:
                recent = np.mean(losses[-config.train.log_every :])
                seconds = (time.perf_counter() - started) / step
                display.say(f"step {step}/{config.train.steps}  loss {recent:.4f} nats/token  {seconds:.2f} s a step")
    return state.params, losses


def _evaluate(config: SftConfig, folder: Path, params: qwen3.Params) -> dict[str, Any]:
    """Accuracy and entropy of both modes on test puzzles."""
    policy = load_policy(folder)
    rows = load_rows(EMBEDDED, config.data, split="test", count=config.eval.questions)
    sampler = Sampler(EngineConfig(policy.config, policy.stop_ids, slots=64), max_prompt_tokens=64)
    with GraderPool(config.data.task) as pool, RunDisplay(1, 0) as display:
        groups, scores = answer(
            params,
            policy,
            sampler,
            make_scorer(policy.config),
            pool,
            rows,
            k=config.eval.k,
            key=jax.random.key(config.eval.seed),
            sampling=Sampling(_MAX_NEW_TOKENS),
        )
        row = scored_metrics(groups, scores, config.eval.k)
        display.console.print(evaluation_table(row))
    return row


def _provenance(config: SftConfig, losses: Sequence[float], row: dict[str, Any]) -> dict[str, Any]:
    """What it takes to make the folder again, and what came out."""
    return {
        "command": "policy-split " + " ".join(sys.argv[1:]),
        "config": settings.to_dict(config),
        "seed": config.train.seed,
        "versions": {
            "policy_split_jax": policy_split_jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")},
        },
        "final_loss": float(np.mean(losses[-50:])),
        "evaluation": {key: value for key, value in row.items() if not key.startswith("time")},
    }
