"""What each difference of the released trainer changes on the embedded task: training runs, then a table.

    python experiments/released.py [--seeds 0 1 2] [--steps 120] [--parallel 2]

Runs are ordinary ones of the command line, one core each, in runs/released; what is there already is not run again, and
what was interrupted goes on. The table has means over seeds, and in brackets the standard deviation.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from jobs import BEST, MAIN, Job, cores, ended
from tables import table

from policy_split_jax.report.runs import read_run

FOLDER = Path("runs/released")
FIGURES = MAIN | BEST
FOUR = {"train.updates_per_step": "4"}
VARIANTS = {
    "paper": {},
    "1 clip(η·B)": {"advantage.clamp": "scaled_bonus"},
    "2 bonus added twice": {"advantage.bonus_repeats": "2"},
    "3 high-entropy prompt as a user turn": {"sharing.high_entropy_prompt": "user_turn"},
    "4 shared responses as text": {"sharing.response": "text"},
    "four updates of whole questions": FOUR,
    "5 four updates, by quarters": FOUR | {"train.update_order": "quarters"},
    "6 lower half of the tokens without bonus": {"advantage.low_quantile": "0.5"},
    "6 only groups of equal rewards (κ = 0)": {"advantage.only_uniform_groups": "true", "advantage.kappa": "0"},
    "6 max-min in place of z-score": {"advantage.normalize": "range"},
    "6 exact entropy in place of −log p": {"advantage.surprise": "entropy"},
    "preset released (1 to 5)": {"preset": "released"},
}


def overrides(variant: dict[str, str], steps: int) -> dict[str, str]:
    """Settings of a run; η is constant, so that no controller hides an effect, and the rate decays with the updates."""
    updates = steps * (4 if variant.get("preset") == "released" else int(variant.get("train.updates_per_step", 1)))
    return {
        "train.steps": str(steps),
        "train.eval_every": "0",
        "rollout.questions_per_step": "32",
        "eta.schedule": "constant",
        "advantage.eta": "0.6",
        "optimizer.decay_steps": str(updates),
        "optimizer.warmup_steps": str(5 * updates // steps),
    } | variant


def cell(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ({stdev(values):.3f})" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--parallel", type=int, default=cores())
    chosen = parser.parse_args()
    names = {(title, seed): f"{at}-seed{seed}" for seed in chosen.seeds for at, title in enumerate(VARIANTS)}
    jobs = [
        Job(name, "configs/tiny.yaml", overrides(VARIANTS[title], chosen.steps) | {"train.seed": str(seed)})
        for (title, seed), name in names.items()
    ]
    for _ in ended(jobs, FOLDER, chosen.parallel):
        pass
    rows = [["", *FIGURES]]
    for title in VARIANTS:
        folders = [FOLDER / names[title, seed] for seed in chosen.seeds]
        ends = [read_run(folder, folder.name).evaluation[-1] for folder in folders]
        rows.append([title, *(cell([end[key] for end in ends]) for key in FIGURES.values())])
    print(table(rows))


if __name__ == "__main__":
    main()
