"""The experiments' tables from made-up results, and the settings of their runs."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import evidence  # noqa: E402
import jobs  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402
from study import Result, Run, Trial  # noqa: E402

from policy_split_jax.config import RunConfig, load  # noqa: E402
from policy_split_jax.data.dataset import load_rows  # noqa: E402
from policy_split_jax.errors import UserError  # noqa: E402
from policy_split_jax.policy import load_policy, model_folder  # noqa: E402
from policy_split_jax.rollouts import check_prompts  # noqa: E402

TASK, RATE = study.ABLATION_TASK, study.ABLATION_RATE


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)


def result(accuracy, **others):
    """A run whose other figures are all 0.25, and were all 0.4 at its start."""
    values = dict.fromkeys(study.FIGURES.values(), 0.25) | {"accuracy/normal": accuracy} | others
    start = dict.fromkeys(study.FIGURES.values(), 0.4)
    return Result([{"step": 0} | start, {"step": 300} | values], dict.fromkeys(study.COSTS, 2.0 + accuracy))


def results_of(accuracies):
    """{method: accuracies of seeds 0, 1, ...}, all tuned to the ablations' rate."""
    found = {}
    for method, values in accuracies.items():
        for rate in study.RATES:
            found[Run(TASK, method, rate, study.TUNING_SEED)] = result(0.9 if rate == RATE else 0.1)
        found |= {Run(TASK, method, RATE, seed): result(value) for seed, value in enumerate(values)}
    return found


def test_a_cell_is_the_mean_and_the_t_interval():
    # Student's t at 97.5 % with two degrees of freedom is 4.3027; the deviation is 0.1, so 4.3027 x 0.1 / sqrt(3).
    assert tables.cell([0.4, 0.5, 0.6]) == "0.500 ± 0.248"
    assert tables.cell([0.4]) == "0.400"


def test_methods_are_compared_by_seed():
    results = results_of({"Policy Split": [0.50, 0.55, 0.60], "GRPO": [0.52, 0.56, 0.62]})
    lines = tables.methods(results, TASK, ["Policy Split", "GRPO"]).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| original |  |  | 0.400 |")
    split = [text.strip() for text in lines[3].split("|")]
    assert split[1:5] == ["Policy Split", "0.0004", "3", "0.550 ± 0.124"]
    # Differences -0.02, -0.01, -0.02: t = -5 with two degrees of freedom, p = 0.038. Against 0.4: Policy Split's
    # t = 0.15 sqrt(3) / 0.05 = 5.196, p = 0.035, and GRPO's t = 0.1667 sqrt(3) / 0.0503 = 5.735, p = 0.0291; of two
    # tests the smaller p is doubled, and the other is not less.
    assert split[-3:-1] == ["0.058", "0.038"]
    assert lines[4].endswith("| 0.058 |  |")


def test_several_tests_are_adjusted_by_holm():
    """By hand: 3 x 0.01, then 2 x 0.04, then no less than that."""
    assert tables.holm({"a": 0.04, "b": 0.01, "c": 0.05}) == pytest.approx({"a": 0.08, "b": 0.03, "c": 0.08})
    assert tables.holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_tables_are_made_of_whatever_results_there_are(capsys):
    """Tuning runs alone; then one method; then two of which one has one seed."""
    tuned = results_of({"Policy Split": [], "GRPO": []})
    assert tables.winners(tuned, TASK) == tables.winners(results_of({"GRPO": [0.5, 0.6]}), TASK) == ""
    assert len(tables.methods(tuned, TASK, list(study.METHODS)).splitlines()) == 3
    text = tables.winners(results_of({"Policy Split": [0.5], "GRPO": [0.7, 0.8]}), TASK)
    assert text.endswith("second: Policy Split (0.500, 25.0 points less).")
    assert evidence.page(tuned, {})
    assert evidence.page({run._replace(task="walk"): found for run, found in tuned.items()}, {})
    assert evidence.page(results_of({"Policy Split": [0.5, 0.6]}), {})
    assert evidence.page({}, {})


def test_a_failed_run_ends_the_others_that_wait(tmp_path, monkeypatch):
    begun = []

    def run(job, core, folder):
        begun.append(job.name)
        time.sleep(0.01)
        raise subprocess.CalledProcessError(2, ["train"])

    monkeypatch.setattr(jobs, "_run", run)
    with pytest.raises(subprocess.CalledProcessError):
        list(jobs.ended([jobs.Job(str(at), "x", {}) for at in range(500)], tmp_path, 1))
    assert len(begun) < 500


def test_the_best_and_the_second_are_named():
    results = results_of({"Policy Split": [0.5, 0.6, 0.52], "GRPO": [0.7, 0.8, 0.73], "Clip-Cov": [0.6, 0.75, 0.66]})
    text = tables.winners(results, TASK)
    assert text.startswith("Most accurate in the normal mode: GRPO (0.743); second: Clip-Cov (0.670, 7.3 points less,")
    assert "Number 3 of 3: Policy Split (0.540, 20.3 points less, p < 0.001)" in text


def test_tuning_takes_the_rate_of_the_highest_accuracy():
    results = results_of({"GRPO": []})
    assert study.best_rate(results, TASK, "GRPO") == RATE
    results[Run(TASK, "GRPO", study.RATES[0], study.TUNING_SEED)] = result(0.95)
    assert study.best_rate(results, TASK, "GRPO") == study.RATES[0]
    assert study.best_rate(results, "4 numbers", "GRPO") == study.RATES[0]


def test_every_run_has_settings_and_a_name_of_its_own():
    variants = [*study.METHODS, *study.ABLATIONS]
    jobs = [
        Run(task, variant, rate, 0).job()
        for task in study.TASKS
        for variant in dict.fromkeys(variants)
        for rate in study.RATES
    ]
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        updates = 4 if "preset-released" in job.name else load(RunConfig, job.config).train.updates_per_step
        steps = 600 if "twice" in job.name else 150 if job.name.startswith("walk") else 300
        assert job.settings["optimizer.decay_steps"] == updates * steps


def test_the_page_has_every_table():
    accuracies = {"Policy Split": [0.5, 0.6], "GRPO": [0.7, 0.85], "η = 1, constant": [0.3, 0.2]}
    text = evidence.page(results_of(accuracies), {})
    assert "$" not in text
    assert "| η = 1, constant | 2 | 0.250 ±" in text
    # Every run begins with 0.4.
    assert "Less accurate than the untrained model in the end: η = 1, constant (2 of 2 seeds).\n" in text
    # Costs are 2 plus the accuracy: 2.5 and 2.6 against 2.7 and 2.85, and 2.1, 2.1 and 2.9 of the tuning runs of both.
    assert "| ratio, median | 1.00 |" in text
    assert "| ratio, lowest to highest | 0.91 to 1.00 |" in text
    assert "| medians of 5 runs each | time of rollout |" in text
    # 0.5 and 0.6 against 0.7 and 0.85.
    assert "p = 0.070" in text


def test_charts_are_made_of_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    results = results_of({"Policy Split": [0.5, 0.6], "GRPO": []})
    found = evidence.seeds_of(results, Run(TASK, "Policy Split", RATE, 7))
    assert [run.name for run in found] == [Run(TASK, "Policy Split", RATE, seed).name for seed in (0, 1)]
    assert [row["step"] for row in found[0].evaluation] == [0, 300]
    evidence.write_charts(results, TASK)
    assert [file.name for file in tmp_path.iterdir()] == ["3-numbers.html"]
    page = (tmp_path / "3-numbers.html").read_text(encoding="utf-8")
    # Of two seeds the band is their range, and the tuning run's 0.9 is not among them.
    assert "40.0 ± 0.0 % → <b>55.0 ± 5.0 %</b>" in page
    assert "Pass@k" not in page
    assert "2 seeds, min–max · training step 300 · 2 evaluations · finished" in page


def test_a_run_that_ends_below_its_beginning_is_told_from_its_seeds():
    results = results_of({"Policy Split": [0.5, 0.39, 0.4], "GRPO": [0.7]})
    assert tables.worse_than_untrained(results).endswith("in the end: Policy Split (1 of 3 seeds).")
    assert tables.worse_than_untrained(results_of({"GRPO": [0.7]})).endswith("in the end: none.")


def tried(value, **others):
    return dict.fromkeys(study.FIGURES.values(), value) | others


def test_prompts_are_told_apart():
    run = Run(TASK, "Policy Split", RATE, 0)
    trials = {Trial(run._replace(seed=seed), "unseen, asks for the opposite"): tried(0.25) for seed in range(3)}
    start = {Trial(study.untrained(TASK), "unseen, asks for the opposite"): tried(0.125)}
    text = tables.prompts(trials | start | {Trial(run, study.AS_PAPER): tried(0.5)})
    assert text.splitlines()[2].startswith("| unseen, asks for the opposite | Low-entropy mode. | 3 | 0.250 ± 0.000 |")
    assert text.endswith("| 0.250 ± 0.000 | 0.125 |")
    assert len(text.splitlines()) == 3
    assert tables.prompts(trials).endswith("| 0.250 ± 0.000 |  |")


def test_runs_sampled_as_in_the_paper_keep_their_rates_and_have_figures_of_their_own():
    results = results_of({"Policy Split": [0.5, 0.6], "GRPO": [0.7, 0.85], "Clip-Cov": [0.1, 0.2]})
    trials = {Trial(study.untrained(TASK), study.AS_PAPER): tried(0.3)}
    for method, values in (("Policy Split", (0.75, 0.875)), ("GRPO", (0.25, 0.5))):
        runs = [Run(TASK, method, RATE, seed) for seed in (0, 1)]
        trials |= {Trial(run, study.AS_PAPER): tried(value) for run, value in zip(runs, values, strict=True)}
    sampled = tables.sampled_as_paper(results, trials)
    lines = tables.methods(sampled, TASK, list(study.METHODS), shown=tables.SAMPLED).splitlines()
    assert [line.split(" |")[:5] for line in lines[2:]] == [
        ["| original", " ", " ", " 0.300", " 0.300"],
        ["| Policy Split", " 0.0004", " 2", " 0.812 ± 0.794", " 0.812 ± 0.794"],
        ["| GRPO", " 0.0004", " 2", " 0.375 ± 1.588", " 0.375 ± 1.588"],
    ]
    page = evidence.page(results, trials)
    assert "Most accurate in the normal mode: Policy Split (0.812); second: GRPO (0.375, 43.8 points less" in page
    assert "Most accurate in the normal mode: GRPO (0.775); second: Policy Split (0.550, 22.5 points less" in page
    part = evidence.chosen_part(results, trials, TASK, ["GRPO"], [0])
    assert part.count("| GRPO |") == 3
    assert "| GRPO | 0.0004 | 1 | 0.250 | 0.250 |" in part


def test_eight_samples_of_both_modes_are_compared_with_eight_of_one():
    results = results_of({"Policy Split": [0.5, 0.6], "GRPO": [0.7, 0.85]})
    assert tables.eight_samples({}, TASK) == ""
    for seed, together in enumerate([0.5, 0.75]):
        run = Run(TASK, "Policy Split", RATE, seed)
        results[run] = result(0.5, **{"pass@8/both": together, "best_of_k/normal": 0.0})
    # GRPO's best of 8 is 0.25 throughout, so differences are 0.25 and 0.5: t = 3 with one degree of freedom, p = 0.205.
    assert tables.eight_samples(results, TASK) == (
        "8 samples of GRPO's normal mode solve 0.250; 4 + 4 samples of Policy Split solve 0.625 (p = 0.205)."
    )


def test_another_evaluation_asks_what_the_run_asks_of_itself():
    run = Run("4 numbers", "GRPO", 4e-4, 3)
    options = Trial(run, study.AS_PAPER).options()
    own = run.config()
    assert options["checkpoint"] == study.FOLDER / run.name
    assert (options["numbers"], options["max-new-tokens"], options["task"]) == ("4", 14, "countdown")
    assert (options["questions"], options["k"], options["seed"]) == (own.eval.questions, own.eval.k, own.eval.seed)
    assert (options["temperature"], options["top-k"], options["top-p"]) == (0.6, 20, 0.95)
    assert Trial(study.untrained("walk"), study.AS_PAPER).options()["model"] == "embedded-walk"
    assert Trial(run, "rewritten").options()["high-entropy-prompt"] == study.PROMPTS["rewritten"]


def test_what_was_tried_is_not_tried_again(tmp_path, monkeypatch):
    begun = []

    def evaluated(options, output, core):
        begun.append(options)
        return tried(0.123456789)

    monkeypatch.setattr(study, "evaluate", evaluated)
    monkeypatch.setattr(study, "TRIAL_RESULTS", tmp_path / "trials.jsonl")
    wanted = [Trial(study.untrained(task), study.AS_PAPER) for task in study.TASKS]
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    study.try_again(wanted[:1], {}, 1)
    study.try_again(wanted, study.read_trials(), 2)
    assert sorted(options["task"] for options in begun) == ["countdown", "countdown", "walk"]
    assert study.read_trials() == {trial: tried(0.123457) for trial in wanted}


def test_the_walk_is_that_of_its_configuration():
    """But for what all runs of the experiments have in common."""
    job = Run("walk", "Policy Split", 4e-4, 0).job()
    found = load(RunConfig, job.config, [f"{key}={value}" for key, value in job.settings.items()])
    own = load(RunConfig, "configs/walk.yaml")
    for section in ("model", "data", "reward", "advantage", "eta", "loss"):
        assert getattr(found, section) == getattr(own, section)
    assert found.rollout.max_prompt_tokens == own.rollout.max_prompt_tokens
    assert found.rollout.max_new_tokens == own.rollout.max_new_tokens


@pytest.mark.parametrize("task", study.TASKS)
def test_the_prompts_of_every_task_are_short_enough(task):
    job = Run(task, "Policy Split", 4e-4, 0).job()
    found = load(RunConfig, job.config, [f"{key}={value}" for key, value in job.settings.items()])
    policy = load_policy(model_folder(found.model.path)).with_prompts(high_entropy=found.prompt.high_entropy)
    rows = load_rows("embedded", found.data, question_column="", answer_column="", split="train", count=200)
    check_prompts(policy, rows, found.rollout.max_prompt_tokens, found.sharing)
    with pytest.raises(UserError, match="questions make prompts"):
        check_prompts(policy, rows, 20, found.sharing)
