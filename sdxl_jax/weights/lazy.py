"""A model on the disk, not read yet: what it is, and how each of its parameters is read, whole or a part of it.

All layouts meet here. A reader makes `Weights` of what it finds; `load_model` puts them on devices and the writers
write them, one parameter at a time, so that neither needs room for the whole model.
"""

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from sdxl_jax.arrays import flatten
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.weights.formats.safetensors import Tensor, fill
from sdxl_jax.weights.names import Entry, Naming, PartConfig, Table

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""Those of parameters, by name."""
_FLOATS = tuple(map(np.dtype, DTYPES.values()))

Index = tuple[slice, ...]
"""One slice an axis, without steps."""


@runtime_checkable
class Leaf(Protocol):
    """One parameter of ours, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index | None = None) -> np.ndarray:
        """The parameter, or the part that slices of all its axes choose."""
        ...


@dataclass(frozen=True)
class FromTensors:
    """A parameter that stands in other people's tensors: one, a part of one, or one a layer."""

    shape: tuple[int, ...]
    rows: Sequence[tuple[Entry, int]]
    """In the order of layers, each tensor and which of its places it is."""
    tensors: Mapping[str, Tensor]
    dtype: np.dtype

    def read(self, index: Index | None = None) -> np.ndarray:
        index = index or tuple(slice(0, size) for size in self.shape)
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        value = np.empty([stop - start for start, stop in bounds], self.dtype)
        entry, number = self.rows[0]
        if entry.places[number].layer is None:
            fill(value, self._one(entry, number, bounds))
        else:
            (first, last), *rest = bounds
            for layer in range(first, last):
                fill(value[layer - first], self._one(*self.rows[layer], rest))
        return value

    def _one(self, entry: Entry, number: int, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
        """One place, with our axes; of the tensor only what is asked for is read."""
        size = entry.shape[0] // len(entry.places)
        (start, stop), *rest = [bounds[axis] for axis in entry.axes]
        whole = (start + number * size, stop + number * size), *rest
        return entry.ours(self.tensors[entry.name].read(tuple(slice(*pair) for pair in whole)))


@dataclass(frozen=True)
class InMemory:
    """A parameter that is there already, on the host or on devices."""

    value: np.ndarray | jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.value.dtype)

    def read(self, index: Index | None = None) -> np.ndarray:
        return np.asarray(self.value if index is None else self.value[index])


@dataclass(frozen=True)
class Changed:
    """A parameter, and what is done to it whenever it is read."""

    leaf: Leaf
    change: Callable[[np.ndarray], np.ndarray]
    """Of a whole parameter."""
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, index: Index | None = None) -> np.ndarray:
        value = self.change(self.leaf.read())
        return value if index is None else value[index]


@dataclass(frozen=True)
class Cast:
    """A parameter in another dtype."""

    leaf: Leaf
    dtype: np.dtype
    path: str
    """For messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, index: Index | None = None) -> np.ndarray:
        value = self.leaf.read(index)
        with np.errstate(over="ignore"):
            cast = value.astype(self.dtype)
        beyond = np.isinf(cast) & np.isfinite(value) if self.dtype == np.float16 else np.zeros(0, bool)
        if beyond.any():
            raise InputError(
                f"{self.path} has values up to {np.abs(value[beyond]).max():.3g}, which float16 cannot hold. Use "
                "bfloat16"
            )
        return cast


@dataclass(frozen=True)
class FirstLayers:
    """The first layers of a stacked parameter."""

    leaf: Leaf
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.leaf.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    def read(self, index: Index | None = None) -> np.ndarray:
        bounds = index or tuple(slice(0, size) for size in self.shape)
        return self.leaf.read((slice(*bounds[0].indices(self.count)[:2]), *bounds[1:]))


@dataclass(frozen=True)
class Initial:
    """A parameter that is not on the disk: it has its initial value."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, index: Index | None = None) -> np.ndarray:
        value = self.make()
        return value if index is None else value[index]


@runtime_checkable
class Carried(Protocol):
    """A tensor without a place in our model."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...


class Found(enum.Enum):
    """As what weights lay where they were found."""

    RUN = "run"
    MEMORY = "memory"
    DIFFUSERS = "diffusers"
    """A directory of a whole model."""
    SINGLE_FILE = "single-file"
    COMPONENT = "component"
    """A directory of one network."""
    PART = "part"
    """A file of one network."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from, as far as a way back must know it."""

    layout: Found
    namings: Mapping[str, Naming] = field(default_factory=dict)
    """Of each part; empty for our own layouts."""


@dataclass(frozen=True)
class Weights:
    """A model, or some of its parts, on the disk."""

    config: ModelConfig
    """Of parts that are not there it has the values of the nearest published model."""
    leaves: Mapping[str, Leaf]
    """By path: "unet/conv_in/kernel"."""
    origin: Origin
    carried: Mapping[tuple[str, str], Carried] = field(default_factory=dict)
    """Tensors without a place here: (part whose folder they are in, "" for a file of all parts; name)."""
    licences: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know of what was found."""
    tells_scale: bool = True
    """Whether the autoencoder's scale was told; false: it was taken from the nearest published model."""
    tells_noise: bool = True
    """The same of prediction and schedule."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path.split("/")[0] for path in self.leaves))

    @property
    def size(self) -> int:
        """Bytes of all parameters."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves.values())


def in_memory(model: Model) -> Weights:
    """A model, or the parts that it has, as the writers take it."""
    # jax gives dictionaries back in the order of the alphabet; that of the parts is told in files.
    ordered = {part: model.params[part] for part in part_configs(model.config) if part in model.params}
    leaves = {path: InMemory(value) for path, value in flatten(ordered).items()}
    return Weights(model.config, leaves, Origin(Found.MEMORY))


def part_configs(config: ModelConfig) -> dict[str, PartConfig]:
    """The configuration of each part, by its key among the parameters."""
    return {"unet": config.unet, "vae": config.vae, **{tower.name: tower.clip for tower in config.text}}


def lacking_half(weights: Weights) -> str | None:
    """ "encoder" or "decoder", where the autoencoder is the other alone: a tiny one's halves are files of their own."""
    if "vae" not in weights.parts:
        return None
    halves = {path.split("/")[1] for path in weights.leaves if path.startswith("vae/")}
    return next((half for half in ("encoder", "decoder") if half not in halves), None)


def leaves_of(part: str, table: Table, tensors: Mapping[str, Tensor], where: Path) -> dict[str, Leaf]:
    """The parameters of one part that its tensors hold wholly. Layers of one stack that differ in dtype are float32,
    which holds them exactly; `stored_dtypes` tells theirs."""
    leaves: dict[str, Leaf] = {}
    for path, rows in table.by_path.items():
        if any(entry.name not in tensors for entry, _ in rows):
            continue
        dtypes = {entry.name: tensors[entry.name].dtype for entry, _ in rows}
        if wrong := [name for name, dtype in dtypes.items() if dtype not in _FLOATS]:
            raise InputError(
                f"{where}: {wrong[0]} is {dtypes[wrong[0]]}; parameters of {', '.join(DTYPES)} are implemented. Use "
                "such a variant of the file"
            )
        widest = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else np.dtype(np.float32)
        leaves[f"{part}/{path}"] = FromTensors(table.abstract[path].shape, rows, tensors, widest)
    return leaves


def stored_dtypes(leaf: Leaf) -> tuple[np.dtype, ...]:
    """The dtypes that a parameter has where it is stored: one; or one a layer, of a stack of layers of other people's.

    What `leaf.read()` gives, cast to them, has every bit of theirs.
    """
    match leaf:
        case FromTensors():
            return tuple(leaf.tensors[entry.name].dtype for entry, _ in leaf.rows)
        case Changed() if leaf.dtype == leaf.leaf.dtype:
            return stored_dtypes(leaf.leaf)
        case FirstLayers():
            stored = stored_dtypes(leaf.leaf)
            return stored[: leaf.count] if len(stored) > 1 else stored
        case _:
            return (leaf.dtype,)


def cast(weights: Weights, dtype: np.dtype) -> Weights:
    """The same parameters in another dtype."""
    leaves = {path: leaf if leaf.dtype == dtype else Cast(leaf, dtype, path) for path, leaf in weights.leaves.items()}
    return replace(weights, leaves=leaves)
