"""Differences between two trees of JSON values: nested dicts, compared key by key."""

import itertools
from collections.abc import Iterator
from typing import Any


def differences(old: Any, new: Any, *, longest: int | None = None) -> list[str]:
    """`name: old -> new` for every value that differs, with keys joined by dots. A missing key counts as null.

    longest: characters shown of each value, from shortly before the first difference; None: all.
    """
    return [
        f"{name}: {' -> '.join(_shortened((str(before), str(after)), longest))}"
        for name, before, after in _different(old, new)
    ]


def _different(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _different(old.get(name), new.get(name), f"{prefix}{name}.")
    elif old != new and repr(old) != repr(new):  # NaN differs from itself, its repr does not
        yield prefix.rstrip("."), old, new


def _shortened(texts: tuple[str, str], longest: int | None) -> Iterator[str]:
    start = 0
    if longest is not None and max(map(len, texts)) > longest:  # leave out most of the common prefix
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
        start = max(0, len(list(equal)) - longest // 3)
    for text in texts:
        stop = len(text) if longest is None else start + longest
        yield "…" * (start > 0) + text[start:stop] + "…" * (stop < len(text))
