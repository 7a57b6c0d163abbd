"""Grades many responses, each within its own limits of time and memory.

Rewards whose work is bounded by construction are graded in this process. The others run in worker processes
that are killed when an answer takes too long. They are started as fresh interpreters: this process runs JAX's
threads, which forbids a fork, and its main module may be heavy, which a spawn would import again.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from typing import Any

from policy_split_jax.errors import UserError
from policy_split_jax.rewards.family import kill_family
from policy_split_jax.rewards.grading import BUILT_IN, Grade, GradeItem, load_grader

INLINE = ("countdown", "exact", "letter", "walk")
CHUNK = 16
START_LIMIT = 120.0
START_ATTEMPTS = 3
"""How often in a row a worker is started that ends before it can grade."""

_READ_BYTES = 2**16
# One worker is one core's work, and each idle BLAS thread reserves memory that the limit counts.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from policy_split_jax.rewards.worker import main; main(int(sys.argv[1]))"
)


@dataclass
class _Job:
    """The answers of one call: how each is sent, those that wait, and the grades of the others."""

    messages: dict[int, str] = field(default_factory=dict)
    queue: deque[int] = field(default_factory=deque)
    grades: dict[int, Grade] = field(default_factory=dict)
    retried: set[int] = field(default_factory=set)


class _Worker:
    """The parent's end of a worker process; `pending` are the answers it has been sent and not replied to.

    Nothing here waits for a worker that is stuck: what it sends is read as far as it has come.
    """

    def __init__(self, setup: Mapping[str, Any], attempt: int = 1) -> None:
        self.attempt = attempt
        self.ready = False
        self.begun = False  # it has read the answers: its end from then on is the work of the first
        self.pending: deque[int] = deque()
        self.deadline = time.monotonic() + START_LIMIT
        self.socket, remote = socket.socketpair()
        self._unread = b""
        path = json.dumps([*sys.path, os.getcwd()])
        with remote:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(remote.fileno()), path],
                stdin=subprocess.DEVNULL,
                pass_fds=[remote.fileno()],
                start_new_session=True,  # so that what a grader starts can be killed with it
                env=os.environ | _ONE_THREAD,
            )
        with suppress(OSError):  # already dead: the next read says so
            self.send(json.dumps(setup), START_LIMIT)

    @property
    def busy(self) -> bool:
        return not self.ready or bool(self.pending)

    def send(self, message: str, limit: float) -> None:
        """Raises OSError where the worker is dead, or has not taken the message within the limit (in seconds)."""
        self.socket.settimeout(limit)
        self.socket.sendall(message.encode() + b"\n")

    def receive(self) -> list[Any]:
        """The messages that have come since. Raises EOFError or OSError at its end, ValueError for no JSON."""
        self.socket.settimeout(0.0)
        with suppress(BlockingIOError):
            data = self.socket.recv(_READ_BYTES)
            if not data:
                raise EOFError
            *lines, self._unread = (self._unread + data).split(b"\n")
            return [json.loads(line) for line in lines]
        return []

    def exit_reason(self) -> str:
        """How the process ended, asked after its socket did."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its socket is closed"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        kill_family(self.process)
        self.socket.close()


class GraderPool:
    """Grades with one of `BUILT_IN`, `package.module:function` or `path/to/file.py:function`.

    `time_limit` is in seconds of wall time for each answer; starting a worker does not count. Use it as a
    context manager, from one thread at a time.

    Raises:
        UserError: the reward is unknown or does not load, or a setting is not positive.
    """

    def __init__(self, reward: str, workers: int = 2, time_limit: float = 5.0, memory_limit_mb: int = 2048) -> None:
        if reward not in BUILT_IN and ":" not in reward:
            known = ", ".join(BUILT_IN)
            raise UserError(f"unknown reward {reward!r}: use {known}, module:function or file.py:function")
        if min(workers, time_limit, memory_limit_mb) <= 0:
            raise UserError("graders: workers, time limit and memory limit must be positive")
        self._time_limit = time_limit
        self._setup = {"reward": reward, "memory_limit_mb": memory_limit_mb, "time_limit": time_limit}
        self._inline = load_grader(reward) if reward in INLINE else None
        self._closed = False
        self._loaded = False
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers if self._inline is None else 0):
                self._workers.append(_Worker(self._setup))
            while not all(worker.ready for worker in self._workers):
                self._receive(_Job())
            self._loaded = True
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; the pool cannot grade any more."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """One grade for each item, in order; where a grader fails, hangs or dies, it has no score.

        Raises:
            UserError: a worker that had to be started again no longer loads the reward.
            ValueError: the pool is closed.
        """
        if self._closed:
            raise ValueError("the grader pool is closed")
        if self._inline is not None:
            return [self._inline(item) for item in items]
        try:
            return self._grade_in_workers(items)
        except BaseException:
            self.close()  # replies still to come would be taken for the next call's
            raise

    def _grade_in_workers(self, items: Sequence[GradeItem]) -> list[Grade]:
        job = _Job()
        for index, item in enumerate(items):
            try:
                job.messages[index] = json.dumps(asdict(item))
            except (TypeError, ValueError) as error:
                job.grades[index] = Grade(None, error=f"ground truth and extra information must be JSON: {error}")
        job.queue.extend(job.messages)
        while len(job.grades) < len(items):
            self._assign(job)
            self._receive(job)
        return [job.grades[index] for index in range(len(items))]

    def _assign(self, job: _Job) -> None:
        """Gives each idle worker its next answers; few enough that the workers finish together."""
        for worker in tuple(self._workers):
            if worker.busy or not job.queue:
                continue
            count = min(CHUNK, math.ceil(len(job.queue) / len(self._workers)))
            worker.pending.extend(job.queue.popleft() for _ in range(count))
            worker.begun = False
            worker.deadline = time.monotonic() + self._time_limit
            try:
                message = "[" + ",".join(job.messages[index] for index in worker.pending) + "]"
                worker.send(message, self._time_limit)
            except OSError:
                self._replace(worker, "the grader process took no answers", job)

    def _receive(self, job: _Job) -> None:
        """Waits for the busy workers, takes in what they sent, and replaces the dead and the overdue."""
        busy = [worker for worker in self._workers if worker.busy]
        remaining = min(worker.deadline for worker in busy) - time.monotonic()
        came = wait([worker.socket for worker in busy], max(remaining, 0.0))
        for worker in busy:
            try:
                for message in worker.receive() if worker.socket in came else []:
                    self._take(worker, message, job)
            except (EOFError, OSError):
                self._replace(worker, f"the grader process died ({worker.exit_reason()})", job)
                continue
            except (ValueError, TypeError, LookupError):
                self._replace(worker, "the grader process sent what is no grade", job)
                continue
            if worker.busy and time.monotonic() > worker.deadline:
                limit = self._time_limit if worker.ready else START_LIMIT
                self._replace(worker, f"no result within {limit:g} s", job)

    def _take(self, worker: _Worker, message: Any, job: _Job) -> None:
        """A worker says that it has loaded, for each list of answers that it has read it, and then its grades."""
        if not worker.ready:
            if message["error"] is not None:
                raise UserError(message["error"])
            worker.ready = True
        elif not worker.begun:
            worker.begun = True
        else:
            job.grades[worker.pending[0]] = Grade(**message)
            worker.pending.popleft()
        worker.deadline = time.monotonic() + self._time_limit

    def _replace(self, worker: _Worker, reason: str, job: _Job) -> None:
        """Ends a worker and starts another for its answers, but for the one that is to blame."""
        if not worker.ready and (not self._loaded or worker.attempt == START_ATTEMPTS):
            remedy = "check its imports, and the graders' memory limit"
            raise UserError(f"reward {self._setup['reward']!r}: {reason} while loading; {remedy}")
        if worker.pending:
            self._put_back(worker, reason, job)
        worker.kill()
        attempt = 1 if worker.ready else worker.attempt + 1
        self._workers[self._workers.index(worker)] = _Worker(self._setup, attempt)

    def _put_back(self, worker: _Worker, reason: str, job: _Job) -> None:
        """Blames the answer that a worker was at; the others wait again, in front.

        A worker that ended before it had read its answers was at none of them, but that happens to no answer twice.
        """
        first = worker.pending[0]
        if worker.begun or first in job.retried:
            job.grades[worker.pending.popleft()] = Grade(None, error=reason)
        else:
            job.retried.add(first)
        job.queue.extendleft(reversed(worker.pending))
