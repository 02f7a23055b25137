"""jax's persistent compilation cache: the user's own folder by default, and entries that kills and several processes do
not harm.

    program ── jax's key ── FOLDER/<key>-cache ── read, or compiled and written

jax's own cache of a folder (jax/_src/lru_cache.py) writes in place, never replaces an entry, and limits the folder's
size with a lock around every read and write. Here an entry appears as a whole or not at all, and a later write replaces
it, so that a damaged one is reported once. What was not used for longest is removed. The format of entries is jax's.

Programs for a CPU are compiled for its kind, so the user's folder has one subfolder per kind: homes may be shared.
Entries are code: the user's folder is refused if somebody else could have written to it. A folder that was asked for by
name is used as it is.
"""

import contextlib
import functools
import hashlib
import os
import platform
import stat
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import jax
from jax._src import compilation_cache as jax_cache  # a cache of one's own has no public name
from jax._src.compilation_cache_interface import CacheInterface

from sdxl_jax.files import atomic, buckets
from sdxl_jax.files.paths import AnyPath, cache_folder, full, in_bucket, located
from sdxl_jax.progress import tqdm

USER = "user"
"""Stands for the user's own folder."""
LIMIT_BYTES = 4 << 30
"""Size of the user's folder, unless jax_compilation_cache_max_size (JAX_COMPILATION_CACHE_MAX_SIZE) is set."""
_SUFFIX = "-cache"
_ABANDONED_SECONDS = 3600
"""After which a partial file is what a kill left, not what is being written."""
_CPU = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
"""What /proc/cpuinfo says of a processor's kind."""


def use(folder: str | PurePath | None) -> None:
    """Sets jax's persistent compilation cache: programs are read from the folder, local or in a bucket, or compiled and
    written there. Runs and processes may share it.

    `USER`: the user's own folder, unless jax has a folder already (JAX_COMPILATION_CACHE_DIR); if it cannot be used,
    that is said and nothing is cached. None: jax's own setting. Raises InputError for a bucket that may not be written
    to, MachineError for one that does not answer.
    """
    if folder is None or (folder == USER and jax.config.values["jax_compilation_cache_dir"] is not None):
        return
    path = None if folder == USER else located(folder, "the compilation cache")
    if path is not None and in_bucket(path):
        buckets.check_writable(path, "the compilation cache")
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # XLA's own are for local folders
    try:
        cache = _user_cache() if path is None else FolderCache(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        _say(f"No compilation cache: {error}. Every start compiles again; training.compilation_cache names a folder")
        return
    jax.config.update("jax_compilation_cache_dir", full(cache.folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax_cache.reset_cache()  # or jax keeps using the previous folder
    jax_cache._cache = cache


def current() -> "FolderCache | None":
    """The cache in use, if `use` has set it."""
    cache = jax_cache._cache
    return cache if isinstance(cache, FolderCache) else None


class FolderCache(CacheInterface):
    """Entries in a folder, which is made. With a limit on the bytes of all files in `whole`, those not used for longest
    are removed. An error of writing is told once; after it, nothing more is written. What cannot be read counts as
    missing, which is told once too: a program is compiled again rather than a run ended."""

    def __init__(self, folder: AnyPath, limit_bytes: int | None = None, whole: Path | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._limit, self._whole = folder, limit_bytes, whole
        self._path: Any = folder  # jax's name for it
        self._lock, self._size, self._failed = threading.Lock(), None, False
        self._asked = threading.local()

    def get(self, key: str) -> bytes | None:
        if (keys := getattr(self._asked, "keys", None)) is not None:
            keys.append(key)
        path = self._entry(key)
        try:
            value = path.read_bytes()
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the file system, or the bucket, raises
            self._say_unreadable(error)
            return None
        if not in_bucket(path):
            with contextlib.suppress(OSError):  # only the order of removal depends on it
                os.utime(path)
        return value

    def put(self, key: str, value: bytes) -> None:
        if self._failed:
            return
        try:
            if self._fits(len(value)):
                atomic.write_bytes(self._entry(key), value, tag=uuid.uuid4().hex)
        except Exception as error:  # whatever the file system raises
            self._failed = True
            _say(f"The compilation cache {full(self.folder)} cannot be written to: {error}. Nothing more is kept")

    def has(self, key: str) -> bool:
        """Whether there is an entry."""
        try:
            return self._entry(key).exists()
        except Exception as error:  # as above
            self._say_unreadable(error)
            return False

    def _say_unreadable(self, error: Exception) -> None:
        _say(f"The compilation cache {full(self.folder)} cannot be read: {error}. Its programs are compiled again")

    def remove(self, key: str) -> None:
        """Removes an entry, if it is there."""
        self._entry(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def asked(self) -> Iterator[list[str]]:
        """Inside, this thread's keys that are looked up are appended."""
        self._asked.keys = keys = []
        try:
            yield keys
        finally:
            self._asked.keys = None

    def _entry(self, key: str) -> AnyPath:
        return self.folder / f"{key}{_SUFFIX}"

    def _fits(self, size: int) -> bool:
        """Makes room for an entry; False if it alone is larger than the limit."""
        if self._limit is None or self._whole is None:
            return True
        if size > self._limit:
            return False
        with self._lock:
            if self._size is None or self._size + size > self._limit:
                self._size = _removed_until(self._whole, self._limit - size)
            self._size += size
        return True


def _removed_until(folder: Path, limit: int) -> int:
    """Removes the files not used for longest until `limit` bytes remain; returns the bytes. Another process may do so
    at the same time."""
    files = list[tuple[float, int, Path]]()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            being_written = path.suffix == atomic.PARTIAL and status.st_mtime > time.time() - _ABANDONED_SECONDS
            if stat.S_ISREG(status.st_mode) and not being_written:
                files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
    return total


def _user_cache() -> FolderCache:
    """The cache in the user's folder. Raises OSError if it cannot be made or is not the user's alone, RuntimeError
    without a home."""
    whole = cache_folder() / "compiled"
    whole.parent.mkdir(parents=True, exist_ok=True)
    whole.mkdir(mode=0o700, exist_ok=True)
    status = whole.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"others may write to {whole}, and its programs are run. Remove it")
    if status.st_mode & 0o077:
        whole.chmod(0o700)
    if not os.access(whole, os.W_OK):
        raise PermissionError(f"{whole} cannot be written to")
    limit = jax.config.values["jax_compilation_cache_max_size"]
    return FolderCache(whole / processor_kind(), LIMIT_BYTES if limit == -1 else limit, whole)


def processor_kind() -> str:
    """Equal on machines whose processors have the same model and features."""
    text = platform.processor()
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        text = "\n".join(line for line in first.splitlines() if line.partition(":")[0].strip() in _CPU)
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@functools.cache
def _say(text: str) -> None:
    """Says it once per process."""
    tqdm.write(f"  {text}", file=sys.stderr)
