"""Atomic writes: a file is written beside its place and renamed, so that it is there whole, as it was, or not at all.

Paths are `pathlib`'s, or `etils.epath`'s for a bucket (gs://…).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

PARTIAL = ".partial"
"""How the name of a file ends that is not complete."""

AnyPath = Any
"""A `pathlib.Path`, or an `epath.Path`."""


def partial_path(path: AnyPath, tag: str = "") -> AnyPath:
    """Where a file is written before it is renamed. tag: what tells apart those who write it at the same time."""
    return path.with_name(f"{path.name}.{tag}{PARTIAL}" if tag else f"{path.name}{PARTIAL}")


@contextlib.contextmanager
def replacing(path: AnyPath, *, tag: str = "", durable: bool = False) -> Iterator[AnyPath]:
    """Yields a path beside `path`, to be written to. It is renamed at the end; after an error, `path` is as it was.

    tag: as in `partial_path`; without it, one process at a time may write. A killed process leaves its partial file,
    which the next one with that tag overwrites. durable: what was written survives a power cut; not in a bucket.
    """
    partial = partial_path(path, tag)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error of before matters more
            partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_bytes(path: AnyPath, content: bytes, *, tag: str = "", durable: bool = False) -> None:
    """Writes a file whole or not at all, as `replacing`."""
    with replacing(path, tag=tag, durable=durable) as partial:
        partial.write_bytes(content)


def write_text(path: AnyPath, content: str, *, tag: str = "", durable: bool = False) -> None:
    """Writes a file in UTF-8 whole or not at all, as `replacing`."""
    write_bytes(path, content.encode(), tag=tag, durable=durable)


def sync(path: AnyPath) -> None:
    """Waits until a file, or a folder's list of names, is on the disk: what counts as finished survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
