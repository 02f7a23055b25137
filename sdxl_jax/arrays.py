"""The arrays of the domain: their names, axes, types and ranges, written once.

Axis words are whole words and always the same: batch height width channels tokens features heads. Layout is
batch height width channels (NHWC) everywhere; torch's layout lives in `weights/` alone.

A size or a position is an integer pair in the order (height, width) or (top, left), in pixels. It stays an integer
until the Fourier embedding, because bfloat16 holds integers exactly only up to 256.
"""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

type_of_array = jax.Array | np.ndarray

# A nested dict of arrays: {"down_blocks_0": {"resnets_0": {"conv1": {"kernel": ...}}}}.
Params = dict[str, Any]


class AccumulatorDtype(enum.Enum):
    """Dtype in which a step leaves an average of the parameters, or of the gradient, for the next."""

    FLOAT32 = "float32"
    """4 bytes a parameter."""
    BFLOAT16 = "bfloat16"
    """2 bytes a parameter."""

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.value)


class Size(NamedTuple):
    """Of one image, in pixels: the one type of a (height, width)."""

    height: int
    width: int


Image = Float[type_of_array, "batch height width 3"]
"""Normalised image, -1..1."""

ImageBytes = UInt8[type_of_array, "batch height width 3"]
"""Image as decoded, 0..255, before normalisation."""

TokenIds = Int32[type_of_array, "batch 77"]
"""Token numbers of one tokenizer, with start, end and padding."""

Pixels = Int32[type_of_array, "batch 2"]
"""One size (height, width) or position (top, left) an image, in pixels."""


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}: parameters by path."""
    flat = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """The reverse of `flatten`."""
    params: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return params


def normalise(image: ImageBytes) -> Float[jax.Array, "batch height width 3"]:
    """0..255 to −1..1. The only place where an image changes its range on the way in."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1


def to_bytes(image: Image) -> UInt8[jax.Array, "batch height width 3"]:
    """The way out: −1..1, clipped, rounded to 0..255."""
    return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)


class MicroConditioning(NamedTuple):
    """What the UNet is told about the geometry of each image. SDXL (arXiv:2307.01952), section 2.2 and 2.3."""

    original_size: Pixels
    """Size before any resize (height, width)."""
    crop_top_left: Pixels
    """Where the crop begins, in pixels of the image after the resize and after any flip (top, left)."""
    target_size: Pixels
    """Size that the model sees: the bucket's (height, width)."""
    aesthetic_score: Float[type_of_array, "batch"] | None = None
    """Rating of the image, about 1 to 10. The refiner alone is told it."""


class EncodedBatch(NamedTuple):
    """What frozen encoders made of a batch's images and captions beforehand, in bfloat16."""

    mean: Float[type_of_array, "batch latent_height latent_width channels"]
    """Of the autoencoder's posterior, unscaled: the sample is drawn again each time."""
    log_variance: Float[type_of_array, "batch latent_height latent_width channels"]
    context: Float[type_of_array, "batch 77 features"]
    """Text states that the UNet attends to."""
    pooled: Float[type_of_array, "batch projection"] | None


class Batch(NamedTuple):
    """One training step's examples, all of one bucket, as the data pipeline hands them over (numpy) or on devices."""

    image: ImageBytes | None
    """None where `encoded` stands for it."""
    tokens: dict[str, TokenIds]
    """One entry a tokenizer, keyed as the conditioning asks for it."""
    micro: MicroConditioning
    example: Int32[type_of_array, "batch"]
    """The examples' numbers in the data, all sources in a row: for logs and tests, the model never sees them."""
    replaced: Bool[type_of_array, "batch"]
    """Which examples stand in for a damaged image: for logs."""
    encoded: EncodedBatch | None = None
    """What was read from a cache."""
