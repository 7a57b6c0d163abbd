"""Grades many responses, each within its own limits of time and memory.

Rewards whose work is bounded by construction are graded in this process. The others run in worker processes
that are killed when an answer takes too long. They are started as fresh interpreters: this process runs JAX's
threads, which forbids a fork, and its main module may be heavy, which a spawn would import again.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from policy_split_jax.errors import UserError
from policy_split_jax.rewards.grading import BUILT_IN, Grade, GradeItem, load_grader

INLINE = ("countdown", "exact", "letter", "walk")
CHUNK = 16
START_LIMIT = 120.0

# One worker is one core's work, and each idle BLAS thread reserves memory that the limit counts.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from policy_split_jax.rewards.worker import main; main(int(sys.argv[1]))"
)


class _Worker:
    """The parent's end of a worker process; `pending` are the answers it has been sent and not replied to."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.ready = False
        self.pending: deque[int] = deque()
        self.deadline = time.monotonic() + START_LIMIT
        self.connection, remote = Pipe()
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
            self.send(json.dumps(setup))

    @property
    def busy(self) -> bool:
        return not self.ready or bool(self.pending)

    def send(self, message: str) -> None:
        self.connection.send_bytes(message.encode())

    def exit_reason(self) -> str:
        """How the process ended, asked after its pipe did."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "its pipe is closed"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


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
        self._setup = {"reward": reward, "memory_limit_mb": memory_limit_mb}
        self._inline = load_grader(reward) if reward in INLINE else None
        self._closed = False
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers if self._inline is None else 0):
                self._workers.append(_Worker(self._setup))
            while not all(worker.ready for worker in self._workers):
                self._receive({}, deque())
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
        grades: dict[int, Grade] = {}
        messages: dict[int, str] = {}
        for index, item in enumerate(items):
            try:
                messages[index] = json.dumps(asdict(item))
            except (TypeError, ValueError) as error:
                grades[index] = Grade(None, error=f"ground truth and extra information must be JSON: {error}")
        queue = deque(messages)
        while len(grades) < len(items):
            self._assign(messages, queue)
            self._receive(grades, queue)
        return [grades[index] for index in range(len(items))]

    def _assign(self, messages: Mapping[int, str], queue: deque[int]) -> None:
        """Gives each idle worker its next answers; few enough that the workers finish together."""
        for place, worker in enumerate(self._workers):
            if worker.busy or not queue:
                continue
            count = min(CHUNK, math.ceil(len(queue) / len(self._workers)))
            worker.pending.extend(queue.popleft() for _ in range(count))
            worker.deadline = time.monotonic() + self._time_limit
            try:
                worker.send("[" + ",".join(messages[index] for index in worker.pending) + "]")
            except OSError:  # it died while idle: no answer is to blame
                queue.extendleft(reversed(worker.pending))
                worker.kill()
                self._workers[place] = _Worker(self._setup)

    def _receive(self, grades: dict[int, Grade], queue: deque[int]) -> None:
        """Waits for the busy workers, takes in what they sent, and replaces the dead and the overdue."""
        busy = [worker for worker in self._workers if worker.busy]
        remaining = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.connection for worker in busy], max(remaining, 0.0))
        for worker in busy:
            try:
                while worker.busy and worker.connection.poll():
                    self._take(worker, grades)
            except (EOFError, ConnectionError):
                self._replace(worker, f"the grader process died ({worker.exit_reason()})", grades, queue)
                continue
            if worker.busy and time.monotonic() > worker.deadline:
                limit = self._time_limit if worker.ready else START_LIMIT
                self._replace(worker, f"no result within {limit:g} s", grades, queue)

    def _take(self, worker: _Worker, grades: dict[int, Grade]) -> None:
        message = json.loads(worker.connection.recv_bytes())
        if worker.ready:
            grades[worker.pending.popleft()] = Grade(**message)
        elif message["error"] is not None:
            raise UserError(message["error"])
        worker.ready = True
        worker.deadline = time.monotonic() + self._time_limit

    def _replace(self, worker: _Worker, reason: str, grades: dict[int, Grade], queue: deque[int]) -> None:
        """Ends a worker, blames the answer it was at, and puts those behind it back in front of the queue."""
        if not worker.ready:
            remedy = "check its imports, and the graders' memory limit"
            raise UserError(f"reward {self._setup['reward']!r}: {reason} while loading; {remedy}")
        grades[worker.pending.popleft()] = Grade(None, error=reason)
        queue.extendleft(reversed(worker.pending))
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._setup)
