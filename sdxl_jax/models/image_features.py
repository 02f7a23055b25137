"""Features of images for a discriminator: frozen networks that were pretrained, behind one interface.

    image −1..1 ── frozen network ── features of several layers, and one vector of the whole image

A discriminator that judges features of a pretrained network (Sauer et al. 2021, arXiv:2111.01007) trains in far fewer
steps than one that judges pixels. ADD (arXiv:2311.17042) has DINOv2; VGG16 is the network whose weights this project
can fetch (`evaluation.weights`, those of LPIPS).

Not here: the heads that judge (`discriminator_heads`), and the features of a UNet (`unet.middle_features`).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import Image, Params
from sdxl_jax.errors import InputError
from sdxl_jax.models import dinov2, lpips
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.models.lpips import Backbone

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's images, 0..1."""
DINOV2_LAYERS = (0, 3, 6, 9, 12)
"""Numbers of layers after which ADD's discriminator looks at a network of 12; 0: the patches themselves."""


class Features(NamedTuple):
    layers: tuple[Float[jax.Array, "batch *positions channels"], ...]
    """Of several layers, from the first: [batch, tokens, channels] or [batch, rows, columns, channels]."""
    embedding: Float[jax.Array, "batch features"]
    """Of the whole image."""


@runtime_checkable
class FeatureNetwork(Protocol):
    """A frozen network that makes features. Hashable; it holds no arrays."""

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each layer's features."""
        ...

    @property
    def axes(self) -> int:
        """1 for features that are tokens, 2 for rows and columns."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Features of the embedding."""
        ...

    @property
    def smallest(self) -> int:
        """Pixels of an image's shorter side that are needed."""
        ...

    def abstract(self) -> Params:
        """The network's parameters, none of them made."""
        ...

    def __call__(self, params: Params, image: Image) -> Features:
        """The features of images. Differentiable in the image."""
        ...


@dataclass(frozen=True)
class VggFeatures:
    """VGG16 after the five stages that LPIPS compares. The embedding is the mean of the last over all positions."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    axes: int = 2
    embedding_dim: int = 512
    smallest: int = lpips.SMALLEST[Backbone.VGG]

    def abstract(self) -> Params:
        return lpips.abstract(Backbone.VGG)["backbone"]

    def __call__(self, params: Params, image: Image) -> Features:
        found = lpips.features(Backbone.VGG, params, image)
        return Features(tuple(found), found[-1].mean((1, 2)))


@dataclass(frozen=True)
class DinoV2Features:
    """The patches' states of DINOv2 after some of its layers. The embedding is that of the class token."""

    config: DinoV2Config
    layers: tuple[int, ...] = DINOV2_LAYERS
    """Numbers of layers after which the states are taken, 0 for those before the first."""

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.config.width,) * len(self.layers)

    @property
    def axes(self) -> int:
        return 1

    @property
    def embedding_dim(self) -> int:
        return self.config.width

    @property
    def smallest(self) -> int:
        return self.config.patch

    def check(self) -> None:
        """Raises InputError for layers that the network does not have."""
        if wrong := [layer for layer in self.layers if not 0 <= layer <= self.config.layers] or not self.layers:
            given = wrong[0] if isinstance(wrong, list) else "none"
            raise InputError(
                f"Features are to be taken after layer {given}, but this DINOv2 has {self.config.layers} layers. Give "
                f"numbers from 0 to {self.config.layers}"
            )

    def abstract(self) -> Params:
        return dinov2.abstract(self.config)

    def __call__(self, params: Params, image: Image) -> Features:
        """Images whose sides are not multiples of the patch are made a little smaller (bilinear)."""
        batch, height, width, _ = image.shape
        patch, found = self.config.patch, jnp.asarray(image)
        size = height // patch * patch, width // patch * patch
        if size != (height, width):
            found = jax.image.resize(found, (batch, *size, 3), "bilinear")
        pixels = ((found + 1) / 2 - jnp.array(_MEAN)) / jnp.array(_DEVIATION)
        states = dinov2.encode(self.config, params, pixels)
        return Features(tuple(states.layers[layer][:, 1:] for layer in self.layers), states.embedding)
