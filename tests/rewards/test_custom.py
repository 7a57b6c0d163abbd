import math
from pathlib import Path

import numpy as np
import pytest

from policy_split_jax.errors import UserError
from policy_split_jax.rewards.custom import checked_score, describe, load, place

GOOD = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0.5\n"


@pytest.fixture(autouse=True)
def unchanged_path(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_file_loads_with_the_modules_beside_it(tmp_path: Path):
    (tmp_path / "beside_reward.py").write_text("VALUE = 7\n")
    file = tmp_path / "mine.py"
    file.write_text("from beside_reward import VALUE\n" + GOOD.replace("0.5", "VALUE"))
    function, source = load(f"{file}:compute_score")
    assert function(data_source="", solution_str="", ground_truth=None, extra_info={}) == 7
    assert source == str(file)


def test_a_module_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "some_reward_module.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    function, _ = load("some_reward_module:compute_score")
    assert function("", "", None, {}) == 0.5


def test_where_a_function_begins(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("import functools\n\n" + GOOD + "\nbound = functools.partial(compute_score)\n")
    assert place(*load(f"{file}:compute_score")) == f"{file}:3"
    assert place(*load(f"{file}:bound")) == str(file)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (None, "compute_score", "there is no file"),
        ("x = 1\n", "compute_score", "has no function 'compute_score'; define compute_score"),
        ("compute_score = 3\n", "compute_score", "has no function"),
        ("def f(solution):\n    return 1\n", "f", r"define f\(data_source, solution_str, ground_truth"),
        ("x = 1\n1 / 0\n", "f", r"ZeroDivisionError: division by zero \(.*mine.py:2\); correct it"),
        ("def f(:\n", "f", "SyntaxError.*mine.py, line 1"),
        ("import sys\nsys.exit(3)\n", "f", "SystemExit: 3"),
    ],
)
def test_a_file_that_does_not_load_says_why(tmp_path: Path, source: str | None, name: str, message: str):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=message) as raised:
        load(f"{tmp_path / 'mine.py'}:{name}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_such_module_here:f", "ModuleNotFoundError"),
        (":f", "write package.module:function"),
        ("module:", "write package.module:function"),
    ],
)
def test_a_bad_import_path_says_why(reward: str, message: str):
    with pytest.raises(UserError, match=message):
        load(reward)


@pytest.mark.parametrize(
    ("result", "score"),
    [
        (1, 1.0),
        (0.25, 0.25),
        (-2.0, -2.0),
        (1e9, 1e9),
        (True, 1.0),
        ({"score": 0.5, "note": "x"}, 0.5),
        (np.float32(0.5), 0.5),
    ],
)
def test_numbers_are_scores(result: object, score: float):
    assert checked_score(result) == score


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (10**400, "inf"),
        (-2e9, "returned -2000000000.0, not a number between -1e.09 and 1e.09"),
        (None, "NoneType"),
        ("1.0", "str"),
        ([1.0], "list"),
        ({}, 'key "score"'),
        ({"score": None}, "NoneType"),
        ({"score": math.nan}, "nan"),
    ],
)
def test_other_results_are_errors(result: object, message: str):
    with pytest.raises(ValueError, match=message):
        checked_score(result)


def test_an_error_can_be_written_whatever_it_quotes():
    """Half of a surrogate pair, as json.loads makes one of a model's text."""
    assert describe(ValueError("unit \ud83d\n and é")) == r"ValueError: unit \ud83d and é"
