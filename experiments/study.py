"""The runs that the evidence is made of: what each changes, and what is known of it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jobs import BEST, MAIN, Job, ended, evaluate, side_by_side

from policy_split_jax.config import RunConfig, load
from policy_split_jax.report.runs import read_run

FOLDER = Path("runs/evidence")
RESULTS = Path("experiments/results/evidence.jsonl")
TRIAL_RESULTS = Path("experiments/results/trials.jsonl")

STEPS, QUESTIONS = 300, 32
RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEED = 100
# Those of the walk are the settings of configs/walk.yaml, its steps too, since every method has a file of its own.
TASKS: Mapping[str, Mapping[str, Any]] = {
    "3 numbers": {"data.numbers": "[3]"},
    "4 numbers": {"data.numbers": "[4]", "rollout.max_prompt_tokens": 40, "rollout.max_new_tokens": 14},
    "walk": {
        "model.path": "embedded-walk",
        "data.task": "walk",
        "reward.grader": "walk",
        "rollout.max_prompt_tokens": 40,
        "advantage.eta": 0.4,
        "eta.smallest": 0.1,
        "eta.largest": 0.4,
        "eta.target_kl": 0.1,
        "train.steps": 150,
    },
}
TUNED_ON = {"4 numbers": "3 numbers"}
"""Tasks that take their learning rates from another, of the same model."""

SPLIT, SPLIT_OF_PAPER = "Policy Split", "Policy Split with η, α, κ of the paper"
METHODS = {
    SPLIT: "configs/tiny.yaml",
    SPLIT_OF_PAPER: "configs/tiny.yaml",
    "GRPO": "configs/baselines/grpo.yaml",
    "clip-higher": "configs/baselines/clip_higher.yaml",
    "forking tokens": "configs/baselines/forking_tokens.yaml",
    "Clip-Cov": "configs/baselines/clip_cov.yaml",
    "KL-Cov": "configs/baselines/kl_cov.yaml",
    "entropy-driven advantage": "configs/baselines/entropy_driven_advantage.yaml",
    "entropy regularization": "configs/baselines/entropy_regularization.yaml",
    "entropy advantage": "configs/baselines/entropy_advantage.yaml",
}

CONSTANT = {"eta.schedule": "constant"}
PAPER = CONSTANT | {"advantage.eta": 0.03, "advantage.alpha": 0.5, "advantage.kappa": 2.0}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "η = 0": CONSTANT | {"advantage.eta": 0.0},
    "η = 0.3, constant": CONSTANT | {"advantage.eta": 0.3},
    "η = 1, constant": CONSTANT | {"advantage.eta": 1.0},
    "η′ = 0.15": {"advantage.eta_normal": 0.15},
    "η′ = −0.15": {"advantage.eta_normal": -0.15},
    "α = 0.35": {"advantage.alpha": 0.35},
    "α = 0.5": {"advantage.alpha": 0.5},
    "κ = 2": {"advantage.kappa": 2.0},
    "κ = 0, no clamp": {"advantage.kappa": 0.0},
    "nothing shared": {"sharing.rollouts": "own"},
    "shared with importance weights up to 2": {"sharing.importance_cap": 2.0},
    SPLIT_OF_PAPER: PAPER,
    "the same and preset released": PAPER | {"preset": "released"},
    "twice the steps": {"train.steps": 2 * STEPS},
    "twice the steps, η down to 0": {"train.steps": 2 * STEPS, "eta.smallest": 0.0},
    "twice the steps, η = 1, constant": CONSTANT | {"advantage.eta": 1.0, "train.steps": 2 * STEPS},
}
"""What each changes of `SPLIT`'s settings."""
COMPARED = (SPLIT, "GRPO", *ABLATIONS)
"""What the ablations' runs are of."""
ABLATION_TASK = "3 numbers"
ABLATION_RATE = 4e-4
"""That of configs/tiny.yaml, at which the modes part."""

PROMPTS = {
    "as in training": "High-entropy mode.",
    "rewritten": "High entropy mode: explore, be unusual.",
    "unseen, asks for the opposite": "Low-entropy mode.",
    "unseen, says nothing": "Answer.",
}
"""System prompts under which the trained high-entropy mode is evaluated."""
AS_PAPER = "sampled as in the paper"
WAYS: Mapping[str, Mapping[str, Any]] = {
    AS_PAPER: {"temperature": 0.6, "top-k": 20, "top-p": 0.95},
    **{title: {"high-entropy-prompt": prompt} for title, prompt in PROMPTS.items()},
}
"""What other evaluations change of those that a run makes of itself: options of `policy-split eval`."""
ORIGINAL = "original"

EXPLORING = BEST | {
    "4 + 4 of both": "pass@8/both",
    "best of 16, 8 + 8 of both": "best_of_k/both",
    "distinct right, normal": "distinct_correct/normal",
    "distinct right, HE": "distinct_correct/high_entropy",
    "distinct right, both": "distinct_correct/both",
    "solved by HE alone": "only_high_entropy_solved",
}
FIGURES = MAIN | EXPLORING | {"KL(N‖HE)": "kl/normal_to_high_entropy"}
"""What is kept of an evaluation."""
COSTS = ("time/rollout", "time/reward", "time/update", "time/step", "tokens/rollout")


class Run(NamedTuple):
    """What tells a run from the others; `variant` is a method or an ablation."""

    task: str
    variant: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        words = f"{self.task} {self.variant} {self.rate:g} seed{self.seed}"
        return "-".join("".join(letter if letter.isalnum() or letter in ".−" else " " for letter in words).split())

    @property
    def settings(self) -> dict[str, Any]:
        """What replaces its configuration's."""
        common = {
            "rollout.questions_per_step": QUESTIONS,
            "optimizer.learning_rate": self.rate,
            "train.steps": STEPS,
            "train.eval_every": STEPS // 4,
            "train.save_every": STEPS // 2,
            "train.keep_checkpoints": 1,
            "train.seed": self.seed,
        }
        return common | dict(TASKS[self.task]) | dict(ABLATIONS.get(self.variant, {}))

    @property
    def path(self) -> str:
        return METHODS.get(self.variant, METHODS[SPLIT])

    def config(self) -> RunConfig:
        return load(RunConfig, self.path, [f"{key}={value}" for key, value in self.settings.items()])

    def job(self) -> Job:
        train = self.config().train
        # The learning rate decays over the updates, of which some have several a step.
        decay = {"optimizer.decay_steps": train.steps * train.updates_per_step}
        return Job(self.name, self.path, self.settings | decay)


class Trial(NamedTuple):
    """Another evaluation of what a run ended with; of the task's untrained model, where the variant is `ORIGINAL`."""

    run: Run
    way: str
    """One of `WAYS`."""

    @property
    def name(self) -> str:
        return f"{self.run.name}-{'-'.join(self.way.replace(',', '').split())}"

    def options(self) -> dict[str, Any]:
        """Of `policy-split eval`: those of the run's own evaluations, and the way's."""
        own = self.run.config()
        trained = {"checkpoint": FOLDER / self.run.name}
        model = {"model": own.model.path} if self.run.variant == ORIGINAL else trained
        return model | {
            "task": own.data.task,
            "numbers": ",".join(map(str, own.data.numbers)),
            "questions": own.eval.questions,
            "k": own.eval.k,
            "seed": own.eval.seed,
            "max-new-tokens": own.rollout.max_new_tokens,
            "max-prompt-tokens": 64,
        } | dict(WAYS[self.way])  # fmt: skip


def untrained(task: str) -> Run:
    return Run(task, ORIGINAL, 0.0, 0)


class Result(NamedTuple):
    """What is known of a run that has ended."""

    evaluations: list[dict[str, float]]
    """In their order: the step and `FIGURES`."""
    costs: dict[str, float]
    """Medians over its steps: seconds and tokens."""


Results = dict[Run, Result]


def read_results() -> Results:
    return {Run(*row["run"]): Result(row["evaluations"], row["costs"]) for row in read_records(RESULTS)}


def read_records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def add_record(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def complete(wanted: Iterable[Run], results: Results, parallel: int) -> None:
    """Runs those that have no result yet, and adds each one's to the file as it ends."""
    missing = {run.name: run for run in wanted if run not in results}
    RESULTS.parent.mkdir(exist_ok=True)
    for job in ended([run.job() for run in missing.values()], FOLDER, parallel):
        run = missing[job.name]
        results[run] = result_of(FOLDER / job.name)
        add_record(RESULTS, {"run": run, **results[run]._asdict()})


def result_of(folder: Path) -> Result:
    """What a run's folder says; six digits of each figure."""
    found = read_run(folder, folder.name)
    evaluations = [{key: _rounded(row[key]) for key in ("step", *FIGURES.values())} for row in found.evaluation]
    return Result(evaluations, {key: _rounded(median(row[key] for row in found.train)) for key in COSTS})


Trials = dict[Trial, dict[str, float]]
"""`FIGURES` of each."""


def read_trials() -> Trials:
    return {Trial(Run(*row["run"]), row["way"]): row["figures"] for row in read_records(TRIAL_RESULTS)}


def try_again(wanted: Iterable[Trial], trials: Trials, parallel: int) -> None:
    """Makes the evaluations that there are not yet, and adds each one's figures to the file as it ends."""
    missing = [trial for trial in wanted if trial not in trials]
    runs = dict.fromkeys(trial.run for trial in missing if trial.run.variant != ORIGINAL)
    # Their results may be known, and their folders not be here.
    list(ended([run.job() for run in runs], FOLDER, parallel))
    for trial, figures in side_by_side(_tried, missing, parallel):
        trials[trial] = figures
        add_record(TRIAL_RESULTS, {**trial._asdict(), "figures": figures})


def _tried(trial: Trial, core: int) -> dict[str, float]:
    row = evaluate(trial.options(), FOLDER / f"{trial.name}.json", core)
    return {key: _rounded(row[key]) for key in FIGURES.values()}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def best_rate(results: Results, task: str, method: str) -> float:
    """The one at which a method's tuning run ended with the highest accuracy of the normal mode."""
    tuned = TUNED_ON.get(task, task)
    runs = {rate: results[Run(tuned, method, rate, TUNING_SEED)] for rate in RATES}
    return max(RATES, key=lambda rate: runs[rate].evaluations[-1]["accuracy/normal"])


def tuning(task: str, methods: Iterable[str]) -> list[Run]:
    tuned = TUNED_ON.get(task, task)
    return [Run(tuned, method, rate, TUNING_SEED) for method in methods for rate in RATES]
