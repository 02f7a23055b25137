"""Attention and the transformer blocks of the UNet.

`dot_product_attention` is the one place where an implementation is chosen; kernels for TPU and GPU are further members
of `layers.Attention` and further branches there. The blocks of one level are stacked on a leading axis and run under a
scan, so that compile time does not grow with depth (the SDXL base has 70 blocks, in 11 stacks).
"""

from typing import Any

import flax.linen as nn
import jax
from einops import rearrange
from jaxtyping import Float

from sdxl_jax.models import layers
from sdxl_jax.models.layers import Compute, conv, dense, group_norm, layer_norm


def dot_product_attention(
    query: Float[jax.Array, "batch queries heads dim"],
    key: Float[jax.Array, "batch keys heads dim"],
    value: Float[jax.Array, "batch keys heads dim"],
    implementation: layers.Attention,
    causal: bool = False,
) -> Float[jax.Array, "batch queries heads dim"]:
    """softmax(q kᵀ / √dim) v, the softmax in float32. Causal: a query sees keys up to its own position."""
    match implementation:
        case layers.Attention.XLA:
            return jax.nn.dot_product_attention(query, key, value, is_causal=causal, implementation="xla")


class MultiHeadAttention(nn.Module):
    """Queries from `hidden`, keys and values from `context`; the output projection alone has a bias, unless `bias`."""

    heads: int
    compute: Compute
    bias: bool = False

    @nn.compact
    def __call__(
        self, hidden: Float[jax.Array, "batch queries features"], context: Float[jax.Array, "batch keys context"]
    ) -> Float[jax.Array, "batch queries features"]:
        features = hidden.shape[-1]

        def project(name: str, inputs: jax.Array) -> jax.Array:
            flat = dense(features, name, self.compute, use_bias=self.bias)(inputs)
            return rearrange(flat, "batch tokens (heads dim) -> batch tokens heads dim", heads=self.heads)

        query, key, value = project("to_q", hidden), project("to_k", context), project("to_v", context)
        out = dot_product_attention(query, key, value, self.compute.attention)
        return dense(features, "to_out", self.compute)(rearrange(out, "b tokens heads dim -> b tokens (heads dim)"))


class FeedForward(nn.Module):
    """GEGLU with the exact GELU: (value · gelu(gate)) W. Shazeer 2020, arXiv:2002.05202; value comes first."""

    compute: Compute

    @nn.compact
    def __call__(self, hidden: Float[jax.Array, "batch tokens features"]) -> Float[jax.Array, "batch tokens features"]:
        features = hidden.shape[-1]
        value, gate = jax.numpy.split(dense(8 * features, "proj_in", self.compute)(hidden), 2, axis=-1)
        return dense(features, "proj_out", self.compute)(value * nn.gelu(gate, approximate=False))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind its norm, around a residual."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(
        self, hidden: Float[jax.Array, "batch tokens features"], context: Float[jax.Array, "batch words context"]
    ) -> tuple[Float[jax.Array, "batch tokens features"], None]:
        """Returns (hidden, None): the pair that a scan's body returns."""
        normed = layer_norm("norm1", self.compute)(hidden)
        hidden = hidden + MultiHeadAttention(self.heads, self.compute, name="attn1")(normed, normed)
        normed = layer_norm("norm2", self.compute)(hidden)
        hidden = hidden + MultiHeadAttention(self.heads, self.compute, name="attn2")(normed, context)
        normed = layer_norm("norm3", self.compute)(hidden)
        return hidden + FeedForward(self.compute, name="ff")(normed), None


def stack(block: type[nn.Module], depth: int, compute: Compute) -> Any:
    """`depth` copies of a block under one scan; parameters gain a leading axis of that length. Build it with a name."""
    return nn.scan(
        compute.block(block, in_scan=not compute.unroll),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (Linen's own marker)
        length=depth,
        unroll=depth if compute.unroll else 1,
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

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width channels"], context: Float[jax.Array, "batch words context"]
    ) -> Float[jax.Array, "batch height width channels"]:
        batch, height, width, channels = x.shape

        def project(name: str, inputs: jax.Array, **options: Any) -> jax.Array:
            if self.conv_projection:
                return conv(channels, name, self.compute, size=1, **options)(inputs)
            return dense(channels, name, self.compute, **options)(inputs)

        hidden = group_norm(self.groups, 1e-6, "norm", self.compute)(x)
        hidden = rearrange(project("proj_in", hidden), "b height width channels -> b (height width) channels")
        blocks = stack(TransformerBlock, self.depth, self.compute)
        hidden, _ = blocks(self.heads, self.compute, name="transformer_blocks")(hidden, context)
        hidden = hidden.reshape(batch, height, width, channels)
        return x + project("proj_out", hidden, kernel_init=nn.initializers.zeros)
