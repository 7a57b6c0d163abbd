"""The pure rooms stay pure: what they import, what they call, and that importing anything does nothing."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("policy_split_jax").origin).parent
PURE_PATTERNS = (
    "masked.py",
    "padding.py",
    "modes.py",
    "errors.py",
    "limits.py",
    "model/*.py",
    "objective/*.py",
    "sampler/__init__.py",
    "sampler/sampling.py",
    "sampler/engine.py",
    "training/__init__.py",
    "training/accumulate.py",
    "training/batch.py",
    "training/fingerprint.py",
    "training/guard.py",
    "training/optimizer.py",
    "training/quarters.py",
    "training/sft.py",
    "training/state.py",
    "training/update.py",
)
WORLDLY = {"model/huggingface.py"}
# Needs an extra, and nothing imports it.
APART = "policy_split_jax.sampler.jetstream"
# The optimizer's settings; `config.py` may be imported by every room (it reads a file only when asked to).
ALSO_ALLOWED = {"policy_split_jax", "policy_split_jax.config"}
LIBRARIES = {
    "collections", "dataclasses", "enum", "functools", "itertools", "math", "re", "typing",
    "flax", "jax", "jaxtyping", "numpy", "optax",
}  # fmt: skip
WORLDLY_CALLS = {"print", "open", "input", "eval", "exec", "compile", "__import__", "breakpoint"}
WORLDLY_ATTRIBUTES = {
    "jax.debug", "jax.pure_callback", "jax.experimental", "jax.device_get", "jax.devices", "jax.config",
    "np.random", "numpy.random", "np.load", "np.save",
}  # fmt: skip
# A module may import its own floor and those below it; the sampler and training do not see each other.
FLOORS = {"": 0, "config": 0, "model": 1, "objective": 2, "sampler": 3, "training": 3}


def pure_files():
    files = {path for pattern in PURE_PATTERNS for path in PACKAGE.glob(pattern)}
    return sorted(files - {PACKAGE / name for name in WORLDLY})


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PURE_MODULES = {module_name(path) for path in pure_files()}


def is_module(name):
    place = PACKAGE.parent.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or place.is_dir()


def imported(tree):
    """Full names of all modules that a syntax tree imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not looked up here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.startswith("policy_split_jax.") and is_module(full) else node.module


def floor(name):
    """(floor, room) of a module."""
    parts = name.split(".")
    room = parts[1] if len(parts) > 1 and parts[1] in FLOORS else ""
    return FLOORS[room], room


def breaches(source, name):
    """Everything in a pure module's source that it may not do."""
    tree = ast.parse(source)
    found = []
    for target in imported(tree):
        if target.split(".")[0] != "policy_split_jax":
            if target.split(".")[0] not in LIBRARIES:
                found.append(f"imports {target}")
        elif target not in PURE_MODULES | ALSO_ALLOWED:
            found.append(f"imports {target}")
        else:
            (own, own_room), (other, other_room) = floor(name), floor(target)
            if other > own or (other == own and other_room != own_room and "" not in (own_room, other_room)):
                found.append(f"imports {target}, which is not below it")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WORLDLY_CALLS:
            found.append(f"calls {node.func.id}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in WORLDLY_ATTRIBUTES:
            found.append(f"uses {ast.unparse(node)}")
        elif isinstance(node, ast.Global):
            found.append(f"changes the global {node.names[0]}")
    return found


def test_the_pure_rooms_are_there():
    for pattern in PURE_PATTERNS:
        assert list(PACKAGE.glob(pattern)), f"{pattern} matches nothing: name the pure module that took its place"
    assert {"policy_split_jax.training.update", "policy_split_jax.model.qwen3"} <= PURE_MODULES
    assert "policy_split_jax.model.huggingface" not in PURE_MODULES


@pytest.mark.parametrize("path", pure_files(), ids=module_name)
def test_a_pure_module_stays_pure(path):
    assert breaches(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("import os", "imports os"),
        ("from pathlib import Path", "imports pathlib"),
        ("def f():\n    import time", "imports time"),
        ("import logging", "imports logging"),
        ("import transformers", "imports transformers"),
        ("from policy_split_jax.data import dataset", "imports policy_split_jax.data.dataset"),
        ("from policy_split_jax.rewards import Grade", "imports policy_split_jax.rewards"),
        ("from policy_split_jax.sampler.rollout import Rollout", "imports policy_split_jax.sampler.rollout"),
        ("from policy_split_jax.model import huggingface", "imports policy_split_jax.model.huggingface"),
        ("import policy_split_jax.training.loop", "imports policy_split_jax.training.loop"),
        ("from policy_split_jax import policy", "imports policy_split_jax.policy"),
        (
            "from policy_split_jax.training import update",
            "imports policy_split_jax.training.update, which is not below it",
        ),
        (
            "from policy_split_jax.sampler.engine import generate",
            "imports policy_split_jax.sampler.engine, which is not below it",
        ),
        ("print(1)", "calls print"),
        ("with open('x') as f: pass", "calls open"),
        ("jax.debug.print('x')", "uses jax.debug"),
        ("np.random.normal()", "uses np.random"),
        ("def f():\n    global a", "changes the global a"),
        (
            "import jax.numpy as jnp\nfrom policy_split_jax import masked\nfrom policy_split_jax.model import qwen3",
            None,
        ),
    ],
)
def test_a_breach_is_seen(source, breach):
    """In a module of the objective, which may see the model and the reductions only."""
    assert breaches(source, "policy_split_jax.objective.example") == ([] if breach is None else [breach])


_IMPORT_EVERYTHING = """
import json, logging, os, sys, threading
import jax
before = dict(os.environ), logging.root.handlers[:], logging.root.level, dict(jax.config.values), sys.path[:]
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
after = dict(os.environ), logging.root.handlers[:], logging.root.level, dict(jax.config.values), sys.path[:]
from jax._src import xla_bridge
print(json.dumps({
    "same": [one == other for one, other in zip(before, after)],
    "threads": threading.active_count(),
    "devices": xla_bridge.backends_are_initialized(),
    "heavy": sorted({"torch", "transformers", "plotly", "pyarrow", "math_verify", "pandas"} & set(sys.modules)),
    "modules": len([name for name in sys.modules if name.startswith("policy_split_jax")]),
}))
"""


def import_in_another_process(names, folder):
    """What the imports of these modules changed there."""
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", _IMPORT_EVERYTHING, *names],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    assert list(folder.iterdir()) == []
    seen = json.loads(result.stdout)
    assert seen.pop("modules") >= len(set(names))
    return seen


def test_importing_pure_modules_does_nothing(tmp_path):
    """No device is initialised, no file, thread, log or environment touched, nothing heavy imported."""
    seen = import_in_another_process(["policy_split_jax", *sorted(PURE_MODULES)], tmp_path)
    assert seen == {"same": [True] * 5, "threads": 1, "devices": False, "heavy": []}


def test_importing_the_whole_package_starts_no_device(tmp_path):
    """Nor does it print, write a file or start a thread."""
    everything = sorted({module_name(path) for path in PACKAGE.rglob("*.py")} - {APART})
    seen = import_in_another_process(everything, tmp_path)
    assert seen["devices"] is False
    assert seen["threads"] == 1


def test_nothing_imports_the_adapter_to_jetstream():
    assert is_module(APART)
    for path in PACKAGE.rglob("*.py"):
        assert APART not in set(imported(ast.parse(path.read_text(encoding="utf-8")))), path
