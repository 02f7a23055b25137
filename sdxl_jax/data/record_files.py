"""Files of records (ArrayRecord): writing one, and reading many, by path, of which a process keeps open the last.

Records are not compressed, and each is a group of its own, so that it costs one read.

Not here: what the records hold, and when a file counts as finished.
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

_OPEN_FILES = 256  # of 0.04 MB and one file each; to open one again takes 0.4 ms
_NO_COUNT = 1 << 62  # told as a file's records, it need not be opened to count them; what is beyond the last is refused


class RecordWriter:
    """Writes one file of records. OSError where the disk does not take it."""

    def __init__(self, path: Path):
        self._writer: Any = _disk(ArrayRecordWriter, str(path), "group_size:1,uncompressed")

    def write(self, record: bytes) -> None:
        _disk(self._writer.write, record)

    def close(self) -> None:
        """Completes the file."""
        _disk(self._writer.close)


def _disk(call: Callable[..., Any], *arguments: Any) -> Any:
    """ArrayRecord says by RuntimeError that the disk fails."""
    try:
        return call(*arguments)
    except RuntimeError as problem:
        raise OSError(str(problem)) from problem


class _OfProcess:
    """What one process has open, never shared with another: neither a reader nor a lock survives a fork."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.readers: OrderedDict[Path, ArrayRecordDataSource] = OrderedDict()


class RecordFiles:
    """ArrayRecord files, opened when they are read from. Any number of threads may read, also after a fork.

    `remedy` ends the message of every InputError: what to do about a file that cannot be read. Not more than
    `open_files` stay open. A pickle holds no open file.
    """

    def __init__(self, remedy: str, open_files: int = _OPEN_FILES):
        self._remedy, self._limit = remedy, open_files
        self._state = _OfProcess()

    def __reduce__(self) -> tuple[type["RecordFiles"], tuple[str, int]]:
        return RecordFiles, (self._remedy, self._limit)

    def _here(self) -> _OfProcess:
        state = self._state
        if state.process != os.getpid():  # forked; where two threads find out at once, one opens its file for nothing
            state = self._state = _OfProcess()
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
        """The error to raise about a record that cannot be used."""
        return InputError(f"Record {record} of {path} is damaged ({why}). {self._remedy}")

    def read(self, path: Path, record: int, size: int | None = None) -> bytes:
        """One record of a file, which is checked to have `size` bytes when it is opened, if that is told.

        Raises InputError, naming the file, where it is missing, not of that size, damaged, or ends before that record.
        A file that was cut off may open all the same and give other bytes: check the record where `size` is not told.
        """
        state = self._here()
        with state.lock:
            reader = state.readers.get(path)
        reader = reader or self._open(path, size)
        with state.lock:
            state.readers[path] = reader
            state.readers.move_to_end(path)
            while len(state.readers) > self._limit:
                state.readers.popitem(last=False)  # closes when the last thread has read
        try:
            return reader[record]
        except (RuntimeError, ValueError) as problem:
            raise self.damaged(path, record, problem) from problem
