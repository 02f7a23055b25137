"""ArrayRecord files: a writer of one, and a reader of many by path, which keeps the last used ones open.

Records are not compressed, and each is a group of its own, so that reading one costs one read of the file. Files that
are read may be in a bucket (gs://…): ArrayRecord has a client of its own, which reads ranges of them.

Not here: the content of records, and when a file counts as finished.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import objects
from sdxl_jax.files.buckets import DEADLINE_SECONDS
from sdxl_jax.files.paths import AnyPath, in_bucket

_T = TypeVar("_T")
_GAVE_UP = "policy exhausted"  # in the message of ArrayRecord's client after it repeated a request

_OPEN_FILES = 256  # of 0.04 MB and one file descriptor each; opening one again takes 0.4 ms
# Given as the number of records, so that a file need not be opened to count them; reading beyond the last one fails.
_NO_COUNT = 1 << 62


class Unavailable(MachineError):
    """The storage does not answer: no record is at fault."""


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


def _in_time(call: Callable[[], _T], path: AnyPath) -> _T:
    """call(), which uses a bucket. Raises Unavailable after `DEADLINE_SECONDS`: ArrayRecord waits for ever."""
    results: list[_T] = []
    problems: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, daemon=True, name="reads a bucket")
    thread.start()
    thread.join(DEADLINE_SECONDS)
    if problems:
        raise problems[0]
    if not results:
        raise Unavailable(
            f"{path} was not read within {DEADLINE_SECONDS:g} s: the bucket does not answer. Check the network, and "
            "run the same command again"
        )
    return results[0]


class _ProcessState:
    """The files that one process has open. Never shared with another: neither a reader nor a lock survives a fork."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.lock = threading.Lock()
        self.readers: OrderedDict[AnyPath, ArrayRecordDataSource] = OrderedDict()


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

    def _size(self, path: AnyPath) -> int:
        try:
            if not in_bucket(path):
                return path.stat().st_size
            if (size := objects.size(path, "the file")) is not None:
                return size
        except OSError as problem:
            raise fault(problem)(f"{path} cannot be read ({problem.strerror}). {self._remedy}") from problem
        except MachineError as problem:
            raise Unavailable(str(problem)) from problem
        raise InputError(f"{path} cannot be read (there is no such object). {self._remedy}")

    def _open(self, path: AnyPath, size: int | None) -> ArrayRecordDataSource:
        found = self._size(path)
        if size not in (None, found):
            raise InputError(
                f"{path} has {found} bytes where {size} are expected: it was cut off or replaced. {self._remedy}"
            )
        return ArrayRecordDataSource([f"{path}[0:{_NO_COUNT}]"])

    def damaged(self, path: AnyPath, record: int, why: object) -> InputError:
        """The error for a record that cannot be used."""
        return InputError(f"Record {record} of {path} is damaged ({why}). {self._remedy}")

    def read(self, path: AnyPath, record: int, size: int | None = None) -> bytes:
        """One record of a file, which is checked to have `size` bytes when it is opened, if that is given.

        Raises InputError, naming the file, where it is missing, not of that size, damaged, or ends before that record.
        A file that was cut off may still open and give wrong bytes: check the record where `size` is not given. Raises
        Unavailable where a bucket does not answer.
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
            return _in_time(lambda: reader[record], path) if in_bucket(path) else reader[record]
        except Unavailable:
            raise
        except (RuntimeError, ValueError) as problem:
            if in_bucket(path) and _GAVE_UP in str(problem):
                raise Unavailable(f"{path} cannot be read ({problem}). Run the same command again") from problem
            raise self.damaged(path, record, problem) from problem
