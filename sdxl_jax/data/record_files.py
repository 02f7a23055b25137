"""ArrayRecord files: a writer of one, and a reader of many by path, which keeps the last used ones open.

Records are not compressed, and each is a group of its own, so that reading one costs one read of the file.

Not here: the content of records, and when a file counts as finished.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from sdxl_jax.errors import InputError, fault

_OPEN_FILES = 256  # of 0.04 MB and one file descriptor each; opening one again takes 0.4 ms
# Given as the number of records, so that a file need not be opened to count them; reading beyond the last one fails.
_NO_COUNT = 1 << 62


class RecordWriter:
    """Writes one ArrayRecord file. Raises OSError where writing to the disk fails."""

    def __init__(self, path: Path):
        self._writer: Any = _with_os_error(ArrayRecordWriter, str(path), "group_size:1,uncompressed")

    def write(self, record: bytes) -> None:
        _with_os_error(self._writer.write, record)

    def close(self) -> None:
        """Completes the file."""
        _with_os_error(self._writer.close)


def _with_os_error(call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ArrayRecord, whose RuntimeError for a failing disk is raised as OSError."""
    try:
        return call(*arguments)
    except RuntimeError as problem:
        raise OSError(str(problem)) from problem


class _ProcessState:
    """The files that one process has open. Never shared with another: neither a reader nor a lock survives a fork."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.readers: OrderedDict[Path, ArrayRecordDataSource] = OrderedDict()


class RecordFiles:
    """A reader of ArrayRecord files, which are opened when they are first read. Any number of threads may read, also
    after a fork.

    `remedy` ends the message of every InputError: what to do about a file that cannot be read. At most `open_files`
    stay open. A pickle holds no open file.
    """

    def __init__(self, remedy: str, open_files: int = _OPEN_FILES):
        self._remedy, self._limit = remedy, open_files
        self._state = _ProcessState()

    def __reduce__(self) -> tuple[type["RecordFiles"], tuple[str, int]]:
        return RecordFiles, (self._remedy, self._limit)

    def _own_state(self) -> _ProcessState:
        state = self._state
        if state.process != os.getpid():  # forked; where two threads notice at once, one file is opened twice
            state = self._state = _ProcessState()
        return state

    def _open(self, path: Path, size: int | None) -> ArrayRecordDataSource:
        try:
            found = path.stat().st_size
        except OSError as problem:
            raise fault(problem)(f"{path} cannot be read ({problem.strerror}). {self._remedy}") from problem
        if size not in (None, found):
            raise InputError(
                f"{path} has {found} bytes where {size} are expected: it was cut off or replaced. {self._remedy}"
            )
        return ArrayRecordDataSource([f"{path}[0:{_NO_COUNT}]"])

    def damaged(self, path: Path, record: int, why: object) -> InputError:
        """The error for a record that cannot be used."""
        return InputError(f"Record {record} of {path} is damaged ({why}). {self._remedy}")

    def read(self, path: Path, record: int, size: int | None = None) -> bytes:
        """One record of a file, which is checked to have `size` bytes when it is opened, if that is given.

        Raises InputError, naming the file, where it is missing, not of that size, damaged, or ends before that record.
        A file that was cut off may still open and give wrong bytes: check the record where `size` is not given.
        """
        state = self._own_state()
        with state.lock:
            reader = state.readers.get(path)
        reader = reader or self._open(path, size)
        with state.lock:
            state.readers[path] = reader
            state.readers.move_to_end(path)
            while len(state.readers) > self._limit:
                state.readers.popitem(last=False)  # closed when the last thread that reads it is done
        try:
            return reader[record]
        except (RuntimeError, ValueError) as problem:
            raise self.damaged(path, record, problem) from problem
