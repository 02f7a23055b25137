"""What a path is: a file or folder of this machine, or of a Google Cloud Storage bucket (gs://…, extra `gcs`).

Paths of buckets are `etils.epath.Path`, which has the methods of `pathlib.Path`. Reading goes through either; writing
that has to be safe goes through `files.atomic` and `files.buckets`. Every other scheme is refused.
"""

import importlib.util
import re
from pathlib import Path, PurePath
from typing import TypeGuard

from etils import epath

from sdxl_jax.errors import InputError

AnyPath = Path | epath.Path

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # pathlib makes one slash of two; one letter is a drive
_BUCKETS = "gs"
_PACKAGES = {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"}


def located(path: str | PurePath, what: str) -> AnyPath:
    """The path of user input, local or in a bucket. what: its role, for messages, e.g. "the model".

    Raises InputError for any other scheme, and for a bucket where the packages of the extra `gcs` are missing. Does not
    look whether the path exists: `buckets.check` does.
    """
    if not (found := _SCHEME.match(str(path))):
        return Path(path)
    scheme, rest = found[1], str(path)[found.end() :].rstrip("/")
    if scheme != _BUCKETS:
        raise _refused(path, what, "a path in this machine's file system, or gs://BUCKET/PATH")
    if not rest:
        raise InputError(f"{what} is {scheme}:// without a bucket. Give gs://BUCKET/PATH")
    if missing := [name for module, name in _PACKAGES.items() if not _is_installed(module)]:
        raise InputError(
            f"{what} is gs://{rest}, but the package{'s' * (len(missing) > 1)} {' and '.join(missing)} for buckets "
            f"{'are' if len(missing) > 1 else 'is'} not installed. Install them with pip install 'sdxl_jax[gcs]'"
        )
    _use_no_stale_listings()
    return epath.Path(f"gs://{rest}")


def local(path: str | PurePath, what: str) -> Path:
    """The path of user input, where only this machine's file system will do. Raises InputError for all URLs (gs://…,
    https://…), which would be taken for a folder of that name. what: as in `located`."""
    if _SCHEME.match(str(path)):
        raise _refused(path, what, "a path in this machine's file system")
    return Path(path)


def in_bucket(path: AnyPath | PurePath) -> TypeGuard[epath.Path]:
    """Whether a path that `located` returned is in a bucket."""
    return str(path).startswith(f"{_BUCKETS}://")


def full(path: AnyPath) -> str:
    """The absolute path as text, for libraries that take local paths and gs://… alike. (`epath.Path.absolute` puts the
    working directory before gs://.)"""
    return str(path) if in_bucket(path) else str(path.absolute())


def _refused(path: str | PurePath, what: str, expected: str) -> InputError:
    found = _SCHEME.match(str(path))
    assert found is not None
    scheme, rest = found[1], str(path)[found.end() :]
    return InputError(
        f"{what} is {scheme}://{rest}. Expected {expected}: {scheme}:// is neither read nor written here. Copy it to a "
        "local folder first, or mount it as one, and give that folder"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _use_no_stale_listings() -> None:
    """gcsfs keeps listings of folders for ever, so that it does not see what other processes write. To be set before
    the first use of a bucket."""
    import fsspec.config  # late: only for buckets

    for protocol in ("gcs", "gs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
