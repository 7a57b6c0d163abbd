"""The process that grades: light (no JAX), limited in memory, and gone when its parent is.

Messages are lines of JSON over one socket. In: `{"reward", "memory_limit_mb", "time_limit"}` once, then lists of items.
Out: `{"error"}` once (null when ready), then for each list null when it is read, and a grade for each item, in order.
"""

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from io import BufferedRWPair
from typing import Any

from policy_split_jax.errors import UserError
from policy_split_jax.rewards.grading import BUILT_IN, Grade, GradeItem, load_grader

PARENT_CHECK_SECONDS = 1.0
CPU_MARGIN = 10


def main(descriptor: int) -> None:
    """Serves the socket with this file descriptor until its other end closes; what graders started ends then too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    os.set_inheritable(descriptor, False)
    _print_to_stderr()
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    with suppress(BrokenPipeError, ConnectionResetError):
        _serve(socket.socket(fileno=descriptor).makefile("rwb"))
    os.killpg(0, signal.SIGKILL)


def _print_to_stderr() -> None:
    """What a reward prints is no output of the command."""
    with suppress(OSError):  # no stderr
        os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]


def _serve(stream: BufferedRWPair) -> None:
    setup = json.loads(stream.readline())
    _limit_memory(setup["memory_limit_mb"])
    # math-verify warns that its timeouts are off: the parent's hold.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        grader = load_grader(setup["reward"])
        _warm_up(setup["reward"])
    except UserError as error:
        _send(stream, {"error": str(error)})
        return
    _send(stream, {"error": None})
    for line in stream:
        _send(stream, None)
        for item in json.loads(line):
            if setup["reward"] in BUILT_IN:
                _limit_processor(setup["time_limit"])
            _send(stream, asdict(_graded(grader, GradeItem(**item))))


def _graded(grader: Callable[[GradeItem], Grade], item: GradeItem) -> Grade:
    process = os.getpid()
    grade = grader(item)
    if os.getpid() != process:  # a reward forked, and its child came back
        os._exit(0)
    return grade


def _send(stream: BufferedRWPair, message: Any) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def _warm_up(reward: str) -> None:
    """Imports what the first answer would, so that it does not count against that answer's time."""
    if reward in ("math", "prm800k", "released"):
        import_module(BUILT_IN[reward]).score(r"</think> \boxed{\frac{x}{2} + 1}", "0.5x + 1")


def _limit_memory(megabytes: int) -> None:
    _limit("RLIMIT_AS", megabytes * 2**20)
    _limit("RLIMIT_CORE", 0)


def _limit_processor(seconds: float) -> None:
    """A call of C that never ends lets no other thread run, not the one that watches the parent either."""
    _limit("RLIMIT_CPU", math.ceil(time.process_time() + seconds) + CPU_MARGIN)


def _limit(name: str, value: int) -> None:
    try:
        import resource
    except ImportError:
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with suppress(ValueError, OSError):  # some systems (macOS) refuse a limit of memory
        resource.setrlimit(kind, (value, hard))


def _exit_with_parent(parent: int) -> None:
    """Ends a worker whose parent died while it hung in a grader, where it does not see its socket close."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os.killpg(0, signal.SIGKILL)
