"""The run directory: its lock, its config.json, and the checks that it belongs to the same run.

Everything here happens before any work, so that a refusal costs nothing and changes nothing.
"""

import contextlib
import json
import os
import platform
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from sdxl_jax.config import RunConfig, blocking_differences, is_within
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import atomic, locks
from sdxl_jax.files.paths import local
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json, read_saved, to_json
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.base import Objective

_LIBRARIES = ("sdxl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FINGERPRINT = "data_fingerprint"
_FIRST_OBJECTIVE = "denoising"
"""The objective of runs whose config.json does not name one."""


def check_run(
    config: RunConfig, run_dir: Path, dataset: BucketedDataset | None = None, allow_changes: Collection[str] = ()
) -> list[str]:
    """Raises InputError if the directory holds another run, or something else; with `dataset`, also if the data has
    changed since the run was started.

    allow_changes: fields, groups of fields, or data_fingerprint, that may differ. Returns all differences, in the
    format of `files.trees.differences`.
    """
    path = local(run_dir, "the run directory") / "config.json"
    if not path.exists():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.glob("checkpoints/[0-9]*"))):
            raise InputError(f"{run_dir} is not a run directory: it has no config.json. Choose another --run-dir")
        return []
    saved, new = read_saved(path), to_json(config)
    old_objective, new_objective = saved.get("objective", _FIRST_OBJECTIVE), objective_of(config).name
    if old_objective != new_objective:
        raise InputError(
            f"{run_dir} belongs to a run of {old_objective}, this configuration is one of {new_objective}. Choose "
            "another --run-dir"
        )
    old = _with_defaults(saved["config"], type(config))
    blocking = blocking_differences(old, new)
    if changed := [line for line in blocking if not is_within(line, allow_changes)]:
        shown = "\n  ".join(changed[:8])
        names = ",".join(line.split(":", 1)[0] for line in changed[:8])
        raise InputError(
            f"{run_dir} belongs to a run with a different configuration ({len(changed)} differences, old -> new):\n  "
            f"{shown}\nResume with the run's own configuration, or choose another --run-dir. To resume with these "
            f"changes, which alter what is learnt: --allow-changes {names}"
        )
    if (old["data"].get("cache") is None) != (config.data.cache is None):
        raise InputError(
            f"{run_dir} was started {'without' if config.data.cache else 'with'} a cache (data.cache), whose rounding "
            f"to bfloat16 affects what is learnt. Resume {'without' if config.data.cache else 'with'} data.cache, or "
            "choose another --run-dir"
        )
    changed = differences(old, new)
    if dataset is not None and saved.get(_FINGERPRINT) != dataset.fingerprint:
        if not is_within(_FINGERPRINT, allow_changes):
            raise InputError(
                f"{run_dir} was trained on other data: names, captions or sizes of the images in {dataset.where} "
                "have changed since, or the weights of data.sources. Restore them, or choose another --run-dir. To "
                f"resume with the present data, in another order: --allow-changes {_FINGERPRINT}"
            )
        changed.append(f"{_FINGERPRINT}: {saved.get(_FINGERPRINT)} -> {dataset.fingerprint}")
    return changed


def _with_defaults(saved: dict[str, Any], kind: type[RunConfig]) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that are newer than it; unchanged if it cannot be read."""
    try:
        return to_json(from_json(saved, kind))
    except InputError:
        return saved


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Locks the directory, created if necessary, for this process alone; the system releases the lock however the
    process ends.

    Raises MachineError if another process holds the lock, InputError if the directory cannot be written to. Removes the
    directories that it has created if nothing was written into them. Limits on network file systems: files.locks.
    """
    created = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    with contextlib.ExitStack() as lock:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            _try_writing(run_dir / "checkpoints")
            lock.enter_context(locks.locked_file(run_dir / "lock"))
        except locks.Busy as error:
            raise MachineError(
                f"{run_dir} is in use by another process ({str(error) or 'which has just started'}). Wait for it to "
                "end, stop it, or choose another --run-dir"
            ) from error
        except OSError as error:
            raise fault(error)(
                f"Nothing can be written in {run_dir} ({error}). Check its permissions and the free disk space, or "
                "choose another --run-dir"
            ) from error
        try:
            yield
        finally:
            lock.close()
            with contextlib.suppress(OSError):  # not empty: there is a run
                (run_dir / "checkpoints").rmdir()
                for folder in created:
                    folder.rmdir()


def _try_writing(folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"can this be written?")
    probe.unlink()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def metadata_of(objective: Objective[Any]) -> dict[str, Any]:
    """The metadata of a checkpoint: configuration, model and versions."""
    return {
        "config": to_json(objective.config),
        "objective": objective.name,
        "model": to_json(objective.model_config),
        "parts": list(objective.parts),
        "versions": versions(),
    }


def write_config(
    objective: Objective[Any], run_dir: Path, dataset: BucketedDataset, step: int, changed: list[str]
) -> None:
    """Writes config.json. changed: differences from the present one, which are appended to its history."""
    path = run_dir / "config.json"
    history: list[Any] = read_saved(path).get("history", []) if path.exists() else []
    if changed:
        history.append({"after_step": step, "changed": changed})
    content = {
        **metadata_of(objective),
        _FINGERPRINT: dataset.fingerprint,
        "commit": commit(),
        "history": history,
    }
    atomic.write_text(path, json.dumps(content, indent=1))


def commit() -> str | None:
    """The commit of the source tree; None for an installed package."""
    head = Path(__file__).parents[2] / ".git" / "HEAD"
    if not head.is_file():
        return None
    content = head.read_text().strip()
    if not content.startswith("ref: "):
        return content
    name = content.removeprefix("ref: ")
    loose, packed = head.parent / name, head.parent / "packed-refs"
    if loose.is_file():
        return loose.read_text().strip()
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)
