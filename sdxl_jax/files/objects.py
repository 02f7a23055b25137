"""Objects of a bucket as files: opened for reading in ranges, written from memory.

Not here: whole objects to and from local files (buckets).
"""

import errno
import io
import os
from typing import Any

from etils import epath

from sdxl_jax.files.buckets import found, object_at, reported, request_options

CHUNK_BYTES = 8 << 20
"""Of one request of a file that is read from front to back."""


def size(path: epath.Path, what: str) -> int | None:
    """An object's size in bytes; None if there is none. what: the path's role, for messages. Raises as
    `buckets.reported`."""
    blob = found(path, what)
    return None if blob is None else blob.size


def write_bytes(path: epath.Path, content: bytes, what: str) -> None:
    """Writes an object, replacing it. Raises as `buckets.reported`."""
    with reported(path, what):
        object_at(path).upload_from_string(content, **request_options())


def open_object(path: epath.Path, what: str, chunk_bytes: int = CHUNK_BYTES) -> io.BufferedReader:
    """An object as a file that is read in ranges of at least `chunk_bytes`, and may be sought in.

    Opening and reading raise FileNotFoundError where there is none, OSError where it was replaced in the meantime, and
    as `buckets.reported`.
    """
    blob = found(path, what)
    if blob is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return io.BufferedReader(_Object(blob, path, what), chunk_bytes)


class _Object(io.RawIOBase):
    """One generation of an object; each read is a request."""

    def __init__(self, blob: Any, path: epath.Path, what: str):
        self._blob, self._path, self._what, self._at = blob, path, what, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._blob.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(self._blob.size)

    def _read(self, count: int) -> bytes:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        end = min(self._at + count, self._blob.size)
        if self._at >= end:
            return b""
        with reported(self._path, self._what):
            try:
                data = self._blob.download_as_bytes(
                    start=self._at,
                    end=end - 1,
                    raw_download=True,
                    if_generation_match=self._blob.generation,
                    **request_options(),
                )
            except (NotFound, PreconditionFailed) as error:
                raise OSError(errno.ESTALE, "it was replaced or deleted while it was read", str(self._path)) from error
        self._at += len(data)
        return data
