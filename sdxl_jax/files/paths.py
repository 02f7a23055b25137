"""Paths in user input."""

import re
from pathlib import Path

from sdxl_jax.errors import InputError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")  # pathlib makes one slash of two; one letter is a drive


def local(path: str | Path, what: str) -> Path:
    """The path as a `Path`. Raises InputError for URLs (gs://…, https://…), which would be taken for a folder of that
    name. what: the path's role, for the message, e.g. "the model"."""
    if found := _SCHEME.match(str(path)):
        scheme, rest = found[1], str(path)[found.end() :]
        raise InputError(
            f"{what} is {scheme}://{rest}. Expected a path in this machine's file system: {scheme}:// is neither read "
            "nor written. Copy it to a local folder first, or mount it as one, and give that folder"
        )
    return Path(path)
