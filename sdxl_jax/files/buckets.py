"""Objects in Google Cloud Storage buckets: checks with clear errors, a mirror of a local folder, a lock, moves.

A bucket has objects, not files: an object appears whole or not at all, cannot be appended to, and is renamed by
copying. Every request has a timeout; those that are safe to repeat are repeated, up to `DEADLINE_SECONDS`.

Credentials are Google's application default credentials: those of the machine's service account, or those of
`gcloud auth application-default login`.
"""

import contextlib
import fnmatch
import functools
import json
import mimetypes
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath

from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import atomic
from sdxl_jax.files.atomic import PARTIAL
from sdxl_jax.files.locks import Busy

TIMEOUT_SECONDS = 20.0
"""Of one request."""
DEADLINE_SECONDS = 60.0
"""Of one operation with its repetitions, after which the bucket counts as not answering."""
HEARTBEAT_SECONDS = 10.0
"""Between two signs of life of a lock's owner."""
PATIENCE_SECONDS = 3 * HEARTBEAT_SECONDS
"""Without a sign of life, after which a lock is taken over."""


@contextlib.contextmanager
def reported(path: epath.Path | str, what: str) -> Iterator[None]:
    """Turns what Google's client raises in the block into InputError (no bucket, no permission, no credentials) or
    MachineError (no answer). FileNotFoundError for a missing object. what: the path's role, for messages."""
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from requests import RequestException

    bucket = str(path).removeprefix("gs://").split("/")[0]
    try:
        yield
    except api.NotFound as error:
        if f"/b/{bucket}/o/" in str(error) and "bucket does not exist" not in str(error):
            raise InputError(
                f"{what}: there is no {path} any more. Check whether another program deletes it"
            ) from error
        raise InputError(
            f"{what} is {path}, but there is no bucket {bucket}, or these credentials may not see it. Check the name, "
            f"or make it with gcloud storage buckets create gs://{bucket}"
        ) from error
    except (api.Forbidden, api.Unauthorized) as error:
        raise InputError(
            f"{what} is {path}, which these credentials may not use ({_line(error)}). Give their account the roles "
            f"roles/storage.objectUser and roles/storage.legacyBucketReader on gs://{bucket}, or use other credentials"
        ) from error
    except (auth.DefaultCredentialsError, auth.RefreshError) as error:
        raise InputError(
            f"{what} is {path}, but there are no valid credentials for it ({_line(error)}). Run gcloud auth "
            "application-default login, or start on a machine with a service account that may use the bucket"
        ) from error
    except (
        *(api.RetryError, api.ServerError, api.TooManyRequests, auth.TransportError, RequestException),
        *(ClientError, HttpError, TimeoutError),  # of gcsfs, which epath uses
    ) as error:
        raise MachineError(
            f"{what} is {path}, and the bucket did not answer within {DEADLINE_SECONDS:g} s ({_line(error)}). Nothing "
            "that was there is lost. Check the network, and run the same command again"
        ) from error


def check(path: epath.Path, what: str) -> None:
    """Raises InputError for a bucket that does not exist or may not be read, MachineError for one that does not
    answer."""
    with reported(path, what):
        bucket, prefix = split(path)
        list(_client().list_blobs(bucket, prefix=prefix, max_results=1, **request_options()))


@contextlib.contextmanager
def answering(path: epath.Path, what: str) -> Iterator[None]:
    """For a block that uses a bucket through other clients: `check`, and again after an error. Some of them take a
    bucket that does not answer for an empty one, others for a damaged file. Raises MachineError then."""
    check(path, what)
    try:
        with reported(path, what):
            yield
    except MachineError:
        raise
    except Exception:
        check(path, what)
        raise


def check_writable(path: epath.Path, what: str) -> None:
    """As `check`; also writes and deletes a small object in the folder, and asks of what kind the bucket is, as Orbax
    does."""
    probe = object_at(path / f".probe-{uuid.uuid4().hex}")
    with reported(path, what):
        _client().get_bucket(split(path)[0], **request_options())
        probe.upload_from_string(b"can this be written?", **request_options())
        probe.delete(**request_options())


def read_bytes(path: epath.Path, what: str) -> bytes | None:
    """An object's content; None if there is none."""
    from google.api_core.exceptions import NotFound

    with reported(path, what):
        try:
            return object_at(path).download_as_bytes(**request_options())
        except NotFound:
            check(path, what)
            return None


def version(path: epath.Path, what: str) -> tuple[int, int] | None:
    """(generation, size in bytes) of an object; None if there is none. Whoever replaces an object changes its
    generation."""
    blob = found(path, what)
    return None if blob is None else (blob.generation, blob.size)


def files(path: epath.Path, what: str) -> dict[str, int]:
    """Objects below a folder, by their path from there, with their sizes in bytes."""
    bucket, name = split(path)
    prefix = name and f"{name}/"
    with reported(path, what):
        blobs = _client().list_blobs(bucket, prefix=prefix, **request_options())
        return {blob.name.removeprefix(prefix): blob.size for blob in blobs if not blob.name.endswith("/")}


def download(path: epath.Path, destination: Path, what: str, wrote: Callable[[int], object] = lambda _: None) -> None:
    """Copies an object to a local file, whole or not at all. wrote: called with numbers of bytes as they arrive."""
    from tqdm.utils import CallbackIOWrapper

    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(destination) as partial, reported(path, what), partial.open("wb") as file:
        object_at(path).download_to_file(CallbackIOWrapper(wrote, file, "write"), **request_options())


def upload(source: Path, path: epath.Path, what: str, wrote: Callable[[int], object] = lambda _: None) -> None:
    """Copies a local file to an object, replacing it. wrote: called with numbers of bytes as they are sent."""
    from tqdm.utils import CallbackIOWrapper

    kind = mimetypes.guess_type(source.name)[0]  # by which browsers show images
    with reported(path, what), source.open("rb") as file:
        counted = CallbackIOWrapper(wrote, file, "read")
        object_at(path).upload_from_file(counted, size=source.stat().st_size, content_type=kind, **request_options())


def delete(path: epath.Path, what: str) -> None:
    """Deletes an object, if there is one."""
    from google.api_core.exceptions import NotFound

    with reported(path, what), contextlib.suppress(NotFound):
        object_at(path).delete(**request_options())


def move_folder(source: epath.Path, destination: epath.Path, last: str, what: str) -> None:
    """Moves a folder's objects, by copies inside the bucket. last: the one that marks the folder as complete, which is
    deleted first and written last, so that at no moment a part of the folder has it."""
    names = files(source, what)
    content = read_bytes(source / last, what) if names.pop(last, None) is not None else None
    delete(source / last, what)
    with reported(source, what):
        for name in names:
            old, new = object_at(source / name), object_at(destination / name)
            token = new.rewrite(old, **request_options())[0]
            while token is not None:
                token = new.rewrite(old, token=token, **request_options())[0]
        if content is not None:
            object_at(destination / last).upload_from_string(content, **request_options())
    for name in names:
        delete(source / name, what)


class Mirror:
    """Copies a local folder's files to a folder in a bucket, each time those that are new or have changed.

    Of files that grow, by their names *.jsonl, only the new end travels: it is uploaded by itself and composed with the
    object that is there. All others are uploaded whole, so they should be small or be written once.
    """

    def __init__(self, folder: Path, target: epath.Path, what: str):
        self._folder, self._target, self._what = folder, target, what
        self._sent: dict[str, tuple[int, int, int]] = {}
        """(size, mtime in ns, inode) of what the bucket has, by path from the folder."""
        self.failed = False
        """Whether the last `push` failed."""

    def pull(self, *patterns: str) -> None:
        """Copies the objects that lie directly in the folder, and whose names match, to the local folder."""
        for name in files(self._target, self._what):
            if "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                download(self._target / name, self._folder / name, self._what)
                self._sent[name] = _state(self._folder / name)

    def push(self) -> None:
        """Raises InputError and MachineError, as `reported`; the local files stay as they are."""
        self.failed = True
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if not path.is_file() or name.endswith(PARTIAL):
                continue
            now, before = _state(path), self._sent.get(name)
            if now == before:
                continue
            # A file that was rewritten is another one, with another inode.
            start, _, inode = before or (0, 0, 0)
            grown = name.endswith(".jsonl") and inode == now[2] and now[0] > start
            if not (grown and self._extend(path, name, start, now[0])):
                upload(path, self._target / name, self._what)
            self._sent[name] = now
        self.failed = False

    def _extend(self, path: Path, name: str, start: int, stop: int) -> bool:
        """Appends the file's bytes from start to stop to its object. False if the object is not the one that was sent:
        the file has to be uploaded whole."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with path.open("rb") as file:
            file.seek(start)
            new = file.read(stop - start)
        blob, part = object_at(self._target / name), object_at(self._target / (name + PARTIAL))
        with reported(self._target / name, self._what):
            try:
                blob.reload(**request_options())
                if blob.size != start:
                    return False
                part.upload_from_string(new, **request_options())
                blob.compose([blob, part], if_generation_match=blob.generation, **request_options())
                part.delete(**request_options())
            except (NotFound, PreconditionFailed):
                return False
        return True


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class Lock:
    """An advisory lock: an object that names its owner and is written anew every few seconds while the owner lives.

    A context manager; `acquire` first. Another process that finds the object waits whether it is renewed: if so, the
    lock is held; if not, its owner is gone, and the lock is taken over. No clocks are compared. An owner that was cut
    off and finds itself replaced says so in `lost`.
    """

    def __init__(self, path: epath.Path, what: str):
        self._path, self._what = path, what
        self._owner = {
            "owner": uuid.uuid4().hex,
            "machine": _machine(),
            "process": os.getpid(),
            "description": f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M}",
        }
        self._generation = 0
        self._over = threading.Event()
        self.lost: str | None = None
        """Who holds the lock instead; None while it is ours."""

    def acquire(self, wait: Callable[[float], object] = time.sleep) -> str | None:
        """Waits for up to `PATIENCE_SECONDS`. Returns the description of an owner that was replaced; None if the lock
        was free. Raises Busy where another process holds it."""
        while not self._write(0):
            held = read_lock(self._path, self._what)
            if held is None:
                continue
            owner, generation = held
            deadline = time.monotonic() + (0 if _is_gone(owner) else PATIENCE_SECONDS)
            while held is not None and held[1] == generation and time.monotonic() < deadline:
                wait(1.0)
                held = read_lock(self._path, self._what)
            if held is not None and held[1] != generation:
                raise Busy(held[0]["description"])
            if held is not None and self._write(generation):
                return owner["description"]
        return None

    def __enter__(self) -> "Lock":
        threading.Thread(target=self._beat, daemon=True, name="renews the lock").start()
        return self

    def __exit__(self, *_: object) -> None:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        self._over.set()
        if self.lost is not None:
            return
        # A bucket that does not answer any more keeps the object, which is taken over in time.
        with contextlib.suppress(NotFound, PreconditionFailed, InputError, MachineError), reported(self._path, ""):
            object_at(self._path).delete(if_generation_match=self._generation, **request_options())

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS) and self.lost is None:
            with contextlib.suppress(InputError, MachineError):  # it is tried again
                self.renew()

    def renew(self) -> None:
        """Writes the object anew, or finds that it is another's."""
        if self._write(self._generation):
            return
        held = read_lock(self._path, self._what)
        if held is not None and held[0]["owner"] == self._owner["owner"]:
            self._generation = held[1]  # our own write, whose answer was lost
        else:
            self.lost = "another process" if held is None else held[0]["description"]

    def _write(self, generation: int) -> bool:
        """Writes the object if it has this generation, 0: if there is none. Returns whether it was written."""
        from google.api_core.exceptions import PreconditionFailed

        blob = object_at(self._path)
        with reported(self._path, self._what):
            try:
                blob.upload_from_string(
                    json.dumps(self._owner),
                    if_generation_match=generation,
                    **request_options(),
                )
            except PreconditionFailed:
                return False
        self._generation = blob.generation
        return True


def read_lock(path: epath.Path, what: str) -> tuple[dict[str, Any], int] | None:
    """(the owner, the object's generation) of a lock; None if nobody holds it."""
    from google.api_core.exceptions import NotFound

    blob = object_at(path)
    with reported(path, what):
        try:
            content = blob.download_as_bytes(**request_options())
        except NotFound:
            return None
    owner = json.loads(content)
    return {"description": "another process", "owner": "", **owner}, blob.generation


def is_held(path: epath.Path, what: str) -> bool:
    """Whether a lock was renewed lately, by the bucket's clock and ours; both are taken to be right to a minute."""
    blob = found(path, what)
    return blob is not None and (datetime.now(UTC) - blob.updated).total_seconds() < 60 + PATIENCE_SECONDS


def _machine() -> str:
    """The same text for all processes that see the same process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether a lock's owner was a process of this machine that has ended."""
    if owner.get("machine") != _machine():
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


@functools.cache
def _client() -> Any:
    from google.cloud import storage  # late: only for buckets

    # Buckets are named without their project.
    return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT"))


def request_options() -> dict[str, Any]:
    """How long Google's client waits for an answer, and how it repeats the request."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return {"timeout": TIMEOUT_SECONDS, "retry": DEFAULT_RETRY.with_timeout(DEADLINE_SECONDS)}


def split(path: epath.Path) -> tuple[str, str]:
    """(bucket, name in it, "" for the bucket itself)."""
    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    return bucket, name


def object_at(path: epath.Path) -> Any:
    """An object as Google's client has it, a `Blob`."""
    bucket, name = split(path)
    return _client().bucket(bucket).blob(name)


def found(path: epath.Path, what: str) -> Any:
    """As `object_at`, with its size, generation and time; None if there is none. Raises as `reported`, also for a
    bucket that does not exist."""
    from google.api_core.exceptions import NotFound

    if not split(path)[1]:
        return None  # the bucket itself
    blob = object_at(path)
    with reported(path, what):
        try:
            blob.reload(**request_options())
        except NotFound:
            check(path, what)  # raises where there is no bucket
            return None
    return blob


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
