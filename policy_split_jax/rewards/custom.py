"""The user's own reward: `compute_score(data_source, solution_str, ground_truth, extra_info)`.

It returns a number, or a dict with a number under "score" (verl's convention).
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from policy_split_jax.errors import UserError

MAX_MESSAGE = 300
MAX_SCORE = 1e9
"""Advantages square scores and add them up in float32."""
ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def load(reward: str) -> tuple[Callable[..., Any], str]:
    """The function that `package.module:function` or `path/to/file.py:function` names, and its file.

    Raises:
        UserError: it is missing, fails to import, or does not take the four arguments.
    """
    place, colon, name = reward.rpartition(":")
    if not (place and colon and name):
        raise UserError(f"reward {reward!r}: write package.module:function or path/to/file.py:function")
    signature = f"({', '.join(ARGUMENTS)})"
    module = _module(reward, place)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward {reward!r}: {place} has no function {name!r}; define {name}{signature}")
    try:
        inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise UserError(f"reward {reward!r}: {error}; define {name}{signature}") from error
    return function, module.__file__ or place


def code_digest(reward: str) -> str:
    """Of the content of a user's file; "" for our own graders, and for a module, whose file only importing it tells."""
    place = reward.rpartition(":")[0]
    return hashlib.sha256(Path(place).read_bytes()).hexdigest() if place.endswith(".py") else ""


def checked_score(result: object) -> float:
    """The number in what a reward function returned.

    Raises:
        ValueError: it is no number of at most `MAX_SCORE`, nor a dict with one under "score".
    """
    if isinstance(result, dict):
        if "score" not in result:
            raise ValueError('returned a dict without the key "score"')
        result = result["score"]
    if not isinstance(result, Real):
        raise ValueError(f"returned {type(result).__name__}, not a number")
    try:
        score = float(result)
    except OverflowError:
        score = math.inf
    if not abs(score) <= MAX_SCORE:
        raise ValueError(f"returned {score}, not a number between {-MAX_SCORE:g} and {MAX_SCORE:g}")
    return score


def place(function: Callable[..., Any], source: str) -> str:
    """Where a function begins, as file:line; its file `source` alone where it is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else source


def describe(error: BaseException, source: str = "") -> str:
    """An error in one line: type, message, and the deepest place in the file `source`, else the deepest."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    frames = [place for place in frames if not place[0].startswith("<frozen ")]
    own = [place for place in frames if place[0] == source] or frames
    where = f" ({own[-1][0]}:{own[-1][1]})" if own else ""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    # A message may quote what no file can hold, such as half of a surrogate pair.
    readable = message.encode(errors="backslashreplace").decode()
    return " ".join(readable.split())[:MAX_MESSAGE] + where


def _module(reward: str, place: str) -> ModuleType:
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"reward {reward!r}: there is no file {place}; give the path of an existing one")
    try:
        return _from_file(Path(place).resolve()) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        reason = f"importing {place} fails: {describe(error)}"
        raise UserError(f"reward {reward!r}: {reason}; correct it") from error


def _from_file(path: Path) -> ModuleType:
    name = f"custom_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up there
    sys.path.append(str(path.parent))  # for the modules that lie beside it
    spec.loader.exec_module(module)
    return module
