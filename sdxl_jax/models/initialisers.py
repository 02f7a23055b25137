"""How parameters begin: each layer declares the distribution of its initial values, and `sample` makes them.

    dense(…, kernel_init=lecun_normal) ── abstract ── Parameter(shape, distribution) ── sample(seed, path, index)

The distributions are those of Flax's initialisers of the same names. Flax itself makes no value: it traces a network
for shapes and declarations, and nothing is compiled (docs/decisions/initial-weights.md).

Normal values are made in tiles along the last two axes, each by a generator of its own, whose seed is the run's with
the parameter's path and the tile's place. So a part of an array has the digits of the whole, and parameters are the
same on any mesh and number of processes. Threads share the tiles.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import meta
from jaxtyping import Float32

from sdxl_jax import processors
from sdxl_jax.arrays import Distribution, Parameter, Params

_TILE = 512, 128
"""Elements along the last two axes that one generator makes, one along all others: 256 KiB, which a core's cache
holds. Smaller: less is made in vain at the edges of a shard, more generators."""


class _Declared(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """What Flax takes for a parameter that is made, with its distribution. A scan adds its axis to the value."""

    value: Any
    distribution: Distribution = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> "_Declared":
        del index, params
        return self

    def remove_axis(self, index: int, params: Any) -> "_Declared":
        del index, params
        return self


# Initialisers, as Flax's layers take them. They return a `_Declared`, which Flax unboxes: `Any`.


def zeros(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
    del key
    return _Declared(jnp.zeros(shape, dtype), Distribution())


def ones(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
    del key
    return _Declared(jnp.ones(shape, dtype), Distribution(1.0))


def normal(deviation: float, bound: float = math.inf) -> Callable[..., Any]:
    def declare(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        del key
        # NaN: Flax's own `init`, which would not make random values, is not to be used by mistake.
        return _Declared(jnp.full(shape, jnp.nan, dtype), Distribution(0.0, deviation, bound))

    return declare


def lecun_normal(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
    """Normal, truncated at two deviations, with the variance 1 / fan-in. The last axis is the output's."""
    # The variance of a standard normal distribution truncated at ±2 is 0.8796².
    deviation = 1 / math.sqrt(math.prod(shape[:-1])) / 0.87962566103423978
    return normal(deviation, bound=2.0)(key, shape, dtype)


def abstract(network: nn.Module, *inputs: jax.ShapeDtypeStruct | None) -> Params:
    """A network's parameters, none of them made: its leaves are `Parameter`. inputs: of its call.

    Fails for a layer that declares nothing: an initialiser of Flax itself says no distribution.
    """

    def parameter(path: tuple[Any, ...], leaf: Any) -> Parameter:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert isinstance(leaf, _Declared), f"{name} has another initialiser than those of models/initialisers.py"
        assert leaf.value.dtype == jnp.float32, f"{name} is {leaf.value.dtype}; parameters are float32"
        return Parameter(leaf.value.shape, leaf.distribution)

    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(network.init, key, *inputs)["params"]
    return jax.tree_util.tree_map_with_path(parameter, params, is_leaf=meta.is_axis_metadata)


def sample(
    parameter: Parameter, seed: int, path: str, index: tuple[slice, ...] | None = None
) -> Float32[np.ndarray, "..."]:
    """The initial values of a parameter, or the part of them that slices of all its axes select. path: "unet/…"; two
    parameters with the same path and seed have the same values."""
    mean, deviation, bound, half_width = parameter.distribution
    index = index or (slice(None),) * len(parameter.shape)
    bounds = [part.indices(size)[:2] for part, size in zip(index, parameter.shape, strict=True)]
    sizes = [stop - start for start, stop in bounds]
    if deviation == half_width == 0:
        return np.full(sizes, mean, np.float32)
    values = np.empty(sizes, np.float32)
    sides = [1] * len(bounds) + [*_TILE]
    sides = sides[-len(bounds) :]
    places = [range(start // side, -(-stop // side)) for (start, stop), side in zip(bounds, sides, strict=True)]
    tiles = list(itertools.product(*places))

    def fill(tiles: Iterable[tuple[int, ...]]) -> None:
        for tile in tiles:
            corner = [place * side for place, side in zip(tile, sides, strict=True)]
            shape = [min(side, size - at) for side, size, at in zip(sides, parameter.shape, corner, strict=True)]
            key, count = f"{seed}/{path}/{tile}", math.prod(shape)
            made = (_uniform(key, count) if half_width else _normal(key, count, bound)).reshape(shape)
            inner, outer = [], []
            for (start, stop), at, size in zip(bounds, corner, shape, strict=True):
                first, last = max(start, at), min(stop, at + size)
                inner.append(slice(first - at, last - at))
                outer.append(slice(first - start, last - start))
            values[tuple(outer)] = mean + np.float32(half_width or deviation) * made[tuple(inner)]

    count = min(processors.usable(), len(tiles))
    list(_pool().map(fill, [tiles[number::count] for number in range(count)]))
    return values


def _normal(key: str, count: int, bound: float) -> Float32[np.ndarray, " count"]:
    """Standard normal values; those beyond the bound are drawn again."""
    generator = _generator(key)
    values = generator.standard_normal(count, np.float32)
    beyond = np.flatnonzero(np.abs(values) > bound) if bound < math.inf else np.empty(0, int)
    while len(beyond):
        values[beyond] = again = generator.standard_normal(len(beyond), np.float32)
        beyond = beyond[np.abs(again) > bound]
    return values


def _uniform(key: str, count: int) -> Float32[np.ndarray, " count"]:
    """Values uniform in −1..1."""
    return 2 * _generator(key).random(count, np.float32) - 1


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(int.from_bytes(key.encode(), "little")))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(processors.usable(), "initial-values")
