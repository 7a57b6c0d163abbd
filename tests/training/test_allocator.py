"""How many pools of memory threads use, as glibc itself tells."""

import os
import subprocess
import sys

import pytest

# Sixteen threads that allocate at once; malloc_info then lists the pools ("heaps") on standard output.
PROGRAM = """
import ctypes, sys, threading
from policy_split_jax.training.allocator import share_arenas
if sys.argv[1] == "shared":
    share_arenas()
together = threading.Barrier(16)
def allocate():
    together.wait()
    kept = [bytes(1000) for _ in range(100)]
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
library = ctypes.CDLL(None)
library.malloc_info(0, ctypes.c_void_p.in_dll(library, "stdout"))
library.fflush(None)
"""


def pools(how, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(sys.platform != "linux", reason="tells glibc something")
def test_threads_share_two_pools():
    alone = pools("alone")
    if alone == 0:
        pytest.skip("the C library here is another one")
    assert alone > 2
    assert pools("shared") == 2
    assert pools("shared", MALLOC_ARENA_MAX="1") == 1
