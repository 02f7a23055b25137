"""The run directory: where its files are, its lock, its config.json, and the checks that it belongs to the same run.

Everything here happens before any work, so that a refusal costs nothing and changes nothing.
"""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from etils import epath

from sdxl_jax.config import RunConfig, blocking_differences, is_within
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import atomic, buckets, locks
from sdxl_jax.files.paths import AnyPath, in_bucket, located
from sdxl_jax.files.trees import differences
from sdxl_jax.jsontree import from_json, read_saved, to_json
from sdxl_jax.model import ModelConfig
from sdxl_jax.progress import tqdm
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.base import Measured, Objective
from sdxl_jax.training.status import LOCK
from sdxl_jax.weights.formats.checkpoints import steps

_LIBRARIES = ("sdxl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FINGERPRINT, _MEASURED = "data_fingerprint", "measured"
_WHAT = "the run directory"
_FIRST_OBJECTIVE = "denoising"
"""The objective of runs whose config.json does not name one."""


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """RUN, which may be in a bucket, as may `checkpoint.directory`.

    Orbax reads and writes arrays where they belong. Small files are appended to and renamed, which buckets cannot do:
    those of a RUN in a bucket are written to a temporary folder of this machine, and copied to the bucket before every
    checkpoint, after validation images, and at the end (`push`).
    """

    path: AnyPath
    """RUN, as it was given."""
    files: Path
    """The local folder of config.json, metrics.jsonl, samples/ and the like: RUN itself, unless it is in a bucket."""
    arrays: AnyPath
    """The folder of checkpoints/ and frozen/: RUN itself, or `checkpoint.directory`."""
    mirror: buckets.Mirror | None = None

    @classmethod
    def here(cls, path: Path) -> "RunDirectory":
        """One of this machine."""
        return cls(path, path, path)

    @property
    def checkpoints(self) -> AnyPath:
        return self.arrays / "checkpoints"

    def push(self) -> None:
        """Copies what is new of the small files to the bucket, if RUN is in one. Raises InputError and MachineError."""
        if self.mirror is not None:
            self.mirror.push()

    @contextlib.contextmanager
    def pushed_at_end(self) -> Iterator[None]:
        """`push` when the block is left, however it is left; a failure does not replace the block's own error."""
        try:
            yield
        except BaseException:
            try:
                self.push()
            except (InputError, MachineError) as error:
                tqdm.write(f"  the last files were not copied to {self.path}: {error}")
            raise
        self.push()

    def lock_owner(self) -> str | None:
        """What identifies the process that holds the lock; None if it is free."""
        if in_bucket(self.path):
            held = buckets.read_lock(self.path / LOCK, _WHAT)
            return None if held is None else held[0]["owner"]
        path = self.files / LOCK
        return path.read_text() if path.exists() else None


@contextlib.contextmanager
def opened(run_dir: str | PurePath, checkpoint_directory: str | None = None) -> Iterator[RunDirectory]:
    """The run directory, which need not exist yet; of one in a bucket, the small files that a resume reads are copied
    to this machine. checkpoint_directory: `checkpoint.directory`.

    Raises InputError for a bucket that does not exist or may not be used, MachineError for one that does not answer.
    """
    path = located(run_dir, _WHAT)
    arrays = path if checkpoint_directory is None else located(checkpoint_directory, "checkpoint.directory")
    if arrays is not path and in_bucket(arrays):
        buckets.check(arrays, "checkpoint.directory")
    if not in_bucket(path):
        yield dataclasses.replace(RunDirectory.here(path), arrays=arrays)
        return
    buckets.check(path, _WHAT)
    temporary = Path(tempfile.mkdtemp(prefix="sdxl_jax-"))
    folder = temporary / path.name
    folder.mkdir()
    mirror = buckets.Mirror(folder, path, _WHAT)
    try:
        mirror.pull("*.json", "*.jsonl", "wandb_id")
        yield RunDirectory(path, folder, arrays, mirror)
    finally:
        if mirror.failed:
            tqdm.write(f"  files of {path} that could not be copied there are kept in {folder}")
        else:
            shutil.rmtree(temporary, ignore_errors=True)


def check_run(
    config: RunConfig,
    run_dir: str | PurePath,
    dataset: BucketedDataset | None = None,
    allow_changes: Collection[str] = (),
) -> list[str]:
    """`check`, for a run directory that is not opened yet."""
    with opened(run_dir, config.checkpoint.directory) as directory:
        return check(config, directory, dataset, allow_changes)


def check(
    config: RunConfig,
    directory: RunDirectory,
    dataset: BucketedDataset | None = None,
    allow_changes: Collection[str] = (),
) -> list[str]:
    """Raises InputError if the directory holds another run, or something else; with `dataset`, also if the data has
    changed since the run was started.

    allow_changes: fields, groups of fields, or data_fingerprint, that may differ. Returns all differences, in the
    format of `files.trees.differences`.
    """
    run_dir, path = directory.path, directory.files / "config.json"
    if not path.exists():
        if run_dir.exists() and (not run_dir.is_dir() or steps(run_dir / "checkpoints")):
            raise InputError(f"{run_dir} is not a run directory: it has no config.json. Choose another --run-dir")
        if steps(directory.checkpoints):
            raise InputError(
                f"checkpoint.directory={directory.arrays} has the checkpoints of another run than {run_dir}, which is "
                "new. Give each run a checkpoint.directory of its own"
            )
        return []
    saved, new = read_saved(path), to_json(config)
    _check_arrays(directory, saved["config"])
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


def _check_arrays(directory: RunDirectory, saved: dict[str, Any]) -> None:
    """Raises InputError if the run's checkpoints are elsewhere: it would start from the beginning."""
    before = saved.get("checkpoint", {}).get("directory")
    old = directory.path if before is None else located(before, "checkpoint.directory")
    if old != directory.arrays and steps(old / "checkpoints") and not steps(directory.checkpoints):
        raise InputError(
            f"The checkpoints of {directory.path} are in {old}, and checkpoint.directory={directory.arrays} has none. "
            "Copy checkpoints/ and frozen/ there, or give the directory that has them"
        )


def _with_defaults(saved: dict[str, Any], kind: type[RunConfig]) -> dict[str, Any]:
    """A saved configuration with the defaults of fields that are newer than it; unchanged if it cannot be read."""
    try:
        return to_json(from_json(saved, kind))
    except InputError:
        return saved


@contextlib.contextmanager
def locked(
    directory: RunDirectory, wait: Callable[[Callable[[], str | None]], str | None] = lambda work: work()
) -> Iterator[Callable[[], None]]:
    """Locks the directory, created if necessary, for this process alone. Yields a function that raises MachineError if
    the lock was lost since, which only happens to one in a bucket.

    The system releases a lock of this machine however the process ends; one in a bucket is taken over once its owner
    has shown no sign of life for a while, which `wait` waits for. Raises MachineError if another
    process holds the lock, InputError if the directory cannot be written to. Removes the directories that it has
    created if nothing was written into them. Limits on network file systems: files.locks.
    """
    if directory.arrays is not directory.path:
        _check_arrays_writable(directory.arrays)
    if in_bucket(directory.path):
        with _locked_in_bucket(directory.path, wait) as check_lock:
            yield check_lock
    else:
        with _locked_here(directory.files):
            yield lambda: None


@contextlib.contextmanager
def _locked_here(run_dir: Path) -> Iterator[None]:
    created = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    with contextlib.ExitStack() as lock:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "checkpoints").mkdir(exist_ok=True)
            _try_writing(run_dir / "checkpoints")
            lock.enter_context(locks.locked_file(run_dir / LOCK))
        except locks.Busy as error:
            raise _in_use(run_dir, str(error) or "which has just started") from error
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        try:
            yield
        finally:
            lock.close()
            with contextlib.suppress(OSError):  # not empty: there is a run
                (run_dir / "checkpoints").rmdir()
                for folder in created:
                    folder.rmdir()


@contextlib.contextmanager
def _locked_in_bucket(
    run_dir: epath.Path, wait: Callable[[Callable[[], str | None]], str | None]
) -> Iterator[Callable[[], None]]:
    buckets.check_writable(run_dir, _WHAT)
    lock = buckets.Lock(run_dir / LOCK, _WHAT)
    try:
        replaced = wait(lock.acquire)
    except locks.Busy as error:
        raise _in_use(run_dir, str(error)) from error
    if replaced is not None:
        tqdm.write(f"  {run_dir} was locked by {replaced}, which shows no sign of life: this process takes over")

    def check_lock() -> None:
        if lock.lost is not None:
            raise MachineError(
                f"{run_dir} was taken over by {lock.lost}, because this process could not reach the bucket for "
                f"{buckets.PATIENCE_SECONDS:g} s. Nothing more is written by this one"
            )

    with lock:
        yield check_lock


def _in_use(run_dir: AnyPath, owner: str) -> MachineError:
    return MachineError(
        f"{run_dir} is in use by another process ({owner}). Wait for it to end, stop it, or choose another --run-dir"
    )


def _unwritable(folder: AnyPath, error: OSError) -> InputError | MachineError:
    return fault(error)(
        f"Nothing can be written in {folder} ({error}). Check its permissions and the free disk space, or choose "
        "another --run-dir"
    )


def _check_arrays_writable(folder: AnyPath) -> None:
    if in_bucket(folder):
        buckets.check_writable(folder, "checkpoint.directory")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try_writing(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _try_writing(folder: AnyPath) -> None:
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
    objective: Objective[Any], directory: RunDirectory, dataset: BucketedDataset, step: int, changed: list[str]
) -> None:
    """Writes config.json, also into `checkpoint.directory`, which can be opened as a run so. changed: differences from
    the present one, which are appended to its history."""
    path = directory.files / "config.json"
    saved = read_saved(path) if path.exists() else {}
    history: list[Any] = saved.get("history", [])
    if changed:
        history.append({"after_step": step, "changed": changed})
    content = {
        **metadata_of(objective),
        _FINGERPRINT: dataset.fingerprint,
        "commit": commit(),
        "history": history,
    }
    if saved.get(_MEASURED, {}).get("step") == step:
        content |= {name: saved[name] for name in ("model", _MEASURED)}
    _write(directory, content)


def _write(directory: RunDirectory, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    atomic.write_text(directory.files / "config.json", text)
    if directory.arrays is not directory.path:
        (directory.arrays / "config.json").write_text(text)


def write_measured(directory: RunDirectory, step: int, measured: Measured) -> None:
    """Writes what was measured on the trained model into config.json, whose model is exported from then on."""
    content = read_saved(directory.files / "config.json")
    content |= {"model": to_json(measured.model), _MEASURED: {"step": step, **measured.values}}
    _write(directory, content)


def measured_model(directory: RunDirectory, step: int) -> ModelConfig | None:
    """The model's configuration with what was measured on it after this step; None: nothing was."""
    saved = read_saved(directory.files / "config.json")
    return from_json(saved["model"], ModelConfig) if saved.get(_MEASURED, {}).get("step") == step else None


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
