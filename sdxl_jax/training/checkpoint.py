"""Checkpoints, with Orbax v1: `RUN/checkpoints/<step>/`, and `RUN/frozen/` for frozen parameters.

A checkpoint holds the state, whose `step` is also the position in the data and in the random numbers; its metadata
holds the configuration with a checksum, the versions, and a checksum of every array, which is compared on restore.
Saving is asynchronous: it continues in the background, and `Checkpoints.finish` waits for it. The states of
`Checkpoints`, which all processes change together (`agree`):

    idle ── save ──> writing ── finish, or the next save ──> idle        the checkpoint is complete
                        │
                        └── failed, on any process ──> reopened ── go_on ──> idle        training continues without it
                                                          └── otherwise, or it is the last one ──> MachineError
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Int
from orbax.checkpoint import v1 as ocp

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, full, in_bucket
from sdxl_jax.files.trees import differences
from sdxl_jax.progress import tqdm
from sdxl_jax.sharding import path_name
from sdxl_jax.training.checksums import checksums
from sdxl_jax.training.state import TrainState
from sdxl_jax.weights.formats import checkpoints, orbax, run
from sdxl_jax.weights.formats.checkpoints import COMMITTED, latest_step
from sdxl_jax.weights.formats.run import Damaged

_CHECKSUMS = "array_checksums"


class _WithoutAuxiliary(NamedTuple):
    """A state of which nothing else is trained, as it is stored: Orbax does not restore a tree with another field."""

    step: Int[jax.Array, ""]
    params: Params
    ema: Params | None
    optimiser: optax.OptState


def _stored(state: TrainState) -> TrainState | _WithoutAuxiliary:
    """The tree that a checkpoint of this state has."""
    return state if state.auxiliary is not None else _WithoutAuxiliary(*state[:4])


class Checkpoints:
    """Writes the checkpoints of one run. A context manager: leaving it waits for the one that is being written.

    Args:
        keep: number of newest checkpoints to keep.
        keep_every_hours: also keeps one per so many hours, for ever.
        keep_best: also keeps the one with the lowest value of this metric, or the highest (`best_is_highest`).
        go_on: whether training continues after a failed save, with a note, or ends with an error. A failed last save
            is always an error.
        agree: gathers a text from all processes, so that all treat the failure of one in the same way.
    """

    def __init__(
        self,
        directory: AnyPath,
        keep: int,
        *,
        keep_every_hours: float | None = None,
        keep_best: str | None = None,
        best_is_highest: bool = False,
        go_on: bool = False,
        agree: Callable[[str], Sequence[str]] = lambda text: [text],
    ):
        policies = ocp.training.preservation_policies
        preserved: list[Any] = [policies.LatestN(keep)]
        if keep_every_hours is not None:
            preserved.append(policies.EveryNSeconds(int(keep_every_hours * 3600)))
        if keep_best is not None:
            sign = -1 if best_is_highest else 1
            best = policies.BestN(
                get_metric_fn=lambda metrics: sign * metrics.get(keep_best, sign * math.inf),  # without it: the worst
                reverse=True,  # descending, and Orbax keeps the last: the lowest
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            preserved.append(best)
        self._directory, self._go_on, self._agree = directory, go_on, agree
        if in_bucket(directory):
            orbax.limit_retries()
        self._policy: Any = policies.AnyPreservationPolicy(preserved)  # Any: Orbax's protocol does not accept its class
        self._checkpointer = self._open()
        self._writing: int | None = None
        """The step whose checkpoint is being written; None: idle."""
        self._lost = ""
        """Why the last checkpoint was not written, if training continued without it."""

    def _open(self) -> ocp.training.Checkpointer:
        # The loop decides when to save; Orbax's default silently skips a save while another is running.
        always: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        return ocp.training.Checkpointer(
            full(self._directory),
            save_decision_policy=always,
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish(last=True)
            self._checkpointer.close()
            return
        try:
            self._checkpointer.close()
        except Exception as error:  # the error that ends the run is reported already, and matters more
            tqdm.write(f"  the checkpoint of step {self._writing} was not finished: {_reason(error)}")

    def save(
        self, step: int, state: TrainState, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Starts an asynchronous save; returns once the arrays are copied. Waits for an earlier save first. Returns
        whether writing has begun.

        metrics: what `keep_best` compares. Raises MachineError if this save or an earlier one failed, unless `go_on`;
        this state is saved first even if the earlier save failed, if possible.
        """
        try:
            self.finish()
        except MachineError as lost:
            self._begin(step, state, metadata, metrics)
            self.finish(last=True)
            raise MachineError(f"{lost}. The checkpoint of step {step}, after it, was written") from lost
        return self._begin(step, state, metadata, metrics)

    def _begin(
        self, step: int, state: TrainState, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> bool:
        self._writing = step
        custom_metadata = {
            **metadata,
            run.CONFIG_CHECKSUM: run.checksum_of(metadata.get(run.CONFIG)),
            _CHECKSUMS: _checksums(state),
        }
        failed = ""
        try:
            response = self._checkpointer.save_async(
                step,
                _stored(state),
                custom_metadata=custom_metadata,
                metrics=None if metrics is None else dict(metrics),
            )
            assert response is not None, f"Orbax skipped the checkpoint of step {step}"
        except Exception as error:  # OSError, or what Orbax and tensorstore wrap it in
            failed = _reason(error)
        self._agree_on_failure(failed)
        return self._writing is not None

    def finish(self, last: bool = False) -> None:
        """Waits until the checkpoint is complete. Raises MachineError if writing failed, unless `go_on`.

        last: no further checkpoint follows, so this one must have been written.
        """
        if self._writing is None:
            if last and self._lost:
                raise MachineError(self._lost)
            return
        failed = ""
        try:
            self._checkpointer.wait()
        except Exception as error:  # as above
            failed = _reason(error)
        self._agree_on_failure(failed, last)
        if self._writing is not None:  # it failed on no process
            self._lost, self._writing = "", None

    def _agree_on_failure(self, failed: str, last: bool = False) -> None:
        """After each part of a save: handles a failure, on this or on another process. failed: the reason; "": none."""
        reasons = self._agree(failed)
        if not any(reasons):
            return
        process = next(process for process, reason in enumerate(reasons) if reason)
        where = f" on process {process}" if len(reasons) > 1 else ""
        step, self._writing = self._writing, None
        message = f"The checkpoint of step {step} could not be written{where} ({reasons[process]})."
        self._reopen()
        previous = latest_step(self._directory)
        intact = "There is no earlier one" if previous is None else f"That of step {previous} is complete"
        self._lost = (
            f"{message} {intact}. Free disk space or check the permissions of {self._directory}, and run the same "
            "command again. With --checkpoint.on-failed-save go_on, training continues after such a failure"
        )
        if last or not self._go_on:
            raise MachineError(self._lost)
        tqdm.write(f"  {message} {intact}; training continues (checkpoint.on_failed_save=go_on)")

    def _reopen(self) -> None:
        """Orbax still counts the checkpoint that it began to write. A new Checkpointer removes its temporary files."""
        try:
            self._checkpointer.close()
        except Exception as error:  # the same failure again
            tqdm.write(f"  closing: {_reason(error)}")
        self._checkpointer = self._open()


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def step_to_start_from(directory: AnyPath, from_step: int | None) -> int | None:
    """The newest checkpoint's step, or `from_step`. Raises InputError if that checkpoint does not exist."""
    steps = checkpoints.steps(directory)
    if from_step is not None and from_step not in steps:
        raise InputError(
            f"There is no checkpoint of step {from_step} in {directory}. Give --from-step one of "
            f"{', '.join(map(str, steps))}"
            if steps
            else f"There is no checkpoint of step {from_step}: {directory} has none. Leave out --from-step"
        )
    return (steps[-1] if steps else None) if from_step is None else from_step


def set_aside_after(run_dir: AnyPath, step: int) -> list[AnyPath]:
    """Moves the checkpoints after a step to RUN/set_aside/, out of the run. Returns their new paths.

    run_dir: the run directory, or `checkpoint.directory`.
    """
    moved = []
    # The newest first: if it is interrupted, the next start does not resume from one that was to be moved.
    for newer in reversed(checkpoints.steps(run_dir / "checkpoints")):
        if newer > step:
            name, number = str(newer), 1
            while (run_dir / "set_aside" / name).exists():
                number += 1
                name = f"{newer}_{number}"
            if in_bucket(run_dir):
                source, place = run_dir / "checkpoints" / str(newer), run_dir / "set_aside" / name
                buckets.move_folder(source, place, COMMITTED, "the run directory")
            else:
                (run_dir / "set_aside").mkdir(exist_ok=True)
                shutil.move(run_dir / "checkpoints" / str(newer), run_dir / "set_aside" / name)
            moved.append(run_dir / "set_aside" / name)
    return moved


def restore(directory: AnyPath, step: int, abstract: TrainState) -> TrainState:
    """The state of a step, with the shapes, dtypes and shardings of `abstract`.

    Raises InputError if the checkpoint cannot be read, has other shapes or dtypes, or fails its checksums; nothing on
    disk is changed.
    """
    try:
        return TrainState(*_load(directory / str(step), _stored(abstract)))
    except Damaged as error:
        earlier = [other for other in checkpoints.steps(directory) if other < step]
        remedy = (
            f"resume from an earlier one: --from-step {earlier[-1]}"
            if earlier
            else "start again with another --run-dir"
        )
        raise InputError(f"{error}, or {remedy}") from error


def save_frozen(run_dir: AnyPath, params: Params) -> None:
    """Writes the frozen parameters, at the start of a run. Replaces those of a start that left no checkpoint."""
    if params:  # Orbax cannot save an empty tree; with everything trainable, there is nothing to save
        ocp.save(full(run_dir / "frozen"), params, overwrite=True, custom_metadata={_CHECKSUMS: _checksums(params)})


def restore_frozen(run_dir: AnyPath, abstract: Params) -> Params:
    """The parameters that `save_frozen` wrote, with the shardings of `abstract`. Raises InputError like `restore`."""
    return _load(run_dir / "frozen", abstract) if abstract else {}


def _load(path: AnyPath, abstract: Any) -> Any:
    stored, metadata = run.metadata(path)
    _compare(path, stored, abstract)
    try:
        tree = orbax.load(path, abstract)
    except InputError as error:
        raise Damaged(str(error)) from error
    if _CHECKSUMS in metadata:
        names = [path_name(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        expected, found = (
            [text[start : start + 8] for start in range(0, len(text), 8)]
            for text in (metadata[_CHECKSUMS], _checksums(tree))
        )
        wrong = [name for name, one, other in zip(names, expected, found, strict=True) if one != other]
        if wrong:
            raise run.damaged(path, f"{len(wrong)} arrays do not match their checksums, the first is {wrong[0]}")
    return tree


def _checksums(tree: Any) -> str:
    """Eight hexadecimal digits per array, in the tree's order."""
    return "".join(checksums(jax.tree.leaves(tree)))


def _shapes(tree: Any) -> dict[str, str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in flat if hasattr(leaf, "shape")}


def _compare(path: AnyPath, stored: Any, expected: Any) -> None:
    """Raises InputError for other shapes or dtypes, and names the first. Orbax casts dtypes silently, and reports other
    differences at length."""
    if lines := differences(_shapes(stored), _shapes(expected)):
        raise InputError(
            f"The checkpoint {path} does not fit this configuration: {len(lines)} arrays differ (stored -> expected), "
            f"the first is {lines[0]}. Use the configuration of the run, or another run directory"
        )
