"""What a path is: a file or folder of this machine, or of a Google Cloud Storage bucket (gs://…, extra `gcs`).

Paths of buckets are `etils.epath.Path`, which has the methods of `pathlib.Path`. Reading goes through either; writing
that has to be safe goes through `files.atomic` and `files.buckets`. Every other scheme is refused.
"""

import importlib.util
import logging
import os
import re
import sys
from pathlib import Path, PurePath

from etils import epath
from typing_extensions import TypeIs

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
    _configure_clients()
    return epath.Path(f"gs://{rest}")


def local(path: str | PurePath, what: str) -> Path:
    """The path of user input, where only this machine's file system will do. Raises InputError for all URLs (gs://…,
    https://…), which would be taken for a folder of that name. what: as in `located`."""
    if _SCHEME.match(str(path)):
        raise _refused(path, what, "a path in this machine's file system")
    return Path(path)


def in_bucket(path: AnyPath) -> TypeIs[epath.Path]:
    """Whether a path that `located` returned is in a bucket."""
    return str(path).startswith(f"{_BUCKETS}://")


def absolute(path: AnyPath) -> AnyPath:
    """The absolute path. (`epath.Path.absolute` puts the working directory before gs://.)"""
    return path if in_bucket(path) else path.absolute()


def full(path: AnyPath) -> str:
    """`absolute` as text, for libraries that take local paths and gs://… alike."""
    return str(absolute(path))


def cache_folder() -> Path:
    """This machine's folder for what can be made again: $XDG_CACHE_HOME/sdxl_jax, by default ~/.cache/sdxl_jax, on a
    Mac ~/Library/Caches/sdxl_jax. Raises RuntimeError if there is no home."""
    usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / usual) / "sdxl_jax"


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


_SILENCE_SECONDS = 20
"""After which a client gives a request up, and repeats it."""


def _configure_clients() -> None:
    """Settings of gcsfs, which `epath` uses, and tensorstore. To be made before the first use of a bucket."""
    import aiohttp  # late: only for buckets
    import fsspec.config

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE_SECONDS, sock_read=_SILENCE_SECONDS)
    for protocol in ("gcs", "gs"):
        settings = fsspec.config.conf.setdefault(protocol, {})
        # gcsfs keeps listings of folders for ever, so that it does not see what other processes write.
        settings["use_listings_cache"] = False
        settings["session_kwargs"] = {"timeout": timeout}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises
    for name, value in (("CONNECT_TIMEOUT", _SILENCE_SECONDS), ("LOW_SPEED_TIME", _SILENCE_SECONDS)):
        os.environ.setdefault(f"TENSORSTORE_CURL_{name}_SECONDS", str(value))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "256")
