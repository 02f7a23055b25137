"""DINOv2, the image transformers of Oquab et al. (arXiv:2304.07193): sizes S, B and L, and smaller ones of that shape.

    image ── patches of 14×14, one convolution ── [class, patches] + positions ── layers ── norm ── class token

A layer is pre-norm with a scale for each feature after attention and feed-forward. Positions are learned for one size
of image, 37×37 patches; for another size the table is interpolated (bicubic, a = −0.75, as torch's). Discriminators
judge the states of several layers (`features`). Source of names and numbers: transformers `modeling_dinov2.py`.

Not here: the giant size, whose feed-forward is SwiGLU, register tokens, and the head that DINOv2 is trained with.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from sdxl_jax.arrays import Params
from sdxl_jax.models import initialisers
from sdxl_jax.models.attention import dot_product_attention, stack
from sdxl_jax.models.layers import Compute, conv, dense, gelu, layer_norm

_EPSILON = 1e-6
_BICUBIC = -0.75


@dataclass(frozen=True)
class DinoV2Config:
    """What the weights depend on. The defaults are those of the size S."""

    width: int = 384
    """Features of a patch."""
    layers: int = 12
    """Transformer layers."""
    heads: int = 6
    """Attention heads."""
    mlp_width: int = 1536
    """Hidden features of the feed-forward."""
    side: int = 518
    """Pixels of the sides of the images whose positions are in the table, a multiple of `patch`."""
    patch: int = 14
    """Pixels of a patch's sides."""

    @property
    def rows(self) -> int:
        """Rows and columns of the table of positions."""
        return self.side // self.patch


DINOV2_S = DinoV2Config()


class DinoV2States(NamedTuple):
    """The states of a batch of images, float32. The position of the class token is the first."""

    layers: Float[jax.Array, "states batch positions features"]
    """Before the first layer, and after each: one more than there are layers. Not normed."""
    embedding: Float[jax.Array, "batch features"]
    """The class token's last state, normed."""


class _Layer(nn.Module):
    config: DinoV2Config
    compute: Compute

    @nn.compact
    def __call__(
        self, hidden: Float[jax.Array, "batch positions features"], _: None
    ) -> tuple[Float[jax.Array, "batch positions features"], Float[jax.Array, "batch positions features"]]:
        """(states, the same states, which a scan collects)."""
        config, compute = self.config, self.compute

        def project(
            name: str, inputs: Float[jax.Array, "batch positions features"]
        ) -> Float[jax.Array, "batch positions heads dim"]:
            flat = dense(config.width, name, compute)(inputs)
            return rearrange(flat, "batch positions (heads dim) -> batch positions heads dim", heads=config.heads)

        def scaled(
            name: str, inputs: Float[jax.Array, "batch positions features"]
        ) -> Float[jax.Array, "batch positions features"]:
            return inputs * self.param(name, initialisers.ones, (config.width,), jnp.float32).astype(inputs.dtype)

        normed = layer_norm("norm1", compute, _EPSILON)(hidden)
        query, key, value = (project(name, normed) for name in ("query", "key", "value"))
        mixed = dot_product_attention(query, key, value, compute.attention)
        mixed = rearrange(mixed, "batch positions heads dim -> batch positions (heads dim)")
        hidden = hidden + scaled("layer_scale1", dense(config.width, "out", compute)(mixed))

        normed = layer_norm("norm2", compute, _EPSILON)(hidden)
        inner = gelu(dense(config.mlp_width, "fc1", compute)(normed))
        hidden = hidden + scaled("layer_scale2", dense(config.width, "fc2", compute)(inner))
        return hidden, hidden


class DinoV2(nn.Module):
    config: DinoV2Config
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, pixels: Float[jax.Array, "batch height width 3"]) -> DinoV2States:
        config, compute = self.config, self.compute
        initial = initialisers.normal(0.02)
        embed = conv(config.width, "patch_embedding", compute, config.patch, strides=config.patch, padding=0)
        patches = embed(pixels)
        rows, columns = patches.shape[1:3]
        patches = rearrange(patches, "batch rows columns features -> batch (rows columns) features")
        token = self.param("cls_token", initial, (1, 1, config.width), jnp.float32)
        positions = self.param("position_embeddings", initial, (1, 1 + config.rows**2, config.width), jnp.float32)
        token = jnp.broadcast_to(token.astype(compute.activations), (len(patches), 1, config.width))
        hidden = jnp.concatenate([token, patches], axis=1)
        hidden += interpolated(positions, rows, columns).astype(compute.activations)
        last, states = stack(_Layer, config.layers, compute)(config, compute, name="layers")(hidden, None)
        embedding = layer_norm("norm", compute, _EPSILON)(last[:, 0])
        states = jnp.concatenate([hidden[None], states])
        return jax.tree.map(lambda x: x.astype(jnp.float32), DinoV2States(states, embedding))


def interpolated(
    positions: Float[jax.Array, "1 positions features"], rows: int, columns: int
) -> Float[jax.Array, "1 positions_out features"]:
    """The table of positions for so many rows and columns of patches."""
    side = int((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    table = rearrange(positions[0, 1:], "(rows columns) features -> rows columns features", rows=side)
    table = jnp.einsum("rcf,ar,bc->abf", table, bicubic(side, rows), bicubic(side, columns))
    return jnp.concatenate([positions[:, :1], table.reshape(1, rows * columns, -1)], axis=1)


def bicubic(size: int, size_out: int) -> Float[np.ndarray, "size_out size"]:
    """The matrix of a bicubic interpolation of one axis, as torch's `interpolate`: a = −0.75, without antialiasing, and
    the outermost values repeated beyond the edges. Keys 1981, eq. 8."""
    place = (np.arange(size_out) + 0.5) * size / size_out - 0.5
    first = np.floor(place).astype(int)
    matrix = np.zeros((size_out, size), np.float32)
    for offset in range(-1, 3):
        d, a = np.abs(place - first - offset), _BICUBIC
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0))
        np.add.at(matrix, (np.arange(size_out), np.clip(first + offset, 0, size - 1)), weight)
    return matrix


def encode(
    config: DinoV2Config,
    params: Params,
    pixels: Float[jax.Array, "batch height width 3"],
    compute: Compute = Compute(),
) -> DinoV2States:
    """The states of a batch of images. pixels: with the mean and deviation of ImageNet, both sides multiples of
    `patch`."""
    return DinoV2(config, compute).apply({"params": params}, pixels)  # pyright: ignore[reportReturnType]


@functools.cache
def abstract(config: DinoV2Config) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`)."""
    return initialisers.abstract(DinoV2(config), jax.ShapeDtypeStruct((1, config.side, config.side, 3), jnp.float32))
