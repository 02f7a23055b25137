"""Output that nobody reads any more, as after `| head`, ends no work."""

import io
import os
import sys
from typing import Any


class _Pipe(io.FileIO):
    """A file whose reader may go: what is written from then on goes nowhere."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # for what C++ and other threads write, too
            os.close(nowhere)
            return memoryview(data).nbytes


def may_close() -> None:
    """From now on, a closed pipe at stdout or stderr raises nothing."""
    sys.stdout, sys.stderr = _guarded(sys.stdout), _guarded(sys.stderr)


def _guarded(stream: Any) -> Any:
    """The same stream, if it is one of the system's, over a `_Pipe`."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream  # there is none, or somebody has put another in its place
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
