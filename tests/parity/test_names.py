"""verl's metrics and those of the authors' trainer, in our names and units."""

import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.parity.logs import Curves
from policy_split_jax.parity.names import read_names, to_common


def renamed(metrics, names=None):
    """The metrics given as lists of values of the steps from 1 on."""
    curves = Curves("run", {name: list(enumerate(values, 1)) for name, values in metrics.items()})
    common = to_common(curves, names)
    assert common.name == "run"
    return {name: [value for _, value in curve] for name, curve in common.metrics.items()}


@pytest.mark.parametrize(
    ("theirs", "ours", "factor"),
    [
        ("actor/pg_loss", "loss", 1.0),
        ("actor/grad_norm", "grad_norm", 1.0),
        ("actor/lr", "learning_rate", 1.0),
        ("actor/lr(1e-4)", "learning_rate", 1e-4),
        ("actor/pg_clipfrac", "clip_fraction", 1.0),
        ("critic/score/mean", "reward", 1.0),
        ("critic/rewards/mean", "reward", 1.0),
        ("response_length/mean", "response_length", 1.0),
        ("response_length/clip_ratio", "truncated", 1.0),
        ("timing_s/step", "time/step", 1.0),
        ("timing_s/gen", "time/rollout", 1.0),
        ("timing_s/reward", "time/reward", 1.0),
        ("timing_s/update_actor", "time/update", 1.0),
        ("actor/org_he_kl", "kl/normal_to_high_entropy", 1.0),
        ("actor/he_org_kl", "kl/high_entropy_to_normal", 1.0),
        ("actor/org_logprob", "neg_logprob/normal", -1.0),
        ("actor/he_logprob", "neg_logprob/high_entropy", -1.0),
        ("val-core/openai/gsm8k/acc/mean@8", "eval/accuracy/normal", 1.0),
        ("val/test_score/openai/gsm8k", "eval/accuracy/normal", 1.0),
        ("train/grad_norm", "grad_norm", 1.0),
        ("eval/accuracy/normal", "eval/accuracy/normal", 1.0),
        ("perf/throughput", "perf/throughput", 1.0),
        ("val-aux/openai/gsm8k/reward/mean@8", "val-aux/openai/gsm8k/reward/mean@8", 1.0),
        ("val-core/openai/gsm8k/acc/best@8/mean", "val-core/openai/gsm8k/acc/best@8/mean", 1.0),
    ],
)
def test_a_name_and_its_unit(theirs, ours, factor):
    assert renamed({theirs: [0.5, -2.0]}) == {ours: [0.5 * factor, -2.0 * factor]}


@pytest.mark.parametrize("name", ["actor/entropy", "actor/entropy_loss"])
def test_the_entropy_of_one_policy_is_that_of_the_normal_mode(name):
    assert renamed({name: [0.5]}) == {"entropy/normal": [0.5], "entropy": [0.5]}


@pytest.mark.parametrize("sign", ["actor/org_he_kl", "actor/he_org_kl", "sub_batch_org/response_length/max"])
def test_the_entropy_of_two_modes_is_no_modes_own(sign):
    common = renamed({"actor/entropy_loss": [0.5], sign: [0.25]})
    assert common["entropy"] == [0.5]
    assert "entropy/normal" not in common


def test_the_first_of_two_with_one_counterpart_gets_it():
    metrics = {"critic/rewards/mean": [0.25], "critic/score/mean": [0.5]}
    assert renamed(metrics) == {"reward": [0.5], "critic/rewards/mean": [0.25]}
    assert renamed({"actor/pg_loss": [1.0], "loss": [2.0]}) == {"loss": [2.0], "actor/pg_loss": [1.0]}


def test_a_second_name_keeps_its_unit_too():
    assert renamed({"actor/org_logprob": [-1.0], "neg_logprob/normal": [2.0]})["actor/org_logprob"] == [-1.0]


def test_accuracies_of_several_sources_are_not_mixed():
    metrics = {"val-core/a/acc/mean@8": [0.5], "val-core/b/acc/mean@8": [0.25]}
    assert renamed(metrics) == metrics


def test_our_runs_get_the_mean_over_both_modes():
    common = renamed({"reward/normal": [0.25, 0.5], "reward/high_entropy": [0.75, 1.0], "truncated/normal": [0.125]})
    assert common["reward"] == [0.5, 0.75]
    # A baseline samples in the normal mode alone.
    assert common["truncated"] == [0.125]
    assert "truncated/high_entropy" not in common


def test_what_a_log_has_itself_stays():
    metrics = {"reward": [0.5], "reward/normal": [0.25], "reward/high_entropy": [0.125]}
    assert renamed(metrics) == metrics


def test_the_mean_is_of_common_steps():
    curves = Curves("run", {"entropy/normal": [(1, 1.0), (2, 2.0)], "entropy/high_entropy": [(2, 4.0), (3, 5.0)]})
    assert to_common(curves).metrics["entropy"] == [(2, 3.0)]
    apart = Curves("run", {"entropy/normal": [(1, 1.0)], "entropy/high_entropy": [(3, 5.0)]})
    assert "entropy" not in to_common(apart).metrics


def test_the_authors_log_gives_both_modes():
    """Quarters of the batch: normal 0.5, high entropy 0.25, and each once more as shared rollouts."""
    quarters = {"critic/score/mean": [(0.5 + 0.25 + 0.25 + 0.5) / 4], "sub_batch_org/critic/score/mean": [0.5]}
    rest = {"sub_batch_he/critic/score/mean": [(0.25 + 0.25 + 0.5) / 3]}
    common = renamed(quarters | rest)
    assert common["reward/normal"] == [0.5]
    assert common["reward/high_entropy"] == [0.25]
    assert common["reward"] == [0.375]
    assert common["sub_batch_he/critic/score/mean"] == rest["sub_batch_he/critic/score/mean"]


def test_a_users_names_come_first():
    metrics = {"my/loss": [1.0], "actor/pg_loss": [2.0], "actor/entropy": [3.0]}
    common = renamed(metrics, {"my/loss": "loss", "actor/entropy": "entropy/high_entropy", "absent": "eta"})
    assert common == {"loss": [1.0], "actor/pg_loss": [2.0], "entropy/high_entropy": [3.0]}


@pytest.mark.parametrize("names", [{"a": "loss", "b": "loss"}, {"a": "other"}])
def test_a_users_names_may_not_meet(names):
    with pytest.raises(UserError, match=r"run: [ab] and another metric are both named (loss|other)"):
        renamed({"a": [1.0], "b": [2.0], "other": [3.0]}, names)


def test_a_file_of_names(tmp_path):
    path = tmp_path / "names.yaml"
    path.write_text("my/loss: loss\n'val-core/a/acc/mean@8': eval/accuracy/normal\n")
    assert read_names(path) == {"my/loss": "loss", "val-core/a/acc/mean@8": "eval/accuracy/normal"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "names.yaml: expected lines of `their name: our name`, found list"),
        ("", "names.yaml: expected lines of `their name: our name`, found NoneType"),
        ("a: 1\n", "names.yaml: a: 1: both must be names"),
        ("1: a\n", "names.yaml: 1: a: both must be names"),
        ("a: [\n", "names.yaml: not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "names.yaml: not valid YAML"),
    ],
)
def test_a_malformed_file_of_names(tmp_path, text, words):
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_names(path)
    assert words in str(error.value)


def test_a_missing_file_of_names(tmp_path):
    with pytest.raises(UserError, match=r"names\.yaml: cannot be read"):
        read_names(tmp_path / "names.yaml")
