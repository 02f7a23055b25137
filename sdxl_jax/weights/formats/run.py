"""A run directory, as far as its weights are opened: its model, and what the metadata of a checkpoint says.

    RUN/config.json            the configuration
    RUN/checkpoints/<step>/    parameters, moving average and optimiser
    RUN/frozen/                parameters that are not trained

Written by `training.checkpoint`; reading it needs no module of training.
"""

import hashlib
import json
from typing import Any, NamedTuple

from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.jsontree import from_json, read_saved
from sdxl_jax.model import ModelConfig
from sdxl_jax.weights.formats import orbax

CONFIG, CONFIG_CHECKSUM = "config", "config_sha256"
"""Keys of a checkpoint's metadata for the configuration, and its checksum."""


class Damaged(InputError):
    """A checkpoint that is incomplete or broken."""


def damaged(path: AnyPath, reason: str) -> Damaged:
    return Damaged(
        f"The checkpoint {path} is incomplete or damaged ({reason}). Nothing was changed. Restore its files from a "
        "backup, or give the checkpoint of another step"
    )


class Trained(NamedTuple):
    """The model that a run trains, by its config.json."""

    config: ModelConfig
    parts: list[str] | None
    """Those of the model that the run has; None: all."""
    steps: int
    """The step at which the run is finished."""
    commit: str | None
    """Of the source tree that trains it; None for an installed package, and in old runs."""


def trained(run_dir: AnyPath) -> Trained:
    """The model that RUN/config.json describes. Raises InputError if it cannot be read."""
    saved = read_saved(run_dir / "config.json")
    # Runs from before objectives have the model in their configuration alone.
    model = saved.get("model", saved["config"].get("model"))
    if not isinstance(model, dict):
        raise InputError(
            f"{run_dir / 'config.json'} does not describe the model that was trained. Restore the file from a backup, "
            "or give another run"
        )
    steps = saved["config"].get("training", {}).get("steps", 0)
    return Trained(from_json(model, ModelConfig), saved.get("parts"), steps, saved.get("commit"))


def metadata(path: AnyPath) -> tuple[Any, dict[str, Any]]:
    """(abstract tree, custom metadata) of a checkpoint. Raises InputError if it cannot be read, or has changed since it
    was written."""
    try:
        stored, described = orbax.metadata(path)
    except InputError as error:
        raise Damaged(str(error)) from error
    if CONFIG_CHECKSUM in described and described[CONFIG_CHECKSUM] != checksum_of(described.get(CONFIG)):
        raise damaged(path, "the configuration in its metadata is not the one that was written")
    return stored, described


def checksum_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
