"""Shared fixtures; switches on run-time checks of array shapes and dtypes for the whole package."""

import os
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# PyTorch's threads cost more than they bring on models as small as these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the time of tests is XLA's, and many compile the same program.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Nor do tests run a program often enough to be worth optimizing it, and what is not optimized compiles three times
# as fast without the emitters that write fusions; XLA of later versions has no others.
if os.environ["JAX_PLATFORMS"] == "cpu":
    emitters = "--xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""
    os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level=0 {emitters}")

import pytest
from jaxtyping import install_import_hook

install_import_hook("policy_split_jax", "beartype.beartype")

PROJECT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that in the end no core waits for it."""
    items.sort(key=lambda item: item.path.name not in ("test_devices.py", "test_processes.py"))


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> Iterator[None]:
    """A suite in the background of a shell ignores interrupts, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of test data that lies beside a development checkout; a user's clone has none."""
    folder = PROJECT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout (real tokenizer and GSM8K)")
    return folder
