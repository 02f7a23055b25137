"""RUN, the folder of one run: whose it is, who writes in it, what its config.json says.

Everything here is done before any work, so that a refusal costs nothing and changes nothing.
"""

import contextlib
import json
import os
import platform
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from sdxl_jax import config as configuration
from sdxl_jax.config import RunConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import atomic, locks
from sdxl_jax.files.paths import local
from sdxl_jax.jsontree import from_json, read_saved, to_json
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.base import Objective

_LIBRARIES = ("sdxl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FINGERPRINT = "data_fingerprint"
_FIRST_OBJECTIVE = "denoising"
"""What runs learn that do not say it."""


def check_run(
    config: RunConfig, run_dir: Path, dataset: BucketedDataset | None = None, allow_changes: Collection[str] = ()
) -> list[str]:
    """Raises InputError if the directory holds another run, or something else; with `dataset`, also if that is no
    longer the data that the run was started with.

    allow_changes: fields, groups of them, or data_fingerprint, that may differ all the same. Returns the differences
    that there are, as `configuration.differences` words them.
    """
    path = local(run_dir, "the run directory") / "config.json"
    if not path.exists():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.glob("checkpoints/[0-9]*"))):
            raise InputError(f"{run_dir} is no run directory: it has no config.json. Choose another --run-dir")
        return []
    saved, new = read_saved(path), to_json(config)
    learnt, learns = saved.get("objective", _FIRST_OBJECTIVE), objective_of(config).name
    if learnt != learns:
        raise InputError(
            f"{run_dir} belongs to a run of {learnt}, this configuration is one of {learns}. Choose another --run-dir"
        )
    old = _completed(saved["config"], type(config))
    blocking = configuration.blocking_differences(old, new)
    if changed := [line for line in blocking if not configuration.is_within(line, allow_changes)]:
        shown = "\n  ".join(changed[:8])
        names = ",".join(line.split(":", 1)[0] for line in changed[:8])
        raise InputError(
            f"{run_dir} belongs to a run with another configuration ({len(changed)} differences, old -> new):\n  "
            f"{shown}\nUse the run's own configuration to go on with it, or another --run-dir. To go on with these "
            f"changes, which alter what is learnt: --allow-changes {names}"
        )
    if (old["data"].get("cache") is None) != (config.data.cache is None):
        raise InputError(
            f"{run_dir} was started {'without' if config.data.cache else 'with'} a cache (data.cache), whose rounding "
            "to bfloat16 is part of what is learnt. Go on in the same way, or choose another --run-dir"
        )
    changed = configuration.differences(old, new)
    if dataset is not None and saved.get(_FINGERPRINT) != dataset.fingerprint:
        if not configuration.is_within(_FINGERPRINT, allow_changes):
            raise InputError(
                f"{run_dir} was trained on other data: names, captions or sizes of the images in {dataset.where} "
                "have changed since, or the weights of data.sources. Bring them back, or choose another --run-dir. To "
                f"go on with what is there now, in another order: --allow-changes {_FINGERPRINT}"
            )
        changed.append(f"{_FINGERPRINT}: {saved.get(_FINGERPRINT)} -> {dataset.fingerprint}")
    return changed


def _completed(saved: dict[str, Any], kind: type[RunConfig]) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that are newer than it; as it is, where it cannot be read."""
    try:
        return to_json(from_json(saved, kind))
    except InputError:
        return saved


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """The directory, made if need be, for this process alone; the system lets go of it however the process ends.

    Raises MachineError where another process has it, InputError where it may not be written. Leaves nothing where
    nothing was.
    What the lock is worth on network file systems: files.locks.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    with contextlib.ExitStack() as lock:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            _try_writing(run_dir / "checkpoints")
            lock.enter_context(locks.locked_file(run_dir / "lock"))
        except locks.Busy as error:
            raise MachineError(
                f"{run_dir} is in use by another process ({str(error) or 'which has just begun'}). Wait for it to end, "
                "stop it, or choose another --run-dir"
            ) from error
        except OSError as error:
            raise fault(error)(
                f"Nothing can be written in {run_dir} ({error}). Choose another --run-dir, or see to its permissions "
                "and its room"
            ) from error
        try:
            yield
        finally:
            lock.close()
            with contextlib.suppress(OSError):  # not empty: there is a run
                (run_dir / "checkpoints").rmdir()
                for folder in made:
                    folder.rmdir()


def _try_writing(folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"can this be written?")
    probe.unlink()


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}}


def described(objective: Objective[Any]) -> dict[str, Any]:
    """What a checkpoint says of itself: with what it was made, and which model is in it."""
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
    """config.json. changed: differences from what it says so far, which become part of its history."""
    path = run_dir / "config.json"
    history: list[Any] = read_saved(path).get("history", []) if path.exists() else []
    if changed:
        history.append({"after_step": step, "changed": changed})
    content = {
        **described(objective),
        _FINGERPRINT: dataset.fingerprint,
        "commit": commit(),
        "history": history,
    }
    atomic.write_text(path, json.dumps(content, indent=1))


def commit() -> str | None:
    """The commit of the source tree, None for an installed package."""
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
