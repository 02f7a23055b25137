"""A TPU kernel for self-attention over images with heads of 64: two of them side by side fill the 128 lanes.

It takes queries, keys and values as the projections leave them, [batch, tokens, heads · 64], and returns the result so.
Kernels with an axis of heads before the tokens, such as splash attention, have each array copied to another layout and
padded to 128 before they begin, and back. One head of the pair is multiplied with zeros in the other's lanes, so that
the products are those of a head padded to 128. FlashAttention, arXiv:2205.14135, with all keys of a pair on chip.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from sdxl_jax.models import layers

_LANES = 128
DIM = 64
"""Of a head."""
MOST_TOKENS = 8192
"""Keys and values of more do not fit on chip."""
_BLOCK = 512
"""Queries and keys of one product; sequences are padded to a multiple."""
_VMEM = 48 * 2**20
"""Bytes that the kernels may use on chip, of 64 MiB and more."""
_MASKED = -1e30
_NN = (((1,), (0,)), ((), ()))
"""a b"""
_NT = (((1,), (1,)), ((), ()))
"""a bᵀ"""
_TN = (((0,), (0,)), ((), ()))
"""aᵀ b"""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def pair_attention(
    query: Float[jax.Array, "batch tokens features"],
    key: Float[jax.Array, "batch tokens features"],
    value: Float[jax.Array, "batch tokens features"],
    interpret: bool = False,
) -> Float[jax.Array, "batch tokens features"]:
    """softmax(q kᵀ / 8) v for each 64 features, a head; features: a multiple of 128."""
    return _forward(query, key, value, interpret)[0]


def _forward(query: Any, key: Any, value: Any, interpret: bool) -> tuple[Any, Any]:
    tokens = query.shape[1]
    query, key, value = (_padded(x) for x in (query, key, value))
    batch, padded, features = query.shape
    block = min(_BLOCK, padded)
    some = pl.BlockSpec((None, block, _LANES), lambda image, pair, part: (image, part, pair))
    every = pl.BlockSpec((None, padded, _LANES), lambda image, pair, part: (image, 0, pair))
    out, logs = pl.pallas_call(
        functools.partial(_forward_kernel, tokens=tokens, block=block),
        grid=(batch, features // _LANES, padded // block),
        in_specs=[some, every, every],
        out_specs=[some, pl.BlockSpec((None, None, 2, block), lambda image, pair, part: (image, pair, 0, part))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, features // _LANES, 2, padded), jnp.float32),
        ],
        compiler_params=_parameters("parallel", "parallel", "parallel"),
        name="pair_attention_fwd",
        interpret=interpret,
    )(query, key, value)
    return checkpoint_name(out[:, :tokens], layers.KEPT), checkpoint_name(logs, layers.KEPT)


def _saving(query: Any, key: Any, value: Any, interpret: bool) -> tuple[Any, Any]:
    out, logs = _forward(query, key, value, interpret)
    return out, (query, key, value, out, logs)


def _backward(interpret: bool, saved: Any, gradient: Any) -> tuple[Any, Any, Any]:
    query, key, value, out, logs = saved
    tokens = query.shape[1]
    query, key, value, out, gradient = (_padded(x) for x in (query, key, value, out, gradient))
    batch, padded, features = query.shape
    block = min(_BLOCK, padded)
    some = pl.BlockSpec((None, block, _LANES), lambda image, pair, part: (image, part, pair))
    every = pl.BlockSpec((None, padded, _LANES), lambda image, pair, part: (image, 0, pair))
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, tokens=tokens, block=block),
        grid=(batch, features // _LANES, padded // block),
        in_specs=[
            every,
            some,
            some,
            every,
            every,
            pl.BlockSpec((None, None, 2, padded), lambda image, pair, part: (image, pair, 0, 0)),
        ],
        out_specs=[every, some, some],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3,
        scratch_shapes=[pltpu.VMEM((padded, _LANES), jnp.float32), pltpu.VMEM((8, padded), jnp.float32)],
        compiler_params=_parameters("parallel", "parallel", "arbitrary"),
        name="pair_attention_bwd",
        interpret=interpret,
    )(query, key, value, out, gradient, logs)
    return tuple(each[:, :tokens] for each in gradients)


pair_attention.defvjp(_saving, _backward)


def _padded(x: Any) -> Any:
    """With tokens up to a multiple of the block: of `_BLOCK`, or of 128 below it."""
    tokens = x.shape[1]
    padding = -tokens % min(_BLOCK, -(-tokens // _LANES) * _LANES)
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x


def _parameters(*axes: Any) -> Any:
    return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=_VMEM)


def _lanes_of(head: int, x: Any) -> Any:
    """x with zeros in the lanes of the other head."""
    lanes = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lanes < DIM) == (head == 0), x, jnp.zeros_like(x))


def _dot(one: Any, other: Any, dimensions: Any = _NN, **options: Any) -> Any:
    return lax.dot_general(one, other, dimensions, preferred_element_type=jnp.float32, **options)


def _deltas(gradient: Any, out: Any) -> Any:
    """Σ gradient · out over the features of each head: [8, queries], of which the first two rows count."""
    rows = lax.broadcasted_iota(jnp.int32, (8, _LANES), 0)
    lanes = lax.broadcasted_iota(jnp.int32, (8, _LANES), 1)
    ones = (lanes // DIM == rows).astype(jnp.float32)
    product = gradient.astype(jnp.float32) * out.astype(jnp.float32)
    return _dot(ones, product, _NT, precision=lax.Precision.HIGHEST)


def _forward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, logs_ref: Any, *, tokens: int, block: int
) -> None:
    """Some queries of one pair of heads: the online softmax over blocks of keys."""
    keys = k_ref.shape[0]
    out = jnp.zeros(q_ref.shape, jnp.float32)
    for head in (0, 1):
        query = _lanes_of(head, q_ref[...]) * DIM**-0.5  # a power of two: exact

        def add(part: Any, sums: Any, query: Any = query) -> Any:
            highest, total, out = sums
            at = pl.ds(part * block, block)
            scores = _dot(query, k_ref[at, :], _NT)
            if keys != tokens:
                number = part * block + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                scores = jnp.where(number < tokens, scores, _MASKED)
            new = jnp.maximum(highest, scores.max(axis=1, keepdims=True))
            weights = jnp.exp(scores - new)
            old = jnp.exp(highest - new)
            total = old * total + weights.sum(axis=1, keepdims=True)
            return new, total, old * out + _dot(weights.astype(v_ref.dtype), v_ref[at, :])

        column = jnp.zeros((block, 1), jnp.float32)
        start = (column + _MASKED, column, jnp.zeros_like(out))
        highest, total, weighted = lax.fori_loop(0, keys // block, add, start, unroll=True)
        out += _lanes_of(head, weighted / total)
        logs = jnp.broadcast_to(highest + jnp.log(total), (block, _LANES))
        logs_ref[head : head + 1, :] = logs.T[:1]
    out_ref[...] = out.astype(out_ref.dtype)


def _backward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    gradient_ref: Any,
    logs_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dq_sum: Any,
    deltas: Any,
    *,
    tokens: int,
    block: int,
) -> None:
    """Some keys and values of one pair of heads, from all queries; scores have the queries in the lanes."""
    part, parts = pl.program_id(2), pl.num_programs(2)
    queries = q_ref.shape[0] // block

    @pl.when(part == 0)
    def start() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)
        for number in range(queries):
            at = pl.ds(number * block, block)
            deltas[:, at] = _deltas(gradient_ref[at, :], out_ref[at, :])

    dk = jnp.zeros(k_ref.shape, jnp.float32)
    dv = jnp.zeros(k_ref.shape, jnp.float32)
    for head in (0, 1):
        key = _lanes_of(head, k_ref[...]) * DIM**-0.5
        value = _lanes_of(head, v_ref[...])

        def add(number: Any, sums: Any, head: int = head, key: Any = key, value: Any = value) -> Any:
            dk, dv = sums
            at = pl.ds(number * block, block)
            query, gradient = q_ref[at, :], gradient_ref[at, :]
            scores = _dot(key, query, _NT)
            if parts * block != tokens:
                row = part * block + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                scores = jnp.where(row < tokens, scores, _MASKED)
            weights = jnp.exp(scores - logs_ref[head : head + 1, at])
            dv += _dot(weights.astype(gradient.dtype), gradient)
            change = weights * (_dot(value, gradient, _NT) - deltas[head : head + 1, at])
            change = change.astype(query.dtype)
            dk += _dot(change, query)
            dq_sum[at, :] += _dot(change, key, _TN)
            return dk, dv

        zeros = jnp.zeros_like(dk)
        own = lax.fori_loop(0, queries, add, (zeros, zeros), unroll=True)
        dk, dv = (total + _lanes_of(head, each) for total, each in zip((dk, dv), own, strict=True))
    dk_ref[...] = (dk * DIM**-0.5).astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)

    @pl.when(part == parts - 1)
    def end() -> None:
        dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)
