"""`policy-split compare` and `from-verl`, as a user calls them."""

import json
from pathlib import Path

import pytest

from policy_split_jax import config as settings
from policy_split_jax.cli import main
from policy_split_jax.config import EMBEDDED, RunConfig
from policy_split_jax.policy import model_folder

PROJECT = Path(__file__).parents[2]
# Third-party code of the checkpoint library warns about its own deprecations.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def dumped(tmp_path_factory):
    """Four questions' rollouts of the embedded model as a run dumps them, and two steps of metrics."""
    folder = tmp_path_factory.mktemp("runs")
    small = ["rollout.questions_per_step=4", "rollout.rollouts_per_mode=2", "rollout.slots=16", "train.steps=2"]
    evaluation = ["eval.questions=2", "eval.k=1", "train.eval_every=0", "train.dump_rollouts=true"]
    config = PROJECT / "configs" / "tiny.yaml"
    assert main(["train", str(config), f"output={folder}", *small, *evaluation]) == 0
    return folder / "tiny"


def test_rollouts_are_compared(dumped, tmp_path, capsys):
    path = tmp_path / "found.json"
    assert main(["compare", "rollouts", str(dumped / "rollouts" / "1.jsonl"), "--output", str(path)]) == 0
    assert "actor/org_he_kl" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["preset"] == "released"
    (step,) = found["steps"]
    assert (step["step"], step["questions"], step["rollouts"], step["shared_prompt"]) == (1, 4, 4, "system")
    quarters = [(each["trained"], each["sampled"]) for each in step["quarters"]]
    modes = ("normal", "high_entropy")
    assert quarters == [(modes[0],) * 2, (modes[1],) * 2, modes, modes[::-1]]


@pytest.mark.slow
def test_a_step_on_rollouts_of_a_file(dumped, tmp_path, capsys):
    given = ["--rollouts", str(dumped / "rollouts" / "2.jsonl"), "--model", str(model_folder(EMBEDDED))]
    options = ["--variant", "grpo", "--dtype", "float32", "--steps", "1", "--output", str(tmp_path / "found.json")]
    assert main(["compare", "step", *given, *options]) == 0
    assert "all 1 agree" in capsys.readouterr().out
    assert main(["compare", "step", *given, *options, "--questions", "8"]) == 2
    assert "2.jsonl: step 2 has 4 questions; lower --questions" in capsys.readouterr().err
    assert main(["compare", "step", *options, "--questions", "6"]) == 2
    assert "--questions 6: must be a multiple of 4" in capsys.readouterr().err


def test_curves_are_compared(dumped, tmp_path):
    path = tmp_path / "curves.html"
    assert main(["compare", "curves", f"one={dumped}", f"two={dumped},{dumped}", "--output", str(path)]) == 0
    page = path.read_text()
    assert "two" in page
    assert "reward/normal" in page


def test_settings_of_verl_are_converted(tmp_path, capsys):
    given = ["data.train_batch_size=8", "actor_rollout_ref.rollout.n=4", "trainer.experiment_name=a"]
    assert main(["from-verl", *given]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    assert main(["from-verl", *given, "--output", str(path)]) == 0
    assert path.read_text() == printed
    config = settings.load(RunConfig, path)
    assert (config.name, config.rollout.questions_per_step, config.rollouts) == ("a", 8, 4)
    script = tmp_path / "run.sh"
    script.write_text("python3 -m verl.trainer.main_ppo data.train_batch_size=16 trainer.experiment_name=b\n")
    assert main(["from-verl", str(script), "trainer.experiment_name=c"]) == 0
    assert "questions_per_step: 16" in (printed := capsys.readouterr().out)
    assert "name: c" in printed
