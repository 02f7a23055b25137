"""Checksums of arrays, computed where they lie. Whole numbers: exact in any order, so that they do not depend on how
arrays are spread over devices.

Checkpoints on the disk carry them (`checkpoint`), caches are named by them (`encoding`): another algorithm would refuse
both.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

_FACTORS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09)
"""Odd numbers without a simple relation, one an axis, so that no two places of an array count alike."""


def checksums(leaves: Iterable[jax.Array], dtype: Any = None) -> list[str]:
    """Eight hexadecimal digits per array; dtype: of its values in that one, None: in its own."""
    numbers = list[jax.Array]()
    for leaf in leaves:
        numbers.append(checksum(leaf, dtype))
        if jax.default_backend() == "cpu":
            # A CPU's devices meet in a few threads: of two programs under way, each can hold what the other waits for.
            numbers[-1].block_until_ready()
    return [f"{int(number):08x}" for number in jax.device_get(numbers)]


@functools.partial(jax.jit, static_argnames="dtype")
def checksum(array: jax.Array, dtype: Any = None) -> UInt32[jax.Array, ""]:
    """Sum of the bits of every element, each times an odd number of its own, modulo 2³²: any one element that changed
    shows."""
    array = array if dtype is None else array.astype(dtype)
    size = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]).astype(jnp.uint32)
    weight = jnp.ones(array.shape, jnp.uint32)
    for axis, factor in zip(range(array.ndim), _FACTORS, strict=False):
        # By axis rather than by the flat index: a reshape would gather what is split over devices.
        weight += 2 * jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * np.uint32(factor)
    return jnp.sum(bits * weight, dtype=jnp.uint32)
