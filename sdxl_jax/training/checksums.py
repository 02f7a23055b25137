"""Checksums of arrays, computed on their devices. Integer sums: exact in any order, so that they do not depend on how
arrays are sharded.

Checkpoints on disk carry them (`checkpoint`), caches are identified by them (`encoding`): with another algorithm, both
would be refused.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt32

_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)
"""Odd numbers without a simple relation, one per axis, so that no two positions in an array have the same weight."""


def checksums(leaves: Iterable[Shaped[jax.Array, "..."]], dtype: Any = None) -> list[str]:
    """Eight hexadecimal digits per array. dtype: what the values are cast to first; None: each array's own dtype."""
    numbers = list[jax.Array]()
    for leaf in leaves:
        numbers.append(checksum(leaf, dtype))
        if jax.default_backend() == "cpu":
            # Simulated CPU devices share a few threads: two collectives in flight can deadlock.
            numbers[-1].block_until_ready()
    return [f"{int(number):08x}" for number in jax.device_get(numbers)]


@functools.partial(jax.jit, static_argnames="dtype")
def checksum(array: Shaped[jax.Array, "..."], dtype: Any = None) -> UInt32[jax.Array, ""]:
    """Sum of the bits of every element, each times an odd weight of its own, modulo 2³²: a change of any single element
    changes it."""
    array = array if dtype is None else array.astype(dtype)
    size = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]).astype(jnp.uint32)
    weight = jnp.ones(array.shape, jnp.uint32)
    for axis, factor in zip(range(array.ndim), _FACTORS, strict=False):
        # Per axis rather than by the flat index: a reshape would gather a sharded array.
        weight += 2 * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(factor)
    return jnp.sum(bits * weight, dtype=jnp.uint32)
