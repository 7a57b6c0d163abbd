"""The tables of docs/results.md, from the results of runs: means over seeds, 95 % t-intervals, paired tests."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np
from jobs import BEST, MAIN
from scipy import stats
from study import (
    ABLATION_RATE,
    ABLATION_TASK,
    AS_PAPER,
    COMPARED,
    COSTS,
    EXPLORING,
    METHODS,
    ORIGINAL,
    PROMPTS,
    SPLIT,
    SPLIT_OF_PAPER,
    TUNING_SEED,
    Result,
    Results,
    Trial,
    Trials,
    best_rate,
    untrained,
)

from policy_split_jax.report.groups import t_half_width

Row = dict[str, float]

ACCURACY = "accuracy/normal"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def cell(values: Sequence[float]) -> str:
    """The mean, and half of its 95 % t-interval."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    return f"{mean(values):.3f} ± {t_half_width(np.array(values)[:, None])[0]:.3f}"


def evaluations(results: Results, task: str, variant: str, rate: float) -> dict[int, list[Row]]:
    """Those of every seed's run; the tuning run is none of them."""
    chosen = (task, variant, rate)
    found = {run.seed: result.evaluations for run, result in results.items() if run[:3] == chosen}
    return {seed: found[seed] for seed in sorted(found) if seed != TUNING_SEED}


def ends(results: Results, task: str, variant: str, rate: float) -> dict[int, Row]:
    return {seed: rows[-1] for seed, rows in evaluations(results, task, variant, rate).items()}


def best_ends(results: Results, task: str, method: str, seeds: Sequence[int] | None = None) -> dict[int, Row]:
    """The last evaluations at the tuned rate, of these seeds or of all; none before the method is tuned."""
    try:
        found = ends(results, task, method, best_rate(results, task, method))
    except KeyError:
        return {}
    return {seed: row for seed, row in found.items() if seeds is None or seed in seeds}


def original(results: Results, task: str) -> Row:
    """What every run of a task begins with; tasks may share a model, but not their questions."""
    return next(result.evaluations[0] for run, result in results.items() if run.task == task)


def stated(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p-values of several tests, so adjusted that the chance of one false finding among all is kept (Holm 1979)."""
    names = sorted(values, key=lambda name: values[name])
    adjusted, least = {}, 0.0
    for at, name in enumerate(names):
        least = max(least, min(1.0, (len(names) - at) * values[name]))
        adjusted[name] = least
    return adjusted


def paired(
    found: dict[int, Row], other: dict[int, Row], key: str = ACCURACY, other_key: str = ACCURACY
) -> float | None:
    """A paired t-test of a figure over the seeds of both; None where they have fewer than two."""
    both = sorted(found.keys() & other.keys())
    if found is other or len(both) < 2:
        return None
    values, others = [found[seed][key] for seed in both], [other[seed][other_key] for seed in both]
    return _p(stats.ttest_rel(values, others))


def _p(test: Any) -> float:
    return float(test.pvalue)


def column(values: Mapping[str, float | None]) -> dict[str, str]:
    """A table's column of tests, adjusted for their number; empty where there is none."""
    adjusted = holm({name: p for name, p in values.items() if p is not None})
    return {name: stated(adjusted[name]).removeprefix("p = ").removeprefix("p ") if name in adjusted else ""
            for name in values}  # fmt: skip


def methods(
    results: Results,
    task: str,
    names: Sequence[str],
    seeds: Sequence[int] | None = None,
    shown: Mapping[str, str] = MAIN,
) -> str:
    """A row a method, the untrained model first."""
    start = original(results, task)
    found = {name: rows for name in names if (rows := best_ends(results, task, name, seeds))}
    accuracies = {name: [row[ACCURACY] for row in rows.values()] for name, rows in found.items()}
    beyond = column(
        {
            name: _p(stats.ttest_1samp(values, start[ACCURACY])) if len(values) > 1 else None
            for name, values in accuracies.items()
        }
    )
    grpo = found.get("GRPO", {})
    than_grpo = column({name: paired(rows, grpo) for name, rows in found.items()})
    rows = [["", "learning rate", "seeds", *shown, "p against original", "p against GRPO"]]
    rows.append([ORIGINAL, "", "", *(f"{start[key]:.3f}" for key in shown.values()), "", ""])
    for name, own in found.items():
        cells = [cell([row[key] for row in own.values()]) for key in shown.values()]
        rate = f"{best_rate(results, task, name):g}"
        rows.append([name, rate, str(len(own)), *cells, beyond[name], than_grpo[name]])
    return table(rows)


SAMPLED = dict(list(MAIN.items())[:2]) | BEST | {"4 + 4 of both": "pass@8/both"}


def sampled_as_paper(results: Results, trials: Trials) -> Results:
    """The runs that were tried so, as if they had been evaluated so; those of tuning end as they did."""
    found = {}
    for run, result in results.items():
        start = trials.get(Trial(untrained(run.task), AS_PAPER))
        if run.seed == TUNING_SEED:
            found[run] = Result([start or result.evaluations[0], result.evaluations[-1]], result.costs)
        elif start and (tried := trials.get(Trial(run, AS_PAPER))):
            found[run] = Result([start, tried], result.costs)
    return found


def winners(results: Results, task: str) -> str:
    """Who is best, who second, and where Policy Split stands; nothing before two methods have results."""
    found = {name: rows for name in METHODS if (rows := best_ends(results, task, name))}
    scores = {name: mean(row[ACCURACY] for row in rows.values()) for name, rows in found.items()}
    if len(scores) < 2:
        return ""
    order = sorted(scores, key=lambda name: -scores[name])
    best = order[0]

    def placed(name: str) -> str:
        p = paired(found[name], found[best])
        text = f"{scores[name]:.3f}, {100 * (scores[best] - scores[name]):.1f} points less"
        return f"{name} ({text})" if p is None else f"{name} ({text}, {stated(p)})"

    text = f"Most accurate in the normal mode: {best} ({scores[best]:.3f}); second: {placed(order[1])}."
    if SPLIT in order[:2] or SPLIT not in order:
        return text
    return f"{text} Number {order.index(SPLIT) + 1} of {len(order)}: {placed(SPLIT)}."


def over_training(results: Results) -> str:
    """Entropies and divergence at each evaluation, means over seeds."""
    shown = dict(list(MAIN.items())[2:])
    rows = [["", "learning rate", "step", *shown]]
    tuned = best_rate(results, ABLATION_TASK, SPLIT) if best_ends(results, ABLATION_TASK, SPLIT) else ABLATION_RATE
    for name, rate in dict.fromkeys([(SPLIT, ABLATION_RATE), (SPLIT, tuned), ("GRPO", ABLATION_RATE)]):
        for at_step in zip(*evaluations(results, ABLATION_TASK, name, rate).values(), strict=True):
            values = [cell([row[key] for row in at_step]) for key in shown.values()]
            rows.append([name, f"{rate:g}", f"{at_step[0]['step']:.0f}", *values])
    return table(rows)


def exploration(results: Results, task: str, names: Sequence[str], seeds: Sequence[int] | None = None) -> str:
    """What the samples of either mode find together."""
    start = original(results, task)
    rows = [["", *EXPLORING], [ORIGINAL, *(f"{start[key]:.3f}" for key in EXPLORING.values())]]
    for name in names:
        if found := best_ends(results, task, name, seeds):
            rows.append([name, *(cell([row[key] for row in found.values()]) for key in EXPLORING.values())])
    return table(rows)


TOGETHER, ALONE = "pass@8/both", "best_of_k/normal"


def eight_samples(results: Results, task: str) -> str:
    """What 8 samples solve, drawn as each method is trained: Policy Split's from both modes, GRPO's from one."""
    grpo = best_ends(results, task, "GRPO")
    lines = []
    for name in (SPLIT, SPLIT_OF_PAPER):
        found = best_ends(results, task, name)
        if (p := paired(found, grpo, TOGETHER, ALONE)) is not None:
            solved = mean(row[TOGETHER] for row in found.values())
            lines.append(f"4 + 4 samples of {name} solve {solved:.3f} ({stated(p)})")
    if not lines:
        return ""
    return f"8 samples of GRPO's normal mode solve {mean(row[ALONE] for row in grpo.values()):.3f}; {'; '.join(lines)}."


def ablations(results: Results) -> str:
    """A row a changed setting, all at the same learning rate."""
    found = {name: rows for name in COMPARED if (rows := ends(results, ABLATION_TASK, name, ABLATION_RATE))}
    shown_keys = MAIN | {"4 + 4 of both": "pass@8/both", "distinct right, both": "distinct_correct/both"}
    rows = [["", "seeds", *shown_keys, "p of the accuracy against Policy Split"]]
    base = found.get(SPLIT, {})
    tests = column({name: paired(own, base) for name, own in found.items()})
    for name, own in found.items():
        cells = [cell([row[key] for row in own.values()]) for key in shown_keys.values()]
        rows.append([name, str(len(own)), *cells, tests[name]])
    return table(rows)


def worse_than_untrained(results: Results) -> str:
    """The ablations whose runs, or some of them, end less accurate than they began: a mean over seeds hides it."""
    if not any(run.task == ABLATION_TASK for run in results):
        return ""
    start = original(results, ABLATION_TASK)[ACCURACY]
    parts = []
    for name in COMPARED:
        rows = ends(results, ABLATION_TASK, name, ABLATION_RATE).values()
        worse = sum(row[ACCURACY] < start for row in rows)
        parts += [f"{name} ({worse} of {len(rows)} seeds)"] if worse else []
    return f"Less accurate than the untrained model in the end: {'; '.join(parts) or 'none'}."


def costs(results: Results) -> str:
    """Seconds and tokens of a step, medians of a run's steps; ratios are of runs of the same rate and seed."""
    of = {name: {(run.rate, run.seed): result.costs for run, result in results.items()
                 if (run.task, run.variant) == (ABLATION_TASK, name)} for name in (SPLIT, "GRPO")}  # fmt: skip
    pairs = sorted(of[SPLIT].keys() & of["GRPO"].keys())
    if not pairs:
        return ""
    ratios = {key: [of[SPLIT][pair][key] / of["GRPO"][pair][key] for pair in pairs] for key in COSTS}
    rows = [[f"medians of {len(pairs)} runs each", *(key.replace("/", " of ") for key in COSTS)]]
    for name, found in of.items():
        rows.append([name, *(f"{median(found[pair][key] for pair in pairs):.3g}" for key in COSTS)])
    rows.append(["ratio, median", *(f"{median(ratios[key]):.2f}" for key in COSTS)])
    rows.append(["ratio, lowest to highest", *(f"{min(own):.2f} to {max(own):.2f}" for own in ratios.values())])
    return table(rows)


def prompts(trials: Trials) -> str:
    """The trained high-entropy mode under other system prompts than its own."""
    keys = {name: key for name, key in MAIN.items() if name != "accuracy, normal"} | {
        "best of 8, HE": "best_of_k/high_entropy",
        "solved by HE alone": "only_high_entropy_solved",
    }
    rows = [["", "system prompt", "seeds", *keys, "accuracy, HE, of the original"]]
    for title, prompt in PROMPTS.items():
        start = Trial(untrained(ABLATION_TASK), title)
        if found := [figures for trial, figures in trials.items() if trial.way == title and trial != start]:
            cells = [cell([figures[key] for figures in found]) for key in keys.values()]
            before = f"{trials[start]['accuracy/high_entropy']:.3f}" if start in trials else ""
            rows.append([title, prompt, str(len(found)), *cells, before])
    return table(rows)
