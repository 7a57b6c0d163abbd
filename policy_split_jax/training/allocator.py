"""What the C library's allocator is told before a run."""

import ctypes
import os
import sys

_M_ARENA_MAX = -8
"""From glibc's malloc.h."""
ARENAS = 2


def share_arenas() -> None:
    """Lets all threads allocate from `ARENAS` pools, where glibc gives each of up to eight times the cores its own.

    Checkpoints are written by many threads that live for a moment; what stays in the pools of each is not given back,
    so that a run's memory grew with its checkpoints (docs/reliability.md, "Long runs"). Does nothing with another C
    library, and where MALLOC_ARENA_MAX says how many pools there may be.
    """
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, ARENAS)
