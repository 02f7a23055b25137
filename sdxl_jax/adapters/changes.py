"""Changes of a model's parameters: what an adapter file holds, and how it is merged into a tree of parameters.

Merged into the weights an adapter costs nothing in sampling. Files are read by `weights.lora`, which resolves their
modules to parameters. The formulas of each kind are in `adapters.kinds`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Shaped

from sdxl_jax.adapters import kinds
from sdxl_jax.adapters.kinds import Factors, Kind
from sdxl_jax.arrays import Params, flatten, type_of_array, unflatten
from sdxl_jax.errors import InputError


class Module(NamedTuple):
    """The change of one module, as a file has it."""

    factors: Mapping[str, Shaped[np.ndarray, "..."]]
    """By the names of `adapters.kinds`, with the file's dtypes and axes: down [rank, in, …], up [out, rank, …]. "bias":
    the difference of the module's bias."""
    alpha: float | None = None
    """From settings beside the tensors; None: from the tensors, or the rank."""

    @property
    def rank(self) -> int | None:
        narrow = (self.factors.get(name) for name in ("down", "down_1", "w2_down", "w1_down"))
        return next((value.shape[0] for value in narrow if value is not None), None)

    @property
    def labels(self) -> list[str]:
        """Its kinds in words, e.g. ["dora", "bias"]."""
        weight = self.factors.keys() - {"bias", "alpha"}
        kind = kinds.kind_of(self.factors).value
        if "magnitude" in weight:
            kind = "dora" if kind == Kind.LORA.value else f"{kind} with dora"
        return [*([kind] if weight else []), *(["bias"] if "bias" in self.factors else [])]


@dataclass(frozen=True, eq=False)
class Lora:
    """The contents of an adapter file, of whatever kinds."""

    name: str
    """The file's, or the folder's."""
    modules: Mapping[str, Module]
    """By the file's names of modules."""
    source: PurePath | None = None
    """The path that it was read from."""
    embeddings: tuple[str, ...] = ()
    """Names of textual inversions that are in the file as well."""
    bundled: Mapping[str, Shaped[np.ndarray, "..."]] = field(default_factory=dict)
    """Their tensors, as they are in the file."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the file's header."""

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({module.rank for module in self.modules.values()} - {None})  # pyright: ignore[reportArgumentType, reportReturnType] (None is taken out)


Rows = Sequence[tuple[int | None, Factors]]
"""(layer of a stacked parameter or None, factors with our axes and the file's dtypes)."""
Resolved = dict[str, list[tuple[int | None, Factors]]]
"""The changes by parameter: our path, "unet/…/kernel" -> its rows."""


def float32(factors: Factors) -> dict[str, Float[type_of_array, "..."]]:
    """The factors in float32."""
    return {name: value.astype(np.float32) for name, value in factors.items()}


def change(rows: Rows, shape: tuple[int, ...], scale: float = 1.0) -> Float[np.ndarray, "..."]:
    """The change of one parameter, float32 and of its shape, for rows that are sums. Layers of a stacked parameter
    without factors do not change."""
    total = np.zeros(shape, np.float32)
    for layer, factors in rows:
        total[... if layer is None else layer] = kinds.delta(float32(factors))
    total *= np.float32(scale)
    return total


def are_sums(rows: Rows) -> bool:
    """Whether all of them are W + ΔW, with a ΔW that does not depend on W."""
    return all(kinds.is_sum(factors) for _, factors in rows)


def changed(value: Float[np.ndarray, "*shape"], rows: Rows, scale: float) -> Float[np.ndarray, "*shape"]:
    """The changed parameter, computed in float32, in the parameter's dtype. scale: the user's strength."""
    if are_sums(rows):
        return np.asarray(_summed(value, change(rows, value.shape, scale)))
    result = value.astype(np.float32)
    for layer, factors in rows:
        place = ... if layer is None else layer
        result[place] = kinds.changed(result[place], float32(factors), scale)
    return result.astype(value.dtype)


def _summed(
    value: Float[type_of_array, "*shape"], change: Float[type_of_array, "*shape"]
) -> Float[type_of_array, "*shape"]:
    """Parameter plus change, summed in float32, in the parameter's dtype; numpy or jax arrays."""
    return (value.astype(np.float32) + change).astype(value.dtype)


_summed_on_devices = jax.jit(_summed)


def merged(params: Params, resolved: Resolved, scale: float) -> dict[str, Any]:
    """Parameters with the changes merged into them; dtypes and shardings stay. Unchanged parameters are the given
    arrays."""
    flat = flatten(params)
    for path, rows in resolved.items():
        value = flat[path]
        if value.dtype == np.int8:
            raise InputError(
                f"{path} is in eight bits, which a change cannot be merged into. Give the adapter to the command that "
                "opens the model (--lora), which merges it first, or load the model without quantize"
            )
        # One parameter at a time: the largest stack of SDXL is 0.5 GB in float32.
        if not isinstance(value, jax.Array):
            flat[path] = changed(value, rows, scale)
        elif are_sums(rows):
            total = jax.device_put(change(rows, value.shape, scale), value.sharding)
            flat[path] = jax.device_put(_summed_on_devices(value, total), value.sharding)
        else:
            flat[path] = jax.device_put(changed(np.asarray(value), rows, scale), value.sharding)
    return unflatten(flat)


# ---- trees of adapters -----------------------------------------------------------------------------------------------


def tree(resolved: Resolved, layers: Mapping[str, int | None]) -> Params:
    """The changes as a tree of adapters (`adapters.kinds`), float32, to train on. layers: of each parameter, how many
    are stacked; None for one that is not.

    Layers of different ranks get the largest rank, filled with zeros, and their alphas grow with it: the same change.
    Raises InputError for a parameter whose layers have not all a change, or changes that do not stack.
    """
    flat = {}
    for path, rows in resolved.items():
        stacked = [float32(factors) for _, factors in sorted(rows, key=lambda row: row[0] or 0)]
        found = stacked[0] if layers[path] is None else _stack(path, stacked, layers[path])
        flat |= {f"{path}/{name}": value for name, value in found.items()}
    return unflatten(flat)


def _stack(path: str, rows: list[dict[str, Any]], layers: int | None) -> dict[str, Any]:
    if len(rows) != layers:
        raise InputError(
            f"The adapter changes {len(rows)} of the {layers} layers of {path}, and an adapter to train changes all of "
            "them. Train a new one, or merge this one into the base model first"
        )
    if kinds.kind_of(rows[0]) in (Kind.LORA, Kind.LOHA):
        rank = max(kinds.rank_of(row) or 0 for row in rows)
        rows = [_widened(row, rank) for row in rows]
    if len({tuple(sorted((name, value.shape) for name, value in row.items())) for row in rows}) > 1:
        raise InputError(
            f"The adapter's layers of {path} are of different kinds or shapes, which cannot be trained together. Merge "
            "it into the base model first, or resize it to one rank (sdxl-jax lora resize)"
        )
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _widened(factors: dict[str, Any], rank: int) -> dict[str, Any]:
    """A LoRA or LoHa whose ranks are filled with zeros up to a rank."""
    more, found = rank - (kinds.rank_of(factors) or 0), {}
    for name, value in factors.items():
        at = {"up": [-2], "down": [-1], "mid": [-2, -1]}.get(name.split("_")[0], [])
        widths = [(0, more if axis - value.ndim in at else 0) for axis in range(value.ndim)]
        found[name] = np.pad(value, widths) if at else value
    if rank > more:
        found["alpha"] = factors["alpha"] * np.float32(rank / (rank - more))
    return found


def by_parameter(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Factors by their parameter: {"unet/…/kernel/down": x} -> {"unet/…/kernel": {"down": x}}."""
    found: dict[str, dict[str, Any]] = {}
    for path, value in flat.items():
        parameter, _, name = path.rpartition("/")
        found.setdefault(parameter, {})[name] = value
    return found


def untree(adapters: Params, layers: Mapping[str, int | None]) -> Resolved:
    """The reverse of `tree`: layers by themselves, as files have them."""
    resolved: Resolved = {}
    for path, factors in by_parameter({path: np.asarray(value) for path, value in flatten(adapters).items()}).items():
        count = layers[path]
        # np.asarray: one layer of alpha would be a scalar of numpy.
        resolved[path] = (
            [(None, factors)]
            if count is None
            else [(n, {name: np.asarray(value[n]) for name, value in factors.items()}) for n in range(count)]
        )
    return resolved
