"""launch/cluster_local.sh with a stub of policy-split."""

import os
import signal
import sys
import time

import pytest


@pytest.fixture
def local(place):
    """The environment in which the script takes the stub."""
    return {"POLICY_SPLIT": str(place.stubs / "policy-split"), "PYTHON": sys.executable}


def test_every_process_is_told_its_place(place, local):
    done = place.run("cluster_local.sh", "3", "configs/tiny.yaml", "name=a b", **local)
    assert (done.returncode, done.stdout) == (0, "process 0, start 0\n")
    calls = sorted(place.calls("policy-split"), key=lambda call: call.arguments[-1])
    assert len(calls) == 3
    coordinator = calls[0].arguments[4]
    assert coordinator.startswith("127.0.0.1:")
    for process, call in enumerate(calls):
        assert call.arguments == [
            *("train", "configs/tiny.yaml", "name=a b"),
            *("--coordinator", coordinator, "--processes", "3", "--process-id", str(process)),
        ]
        assert call.environment == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def test_processes_may_pretend_to_have_several_devices(place, local):
    given = {**local, "DEVICES": "4", "XLA_FLAGS": "--xla_dump_to=x"}
    assert place.run("cluster_local.sh", "1", "configs/tiny.yaml", **given).returncode == 0
    flags = place.calls("policy-split")[0].environment["XLA_FLAGS"]
    assert flags == "--xla_dump_to=x --xla_force_host_platform_device_count=4"


def test_the_first_failure_ends_all_and_is_shown(place, local):
    place.plan(p0=[{"wait": True}], p1=[{"wait": True}], p2=[{"seconds": 1, "code": 3}])
    start = time.monotonic()
    done = place.run("cluster_local.sh", "3", "configs/tiny.yaml", **local)
    assert time.monotonic() - start < 20
    assert done.returncode == 3
    assert "process 2 ended with exit code 3\nprocess 2, start 0\n" in done.stderr
    assert sorted(call.arguments[0] for call in place.calls("interrupted")) == ["0", "1"]


def test_ctrl_c_ends_all(place, local):
    place.plan(p0=[{"wait": True}], p1=[{"wait": True}])
    process = place.start("cluster_local.sh", "2", "configs/tiny.yaml", **local)
    deadline = time.monotonic() + 30
    while len(place.calls("policy-split")) < 2 or not all((place.stubs / f"starts-{i}").exists() for i in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert sorted(call.arguments[0] for call in place.calls("interrupted")) == ["0", "1"]


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "configs/tiny.yaml"], ["configs/tiny.yaml", "name=x"]])
def test_wrong_arguments_get_the_usage(arguments, place, local):
    done = place.run("cluster_local.sh", *arguments, **local)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert place.calls() == []
