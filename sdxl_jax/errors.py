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


def check_ranges(ranges: Iterable[tuple[str, int | float | None, int | float, int | float]]) -> None:
    """Raises InputError for the first (name, value, lowest, highest) whose value is outside, or NaN. None is not looked
    at."""
    for name, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            expected = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise InputError(f"{name}={value} is out of range. Give {expected}")
