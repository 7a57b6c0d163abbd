"""What a signal does while a run listens, and that it does nothing more afterwards."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from policy_split_jax.training.stop import Stopped, StopRequests

# One call of C that takes many seconds, as compiling a large model does.
BUSY = """
import hashlib, sys
from policy_split_jax.training.stop import StopRequests
with StopRequests():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 40_000_000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_note(number, capfd):
    with StopRequests() as stop:
        stop.check()
        signal.raise_signal(number)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.exit_code == 128 + number


def test_the_second_interrupt_ends_a_process_that_is_in_a_long_call():
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"busy\n"
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == b"\n"
            assert process.stderr.readline() == b"policy-split: stopping and saving; Ctrl-C again ends at once\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert time.monotonic() - started < 5
        finally:
            process.kill()


def test_afterwards_everything_is_as_it_was():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before, threads = [signal.getsignal(number) for number in numbers], set(threading.enumerate())
    with StopRequests():
        counting = set(threading.enumerate()) - threads
        assert len(counting) == 1
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
    counting.pop().join(10)
    assert set(threading.enumerate()) <= threads
