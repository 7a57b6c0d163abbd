"""Numbers that are none, and modes that run away, in whole runs."""

import json
import signal

import pytest

from policy_split_jax.training.checkpoint import latest_step

DIVERGING = ("train.steps=40", "train.save_every=1", "optimizer.learning_rate=1e35", "optimizer.gradient_clip=1e35")


def test_a_run_whose_numbers_are_none_ends_with_its_parameters_as_they_were(runs, tmp_path):
    """A rate that no number survives: the second step finds parameters that make none."""
    code = runs.finish(tmp_path, *DIVERGING, "guard.skipped_steps=3")
    error = (tmp_path / "err").read_text().strip().splitlines()[-1]
    assert (code, error.count("\n")) == (2, 0), error
    rows = [row for row in runs.rows(tmp_path) if row["kind"] == "train"]
    assert [row["skipped"] for row in rows[-3:]] == [1.0, 1.0, 1.0]
    last = rows[-1]["step"]
    assert f"stopped at step {last}: the update was skipped" in error
    assert "3 steps in a row (guard.skipped_steps); lower optimizer.learning_rate" in error
    # The rollouts of every such step, and of no other.
    skipped = [row["step"] for row in rows if row["skipped"]]
    names = sorted(int(path.stem) for path in (tmp_path / "run" / "skipped").iterdir())
    assert names == skipped
    dumped = [json.loads(line) for line in (tmp_path / "run" / "skipped" / f"{last}.jsonl").read_text().splitlines()]
    assert {row["step"] for row in dumped} == {last}
    assert "warning: the update was skipped" in (tmp_path / "out").read_text()
    assert latest_step(tmp_path / "run" / "checkpoints") == last - 1


@pytest.mark.slow
@pytest.mark.parametrize("action", ["warn", "lower_eta", "stop"])
def test_a_mode_that_runs_away_is_found(runs, tmp_path, action):
    """Far too large an η: the high-entropy mode's entropy grows until its answers are noise."""
    away = ("train.steps=120", "advantage.eta=20", "advantage.kappa=0", "eta.schedule=constant",
            "rollout.rollouts_per_mode=4", "optimizer.learning_rate=2e-3", f"guard.on_collapse={action}")  # fmt: skip
    code = runs.finish(tmp_path, *away)
    rows = [row for row in runs.rows(tmp_path) if row["kind"] == "train"]
    output, error = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert "η is too large" in output
    if action == "stop":
        assert code == 2
        assert "η is too large" in error
        assert len(rows) < 120
    else:
        assert code == 0
        assert len(rows) == 120
    etas = {row["eta"] for row in rows}
    assert (min(etas) <= 10.0) == (action == "lower_eta")
    assert max(etas) == 20.0


@pytest.mark.slow
def test_the_guards_memory_is_part_of_a_checkpoint(runs, tmp_path):
    process = runs.start(tmp_path, "train.steps=900", "train.save_every=900")
    runs.wait_for(tmp_path, "  3/900", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    step = latest_step(tmp_path / "run" / "checkpoints")
    extra = json.loads((tmp_path / "run" / "checkpoints" / str(step) / "extra" / "metadata").read_text())
    guard = extra["guard"]
    assert guard["steps"] == step >= 3
    assert set(guard["means"]) == {"entropy/high_entropy", "accuracy/normal", "accuracy/high_entropy"}
    entropies = [row["entropy/high_entropy"] for row in runs.rows(tmp_path) if row["kind"] == "train"]
    # The plain mean of the first steps, of what JSON kept of float32.
    assert guard["means"]["entropy/high_entropy"] == pytest.approx(sum(entropies) / step, rel=1e-6)
