"""Ending a run early but in order: SIGTERM, as a preempted machine gets, and the first Ctrl-C.

A signal only leaves a note. The run looks at it where nothing is half done, ends there, and saves what it has. The
second Ctrl-C ends the process at once: a thread counts them, because Python runs handlers between two of its own
instructions, and compiling a program or an update of the model is one.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from policy_split_jax.processes import asked_to_stop, several

_SHOW_CURSOR = "\x1b[?25h"


class Stopped(Exception):
    """A run that ended because it was asked to."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.number = number
        self.step = 0
        """The last step that is saved; 0 before the first one."""

    @property
    def exit_code(self) -> int:
        """As a shell has it: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


class StopRequests:
    """Listens while its `with` block lasts; in the main thread only, which alone may."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._undo = ExitStack()

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            self._undo.enter_context(_second_interrupt_ends())
            self._listen(signal.SIGINT, self._interrupted)
            # With several processes JAX listens for it, and tells all of them.
            if not several():
                self._listen(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, *unused: object) -> None:
        self._undo.close()

    def check(self) -> None:
        """Raises Stopped where the run was asked to stop; all processes of a run call it equally often."""
        if several():
            if asked_to_stop():
                raise Stopped(self._number or signal.SIGTERM)
        elif self._number is not None:
            raise Stopped(self._number)

    def _listen(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        # What is ignored, as Ctrl-C is in the background of a shell, stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            self._undo.callback(signal.signal, number, signal.signal(number, handler))

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        if several():
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _second_interrupt_ends() -> Iterator[None]:
    """While the block lasts, the first Ctrl-C is answered and the second ends the process, whatever it is at."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    threading.Thread(target=_count_interrupts, args=(receiver,), daemon=True).start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()


def _count_interrupts(receiver: socket.socket) -> None:
    """Reads the number of each signal that comes, until the other end is closed."""
    interrupts = 0
    with receiver:
        while numbers := receiver.recv(64):
            for _ in range(numbers.count(signal.SIGINT)):
                interrupts += 1
                _answer(interrupts)


def _answer(interrupts: int) -> None:
    if interrupts == 1:
        os.write(2, b"\npolicy-split: stopping and saving; Ctrl-C again ends at once\n")
        return
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR.encode())
    os._exit(128 + signal.SIGINT)
