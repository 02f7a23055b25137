"""Attention and the transformer blocks of the UNet.

`dot_product_attention` is the one place where an implementation is chosen, by platform and shape. The blocks of one
level are stacked on a leading axis and run under a scan, so that compile time does not grow with depth (the SDXL base
has 70 blocks, in 11 stacks).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Bool, Float

from sdxl_jax import sharding
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers, layers, pair_attention
from sdxl_jax.models.layers import Attention, Compute, conv, dense, gelu, group_norm, layer_norm
from sdxl_jax.sharding import constrain

_BLOCK = 512
"""Queries and keys that splash attention takes at a time; sequences are padded to a multiple. Its scores are
4 · _BLOCK² bytes of the 16 MiB that a kernel may have on chip."""
_BLOCK_KEYS = 2048
"""Keys of a block of the backward kernel."""
_LONG = 1024
"""Tokens from which on a kernel pays: below, XLA's scores are small and fuse well."""


def dot_product_attention(
    query: Float[jax.Array, "batch queries heads dim"],
    key: Float[jax.Array, "batch keys heads dim"],
    value: Float[jax.Array, "batch keys heads dim"],
    implementation: Attention,
    causal: bool = False,
) -> Float[jax.Array, "batch queries heads dim"]:
    """softmax(q kᵀ / √dim) v, the softmax in float32. Causal: a query sees keys up to its own position.

    Kernels are for self-attention over images; attention to text and within it is XLA's whatever `implementation` says,
    since 77 keys fit no kernel. Raises InputError for cuDNN without a GPU.
    """
    if implementation is Attention.AUTO:
        implementation = choose(_platform(), query, key)
    if causal or query.shape != key.shape:
        implementation = Attention.XLA
    match implementation:
        case Attention.SPLASH:
            return _on_each_device(_splash, query, key, value)
        case Attention.PAIRS:
            return _on_each_device(_pairs, query, key, value)
        case Attention.CUDNN:
            if _platform() != "gpu":
                raise InputError(
                    "compute.attention=cudnn needs an NVIDIA GPU of the Ampere generation or later; the platform here "
                    f"is {_platform()}. Set compute.attention=auto"
                )
            out = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        case _:
            out = jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="xla")
    return checkpoint_name(out, layers.KEPT)


def chunked_attention(
    query: Float[jax.Array, "batch queries heads dim"],
    key: Float[jax.Array, "batch keys heads dim"],
    value: Float[jax.Array, "batch keys heads dim"],
    implementation: Attention,
    at_once: int,
) -> Float[jax.Array, "batch queries heads dim"]:
    """Chunked attention: the same with `at_once` queries at a time, where XLA would materialise the scores of all
    queries: 16 GiB for the 65536 positions of an image of 2048 × 2048 in an autoencoder."""
    if implementation is Attention.AUTO:
        implementation = choose(_platform(), query, key)
    queries = query.shape[1]
    if implementation is not Attention.XLA or queries <= at_once:
        return dot_product_attention(query, key, value, implementation)
    padded = jnp.pad(query, ((0, 0), (0, -queries % at_once), (0, 0), (0, 0)))
    parts = rearrange(padded, "batch (parts queries) heads dim -> parts batch queries heads dim", queries=at_once)
    out = jax.lax.map(lambda part: dot_product_attention(part, key, value, Attention.XLA), parts)
    return rearrange(out, "parts batch queries heads dim -> batch (parts queries) heads dim")[:, :queries]


def choose(platform: str, query: Any, key: Any) -> Attention:
    """The implementation that `AUTO` stands for on a platform ("cpu", "gpu", "tpu"), for arrays of these shapes and
    dtypes."""
    tokens, dim = query.shape[1], query.shape[3]
    if query.shape != key.shape or tokens < _LONG:
        return Attention.XLA
    if platform == "tpu" and dim % 64 == 0:
        return Attention.SPLASH
    if platform == "gpu" and dim % 8 == 0 and dim <= 128 and query.dtype in (jnp.bfloat16, jnp.float16):
        return Attention.CUDNN
    return Attention.XLA


def _platform() -> str:
    """As `layers.platform`; a GPU without cuDNN's attention is an "other gpu"."""
    if (platform := layers.platform()) != "gpu":
        return platform
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and jax.default_backend() != "gpu":  # not attached; names before Ampere begin with Tesla
        return "other gpu" if device.device_kind.startswith("Tesla") else "gpu"
    return "gpu" if _from_ampere_on(jax.devices()[0]) else "other gpu"


def _from_ampere_on(device: Any) -> bool:
    """Whether a GPU is of the Ampere generation or later, by NVIDIA's compute capability, e.g. "8.0". Where GPUs of
    others have one, it is a name."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return major.isdecimal() and int(major) >= 8


def _on_each_device(
    kernel: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    query: Float[jax.Array, "batch tokens heads dim"],
    key: Float[jax.Array, "batch tokens heads dim"],
    value: Float[jax.Array, "batch tokens heads dim"],
) -> Float[jax.Array, "batch tokens heads dim"]:
    """The kernel on each device's own images and heads: XLA cannot split a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return kernel(query, key, value)
    spec = sharding.activation(mesh, query.shape, "batch", None, "tensor", None)
    # The kernel does not declare how its result varies over the mesh, which check_vma would require.
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)


def _pairs(
    query: Float[jax.Array, "batch tokens heads dim"],
    key: Float[jax.Array, "batch tokens heads dim"],
    value: Float[jax.Array, "batch tokens heads dim"],
) -> Float[jax.Array, "batch tokens heads dim"]:
    """Attention of pairs of heads on one device, splash attention for what has no pairs."""
    _, tokens, heads, dim = query.shape
    if heads % 2 or dim != pair_attention.DIM or tokens > pair_attention.MOST_TOKENS:
        return _splash(query, key, value)
    flat = (rearrange(x, "batch tokens heads dim -> batch tokens (heads dim)") for x in (query, key, value))
    out: Any = pair_attention.pair_attention(*flat, _platform() != "tpu")
    return rearrange(out, "batch tokens (heads dim) -> batch tokens heads dim", heads=heads)


def _splash(
    query: Float[jax.Array, "batch tokens heads dim"],
    key: Float[jax.Array, "batch tokens heads dim"],
    value: Float[jax.Array, "batch tokens heads dim"],
) -> Float[jax.Array, "batch tokens heads dim"]:
    """Splash attention on one device."""
    _, tokens, heads, dim = query.shape
    query = query / math.sqrt(dim)  # the kernel applies no scale
    padding = -tokens % min(_BLOCK, -(-tokens // 128) * 128)
    kernel = _splash_kernel(heads, tokens + padding, interpret=_platform() != "tpu")
    seen = jnp.arange(tokens + padding) >= tokens
    segments = splash_attention.SegmentIds(jnp.zeros_like(seen, jnp.int32), seen.astype(jnp.int32))
    heads_first = (rearrange(x, "batch tokens heads dim -> batch heads tokens dim") for x in (query, key, value))
    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in heads_first]
    out = jax.vmap(functools.partial(kernel, segment_ids=segments if padding else None))(*padded)
    return rearrange(out[:, :, :tokens], "batch heads tokens dim -> batch tokens heads dim")


def _splash_kernel(heads: int, tokens: int, interpret: bool) -> Any:
    """The splash attention kernel for `tokens` keys and queries, a multiple of `_BLOCK`, or of 128 below it."""
    block = min(_BLOCK, tokens)
    # The backward kernel makes all three gradients from one recomputation of the scores; that of the queries comes in
    # as many parts as there are blocks of keys, therefore large ones.
    keys = next(keys for keys in range(min(_BLOCK_KEYS, tokens), 0, -block) if tokens % keys == 0)
    sizes = splash_attention.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention.MultiHeadMask([splash_attention.FullMask((tokens, tokens))] * heads)
    return splash_attention.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=layers.KEPT,
        interpret=interpret,
    )


class MultiHeadAttention(nn.Module):
    """Queries from `hidden`, keys and values from `context`; the output projection alone has a bias, unless `bias`.

    Without a context, keys and values are in the collection `layers.TEXT`, under the names of their projections.

    Rows that are `perturbed` have the identity as their attention map: each position takes its own value alone. Ahn et
    al. 2024, arXiv:2403.17377, section 4; diffusers `attention_processor.py:PAGIdentitySelfAttnProcessor2_0`.
    """

    heads: int
    compute: Compute
    bias: bool = False
    queries: int | None = None
    """Queries that attend at a time; None: all."""

    @nn.compact
    def __call__(
        self,
        hidden: Float[jax.Array, "batch queries features"],
        context: Float[jax.Array, "batch keys context"] | None,
        perturbed: Bool[jax.Array, "batch"] | None = None,
    ) -> Float[jax.Array, "batch queries features"]:
        features = hidden.shape[-1]

        def project(
            name: str, inputs: Float[jax.Array, "batch tokens features_in"] | None
        ) -> Float[jax.Array, "batch tokens heads dim"]:
            if inputs is None:
                flat = self.get_variable(layers.TEXT, name)
            else:
                flat = dense(features, name, self.compute, use_bias=self.bias)(inputs)
            split = rearrange(flat, "batch tokens (heads dim) -> batch tokens heads dim", heads=self.heads)
            return constrain(split, "batch", None, "tensor", None)

        query, key, value = project("to_q", hidden), project("to_k", context), project("to_v", context)
        if self.queries is None:
            out = dot_product_attention(query, key, value, self.compute.attention)
        else:
            out = chunked_attention(query, key, value, self.compute.attention, self.queries)
        if perturbed is not None:
            out = jnp.where(perturbed[:, None, None, None], value, out)
        merged = rearrange(out, "batch queries heads dim -> batch queries (heads dim)")
        return dense(features, "to_out", self.compute)(merged)


class FeedForward(nn.Module):
    """GEGLU with the exact GELU: (value · gelu(gate)) W. Shazeer 2020, arXiv:2002.05202; value comes first."""

    compute: Compute

    @nn.compact
    def __call__(self, hidden: Float[jax.Array, "batch tokens features"]) -> Float[jax.Array, "batch tokens features"]:
        features = hidden.shape[-1]
        value, gate = jnp.split(dense(8 * features, "proj_in", self.compute)(hidden), 2, axis=-1)
        value, gate = (constrain(part, "batch", None, "tensor") for part in (value, gate))
        return dense(features, "proj_out", self.compute)(value * gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after its norm, around a residual."""

    heads: int
    compute: Compute
    alone: bool = False
    """There is no text: what would be cross-attention is self-attention again."""

    @nn.compact
    def __call__(
        self,
        hidden: Float[jax.Array, "batch positions features"],
        context: Float[jax.Array, "batch tokens context"] | None,
        perturbed: Bool[jax.Array, "batch"] | None = None,
    ) -> tuple[Float[jax.Array, "batch positions features"], None]:
        """Returns (hidden, None): the pair that a scan's body returns. `perturbed` concerns self-attention."""
        hidden = checkpoint_name(constrain(hidden, "batch", None, None), layers.ENTERING)
        normed = layer_norm("norm1", self.compute)(hidden)
        hidden = hidden + MultiHeadAttention(self.heads, self.compute, name="attn1")(normed, normed, perturbed)
        normed = layer_norm("norm2", self.compute)(hidden)
        context = normed if self.alone else context
        hidden = hidden + MultiHeadAttention(self.heads, self.compute, name="attn2")(normed, context)
        normed = layer_norm("norm3", self.compute)(hidden)
        return hidden + FeedForward(self.compute, name="ff")(normed), None


def stack(block: type[nn.Module], depth: int, compute: Compute) -> Any:
    """`depth` copies of a block under one scan; parameters gain a leading axis of that length. Build it with a name."""
    return nn.scan(
        compute.block(block, in_scan=not compute.unroll),
        variable_axes={"params": 0, layers.ADAPTERS: 0, layers.SCALES: 0, layers.TEXT: 1},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (Linen's own marker)
        length=depth,
        unroll=depth if compute.unroll else 1,
        check_constancy_invariants=False,  # it traces the block a second time, for variables that are broadcast
    )


class SpatialTransformer(nn.Module):
    """Norm, projection in, a stack of transformer blocks over all positions, projection out, around a residual.

    The projections are linear (SDXL, SD 2.x) or 1×1 convolutions (SD 1.x): the same sums, different weight shapes.
    """

    heads: int
    depth: int
    groups: int
    conv_projection: bool
    compute: Compute
    alone: bool = False
    """As in `TransformerBlock`."""

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "batch height width channels"],
        context: Float[jax.Array, "batch tokens context"] | None,
        perturbed: Bool[jax.Array, "batch"] | None = None,
    ) -> Float[jax.Array, "batch height width channels"]:
        batch, height, width, channels = x.shape

        def project(
            name: str, inputs: Float[jax.Array, "batch *positions features"], **options: Any
        ) -> Float[jax.Array, "batch *positions features"]:
            if self.conv_projection:
                return conv(channels, name, self.compute, size=1, **options)(inputs)
            return dense(channels, name, self.compute, **options)(inputs)

        hidden = group_norm(self.groups, 1e-6, "norm", self.compute)(x)
        hidden = rearrange(project("proj_in", hidden), "batch height width channels -> batch (height width) channels")
        blocks = stack(TransformerBlock, self.depth, self.compute)
        hidden, _ = blocks(self.heads, self.compute, self.alone, name="transformer_blocks")(hidden, context, perturbed)
        hidden = hidden.reshape(batch, height, width, channels)
        return x + project("proj_out", hidden, kernel_init=initialisers.zeros)
