"""Which checkpoints a run has, and where. Without jax: `status` answers at once.

RUN/checkpoints/<step>/    or `checkpoint.directory` in place of RUN
"""

import json

from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath, in_bucket, located

COMMITTED = "commit_success.txt"
"""The object that Orbax writes last: a checkpoint in a bucket without it is incomplete."""


def arrays(run_dir: AnyPath) -> AnyPath:
    """The folder of a run's checkpoints/ and frozen/: `checkpoint.directory` of its config.json, or RUN itself. Raises
    InputError for a config.json that cannot be read."""
    path = run_dir / "config.json"
    if not path.exists():
        return run_dir
    try:
        directory = json.loads(path.read_text())["config"].get("checkpoint", {}).get("directory")
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Restore the file from a backup") from error
    return run_dir if directory is None else located(directory, "checkpoint.directory")


def steps(directory: AnyPath) -> list[int]:
    """Steps of the complete checkpoints in RUN/checkpoints, ascending. An interrupted save leaves another name, and in
    a bucket no commit marker."""
    names = [path.name for path in directory.glob("*") if path.name.isdecimal()]
    if in_bucket(directory):
        names = [name for name in names if (directory / name / COMMITTED).exists()]
    return sorted(map(int, names))


def latest_step(directory: AnyPath) -> int | None:
    """Step of the newest checkpoint; None if there is none."""
    return max(steps(directory), default=None)
