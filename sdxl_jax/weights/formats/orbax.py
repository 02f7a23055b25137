"""Orbax checkpoints larger than memory: read and written in groups of parameters.

A converted model is one checkpoint of the parameter tree, {"unet": …, "vae": …, "text_encoder": …}: Orbax's own
`load(path)` gives the nested dict. Its custom metadata says under "sdxl_jax" what the model is. Tensors of other
layouts that have no place in the tree are next to it, under "carried".

Checkpoints in a bucket are read from it directly. Not here: writing them there, which Orbax can only do with the whole
model in memory.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from sdxl_jax.arrays import unflatten
from sdxl_jax.errors import InputError, MachineError, fault
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, full, in_bucket
from sdxl_jax.weights.formats.checkpoints import COMMITTED
from sdxl_jax.weights.lazy import Carried, Index, Leaf

_GROUP_BYTES = 2**29
"""Parameters are read and written in groups up to this size: one by one, opening the checkpoint would dominate."""


def is_checkpoint(path: AnyPath) -> bool:
    """Whether a directory is an Orbax checkpoint; in a bucket, a complete one."""
    return (path / "_CHECKPOINT_METADATA").is_file() and (not in_bucket(path) or (path / COMMITTED).is_file())


def metadata(path: AnyPath) -> tuple[Any, dict[str, Any]]:
    """(abstract tree, custom metadata) of a checkpoint. Raises InputError if it cannot be read."""
    from orbax.checkpoint import v1 as ocp  # late: importing it takes seconds

    with _reading(path):
        found = ocp.metadata(full(path))
    if found.metadata is None:  # Orbax's only sign of some kinds of damage
        raise _unreadable(path, ValueError("its arrays cannot be listed"))
    custom = found.custom_metadata
    return found.metadata, custom if isinstance(custom, dict) else {}


def load(path: AnyPath, abstract: Any) -> Any:
    """Restores a checkpoint's tree with the shardings of `abstract`; leaves that are `ocp.PLACEHOLDER` are not read.
    Raises InputError."""
    from orbax.checkpoint import v1 as ocp  # late: importing it takes seconds

    with _reading(path):
        return ocp.load(full(path), abstract)


@contextlib.contextmanager
def _reading(path: AnyPath) -> Iterator[None]:
    """Turns what Orbax raises in the block into InputError, or MachineError where a disk or a bucket fails."""
    with buckets.answering(path, "the checkpoint") if in_bucket(path) else contextlib.nullcontext():
        if in_bucket(path):
            limit_retries()
        try:
            yield
        except Exception as error:  # Orbax raises many types for a damaged directory
            raise _unreadable(path, error) from error


def limit_retries() -> None:
    """tensorstore repeats a request to a bucket 32 times, for 15 minutes; from now on for one. Orbax has no option."""
    from orbax.checkpoint._src.serialization import tensorstore_utils

    limited: dict[str, Any] = {"gcs_request_retries": {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}}
    tensorstore_utils._BASE_TS_CONTEXT.update(limited)
    tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT.update(limited)


def _unreadable(path: AnyPath, error: Exception) -> InputError | MachineError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if (kind := fault(error)) is MachineError:
        return kind(f"The checkpoint {path} cannot be read now ({reason}). Nothing was changed. Try again")
    return kind(
        f"The checkpoint {path} is incomplete or damaged ({reason}). Nothing was changed. Restore its files from a "
        "backup, or give another checkpoint"
    )


@dataclass(frozen=True)
class _Abstract:
    """Shape and dtype that make Orbax restore a numpy array."""

    shape: tuple[int, ...]
    dtype: np.dtype


class _Reader:
    """Reads a checkpoint's arrays in groups, in the order of the tree, and keeps the last group."""

    def __init__(self, path: AnyPath, tree: Mapping[str, Any]):
        self._path = path
        self._abstract = {name: _Abstract(tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _arrays(tree)}
        self._tree = tree
        self._group_of: dict[str, int] = {}
        group, size = 0, 0
        for name, leaf in self._abstract.items():
            size += int(np.prod(leaf.shape, dtype=np.int64)) * leaf.dtype.itemsize
            if size > _GROUP_BYTES:
                group, size = group + 1, 0
            self._group_of[name] = group
        self._group = functools.lru_cache(maxsize=1)(self._load)

    def _load(self, group: int) -> dict[str, Shaped[np.ndarray, "..."]]:
        from orbax.checkpoint import v1 as ocp  # late: importing it takes seconds

        def abstract(tree: Any, prefix: str) -> Any:
            """The tree with placeholders for all arrays outside the group."""
            if isinstance(tree, Mapping):
                return {key: abstract(value, f"{prefix}{key}/") for key, value in tree.items()}
            if isinstance(tree, list | tuple):
                return [abstract(value, f"{prefix}{number}/") for number, value in enumerate(tree)]
            name = prefix.removesuffix("/")
            return self._abstract[name] if self._group_of.get(name) == group else ocp.PLACEHOLDER

        loaded = _arrays(load(self._path, abstract(self._tree, "")))
        return {name: value for name, value in loaded if self._group_of[name] == group}

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        return self._group(self._group_of[name])[name]


def _arrays(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(keys joined by slashes, array) of every leaf of a tree that has a shape."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _arrays(value, f"{prefix}{key}/")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _arrays(value, f"{prefix}{number}/")
    elif hasattr(tree, "shape"):
        yield prefix.removesuffix("/"), tree


@dataclass(frozen=True)
class FromCheckpoint:
    """One array of a checkpoint, read on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    reader: _Reader

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        value = self.reader.read(self.name)
        return value if index is None else value[index]


def leaves(path: AnyPath, tree: Any) -> dict[str, FromCheckpoint]:
    """The arrays of a checkpoint by path, keys joined by slashes. tree: as from `metadata`."""
    reader = _Reader(path, tree)
    return {name: FromCheckpoint(tuple(leaf.shape), np.dtype(leaf.dtype), name, reader) for name, leaf in _arrays(tree)}


def write(
    path: Path, arrays: Mapping[str, Leaf | Carried], custom_metadata: dict[str, Any], wrote: Callable[[int], object]
) -> None:
    """Writes a checkpoint to a local path, with no more than one group of arrays in memory.

    arrays: by path, keys joined by slashes. wrote: called with the number of bytes of every array, for progress.
    """
    from orbax.checkpoint import v1 as ocp  # late: importing it takes seconds

    group: dict[str, np.ndarray] = {}

    def save() -> None:
        ocp.partial.save(str(path.absolute()), unflatten(group), custom_metadata=custom_metadata)
        for value in group.values():
            wrote(value.nbytes)
        group.clear()

    for name, leaf in arrays.items():
        group[name] = leaf.read()
        if sum(value.nbytes for value in group.values()) > _GROUP_BYTES:
            save()
    if group:
        save()
    ocp.partial.finalize(str(path.absolute()))
