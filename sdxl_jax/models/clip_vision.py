"""The image towers of CLIP: OpenAI's L at 224² and 336², OpenCLIP's H and bigG, and smaller ones of the same shape.

    image ── patches of 14×14, one convolution ── [class, patches] + positions ── norm ── transformer, without a mask
          ── state of the class token ── norm ── projection ── embedding

The layers are those of the text towers (`clip`). CMMD and the CLIP score compare embeddings; image prompts condition on
them (Revision, IP-Adapter). Sources: Radford et al. (arXiv:2103.00020), Dosovitskiy et al. (arXiv:2010.11929),
transformers `modeling_clip.py`.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from sdxl_jax.arrays import Params
from sdxl_jax.models import initialisers
from sdxl_jax.models.attention import stack
from sdxl_jax.models.clip import Activation, ClipLayer
from sdxl_jax.models.layers import Compute, conv, dense, layer_norm


@dataclass(frozen=True)
class ClipVisionConfig:
    """What a tower's weights depend on. The defaults are CLIP-L's."""

    width: int = 1024
    """Features of a patch."""
    layers: int = 24
    """Transformer layers."""
    heads: int = 16
    """Attention heads."""
    mlp_width: int = 4096
    """Hidden features of the feed-forward."""
    activation: Activation = Activation.QUICK_GELU
    """The feed-forward's nonlinearity."""
    projection_dim: int = 768
    """Features of the embedding, which it shares with the text tower."""
    side: int = 224
    """Pixels of the image's sides, a multiple of `patch`."""
    patch: int = 14
    """Pixels of a patch's sides."""

    @property
    def positions(self) -> int:
        """The class token and the patches."""
        return 1 + (self.side // self.patch) ** 2


VISION_L = ClipVisionConfig()
VISION_L_336 = ClipVisionConfig(side=336)
VISION_H = ClipVisionConfig(1280, 32, 16, 5120, Activation.GELU, 1024)
VISION_BIGG = ClipVisionConfig(1664, 48, 16, 8192, Activation.GELU, 1280)


class ImageStates(NamedTuple):
    """A tower's states for a batch of images. The position of the class token is the first."""

    penultimate: Float[jax.Array, "batch positions features"]
    """Before the last layer, not normed."""
    last: Float[jax.Array, "batch positions features"]
    """After the last layer, not normed."""
    pooled: Float[jax.Array, "batch features"]
    """The class token's last state, normed."""
    embedding: Float[jax.Array, "batch projection"]
    """`pooled` times the projection, not of unit length."""


class ClipVision(nn.Module):
    config: ClipVisionConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, pixels: Float[jax.Array, "batch side side 3"]) -> ImageStates:
        config, compute = self.config, self.compute
        # Standard deviations of CLIP's own initialisation (its model.py).
        initial = initialisers.normal(config.width**-0.5)
        embed = conv(
            *(config.width, "patch_embedding", compute, config.patch), strides=config.patch, padding=0, use_bias=False
        )
        patches = rearrange(embed(pixels), "batch rows columns features -> batch (rows columns) features")
        token = self.param("class_embedding", initial, (config.width,), jnp.float32).astype(compute.activations)
        token = jnp.broadcast_to(token, (len(patches), 1, config.width))
        positions = self.param("position_embedding", initial, (config.positions, config.width), jnp.float32)
        hidden = jnp.concatenate([token, patches], axis=1) + positions.astype(compute.activations)
        hidden = layer_norm("pre_layernorm", compute)(hidden)
        layers = stack(ClipLayer, config.layers, compute)(config, compute, causal=False, name="layers")
        (last, penultimate), _ = layers((hidden, hidden), None)
        pooled = layer_norm("post_layernorm", compute)(last[:, 0])
        embedding = dense(config.projection_dim, "visual_projection", compute, use_bias=False)(pooled)
        return jax.tree.map(lambda x: x.astype(jnp.float32), ImageStates(penultimate, last, pooled, embedding))


def encode(
    config: ClipVisionConfig,
    params: Params,
    pixels: Float[jax.Array, "batch side side 3"],
    compute: Compute = Compute(),
) -> ImageStates:
    """The states of a batch of images, float32. pixels: as `sampling.clip_images` makes them."""
    return ClipVision(config, compute).apply({"params": params}, pixels)  # pyright: ignore[reportReturnType]


@functools.cache
def abstract(config: ClipVisionConfig) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`)."""
    return initialisers.abstract(
        ClipVision(config), jax.ShapeDtypeStruct((1, config.side, config.side, 3), jnp.float32)
    )
