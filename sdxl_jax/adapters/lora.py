"""LoRA: W' = W + Σ scale · (alpha / rank) · up · down.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, section 4.1) changes a linear layer or a convolution by a product
of two small factors, down [rank, in, …] and up [out, rank]. Merged into the weights it costs nothing in sampling. Files
are read by `weights.lora`, which resolves their modules to parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from sdxl_jax.arrays import Params, flatten, type_of_array, unflatten


class Factors(NamedTuple):
    """The low-rank factors of one layer's change. With a file's axes [rank, in, …] and [out, rank, …], or with ours,
    [… in, rank] and [rank, out]."""

    down: Float[np.ndarray, "*_down"]
    up: Float[np.ndarray, "*_up"]
    alpha: float
    """The change is up · down · alpha / rank."""


@dataclass(frozen=True, eq=False)
class Lora:
    """The contents of a LoRA file."""

    name: str
    """The file's, or the folder's."""
    modules: Mapping[str, Factors]
    """By the file's names of modules: float32, with the file's axes."""
    source: PurePath | None = None
    """The path that it was read from."""
    embeddings: tuple[str, ...] = ()
    """Names of textual inversions that are in the file as well."""

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({factors.down.shape[0] for factors in self.modules.values()})


Resolved = dict[str, list[tuple[int | None, Factors]]]
"""The changes of a LoRA by parameter: our path, "unet/…/kernel" -> (layer of a stacked parameter or None, factors with
our axes: down [in, rank] or [height, width, in, rank], up [rank, out])."""


def delta(resolved: Resolved, path: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."] | None:
    """The change of one parameter, float32 and of its shape, before the user's scale; None if it does not change.

    path: "unet/…/kernel". Layers of a stacked parameter without factors do not change.
    """
    if path not in resolved:
        return None
    total = np.zeros(shape, np.float32)
    for layer, (down, up, alpha) in resolved[path]:
        np.matmul(down, up * np.float32(alpha / len(up)), out=total if layer is None else total[layer])
    return total


def change(resolved: Resolved, path: str, shape: tuple[int, ...], scale: float) -> Float[np.ndarray, "..."]:
    """The change of a parameter in `resolved`, with the user's scale."""
    changed = delta(resolved, path, shape)
    assert changed is not None
    changed *= np.float32(scale)
    return changed


def summed(
    value: Float[type_of_array, "*shape"], changed: Float[type_of_array, "*shape"]
) -> Float[type_of_array, "*shape"]:
    """Parameter plus change, summed in float32, in the parameter's dtype; numpy or jax arrays."""
    return (value.astype(np.float32) + changed).astype(value.dtype)


_summed_on_devices = jax.jit(summed)


def merged(params: Params, resolved: Resolved, scale: float) -> dict[str, Any]:
    """Parameters with a LoRA merged into them; dtypes and shardings stay. Unchanged parameters are the given arrays."""
    flat = flatten(params)
    for path in resolved:
        value = flat[path]
        changed = change(resolved, path, value.shape, scale)
        if isinstance(value, jax.Array):
            # One parameter at a time: the largest stack of SDXL is 0.5 GB in float32.
            changed = jax.device_put(changed, value.sharding)
            flat[path] = jax.device_put(_summed_on_devices(value, changed), value.sharding)
        else:
            flat[path] = summed(value, changed)
    return unflatten(flat)
