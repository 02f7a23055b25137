"""Locks between processes (flock), which the system releases however a process ends.

On a network file system it depends on the server whether other machines see a lock: with NFS 4 they do, with object
stores mounted as a folder mostly not.
"""

import contextlib
import datetime
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

_GLANCE_SECONDS = 0.05
"""Longer than a process that only looks whether a lock is held (`training.status`) shares it."""


class Busy(OSError):
    """Another process holds the lock; the message is that process's own description, or empty."""


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Creates and holds a lock file that describes this process (number, machine, time). Removed at the end.

    Raises Busy where another process holds it, or where it cannot be locked; OSError where it cannot be written.
    """
    with path.open("a+") as file:
        try:
            _lock(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # stat raises where the file is gone
                raise OSError("the file was removed by the process that held it")
        except OSError as error:
            file.seek(0)
            raise Busy(file.read().strip()) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M}\n")
        file.flush()
        try:
            yield
        finally:
            # A process that opened this file before and locks it after us finds that it was removed, and gives up.
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Holds a lock on a folder; writes nothing. Without effect where the file system has no locks.

    Raises Busy where another process holds it.
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


@contextlib.contextmanager
def awaited_folder(path: Path) -> Iterator[None]:
    """As `locked_folder`, but waits while another process holds it."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked_folder(path))
                break
            except Busy:
                time.sleep(0.2)
        yield


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another process holds the lock, OSError where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_GLANCE_SECONDS)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
