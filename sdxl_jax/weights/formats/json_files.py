"""JSON files that hold an object: other people's configurations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.files.text import read_text

Fields = Mapping[str, Any]
"""A parsed config.json."""


def read(path: AnyPath, optional: bool = False) -> dict[str, Any]:
    """The object in a file; optional: {} where there is none. Raises InputError if it is missing or unreadable."""
    if not path.is_file():
        if optional:
            return {}
        raise InputError(f"{path} is missing. Download the model's whole directory, with its .json and .txt files")
    content = read_text(path, remedy="Download it again")
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}). Download it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds {json.dumps(fields)[:50]}, not a JSON object {{…}}. Download it again")
    return fields


def write(path: Path, fields: Fields | str) -> None:
    """Writes an object as JSON, or a text as it is; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = fields if isinstance(fields, str) else json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    path.write_text(content, encoding="utf-8")
