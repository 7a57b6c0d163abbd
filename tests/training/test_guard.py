"""What the guard says of made-up rows of metrics."""

import json
import math

import pytest

from policy_split_jax.training.guard import Guard, GuardConfig, watch

SOUND = {
    "skipped": 0.0,
    "sampler/kl": 1e-6,
    "sampler/max_difference": 1e-5,
    "entropy/high_entropy": 0.8,
    "accuracy/normal": 0.4,
    "accuracy/high_entropy": 0.4,
}


def watched(rows, config=None, guard=None):
    """The guard after these rows, and (step, finding) of all that was found."""
    guard, found = guard or Guard(), []
    for row in rows:
        guard, findings = watch(guard, SOUND | row, config or GuardConfig())
        found += [(guard.steps, finding) for finding in findings]
    return guard, found


def test_nothing_is_said_of_a_sound_run():
    assert watched([{}] * 200)[1] == []


def test_skipped_steps_are_said_once_and_end_the_run_when_they_follow_each_other():
    _, found = watched([{"skipped": 1.0}] * 3, GuardConfig(skipped_steps=3))
    assert [(step, finding.action) for step, finding in found] == [(1, "warn"), (3, "stop")]
    assert "3 steps in a row" in found[1][1].text
    # One in between that was not skipped begins the count anew.
    rows = [{"skipped": 1.0}, {}, {"skipped": 0.25}, {"skipped": 1.0}, {}]
    assert [finding.action for _, finding in watched(rows, GuardConfig(skipped_steps=3))[1]] == ["warn"]


@pytest.mark.parametrize("value", [0.02, math.inf, math.nan])
def test_a_sampler_that_disagrees_is_said_or_ends_the_run(value):
    row = {"sampler/kl": value, "sampler/max_difference": 0.5}
    (step, finding), *rest = watched([{}, row, row])[1]
    assert (step, finding.action, rest) == (2, "warn", [])
    assert "largest difference 0.5" in finding.text
    assert watched([row], GuardConfig(on_disagreement="stop"))[1][0][1].action == "stop"
    assert watched([row], GuardConfig(sampler_kl=0.0))[1] == []


def test_a_limit_that_is_met_is_not_exceeded():
    assert watched([{"sampler/kl": 0.01}], GuardConfig(sampler_kl=0.01))[1] == []


@pytest.mark.parametrize("action", ["warn", "lower_eta", "stop"])
def test_an_inflated_entropy_is_found(action):
    rows = [{}] * 20 + [{"entropy/high_entropy": 4.0}] * 20
    (step, finding), *_ = watched(rows, GuardConfig(on_collapse=action))[1]
    # The running mean passes three times 0.8 when 3.2 (1 - 0.9^n) > 1.6: at n = 7.
    assert (step, finding.action) == (27, action)
    assert "grew from 0.80 to 2.4" in finding.text
    assert ("halved" in finding.text) == (action == "lower_eta")


def test_what_was_said_is_said_again_after_fifty_steps():
    rows = [{}] * 20 + [{"entropy/high_entropy": 4.0}] * 70
    assert [step for step, _ in watched(rows)[1]] == [27, 77]


def test_little_entropy_may_grow():
    rows = [{"entropy/high_entropy": 0.05}] * 20 + [{"entropy/high_entropy": 0.45}] * 40
    assert watched(rows)[1] == []


@pytest.mark.parametrize("mode", ["normal", "high_entropy"])
def test_a_lost_accuracy_is_found(mode):
    key = f"accuracy/{mode}"
    rows = [{key: 0.2}] * 10 + [{key: 0.8}] * 60 + [{key: 0.1}] * 30
    (step, finding), *_ = watched(rows)[1]
    # From 0.8 (nearly) to 0.1: half of 0.8 is passed when 0.7 x 0.9^n < 0.3, at n = 9.
    assert step == 79
    assert f"the {mode.replace('_', '-')} mode's accuracy fell from 0.80 to 0.37" in finding.text


def test_a_mode_that_never_solved_anything_has_nothing_to_lose():
    rows = [{"accuracy/normal": 0.04}] * 40 + [{"accuracy/normal": 0.0}] * 40
    assert watched(rows)[1] == []


def test_a_baseline_has_no_second_mode():
    row = {key: value for key, value in SOUND.items() if "high_entropy" not in key}
    guard = Guard()
    for _ in range(40):
        guard, findings = watch(guard, row, GuardConfig())
        assert findings == []
    assert set(guard.means) == {"accuracy/normal"}


def test_it_goes_on_from_a_checkpoint_as_if_nothing_had_been():
    rows = [{}] * 20 + [{"entropy/high_entropy": 4.0}] * 70
    half, first = watched(rows[:40])
    restored = Guard(**json.loads(json.dumps(half.to_json())))
    whole, second = watched(rows[40:], guard=restored)
    assert first + second == watched(rows)[1]
    assert whole == watched(rows)[0]


@pytest.mark.parametrize(
    "settings", [{"skipped_steps": 0}, {"sampler_kl": -1.0}, {"entropy_growth": 0.5}, {"accuracy_loss": 1.0}]
)
def test_what_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GuardConfig(**settings)
