"""LPIPS, the learned perceptual distance of two images, and `psim`: distances of the features of a frozen network.

    image −1..1 ── (x − shift) / scale ── five layers f of VGG16 or AlexNet, after their ReLU ── n = f / (|f| + 1e-10)
    LPIPS = Σ over layers of the mean over positions of Σ over channels of w (n_x − n_y)²,  w ≥ 0 learned
    psim  = Σ over layers of the mean over positions of Σ over channels of (n_x − n_y)² / 2  =  Σ 1 − mean cosine

LPIPS is version 0.1 of Zhang et al. (arXiv:1801.03924): one number per image. Tables give it with AlexNet, losses use
VGG16. Its training has dropout before w; here there is none, in training neither.

`psim` is the scale of the column that SDXL's table 3 calls LPIPS (0.88), which is not LPIPS (0.12 for the same images).
Nobody has published how it is computed. This is the likeliest candidate, the `PNet` of SynSin (arXiv:1912.08804) with
VGG16: between 0 and 5, and of the right size. Compare it with other people's figures with that in mind.

Not here: the weights, which `evaluation.weights` finds.
"""

import enum
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdxl_jax.arrays import Image, Params
from sdxl_jax.errors import InputError
from sdxl_jax.models import initialisers
from sdxl_jax.models.initialisers import Distribution, Parameter
from sdxl_jax.models.layers import Compute, conv

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_COMPUTE = Compute()
"""float32: differences of features lose their digits in bfloat16."""


class Backbone(enum.Enum):
    """The network whose features are compared."""

    VGG = "vgg"
    """VGG16: training losses, and `psim`."""
    ALEX = "alex"
    """AlexNet: tables."""


class _Conv(NamedTuple):
    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    compared: bool = False
    """Whether its result is one of the five."""


class _Pool(NamedTuple):
    size: int


_LAYERS: dict[Backbone, tuple[_Conv | _Pool, ...]] = {
    Backbone.VGG: (
        *(_Conv(64), _Conv(64, compared=True), _Pool(2)),
        *(_Conv(128), _Conv(128, compared=True), _Pool(2)),
        *(_Conv(256), _Conv(256), _Conv(256, compared=True), _Pool(2)),
        *(_Conv(512), _Conv(512), _Conv(512, compared=True), _Pool(2)),
        *(_Conv(512), _Conv(512), _Conv(512, compared=True)),
    ),
    Backbone.ALEX: (
        *(_Conv(64, 11, 4, 2, compared=True), _Pool(3)),
        *(_Conv(192, 5, 1, 2, compared=True), _Pool(3)),
        *(_Conv(384, compared=True), _Conv(256, compared=True), _Conv(256, compared=True)),
    ),
}
SMALLEST = {Backbone.VGG: 16, Backbone.ALEX: 31}
"""Pixels of the shorter side at which the last layer still has a position."""


class _Features(nn.Module):
    backbone: Backbone

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "batch height width 3"]
    ) -> list[Float[jax.Array, "batch rows columns channels"]]:
        x = (x - jnp.array(_SHIFT)) / jnp.array(_SCALE)
        found, number = [], 0
        for layer in _LAYERS[self.backbone]:
            if isinstance(layer, _Pool):
                x = nn.max_pool(x, (layer.size, layer.size), strides=(2, 2))
                continue
            convolution = conv(
                *(layer.features, f"conv_{number}", _COMPUTE, layer.size), strides=layer.stride, padding=layer.padding
            )
            x, number = nn.relu(convolution(x)), number + 1
            found += [x] if layer.compared else []
        return found


def features(backbone: Backbone, params: Params, image: Image) -> list[Float[jax.Array, "batch rows columns channels"]]:
    """What is compared of an image, −1..1: the results of five layers, from the finest. params: `backbone` of
    `abstract`. Raises InputError for images that are too small."""
    height, width = image.shape[1:3]
    if min(height, width) < (smallest := SMALLEST[backbone]):
        raise InputError(
            f"LPIPS ({backbone.value}) compares images of {smallest} pixels and more; these are {height}×{width}. Give "
            "larger images, or enlarge both alike"
        )
    return _Features(backbone).apply({"params": params}, image)  # pyright: ignore[reportReturnType]


def _differences(
    backbone: Backbone, params: Params, x: Image, y: Image
) -> list[Float[jax.Array, "batch rows columns channels"]]:
    """(n_x − n_y)² of each layer."""
    # One after the other: a gradient with respect to one image alone then leaves the other's network out.
    of_x, of_y = (features(backbone, params["backbone"], image) for image in (x, y))
    return [jnp.square(_unit(a) - _unit(b)) for a, b in zip(of_x, of_y, strict=True)]


def _unit(
    features: Float[jax.Array, "batch rows columns channels"],
) -> Float[jax.Array, "batch rows columns channels"]:
    """f / (|f| + 1e-10). Zero, with a gradient of zero, where all features are."""
    squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # The root's own gradient at 0 is infinite.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return features / (norm + 1e-10)


def lpips(backbone: Backbone, params: Params, x: Image, y: Image) -> Float[jax.Array, "batch"]:
    """LPIPS of each pair of images, −1..1: 0 for equal ones, seldom above 1. Both may have a gradient.

    params: `backbone`, and the learned weights of each layer, as `abstract` has them. Raises InputError for images
    that are smaller than 16 pixels (VGG) or 31 pixels (AlexNet).
    """
    layers = enumerate(_differences(backbone, params, x, y))
    return sum((each @ params[f"layer_{n}"]["scale"]).mean((1, 2)) for n, each in layers)  # pyright: ignore[reportReturnType]


def psim(params: Params, x: Image, y: Image) -> Float[jax.Array, "batch"]:
    """`psim` of each pair of images, −1..1: from 0, for equal ones, to 5. params: those of LPIPS with VGG, whose
    learned weights are not used. Raises InputError as `lpips`."""
    differences = _differences(Backbone.VGG, params, x, y)
    return sum(each.sum(-1).mean((1, 2)) / 2 for each in differences)  # pyright: ignore[reportReturnType]


@functools.cache
def abstract(backbone: Backbone) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`): features random, w one."""
    side = SMALLEST[backbone]
    features = initialisers.abstract(_Features(backbone), jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    compared = [layer for layer in _LAYERS[backbone] if isinstance(layer, _Conv) and layer.compared]
    weights = {
        f"layer_{n}": {"scale": Parameter((layer.features,), Distribution(1.0))} for n, layer in enumerate(compared)
    }
    return {"backbone": features, **weights}
