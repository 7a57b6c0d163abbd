"""Policy Split against the baselines on the embedded task, at equal rollouts and steps: training runs, then tables.

    python experiments/evidence.py [--methods "Policy Split" GRPO ...] [--numbers 3 4] [--seeds 0 1 2 3 4]

Tuning first: every method has one run at each of the same learning rates, with a seed of its own; the rate that ends
with the highest accuracy of the normal mode is that of its runs with the other seeds. Runs are ordinary ones of the
command line, one core each, in runs/evidence. What their evaluations found goes into
experiments/results/evidence.jsonl, and what is there is not run again. The tables go to standard output.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from jobs import FIGURES as COMMON
from jobs import Job, cores, ended, evaluations
from scipy import stats

from policy_split_jax import config

FOLDER = Path("runs/evidence")
RESULTS = Path("experiments/results/evidence.jsonl")
METHODS = {
    "Policy Split": "configs/tiny.yaml",
    "GRPO": "configs/baselines/grpo.yaml",
    "clip-higher": "configs/baselines/clip_higher.yaml",
    "forking tokens": "configs/baselines/forking_tokens.yaml",
    "Clip-Cov": "configs/baselines/clip_cov.yaml",
    "KL-Cov": "configs/baselines/kl_cov.yaml",
    "entropy-driven advantage": "configs/baselines/entropy_driven_advantage.yaml",
    "entropy regularization": "configs/baselines/entropy_regularization.yaml",
    "entropy advantage": "configs/baselines/entropy_advantage.yaml",
}
RATES = (1e-4, 2e-4, 4e-4)
TUNING_SEED = 100
TASKS = {3: {}, 4: {"rollout.max_new_tokens": 14}}
"""By how many numbers a puzzle has."""
STEPS = 300
FIGURES = COMMON | {
    "4 + 4 of both": "pass@8/both",
    "8 + 8 of both": "best_of_k/both",
    "distinct right, normal": "distinct_correct/normal",
    "distinct right, HE": "distinct_correct/high_entropy",
    "distinct right, both": "distinct_correct/both",
    "solved by HE alone": "only_high_entropy_solved",
    "KL(N‖HE)": "kl/normal_to_high_entropy",
}


class Run(NamedTuple):
    """What tells a run from the others."""

    numbers: int
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.numbers}-{self.method.replace(' ', '-').lower()}-{self.rate:g}-seed{self.seed}"

    def job(self) -> Job:
        # The learning rate decays over the updates, of which some methods have two a step.
        updates = STEPS * config.load(config.RunConfig, METHODS[self.method]).train.updates_per_step
        settings = {
            "data.numbers": f"[{self.numbers}]",
            "rollout.questions_per_step": 32,
            "optimizer.learning_rate": self.rate,
            "optimizer.decay_steps": updates,
            "train.steps": STEPS,
            "train.eval_every": STEPS // 4,
            "train.save_every": STEPS // 2,
            "train.keep_checkpoints": 1,
            "train.seed": self.seed,
        }
        return Job(self.name, METHODS[self.method], settings | TASKS[self.numbers])


Results = dict[Run, list[dict[str, float]]]
"""The evaluations of each run, in their order."""


def read_results() -> Results:
    if not RESULTS.is_file():
        return {}
    rows = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {Run(*row["run"]): row["evaluations"] for row in rows}


def complete(wanted: Iterable[Run], results: Results, parallel: int) -> None:
    """Runs those that have no result yet, and adds each one's to the file as it ends."""
    missing = {run.name: run for run in wanted if run not in results}
    RESULTS.parent.mkdir(exist_ok=True)
    for job in ended([run.job() for run in missing.values()], FOLDER, parallel):
        run, keys = missing[job.name], ("step", *FIGURES.values())
        results[run] = [{key: row[key] for key in keys} for row in evaluations(FOLDER / job.name)]
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": run, "evaluations": results[run]}) + "\n")


def best_rate(results: Results, numbers: int, method: str) -> float:
    return max(RATES, key=lambda rate: results[Run(numbers, method, rate, TUNING_SEED)][-1]["accuracy/normal"])


def cell(values: Sequence[float]) -> str:
    """Mean and half of the 95 % t-interval of it."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):.3f} ± {half:.3f}"


def table(results: Results, numbers: int, methods: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A row a method, the untrained model first."""
    heads = ["", "learning rate", *FIGURES, "p against original", "p against GRPO"]
    ends = {
        method: [results[Run(numbers, method, best_rate(results, numbers, method), seed)][-1] for seed in seeds]
        for method in methods
    }
    original = results[Run(numbers, methods[0], RATES[0], TUNING_SEED)][0]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines.append(f"| original | | {' | '.join(f'{original[key]:.3f}' for key in FIGURES.values())} | | |")
    for method, found in ends.items():
        cells = [cell([end[key] for end in found]) for key in FIGURES.values()]
        accuracies = [end["accuracy/normal"] for end in found]
        against = [p_value(stats.ttest_1samp(accuracies, original["accuracy/normal"]), seeds), ""]
        if method != "GRPO" and "GRPO" in ends:
            against[1] = p_value(stats.ttest_rel(accuracies, [end["accuracy/normal"] for end in ends["GRPO"]]), seeds)
        rate = best_rate(results, numbers, method)
        lines.append(f"| {method} | {rate:g} | {' | '.join([*cells, *against])} |")
    return lines


def p_value(test: Any, seeds: Sequence[int]) -> str:
    return f"{test.pvalue:.3f}" if len(seeds) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--numbers", type=int, nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--parallel", type=int, default=cores())
    chosen = parser.parse_args()
    results = read_results()
    pairs = [(numbers, method) for numbers in chosen.numbers for method in chosen.methods]
    tuning = [Run(*pair, rate, TUNING_SEED) for pair in pairs for rate in RATES]
    complete(tuning, results, chosen.parallel)
    final = [Run(*pair, best_rate(results, *pair), seed) for seed in chosen.seeds for pair in pairs]
    complete(final, results, chosen.parallel)
    for numbers in chosen.numbers:
        print(f"\n{numbers} numbers, {len(chosen.seeds)} seeds\n")
        print("\n".join(table(results, numbers, chosen.methods, chosen.seeds)))


if __name__ == "__main__":
    main()
