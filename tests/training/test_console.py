"""What a run says of a step: the modes that it has."""

import io

import pytest
from rich.console import Console

from policy_split_jax.training.console import RunDisplay

BOTH = {
    "reward/normal": 0.25,
    "reward/high_entropy": 0.5,
    "entropy/normal": 0.1254,
    "entropy/high_entropy": 0.3,
    "kl/high_entropy_to_normal": 0.01,
    "eta": 0.03,
    "response_length/normal": 7.25,
    "response_length/high_entropy": 9.0,
    "time/step": 1.26,
}
ONE = {name: BOTH[name] for name in ("reward/normal", "entropy/normal", "response_length/normal", "time/step")}


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        (
            BOTH,
            "reward 0.25 0.50  entropy 0.125 0.300  KL 0.0100  eta 0.030  length 7.2 9.0  1.3 s",
        ),
        # No divergence, and no bonus: they need two modes.
        (ONE, "reward 0.25  entropy 0.125  length 7.2  1.3 s"),
    ],
    ids=["both modes", "one mode"],
)
def test_the_line_of_a_step(capsys, row, figures):
    RunDisplay(steps=8, done=0).step(3, row)
    assert capsys.readouterr().out == f"step 3/8  {figures}\n"


def test_phases_come_one_after_the_other_and_leave_nothing():
    """Of ten thousand steps the bar keeps as much as of one."""
    display = RunDisplay(steps=100, done=0)
    shown = []
    for number in range(1, 51):
        with display.phase("rollouts", 2 * number) as report:
            report(number)
            shown.append(_bar(display))
    assert [words.split()[:2] for words in shown[:2]] == [["training", "0/100"], ["training", "0/100"]]
    assert "rollouts" in shown[0]
    assert "1/2" in shown[0]
    assert "50/100" in shown[-1]
    assert "rollouts" not in _bar(display)
    assert all(len(column._renderable_cache) <= 2 for column in display._progress.columns)


def _bar(display):
    console = Console(width=100, file=io.StringIO())
    console.print(display._progress.get_renderable())
    return console.file.getvalue()
