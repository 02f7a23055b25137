"""Checkpoints, with Orbax v1: `RUN/checkpoints/<step>/`, and `RUN/frozen/` for what does not train.

A checkpoint holds the state, whose `step` is also the position in the data and in the random numbers; its metadata
holds the configuration with a checksum, the versions, and a checksum of every array, which is compared when it is read.
Saving goes on in the background; `Checkpoints.finish` waits for it.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files.trees import differences
from sdxl_jax.sharding import path_name
from sdxl_jax.training.checksums import checksums
from sdxl_jax.training.state import TrainState
from sdxl_jax.weights.formats import orbax, run
from sdxl_jax.weights.formats.run import Damaged, latest_step

_CHECKSUMS = "array_checksums"


class Checkpoints:
    """Writes the checkpoints of one run. A context manager: leaving it finishes what is being written.

    Args:
        keep: newest checkpoints that are kept.
        keep_every_hours: keeps one of so many hours besides, for ever.
        keep_best: keeps the one with the lowest of this metric besides.
        go_on: whether a failed save is told and the run goes on, or the run ends with it. The last one ends it always.
        agree: what all processes say, given what this one says, so that they take one process's failure alike.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        *,
        keep_every_hours: float | None = None,
        keep_best: str | None = None,
        go_on: bool = False,
        agree: Callable[[str], Sequence[str]] = lambda text: [text],
    ):
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every_hours is not None:
            kept.append(policies.EveryNSeconds(int(keep_every_hours * 3600)))
        if keep_best is not None:
            best = policies.BestN(
                get_metric_fn=lambda metrics: metrics.get(keep_best, math.inf),  # one of another metric is the worst
                reverse=True,  # in falling order, and the last one stays: the lowest
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        self._directory, self._go_on, self._agree = directory, go_on, agree
        self._policy = policies.AnyPreservationPolicy(kept)
        self._checkpointer = self._open()
        self._writing: int | None = None
        self._lost = ""
        """Why the last checkpoint was not written, if the run went on after it."""

    def _open(self) -> ocp.training.Checkpointer:
        return ocp.training.Checkpointer(
            str(self._directory.absolute()),
            # The loop decides when; Orbax's default skips a save while another is running, and says nothing.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore
            preservation_policy=self._policy,  # pyright: ignore
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
        except Exception as error:  # what ends the run is told already, and matters more
            tqdm.write(f"  the checkpoint of step {self._writing} was not finished: {_reason(error)}")

    def save(
        self, step: int, state: TrainState, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Starts writing; returns when the arrays are copied. Waits for an earlier save first. Whether it has begun.

        metrics: what `keep_best` goes by. Raises MachineError for a save that failed, or an earlier one, unless the run
        goes on; what has been learnt since the earlier one is saved before, if it can be.
        """
        try:
            self.finish()
        except MachineError as lost:
            self._begin(step, state, metadata, metrics)
            self.finish(last=True)
            raise MachineError(f"{lost}. That of step {step}, after it, was written") from lost
        return self._begin(step, state, metadata, metrics)

    def _begin(
        self, step: int, state: TrainState, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> bool:
        self._writing = step
        described = {
            **metadata,
            run.CONFIG_CHECKSUM: run.checksum_of(metadata.get(run.CONFIG)),
            _CHECKSUMS: _checksums(state),
        }
        failed = ""
        try:
            response = self._checkpointer.save_async(
                step, state, custom_metadata=described, metrics=None if metrics is None else dict(metrics)
            )
            assert response is not None, f"Orbax skipped the checkpoint of step {step}"
        except Exception as error:  # OSError, and what Orbax and tensorstore make of it
            failed = _reason(error)
        self._settle(failed)
        return self._writing is not None

    def finish(self, last: bool = False) -> None:
        """Waits until all is written. Raises MachineError where that failed, unless the run goes on.

        last: no other comes after it, and it must have been written.
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
        self._settle(failed, last)
        if self._writing is not None:  # on no process has it failed
            self._lost, self._writing = "", None

    def _settle(self, failed: str, last: bool = False) -> None:
        """After a part of a save: has it failed, here or on another process?"""
        reasons = self._agree(failed)
        if not any(reasons):
            return
        process = next(process for process, reason in enumerate(reasons) if reason)
        where = f" on process {process}" if len(reasons) > 1 else ""
        step, self._writing = self._writing, None
        message = f"The checkpoint of step {step} could not be written{where} ({reasons[process]})."
        self._reopen()
        before = latest_step(self._directory)
        kept = "There is none before it" if before is None else f"That of step {before} is whole"
        self._lost = (
            f"{message} {kept}. Make room or see to the folder, and run the same command again; "
            "checkpoint.on_failed_save=go_on trains on after such a failure"
        )
        if last or not self._go_on:
            raise MachineError(self._lost)
        tqdm.write(f"  {message} {kept}; training goes on (checkpoint.on_failed_save)")

    def _reopen(self) -> None:
        """Orbax counts on what it began to write. A new one removes that."""
        try:
            self._checkpointer.close()
        except Exception as error:  # the failure of before, once more
            tqdm.write(f"  closing: {_reason(error)}")
        self._checkpointer = self._open()


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def step_to_start_from(directory: Path, from_step: int | None) -> int | None:
    """The newest checkpoint's step, or the one that is asked for. Raises InputError where that is not there."""
    steps = run.steps(directory)
    if from_step is not None and from_step not in steps:
        raise InputError(
            f"There is no checkpoint of step {from_step} in {directory}. Those that there are: "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    return (steps[-1] if steps else None) if from_step is None else from_step


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Moves the checkpoints after a step to RUN/set_aside/, out of the run; where they are now."""
    moved = []
    # The newest first: cut off in between, the next start does not take one of those that were to go.
    for newer in reversed(run.steps(run_dir / "checkpoints")):
        if newer > step:
            place = run_dir / "set_aside" / str(newer)
            number = 1
            while place.exists():
                number += 1
                place = place.with_name(f"{newer}_{number}")
            place.parent.mkdir(exist_ok=True)
            shutil.move(run_dir / "checkpoints" / str(newer), place)
            moved.append(place)
    return moved


def restore(directory: Path, step: int, abstract: TrainState) -> TrainState:
    """The state of a step, placed as `abstract` says (shapes, dtypes, shardings).

    Raises InputError if the checkpoint cannot be read, is of another shape, or is not what was written; nothing is
    changed.
    """
    try:
        return _load(directory / str(step), abstract)
    except Damaged as error:
        before = [other for other in run.steps(directory) if other < step]
        offer = f"go on from the one before it: --from-step {before[-1]}" if before else "start again in another folder"
        raise InputError(f"{error}, or {offer}") from error


def save_frozen(run_dir: Path, params: Params) -> None:
    """Writes the frozen parameters, at the start of a run. A start that left no checkpoint may have left others."""
    if params:  # Orbax saves no empty tree; where everything trains, there is nothing to keep
        path = str((run_dir / "frozen").absolute())
        ocp.save(path, params, overwrite=True, custom_metadata={_CHECKSUMS: _checksums(params)})


def restore_frozen(run_dir: Path, abstract: Params) -> Params:
    """What `save_frozen` wrote, placed as `abstract` says. Raises InputError as `restore`."""
    return _load(run_dir / "frozen", abstract) if abstract else {}


def _load(path: Path, abstract: Any) -> Any:
    stored, described = run.metadata(path)
    _compare(path, stored, abstract)
    try:
        tree = orbax.load(path, abstract)
    except InputError as error:
        raise Damaged(str(error)) from error
    if _CHECKSUMS in described:
        names = [path_name(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
        expected, found = (
            [text[start : start + 8] for start in range(0, len(text), 8)]
            for text in (described[_CHECKSUMS], _checksums(tree))
        )
        wrong = [name for name, one, other in zip(names, expected, found, strict=True) if one != other]
        if wrong:
            raise run.damaged(path, f"{len(wrong)} arrays are not what was written, the first is {wrong[0]}")
    return tree


def _checksums(tree: Any) -> str:
    """Eight hexadecimal digits an array, in the tree's order."""
    return "".join(checksums(jax.tree.leaves(tree)))


def _shapes(tree: Any) -> dict[str, str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in flat if hasattr(leaf, "shape")}


def _compare(path: Path, stored: Any, expected: Any) -> None:
    """Orbax casts dtypes without a word and reports other differences at length; this names the first."""
    if lines := differences(_shapes(stored), _shapes(expected)):
        raise InputError(
            f"The checkpoint {path} does not fit this configuration: {len(lines)} arrays differ (stored -> expected), "
            f"the first is {lines[0]}. Use the configuration of the run, or another run directory"
        )
