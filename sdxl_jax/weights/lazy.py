"""Lazy weights: a model on disk whose parameters are read on demand, whole or a slice of them.

The common form of all layouts. A reader makes `Weights` of a path; `load_model` puts them on devices and the writers
write them, one parameter at a time, so that neither needs memory for the whole model.
"""

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from sdxl_jax.arrays import flatten, type_of_array
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import initialisers
from sdxl_jax.models.initialisers import Parameter
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.weights import names
from sdxl_jax.weights.formats.safetensors import Tensor, fill
from sdxl_jax.weights.names import Entry, Naming, PartConfig, Table

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
"""Dtypes of parameters, by name."""
_FLOATS = tuple(map(np.dtype, DTYPES.values()))

Index = tuple[slice, ...]
"""One slice per axis, without steps."""


@runtime_checkable
class Leaf(Protocol):
    """One parameter of ours, read on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        """The parameter, or the part that slices of all its axes select."""
        ...


@dataclass(frozen=True)
class FromTensors:
    """A parameter held by tensors of another layout: one, a part of one, or one per layer."""

    shape: tuple[int, ...]
    rows: Sequence[tuple[Entry, int]]
    """In the order of layers, the tensor and the number of its place."""
    tensors: Mapping[str, Tensor]
    dtype: np.dtype

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
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

    def _one(self, entry: Entry, number: int, bounds: Sequence[tuple[int, int]]) -> Shaped[np.ndarray, "..."]:
        """One place, with our axes; only the slice within `bounds` is read of the tensor."""
        size = entry.shape[0] // len(entry.places)
        (start, stop), *rest = [bounds[axis] for axis in entry.axes]
        whole = (start + number * size, stop + number * size), *rest
        return entry.ours(self.tensors[entry.name].read(tuple(slice(*pair) for pair in whole)))


@dataclass(frozen=True)
class InMemory:
    """A parameter in memory, on the host or on devices."""

    value: Shaped[type_of_array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.value.dtype)

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        return np.asarray(self.value if index is None else self.value[index])


@dataclass(frozen=True)
class Changed:
    """A parameter to which a function is applied whenever it is read."""

    leaf: Leaf
    change: Callable[[Shaped[np.ndarray, "..."]], Shaped[np.ndarray, "..."]]
    """From the whole parameter to the changed one, of the same shape."""
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        value = self.change(self.leaf.read())
        return value if index is None else value[index]


@dataclass(frozen=True)
class Cast:
    """A parameter cast to another dtype."""

    leaf: Leaf
    dtype: np.dtype
    path: str
    """For messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        value = self.leaf.read(index)
        with np.errstate(over="ignore"):
            cast = value.astype(self.dtype)
        beyond = np.isinf(cast) & np.isfinite(value) if self.dtype == np.float16 else np.zeros(0, bool)
        if beyond.any():
            raise InputError(
                f"{self.path} has values up to {np.abs(value[beyond]).max():.3g}; float16 holds up to 65504. Use "
                "bfloat16"
            )
        return cast


@dataclass(frozen=True)
class WithRows:
    """A parameter with rows of another one after its own, in its dtype."""

    leaf: Leaf
    rows: Leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.leaf.shape[0] + self.rows.shape[0], *self.leaf.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        value = np.concatenate([self.leaf.read(), self.rows.read().astype(self.dtype)])
        return value if index is None else value[index]


@dataclass(frozen=True)
class WithZeroInputs:
    """A kernel [..., in, out] with zeros for further input channels after its own."""

    leaf: Leaf
    channels: int
    """Input channels in all."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.leaf.shape[:-2], self.channels, self.leaf.shape[-1])

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        value = np.zeros(self.shape, self.dtype)
        value[..., : self.leaf.shape[-2], :] = self.leaf.read()
        return value if index is None else value[index]


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

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        bounds = index or tuple(slice(0, size) for size in self.shape)
        return self.leaf.read((slice(*bounds[0].indices(self.count)[:2]), *bounds[1:]))


@dataclass(frozen=True)
class Initial:
    """A parameter that is not on disk and has its initial values."""

    parameter: Parameter
    path: str
    """"unet/conv_in/kernel"."""
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def dtype(self) -> np.dtype:
        return self.parameter.dtype

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        return initialisers.sample(self.parameter, self.seed, self.path, index)


@runtime_checkable
class Carried(Protocol):
    """A tensor without a place in our model."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> Shaped[np.ndarray, "..."]: ...


class Layout(enum.Enum):
    """What `convert` writes."""

    ORBAX = "orbax"
    DIFFUSERS = "diffusers"
    SINGLE_FILE = "single-file"


class SourceLayout(enum.Enum):
    """The layout in which weights were found."""

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
    """The layout and naming of the source, as far as the conversion back needs them."""

    layout: SourceLayout
    namings: Mapping[str, Naming] = field(default_factory=dict)
    """Naming of each part; empty for our own layouts."""


@dataclass(frozen=True)
class Provenance:
    """Which run or file weights are from, for the model card."""

    name: str | None = None
    """Of the run directory, directory or file, without the folders above it; None for a model in memory."""
    step: int | None = None
    """Of the run's checkpoint; None for weights that are not from a run."""
    steps: int | None = None
    """At which the run is finished."""
    has_average: bool = False
    """Whether they are the run's averaged weights (EMA)."""
    commit: str | None = None
    """Of the source tree that trained the run, where it is known."""
    parts_from: tuple[str, ...] = ()
    """Names of the models whose parts replace this one's."""
    merged: tuple[str, ...] = ()
    """LoRAs that are merged into the weights, each with its scale."""


@dataclass(frozen=True)
class Weights:
    """A model, or some of its parts, on disk."""

    config: ModelConfig
    """For parts that are missing it has the values of the nearest published model."""
    leaves: Mapping[str, Leaf]
    """By path: "unet/conv_in/kernel"."""
    origin: Origin
    carried: Mapping[tuple[str, str], Carried] = field(default_factory=dict)
    """Tensors without a place in our model: (part whose folder they are in, "" for a file of all parts; name)."""
    licences: tuple[AnyPath, ...] = ()
    """Licence files beside the weights."""
    notes: tuple[str, ...] = ()
    """Messages for the user about the files."""
    scale_is_known: bool = True
    """Whether the files say the autoencoder's scale; false: it is that of the nearest published model."""
    noise_is_known: bool = True
    """The same of prediction and schedule."""
    licence: str | None = None
    """Hugging Face's identifier of the licence that the source's model card states; None where it states none."""
    provenance: Provenance = Provenance()
    """Which run or file they are from."""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path.split("/")[0] for path in self.leaves))

    @property
    def size(self) -> int:
        """Bytes of all parameters."""
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves.values())


def in_memory(model: Model) -> Weights:
    """A model in memory, or the parts that it has, as the writers take it."""
    if any(leaf.dtype == np.int8 for leaf in flatten(model.params).values()):
        raise InputError("The model is in eight bits, which no layout holds. Load it without quantize")
    # jax returns dictionaries in alphabetical order; files have the order of the parts.
    ordered = {part: model.params[part] for part in part_configs(model.config) if part in model.params}
    leaves = {path: InMemory(value) for path, value in flatten(ordered).items()}
    merged = tuple(f"{adapter.name} × {adapter.scale:g}" for adapter in model.adapters)
    return Weights(model.config, leaves, Origin(SourceLayout.MEMORY), provenance=Provenance(merged=merged))


def part_configs(config: ModelConfig) -> dict[str, PartConfig]:
    """The configuration of each part, by its key in the parameters. An exact autoencoder has none, and is no part."""
    autoencoder = {} if isinstance(config.vae, WaveletConfig) else {"vae": config.vae}
    return {"unet": config.unet, **autoencoder, **{tower.name: tower.clip for tower in config.text}}


def abstract_leaves(config: ModelConfig, parts: Sequence[str] | None = None) -> dict[str, Parameter]:
    """A model's parameters and how they begin, by path. parts: only those below these keys; None: all."""
    below = tuple(f"{part}/" for part in (part_configs(config) if parts is None else parts))
    return {
        f"{part}/{path}": leaf
        for part, part_config in part_configs(config).items()
        for path, leaf in names.abstract(part_config).items()
        if f"{part}/{path}".startswith(below)
    }


def lacking_half(weights: Weights) -> str | None:
    """The half that a tiny autoencoder lacks, "encoder" or "decoder": its halves are files of their own. None if it has
    both, and for weights without an autoencoder."""
    if "vae" not in weights.parts:
        return None
    halves = {path.split("/")[1] for path in weights.leaves if path.startswith("vae/")}
    return next((half for half in ("encoder", "decoder") if half not in halves), None)


def leaves_of(part: str, table: Table, tensors: Mapping[str, Tensor], where: AnyPath) -> dict[str, Leaf]:
    """The parameters of one part whose tensors are all there. Stacked layers that differ in dtype become float32, which
    holds their values exactly; `stored_dtypes` gives theirs."""
    leaves: dict[str, Leaf] = {}
    for path, rows in table.by_path.items():
        if any(entry.name not in tensors for entry, _ in rows):
            continue
        dtypes = {entry.name: tensors[entry.name].dtype for entry, _ in rows}
        if wrong := [name for name, dtype in dtypes.items() if dtype not in _FLOATS]:
            raise InputError(
                f"{where}: {wrong[0]} is {dtypes[wrong[0]]}; parameters of {', '.join(DTYPES)} are implemented. Use "
                "a variant of the file with one of these dtypes"
            )
        widest = next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else np.dtype(np.float32)
        leaves[f"{part}/{path}"] = FromTensors(table.abstract[path].shape, rows, tensors, widest)
    return leaves


def stored_dtypes(leaf: Leaf) -> tuple[np.dtype, ...]:
    """The dtypes in which a parameter is stored: one; or one per layer, for stacked layers of other people's files.

    `leaf.read()` cast to them is bit-identical to the stored values.
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
