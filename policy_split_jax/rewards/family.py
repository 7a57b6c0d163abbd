"""Ends a process with all that it started, also what has left its session."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROUNDS = 50


def kill_family(leader: subprocess.Popen[bytes]) -> None:
    """Kills a process that leads a session, the session's processes, and the descendants of either.

    All are stopped before one is killed: an orphan is nobody's descendant, and what forks would be ahead of us. A
    process that has lost both its parent and the session (a daemon) is not found. Without `/proc`, only the leader's
    group is killed.
    """
    stopped: set[int] = set()
    for _ in range(_ROUNDS):
        running = _family(leader.pid) - stopped
        if not running:
            break
        for pid in running:
            _signal(pid, signal.SIGSTOP)
        stopped |= running
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader.pid, signal.SIGKILL)
    for pid in stopped:
        _signal(pid, signal.SIGKILL)
    leader.wait()


def _family(session: int) -> set[int]:
    table = list(_processes())
    found = {pid for pid, _, own in table if own == session}
    while more := {pid for pid, parent, _ in table if parent in found} - found:
        found |= more
    return found


def _processes() -> Iterator[tuple[int, int, int]]:
    """Process, parent and session of every process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = stat.read_bytes().rpartition(b")")[2].split()
            yield int(stat.parent.name), int(fields[1]), int(fields[3])


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
