"""A nested dict of arrays in one `.safetensors` file, and back. Paths are joined by slashes."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.errors import InputError


def save(path: Path, params: Params, metadata: dict) -> None:
    """Writes the arrays with their dtypes and `metadata` (anything JSON can hold)."""
    save_file(
        {name: np.asarray(value) for name, value in flatten(params).items()},
        path,
        metadata={"metadata": json.dumps(metadata)},
    )


def load(path: Path) -> tuple[Params, dict]:
    """(arrays, metadata). Raises InputError for a file that is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = json.loads((file.metadata() or {}).get("metadata", "{}"))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is no readable safetensors file ({error}). Check the path, or fetch it anew"
        ) from error
    return unflatten(flat), metadata
