"""Writing files whole or not at all, and finding out beforehand whether a file can be written."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from policy_split_jax.errors import UserError

PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.EHOSTDOWN}
"""Numbers of an `OSError` that may be gone at the next try, which the launchers make after any exit code but 2."""


@contextmanager
def whole_file(path: Path, errors: str = "strict") -> Iterator[TextIO]:
    """A text file that stands at `path` when the block ends well, also where the machine is lost thereafter; otherwise
    what was there stays."""
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("w", encoding="utf-8", errors=errors, newline="\n") as file:
            yield file
        sync(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: Path, refusal: str) -> Iterator[None]:
    """Holds a lock file while the block lasts; the lock goes with its process, however that ends.

    Raises UserError with these words where another process holds it.
    """
    # Every command imports this file, and few need a lock.
    from filelock import FileLock, Timeout

    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(refusal) from None
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Returns when what was written to a file will outlast the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """The same of the names in a folder, where the system can."""
    try:
        sync(path)
    except OSError as error:
        # Windows opens no folder, and some disks of a network sync none.
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_output(path: Path, *inputs: Path) -> Path:
    """`path`, where a file can be written there; asked before the work whose result it will hold.

    Raises UserError for a missing or read-only folder, for a path that is a folder, and for one of the files that are
    read.
    """
    if path.exists() and any(given.exists() and path.samefile(given) for given in inputs):
        raise UserError(f"{path}: is what is read; choose another --output")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it or choose another --output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{path.parent}: not writable; choose another --output")
    return path
