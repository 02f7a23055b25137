"""The array types of the domain: names, axes, dtypes and ranges, defined once.

Axis names are whole words and always the same: batch height width channels tokens features heads. The layout is
batch height width channels (NHWC) everywhere; torch's layout is confined to `weights/`.

A size or a position is an integer pair in the order (height, width) or (top, left), in pixels. It stays an integer
until the Fourier embedding, because bfloat16 represents integers exactly only up to 256.
"""

import enum
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

type_of_array = jax.Array | np.ndarray

# A nested dict of arrays: {"down_blocks_0": {"resnets_0": {"conv1": {"kernel": ...}}}}.
Params = dict[str, Any]


class AccumulatorDtype(enum.Enum):
    """Dtype of an accumulator that is carried from step to step: an average of the parameters or of the gradient."""

    FLOAT32 = "float32"
    """4 bytes per parameter."""
    BFLOAT16 = "bfloat16"
    """2 bytes per parameter."""

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.value)


class BaseDtype(enum.Enum):
    """How a frozen model is kept, beside which something else is trained."""

    FLOAT32 = "float32"
    """4 bytes per parameter."""
    BFLOAT16 = "bfloat16"
    """2 bytes per parameter."""
    INT8 = "int8"
    """1 byte per weight of a kernel, and a scale for each of its output channels (`weights.eight_bits`); 2 bytes for
    everything else."""

    @property
    def dtype(self) -> Any:
        """Of what is not in eight bits."""
        return jnp.dtype("bfloat16" if self is BaseDtype.INT8 else self.value)


class Distribution(NamedTuple):
    """A constant, a normal distribution, or a uniform one."""

    mean: float = 0.0
    deviation: float = 0.0
    """Standard deviation before truncation; 0: a constant."""
    bound: float = math.inf
    """Deviations from the mean at which it is truncated."""
    half_width: float = 0.0
    """Half the width of a uniform distribution around the mean; 0: it is normal, or a constant."""


@dataclass(frozen=True)
class Parameter:
    """A parameter that is not made yet; it can stand in for an abstract array (ShapeDtypeStruct)."""

    shape: tuple[int, ...]
    distribution: Distribution

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)


Image = Float[type_of_array, "batch height width 3"]
"""Normalised image, -1..1."""

ImageBytes = UInt8[type_of_array, "batch height width 3"]
"""Image as decoded, 0..255, before normalisation."""

TokenIds = Int32[type_of_array, "batch 77"]
"""Token ids of one tokeniser, with start, end and padding."""

Pixels = Int32[type_of_array, "batch 2"]
"""One size (height, width) or position (top, left) per image, in pixels."""


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
    """0..255 to −1..1. The only place where the range of an input image changes."""
    return jnp.asarray(image, jnp.float32) / 127.5 - 1


def to_bytes(image: Image) -> UInt8[jax.Array, "batch height width 3"]:
    """−1..1, clipped, rounded to 0..255: the reverse of `normalise`, for output."""
    return jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5).astype(jnp.uint8)


class MicroConditioning(NamedTuple):
    """Micro-conditioning: the geometry of each image that the UNet is conditioned on. SDXL (arXiv:2307.01952), sections
    2.2 and 2.3."""

    original_size: Pixels
    """Size before any resize (height, width)."""
    crop_top_left: Pixels
    """Top left corner of the crop, in pixels of the image after the resize and after any flip (top, left)."""
    target_size: Pixels
    """Size of the training image after the crop: the bucket's (height, width)."""
    aesthetic_score: Float[type_of_array, "batch"] | None = None
    """Rating of the image, about 1 to 10. Only the refiner is conditioned on it."""
    kept: Float[type_of_array, "batch conditions"] | None = None
    """1 where a condition is kept, 0 where it is dropped, in the order of the model's conditions
    (`conditioning.micro`). None: all are kept."""


class EncodedBatch(NamedTuple):
    """Precomputed outputs of the frozen encoders for a batch's images and captions, in bfloat16."""

    mean: Float[type_of_array, "batch latent_height latent_width channels"]
    """Mean of the autoencoder's posterior, unscaled: each epoch draws a new sample from it."""
    log_variance: Float[type_of_array, "batch latent_height latent_width channels"]
    """Logarithm of the posterior's variance."""
    context: Float[type_of_array, "batch 77 features"] | None
    """Text states for the UNet's cross-attention; None for models without text encoders."""
    pooled: Float[type_of_array, "batch projection"] | None
    """Pooled text embedding; None for models without one."""
    image_embedding: Float[type_of_array, "batch projection"] | None = None
    """Of the crop, by CLIP's image tower; None where there are no image prompts."""


class Batch(NamedTuple):
    """The examples of one training step, all of one bucket: numpy from the data pipeline, or jax on devices."""

    image: ImageBytes | None
    """None where `encoded` takes its place."""
    tokens: dict[str, TokenIds]
    """Token ids by the name of the text encoder."""
    micro: MicroConditioning
    example: Int32[type_of_array, "batch"]
    """The examples' numbers in the data, counted over all sources: for logs and tests, not an input of the model."""
    replaced: Bool[type_of_array, "batch"]
    """Which examples replace a damaged image: for logs."""
    encoded: EncodedBatch | None = None
    """Precomputed encodings from a cache."""
    label: Int32[type_of_array, "batch"] | None = None
    """Number of each image's class; None where the model is not conditioned on classes."""
    loss_weight: Float[type_of_array, "batch"] | None = None
    """Factor of each example's loss; None: all count alike."""
    base_target: Bool[type_of_array, "batch"] | None = None
    """Which examples are compared with the frozen model's own prediction; None: none."""
    mask: UInt8[type_of_array, "batch height width"] | None = None
    """How much each pixel counts in the loss, 0..255; None: all of them do."""
