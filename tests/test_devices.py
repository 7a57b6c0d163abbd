"""Runs `tests/devices` where it can be run: in a process that sees eight devices from its beginning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(chosen):
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    # Uncaptured, or pytest would keep to itself what XLA says in tests that pass.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", chosen, "tests/devices"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=os.environ | devices, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    # What XLA says where it moves whole arrays for want of a better idea.
    assert "involuntary full rematerialization" not in (done.stdout + done.stderr).lower()
