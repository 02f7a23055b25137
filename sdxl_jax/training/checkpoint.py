"""Checkpoints, with Orbax v1: `RUN/checkpoints/<step>/`, and `RUN/frozen/` for what does not train.

A checkpoint holds the state, whose `step` is also the position in the data and in the random numbers; its metadata
holds the configuration and the versions. Saving goes on in the background; `close` waits for it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from orbax.checkpoint import v1 as ocp

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.interop import orbax
from sdxl_jax.sharding import path_name
from sdxl_jax.training.state import TrainState


class Checkpoints:
    """Writes the checkpoints of one run. A context manager: leaving it finishes what is being written."""

    def __init__(self, directory: Path, keep: int):
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            # The loop decides when; Orbax's default skips a save while another is running, and says nothing.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),  # pyright: ignore
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Starts writing; returns when the arrays are copied. Waits for an earlier save first."""
        self._checkpointer.wait()
        response = self._checkpointer.save_async(step, state, custom_metadata=dict(metadata))
        assert response is not None, f"Orbax skipped the checkpoint of step {step}"


def latest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint, None if there is none. What a cut-off save leaves has another name."""
    return max((int(path.name) for path in directory.glob("*") if path.name.isdecimal()), default=None)


def restore(directory: Path, step: int, abstract: TrainState) -> TrainState:
    """The state of a step, placed as `abstract` says (shapes, dtypes, shardings).

    Raises InputError if the checkpoint cannot be read or is of another shape; nothing is changed.
    """
    return _load(directory / str(step), abstract)


def save_frozen(run_dir: Path, params: Params) -> None:
    """Writes the frozen parameters, at the start of a run. A start that left no checkpoint may have left others."""
    if params:  # Orbax saves no empty tree; where everything trains, there is nothing to keep
        ocp.save(str((run_dir / "frozen").absolute()), params, overwrite=True)


def restore_frozen(run_dir: Path, abstract: Params) -> Params:
    """What `save_frozen` wrote, placed as `abstract` says. Raises InputError as `restore`."""
    return _load(run_dir / "frozen", abstract) if abstract else {}


def _load(path: Path, abstract: Any) -> Any:
    _compare(path, orbax.metadata(path)[0], abstract)
    return orbax.load(path, abstract)


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def _leaves(tree: Any) -> dict[str, _Leaf]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): _Leaf(tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flat if hasattr(leaf, "shape")}


def _compare(path: Path, stored: Any, expected: Any) -> None:
    """Orbax casts dtypes without a word and reports other differences at length; this names the first."""
    have, want = _leaves(stored), _leaves(expected)
    wrong = [name for name in want if name not in have or have[name] != want[name]] + [n for n in have if n not in want]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"The checkpoint {path} does not fit this configuration: {len(wrong)} arrays differ, the first is {name}: "
            f"stored {have.get(name)}, expected {want.get(name)}. Use the configuration of the run, or another run "
            "directory"
        )
