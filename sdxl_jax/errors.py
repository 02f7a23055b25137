"""The one exception for input that is at fault.

The command line prints its message, without a traceback, and exits with code 2. A message says what was given, what
was expected and what to do. Our own mistakes are `assert`s and ordinary exceptions: they keep their traceback.
"""

import difflib
import math
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used; the message names the remedy."""


def nearest_first(given: str, known: Iterable[str]) -> list[str]:
    """The known names, those most like `given` first. For messages about an unknown name."""
    return sorted(known, key=lambda name: -difflib.SequenceMatcher(None, given, name).ratio())


def check_ranges(
    ranges: Iterable[tuple[str, int | float | None, int | float, int | float]],
    *,
    above_low: bool = False,
    below_high: bool = False,
) -> None:
    """Raises InputError for the first (name, value, low, high) whose value is not within low to high; None is.

    above_low, below_high: the end itself is outside too. NaN is never within.
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


def out_of_memory(error: BaseException) -> str | None:
    """The line in which jax says that the devices' memory does not suffice, that about HBM if any; None of other
    errors."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "out of memory" not in text.lower():
        return None
    lines = text.splitlines()
    return next((line for line in lines if "hbm" in line.lower()), lines[0])
