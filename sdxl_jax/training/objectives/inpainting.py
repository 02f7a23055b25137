"""Training of models for inpainting: the UNet sees a mask, and the latent of the image without what is masked.

    image ─┬─ encode, sample ── latent ── add noise ──┐
           │                                          ├── UNet of 2 × channels + 1 ── error of the whole latent
    mask ──┴─ hidden pixels 0 ── encode ── + mask ────┘

As Stable Diffusion's inpainting models were trained: random masks of LaMa's strategy (Suvorov et al. 2021,
arXiv:2109.07161, section 2.3), and some of the whole image. The mask and the masked image come to the UNet as they do
in sampling (`sampling.program.encode`, `sampling.init_images.latent_mask`). The first convolution of a model without
these inputs gets zeros for them (`training.initial`), so that it begins as what it was.

Masks are made on the devices, from the example's key: they are others in every epoch, and resume to the bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Bool, Float, Key, UInt8

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.config import InpaintingConfig, TrainConfig
from sdxl_jax.data.examples import crop_of, images_of
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.diffusion.loss import Network
from sdxl_jax.model import autoencoder
from sdxl_jax.sampling import program
from sdxl_jax.sizes import Size

Array = jax.Array

_MASK = 3
"""Folded into an example's key of dropout, whose own uses are 0 to 2 (`denoising`)."""

_SIDE = 256
"""Of the images of LaMa's settings: its numbers below are in pixels of these, and scale with the shorter side."""
_BOXES, _BOX_PX, _MARGIN_PX = 3, (30, 150), 10
"""Largest number of boxes; their sides, and their distance from the border."""
_STROKES, _LINES, _LENGTH_PX, _WIDTH_PX = 5, 5, (10, 210), (5, 105)
"""Largest number of strokes, and of connected lines in each; a line's length and width."""


def random_mask(
    key: Key[Array, ""], height: int, width: int, config: InpaintingConfig
) -> Bool[Array, "{height} {width}"]:
    """True where the image is hidden: boxes, strokes, or everywhere. Sizes and numbers are LaMa's, directions
    uniform."""
    kind_key, boxes_key, strokes_key = jax.random.split(key, 3)
    kind = jax.random.uniform(kind_key)
    boxes_until = config.whole_share + (1 - config.whole_share) * config.box_share
    drawn = jnp.where(kind < boxes_until, _boxes(boxes_key, height, width), _strokes(strokes_key, height, width))
    return jnp.where(kind < config.whole_share, True, drawn)


def _boxes(key: Key[Array, ""], height: int, width: int) -> Bool[Array, "{height} {width}"]:
    scale = min(height, width) / _SIDE
    count_key, size_key, place_key = jax.random.split(key, 3)
    low, high = (scale * side for side in _BOX_PX)
    size = jax.random.uniform(size_key, (2, _BOXES, 1, 1), minval=low, maxval=high)
    room = jnp.array([height, width])[:, None, None, None] - 2 * scale * _MARGIN_PX - size
    top, left = scale * _MARGIN_PX + room * jax.random.uniform(place_key, size.shape)
    down, right = _pixels(height, width)
    inside = (top <= down) & (down < top + size[0]) & (left <= right) & (right < left + size[1])
    exists = jnp.arange(_BOXES) < jax.random.randint(count_key, (), 1, _BOXES + 1)
    return (inside & exists[:, None, None]).any(0)


def _strokes(key: Key[Array, ""], height: int, width: int) -> Bool[Array, "{height} {width}"]:
    scale, shape = min(height, width) / _SIDE, (_LINES, _STROKES)
    count_key, lines_key, start_key, angle_key, length_key, width_key = jax.random.split(key, 6)
    length, thickness = (
        jax.random.uniform(each, shape, minval=scale * low, maxval=scale * high)
        for each, (low, high) in ((length_key, _LENGTH_PX), (width_key, _WIDTH_PX))
    )
    angle = jax.random.uniform(angle_key, shape, maxval=2 * jnp.pi)
    steps = length[..., None] * jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1)
    border = jnp.array([height, width], jnp.float32)
    points = [border * jax.random.uniform(start_key, (_STROKES, 2))]
    for step in steps:
        points.append(jnp.clip(points[-1] + step, 0, border))
    strokes = jnp.arange(_STROKES) < jax.random.randint(count_key, (), 1, _STROKES + 1)
    lines = jnp.arange(_LINES)[:, None] < jax.random.randint(lines_key, (_STROKES,), 1, _LINES + 1)
    # At least a pixel wide, so that small images have strokes too: √½ is the distance of a corner from its middle.
    radius = jnp.maximum(thickness / 2, 0.75)
    distance = _distance(height, width, jnp.concatenate(points[:-1]), jnp.concatenate(points[1:]))
    return ((distance <= radius.reshape(-1, 1, 1)) & (strokes & lines).reshape(-1, 1, 1)).any(0)


def _pixels(height: int, width: int) -> tuple[Float[Array, "{height} 1"], Float[Array, " {width}"]]:
    """The middle of each pixel: down, right."""
    return jnp.arange(height)[:, None] + 0.5, jnp.arange(width) + 0.5


def _distance(
    height: int, width: int, start: Float[Array, "lines 2"], end: Float[Array, "lines 2"]
) -> Float[Array, "lines {height} {width}"]:
    """Of each pixel from each line between two points. Elementwise, so that XLA stores nothing of this size."""
    line = (end - start)[:, :, None, None]
    below, beside = (
        place - first for place, first in zip(_pixels(height, width), start.T[:, :, None, None], strict=True)
    )
    share = (below * line[:, 0] + beside * line[:, 1]) / jnp.maximum((line**2).sum(1), 1e-6)
    share = jnp.clip(share, 0, 1)
    return jnp.hypot(below - share * line[:, 0], beside - share * line[:, 1])


def mask_channels(
    batch: Batch, params: Params, keys: Key[Array, " batch"], config: TrainConfig
) -> Float[Array, "batch latent_height latent_width mask_channels"]:
    """What the UNet sees besides the latent: the mask, 1 in each position that it touches, and the latent of the masked
    image. keys: those of dropout, one per example."""
    assert config.inpainting is not None and batch.image is not None, "TrainConfig.check"
    given, parts = config.inpainting, config.model
    _, height, width, _ = batch.image.shape
    hidden = jax.vmap(lambda key: random_mask(jax.random.fold_in(key, _MASK), height, width, given))(keys)[..., None]
    masked = program.encode(autoencoder(params), jnp.asarray(batch.image), hidden, config=parts, compute=config.compute)
    cell = parts.vae.downsampling
    touched = reduce(hidden, "batch (h down) (w right) 1 -> batch h w 1", "max", down=cell, right=cell)
    return jnp.concatenate([touched.astype(jnp.float32), masked], axis=-1)


def seeing(network: Network, channels: Float[Array, "batch latent_height latent_width mask_channels"]) -> Network:
    """The network with further channels after those of the noisy latent."""
    return lambda x_t, timestep: network(jnp.concatenate([x_t, channels], axis=-1), timestep)


def example(
    dataset: BucketedDataset, size: Size, config: InpaintingConfig
) -> tuple[UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """(image of the data, what of it is hidden), the same ones at every call, for validation images."""
    image = crop_of(dataset, images_of(dataset)[0], size)
    partly = dataclasses.replace(config, whole_share=0.0)
    return image, np.asarray(random_mask(jax.random.key(0), *size, partly))


def masked(
    image: UInt8[np.ndarray, "height width 3"], hidden: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The image with grey where it is hidden, as the UNet sees it."""
    return np.where(hidden[:, :, None], np.uint8(128), image)
