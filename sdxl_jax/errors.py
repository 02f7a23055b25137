"""Errors that are reported as one message without a traceback, and the exit code of each.

| error | exit code | cause |
|---|---|---|
| InputError | 2 | the user's input is at fault: trying again will not help |
| MachineError | 1 | the machine or the network failed: trying again may help |
| ProcessFailed | that process's | another process of the run failed; the message is its message |
| Interrupted | 143, 130 | stopped by SIGTERM or Ctrl-C with work left |

A message says what was given, what was expected and what to do. Our own mistakes are `assert`s and ordinary exceptions:
they keep their traceback, and have exit code 1.
"""

import dataclasses
import difflib
import errno
import math
import os
import re
import signal
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is at fault; the message names the remedy."""

    code = 2


class MachineError(RuntimeError):
    """A fault of the machine or the network: no room, a disk that does not answer. Trying again may help; the message
    names the remedy."""

    code = 1


class ProcessFailed(Exception):
    """Another process of the run failed; the message and the exit code are those of that process."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Interrupted(SystemExit):
    """SIGTERM or SIGINT stopped a command with work left. Ends the process with exit code 143 or 130 unless caught.

    signal_name: "SIGTERM" or "SIGINT", optionally followed by the process that received it.
    """

    def __init__(self, signal_name: str):
        super().__init__(128 + signal.Signals[signal_name.split()[0]])
        self.signal_name = signal_name


REPORTED = (InputError, MachineError, ProcessFailed)
"""Errors that the command line prints as one message."""

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EFBIG}
_MACHINE_ERRNOS = {
    *_STORAGE,
    *(errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.ENODEV, errno.ENXIO, errno.ENOLCK),
    *(errno.ENOTCONN, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EPIPE),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
}
_STORAGE_MESSAGES = tuple(map(os.strerror, _STORAGE))
"""In the messages of libraries that do not raise OSError: Orbax, ArrayRecord."""


def fault(error: BaseException) -> type[InputError] | type[MachineError]:
    """The error that a failed read or write is reported as: MachineError for a full or failing disk; InputError for a
    path that does not exist or is not writable, and for a damaged file."""
    if isinstance(error, TimeoutError):
        return MachineError
    number = getattr(error, "errno", None)
    if number is None:
        return MachineError if any(text in str(error) for text in _STORAGE_MESSAGES) else InputError
    return MachineError if number in _MACHINE_ERRNOS else InputError


def exit_code(error: BaseException) -> int:
    """The exit code of a process that an exception ends."""
    match error:
        case InputError() | MachineError() | ProcessFailed():
            return error.code
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case OSError():
            return fault(error).code
        case ModuleNotFoundError():
            return InputError.code
    return 1


def nearest_first(given: str, known: Iterable[str]) -> list[str]:
    """The known names, those most similar to `given` first. For messages about an unknown name."""
    return sorted(known, key=lambda name: -difflib.SequenceMatcher(None, given, name).ratio())


RENAMED = "renamed"
"""Key in the metadata of a dataclass field; the value is the field's old name."""


def old_names(kind: type) -> dict[str, str]:
    """The old names of a dataclass's renamed fields, each with the new name."""
    return {each.metadata[RENAMED]: each.name for each in dataclasses.fields(kind) if RENAMED in each.metadata}


def check_ranges(
    ranges: Iterable[tuple[str, int | float | None, int | float, int | float]],
    *,
    above_low: bool = False,
    below_high: bool = False,
) -> None:
    """Raises InputError for the first (name, value, low, high) whose value is outside low to high. None is inside, NaN
    is outside.

    above_low, below_high: the interval is open at that end.
    """
    for name, value, low, high in ranges:
        if value is None:
            continue
        above = value > low if above_low else value >= low
        below = value < high if below_high else value <= high
        if not (above and below):
            first, last = (f"{end:g}" if isinstance(end, float) else str(end) for end in (low, high))
            least = f"more than {first}" if above_low else first
            if high == math.inf:
                expected = least if above_low else f"{least} or more"
            elif above_low:
                expected = f"{least}, {'less than' if below_high else 'up to'} {last}"
            else:
                expected = f"{least} to {'below ' if below_high else ''}{last}"
            raise InputError(f"{name}={value} is out of range. Give {expected}")


def check_pattern(field: str, pattern: str) -> None:
    """Raises InputError for what is not a regular expression. field: that has it."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(
            f'{field} has "{pattern}", which is not a regular expression: {error}. Give patterns such as "^unet/"'
        ) from error


def out_of_memory(error: BaseException) -> str | None:
    """The line of jax's error that reports that the devices ran out of memory, the one about HBM if any; None for other
    errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    lines = text.splitlines()
    return next((line for line in lines if "hbm" in line.lower()), lines[0])
