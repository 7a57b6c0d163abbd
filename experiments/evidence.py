"""Policy Split against the baselines, and against itself changed: training runs, then docs/results.md.

    python experiments/evidence.py --small         # 3 numbers, 3 methods, 3 seeds: 34 minutes on 2 cores
    python experiments/evidence.py                 # everything: some 12 hours on 2 cores
    python experiments/evidence.py --tasks "4 numbers" --methods "Policy Split" GRPO --seeds 0 1
    python experiments/evidence.py --only-write    # the page anew, from the results that there are

Tuning first: every method has one run at each of the same learning rates, with a seed of its own; the rate that ends
with the highest accuracy of the normal mode is that of its runs with the other seeds. Runs are ordinary ones of the
command line, one core each, in runs/evidence; what was interrupted goes on. What they found goes into
experiments/results, and what is there is not run again: move it away to make all of it anew.
A chosen part goes to standard output; everything goes into docs/results.md. Curves are in runs/evidence/TASK.html,
divergence.html and, of longer runs, stability.html.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import tables
from jobs import cores
from study import (
    ABLATION_RATE,
    ABLATION_TASK,
    AS_PAPER,
    COMPARED,
    FOLDER,
    METHODS,
    PAPER,
    PROMPTS,
    QUESTIONS,
    RATES,
    SPLIT,
    SPLIT_OF_PAPER,
    STEPS,
    TASKS,
    TUNING_SEED,
    WAYS,
    Results,
    Run,
    Trial,
    Trials,
    best_rate,
    complete,
    read_results,
    read_trials,
    try_again,
    tuning,
    untrained,
)

from policy_split_jax.config import RunConfig, load
from policy_split_jax.report.frame import write_page
from policy_split_jax.report.groups import RunGroup
from policy_split_jax.report.page import render
from policy_split_jax.report.runs import Run as ReportedRun

TEMPLATE = Path(__file__).with_name("results.template.md")
PAGE = Path("docs/results.md")
SEEDS = (0, 1, 2, 3, 4)
CHARTED = (SPLIT, SPLIT_OF_PAPER, "GRPO", "entropy advantage")
COMPARISONS = {
    "divergence": (SPLIT, "GRPO"),
    "stability": ("twice the steps", "twice the steps, η down to 0", "twice the steps, η = 1, constant"),
}
"""Further charts, at the rate of the ablations."""
SMALL = (("3 numbers",), (SPLIT, "GRPO", "entropy advantage"), (0, 1, 2))


def chosen_runs(results: Results, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Those at each method's best rate, which tuning has found."""
    best = [(task, method, best_rate(results, task, method)) for task in tasks for method in methods]
    return [Run(*each, seed) for seed in seeds for each in best]


def compare_methods(
    results: Results, trials: Trials, tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], parallel: int
) -> None:
    """Tuning, then the runs at each method's best rate, then their models and the untrained sampled as in the paper."""
    complete((run for task in tasks for run in tuning(task, methods)), results, parallel)
    runs = chosen_runs(results, tasks, methods, seeds)
    complete(runs, results, parallel)
    try_again((Trial(run, AS_PAPER) for run in [*map(untrained, tasks), *runs]), trials, parallel)


def ablate(results: Results, trials: Trials, seeds: Sequence[int], parallel: int) -> None:
    """One setting changed at a time, then other prompts for what was trained with none changed, and untrained."""
    runs = [Run(ABLATION_TASK, name, ABLATION_RATE, seed) for seed in seeds for name in COMPARED]
    complete(runs, results, parallel)
    own = [untrained(ABLATION_TASK), *(run for run in runs if run.variant == SPLIT)]
    try_again((Trial(run, way) for run in own for way in PROMPTS), trials, parallel)


def page(results: Results, trials: Trials) -> str:
    """docs/results.md from whatever results there are."""
    tasks = [task for task in TASKS if any(tables.best_ends(results, task, method) for method in METHODS)]
    tried = [task for task in tasks if Trial(untrained(task), AS_PAPER) in trials]
    sampled = tables.sampled_as_paper(results, trials)
    sections = {
        "methods": _headed({task: _compared(results, task, tables.MAIN) for task in tasks}),
        "sampled": _headed({task: _sampled(sampled, task) for task in tried}),
        "training": tables.over_training(results),
        "exploration": _headed({task: _explored(results, task) for task in tasks}),
        "ablations": f"{tables.ablations(results)}\n\n{tables.worse_than_untrained(results)}",
        "costs": tables.costs(results),
        "prompts": tables.prompts(trials),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(sections | _facts())


def _compared(results: Results, task: str, shown: Mapping[str, str]) -> str:
    table = tables.methods(results, task, tuple(METHODS), shown=shown)
    return f"{table}\n\n{tables.winners(results, task)}"


def _sampled(sampled: Results, task: str) -> str:
    return f"{_compared(sampled, task, tables.SAMPLED)} {tables.eight_samples(sampled, task)}"


def _explored(results: Results, task: str) -> str:
    return f"{tables.exploration(results, task, tuple(METHODS))}\n\n{tables.eight_samples(results, task)}"


def _facts() -> dict[str, object]:
    """What the page says of the runs' settings."""
    own = load(RunConfig, METHODS[SPLIT])
    return {
        "steps": STEPS,
        "walk_steps": TASKS["walk"]["train.steps"],
        "questions": QUESTIONS,
        "rollouts": own.rollouts,
        "k": own.eval.k,
        "test_questions": own.eval.questions,
        "rates": ", ".join(f"{rate:g}" for rate in RATES),
        "split_of_paper": SPLIT_OF_PAPER,
        "paper_sampling": ", ".join(f"{name} {value}" for name, value in WAYS[AS_PAPER].items()),
        "ablation_task": ABLATION_TASK,
        "ablation_rate": f"{ABLATION_RATE:g}",
        "target_kl": own.eta.target_kl,
        "eta_smallest": own.eta.smallest,
        "eta_largest": own.eta.largest,
        "alpha": own.advantage.alpha,
        "kappa": own.advantage.kappa,
        **{f"paper_{name}": PAPER[f"advantage.{name}"] for name in ("eta", "alpha", "kappa")},
    }


def _headed(parts: Mapping[str, str]) -> str:
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def write_charts(results: Results, task: str) -> None:
    """A report that lays some methods' curves over each other, each at its tuned rate."""
    compared = [
        Run(task, name, best_rate(results, task, name), 0) for name in CHARTED if tables.best_ends(results, task, name)
    ]
    write_comparison(results, compared, "-".join(task.split()))


def write_comparison(results: Results, compared: Sequence[Run], name: str) -> None:
    """A report of runs, of all seeds of each: what evaluations found, since of other steps nothing is kept."""
    groups = [RunGroup(run.variant, tuple(found)) for run in compared if (found := seeds_of(results, run))]
    if groups:
        print(f"written to {write_page(render(groups), FOLDER / f'{name}.html')}")


def seeds_of(results: Results, one: Run) -> list[ReportedRun]:
    """As the report knows runs: those that differ from this one in their seed alone; the tuning run is none of them."""
    found = {run.seed: result for run, result in results.items() if run._replace(seed=one.seed) == one}
    return [
        ReportedRun(
            name=one._replace(seed=seed).name,
            train=[{"step": int(found[seed].evaluations[-1]["step"])}],
            evaluation=[_charted(row) for row in found[seed].evaluations],
            samples=[],
            config=None,
            summary=found[seed].costs,
        )
        for seed in sorted(found.keys() - {TUNING_SEED})
    ]


def _charted(row: Mapping[str, float]) -> dict[str, float]:
    """Without the one pass@k that is kept, which makes no curve."""
    return {key: value for key, value in row.items() if not key.startswith("pass@")} | {"step": int(row["step"])}


def chosen_part(results: Results, trials: Trials, task: str, methods: Sequence[str], seeds: Sequence[int]) -> str:
    """A task's tables of some methods and seeds."""
    found = {
        "accuracy": tables.methods(results, task, methods, seeds),
        "exploration": tables.exploration(results, task, methods, seeds),
    }
    if Trial(untrained(task), AS_PAPER) in trials:
        sampled = tables.sampled_as_paper(results, trials)
        found[AS_PAPER] = tables.methods(sampled, task, methods, seeds, tables.SAMPLED)
    return _headed({f"{task}, {what}": text for what, text in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one task, three methods, three seeds")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--only-write", action="store_true", help="run nothing")
    parser.add_argument("--parallel", type=int, default=cores(), help="runs at once (default: a core each)")
    chosen = parser.parse_args()
    results, trials = read_results(), read_trials()
    tasks, methods, seeds = SMALL if chosen.small else (tuple(TASKS), tuple(METHODS), SEEDS)
    tasks, methods, seeds = chosen.tasks or tasks, chosen.methods or methods, chosen.seeds or seeds
    if not chosen.only_write:
        compare_methods(results, trials, tasks, methods, seeds, chosen.parallel)
    known = [task for task in tasks if any(run.task == task for run in results)]
    if not known or (chosen.tasks and known != chosen.tasks):
        parser.error("there are no results of these tasks yet: leave --only-write out")
    for task in known:
        write_charts(results, task)
    if chosen.small or chosen.tasks or chosen.methods or chosen.seeds:
        for task in known:
            print(chosen_part(results, trials, task, methods, seeds))
        return
    if not chosen.only_write:
        ablate(results, trials, seeds, chosen.parallel)
    for name, variants in COMPARISONS.items():
        write_comparison(results, [Run(ABLATION_TASK, variant, ABLATION_RATE, 0) for variant in variants], name)
    PAGE.write_text(page(results, trials), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
