"""The process that grades: light (no JAX), limited in memory, and gone when its parent is.

Messages are JSON over one pipe. In: `{"reward", "memory_limit_mb"}` once, then lists of items. Out:
`{"error"}` once (null when ready), then one grade for each item, in order.
"""

import json
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from multiprocessing.connection import Connection

from policy_split_jax.errors import UserError
from policy_split_jax.rewards.grading import BUILT_IN, GradeItem, load_grader

PARENT_CHECK_SECONDS = 1.0


def main(descriptor: int) -> None:
    """Serves the pipe with this file descriptor until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        _serve(Connection(descriptor))


def _serve(connection: Connection) -> None:
    setup = json.loads(connection.recv_bytes())
    _limit_memory(setup["memory_limit_mb"])
    # math-verify warns that its timeouts are off: the parent's hold.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    try:
        grader = load_grader(setup["reward"])
        _warm_up(setup["reward"])
    except UserError as error:
        connection.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    connection.send_bytes(json.dumps({"error": None}).encode())
    while True:
        for item in json.loads(connection.recv_bytes()):
            connection.send_bytes(json.dumps(asdict(grader(GradeItem(**item)))).encode())


def _warm_up(reward: str) -> None:
    """Imports what the first answer would, so that it does not count against that answer's time."""
    if reward in ("math", "prm800k", "released"):
        import_module(BUILT_IN[reward]).score(r"</think> \boxed{\frac{x}{2} + 1}", "0.5x + 1")


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = megabytes * 2**20
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    with suppress(ValueError, OSError):  # some systems (macOS) refuse any such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _exit_with_parent(parent: int) -> None:
    """Ends a worker whose parent died while it hung in a grader, where it does not see its pipe close."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(1)
