"""Atomic writes: a file is written under another name in the same folder and renamed, so that at any moment the path
holds the complete new file or the old state.

Paths are `pathlib.Path`, or `etils.epath.Path` for a bucket (gs://…).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

PARTIAL = ".partial"
"""Suffix of an incomplete file or folder."""

AnyPath = Any
"""A `pathlib.Path`, or an `epath.Path`."""


def partial_path(path: AnyPath, tag: str = "") -> AnyPath:
    """The temporary path of an atomic write. tag: distinguishes processes that write the file at the same time."""
    return path.with_name(f"{path.name}.{tag}{PARTIAL}" if tag else f"{path.name}{PARTIAL}")


@contextlib.contextmanager
def replacing(path: AnyPath, *, tag: str = "", durable: bool = False) -> Iterator[AnyPath]:
    """Atomic write: yields a temporary path to write to, which is renamed to `path` at the end. After an error `path`
    is unchanged.

    tag: as in `partial_path`; without it, one process at a time may write. A killed process leaves its partial file,
    which the next one with that tag overwrites. durable: synced, so that the file survives a power cut; not for
    buckets.
    """
    partial = partial_path(path, tag)
    try:
        yield partial
        if durable:
            sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is raised, not one of the clean-up
            partial.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_bytes(path: AnyPath, content: bytes, *, tag: str = "", durable: bool = False) -> None:
    """Atomic write of bytes, as `replacing`."""
    with replacing(path, tag=tag, durable=durable) as partial:
        partial.write_bytes(content)


def write_text(path: AnyPath, content: str, *, tag: str = "", durable: bool = False) -> None:
    """Atomic write of text in UTF-8, as `replacing`."""
    write_bytes(path, content.encode(), tag=tag, durable=durable)


def sync(path: AnyPath) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk (fsync) and so survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
