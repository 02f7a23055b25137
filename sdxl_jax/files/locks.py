"""Locks between processes, which the system lets go of however a process ends.

On network file systems it depends on the server whether other machines see them: NFS 4 does that, object stores
mounted as a folder mostly do not.
"""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path


class Busy(OSError):
    """Another process has the lock; the message is what it said about itself, empty where that is nothing."""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """A file made for this, for this process alone, which says in it who it is. Removed at the end.

    Raises Busy where another process has it, or where it cannot be locked; OSError where it cannot be written.
    """
    with path.open("a+") as file:
        try:
            _lock(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # which raises where there is none
                raise OSError("the file was removed by the process that had it")
        except OSError as error:
            file.seek(0)
            raise Busy(file.read().strip()) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M}\n")
        file.flush()
        try:
            yield
        finally:
            # Whoever opened this file and gets its lock after us sees that it is no longer there, and gives up.
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """A folder for this process alone; nothing is written. Unlocked where the file system has no locks.

    Raises Busy where another process has it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            _lock(descriptor)
        except BlockingIOError as error:
            raise Busy from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another process has it, OSError where the file system has no locks."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
