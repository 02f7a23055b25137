"""Closed pipes, as after `| head`: a command whose output nobody reads any more continues."""

import io
import os
import sys
from typing import Any


class _Pipe(io.FileIO):
    """A file whose reader may close: from then on, what is written is discarded."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.fileno())  # also for what C++ and other threads write
            os.close(devnull)
            return memoryview(data).nbytes


def may_close() -> None:
    """From now on, a closed pipe at stdout or stderr raises nothing."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


def _guarded(stream: Any) -> Any:
    """The stream over a `_Pipe`, if it is one of the operating system's."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # None, or a replacement such as a test's
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
