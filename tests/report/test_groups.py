"""Which runs the command line names, and what they are called."""

import json

import numpy as np
import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.report.groups import Named, average_of_rows, average_of_seeds, parse_named, read_groups


@pytest.fixture
def make_run(tmp_path):
    def make(name, *evaluations):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = ({"kind": "eval", "step": step} for step in evaluations)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return make


def test_a_path_stands_alone_and_a_label_has_seeds():
    assert parse_named("runs/tiny") == Named(None, ("runs/tiny",))
    assert parse_named(" mine = runs/a, runs/b") == Named("mine", ("runs/a", "runs/b"))


def test_a_path_may_hold_an_equals_sign(make_run):
    run = make_run("lr=1")
    assert parse_named(run) == Named(None, (run,))


@pytest.mark.parametrize("text", ["=runs/a", "mine=", "mine=runs/a,", "mine= ,runs/a"])
def test_an_empty_label_or_path_is_refused(text):
    with pytest.raises(UserError, match="has an empty label or path; write LABEL=PATH"):
        parse_named(text)


def test_runs_of_one_name_are_told_apart_by_their_parents(make_run):
    named = [parse_named(text) for text in (make_run("a/run"), f"mine={make_run('b/run')},{make_run('c')}")]
    groups = read_groups(named)
    assert [group.label for group in groups] == ["a/run", "mine"]
    assert [[seed.name for seed in group.seeds] for group in groups] == [["a/run"], ["b/run", "c"]]


def test_names_have_as_many_parts_as_tell_them_apart(make_run):
    runs = [make_run(name) for name in ("a/runs/s0", "b/runs/s0", "b/runs/s1", "b/other/s1", "s2")]
    [group] = read_groups([Named("mine", (*runs, runs[-1]))])
    assert [seed.name for seed in group.seeds] == ["a/runs/s0", "b/runs/s0", "runs/s1", "other/s1", "s2", "s2 (2)"]


def test_a_label_that_is_there_twice_is_numbered(make_run):
    run = make_run("a")
    assert [group.label for group in read_groups([Named("x", (run,)), Named("x", (run,))])] == ["x", "x (2)"]


def test_no_run_at_all_is_refused():
    with pytest.raises(UserError, match="no run folder given"):
        read_groups([])


def test_the_legend_says_what_the_band_is(make_run):
    runs = [make_run(name) for name in "abcd"]
    legends = [read_groups([Named("mine", tuple(runs[:count]))])[0].legend for count in (1, 3, 4)]
    assert legends == ["mine", "mine (3 seeds, min–max)", "mine (4 seeds, 95 % t-interval)"]


def test_four_seeds_have_a_t_interval():
    found = average_of_seeds([{7: value} for value in (1.0, 2.0, 3.0, 6.0)])
    # Mean 3, variance (4 + 1 + 0 + 9) / 3; 3.182446 is the 97.5 % quantile of t with 3 degrees of freedom.
    half = 3.182446305 * np.sqrt(14 / 3) / 2
    np.testing.assert_allclose([found.low[0], found.mean[0], found.high[0]], [3 - half, 3, 3 + half], rtol=1e-8)


def test_evaluations_are_those_that_all_seeds_have_made(make_run):
    steps = {"a": (0, 25, 75, 300), "b": (0, 75), "c": (75, 0, 50)}
    runs = [make_run(name, *each) for name, each in steps.items()]
    [group] = read_groups([Named("mine", tuple(runs))])
    assert [[row["step"] for row in rows] for rows in group.evaluations] == [[0] * 3, [75] * 3]
    [apart] = read_groups([Named("mine", (runs[1], make_run("d")))])
    assert apart.evaluations == []


def test_a_value_that_a_seed_lacks_has_no_average():
    rows = [{"step": 9, "kl": value} for value in (0.5, 1.0, 1.5)]
    found = average_of_rows(rows, "kl")
    assert (found.steps, found.low, found.mean, found.high) == ([9], [0.5], [1.0], [1.5])
    # A band of the other three is not what "4 seeds" says it is.
    assert average_of_rows([*rows, {"step": 9, "kl": None}], "kl") is None
