"""Init images of image to image, and masks of inpainting: from files to arrays of the right size, and back.

    image file ── read ── [outpaint] ── fit ─────────────── encoded, noised ── … ── decoded ── composite ── image
    mask file ─── read_mask ────────── fit_mask ── latent_mask ─────────────────────────────────┘

Images are uint8 [height, width, 3], RGB, 0..255; masks are bool [height, width], True where the image is repainted.
Sizes are (height, width) in pixels, after the EXIF orientation.

Any format that Pillow reads is read, by the decoder of training images. Resizing is that of training images too, so an
image that has the size already is not changed.

Not here: noise, the autoencoder, and blending along the mask's edge. No jax: nothing here touches a device.
"""

import re
from pathlib import Path

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from sdxl_jax.data import images, transforms
from sdxl_jax.errors import InputError, fault
from sdxl_jax.sizes import Size

Colour = tuple[int, int, int]
"""Red, green, blue, 0..255."""

WHITE, BLACK = images.WHITE, (0, 0, 0)
HALF = 128
"""The darkest grey of a mask that counts as white: diffusers' 0.5 of `VaeImageProcessor.binarize`, in bytes."""


def parse_background(text: str) -> Colour:
    """ "white", "black" or "#rrggbb" as a colour. Raises InputError for anything else."""
    named = {"white": WHITE, "black": BLACK}
    if text in named:
        return named[text]
    if not re.fullmatch("#[0-9a-fA-F]{6}", text):
        raise InputError(
            f"--background {text!r} is not a colour. Give white, black, or a colour as #rrggbb, e.g. #808080"
        )
    red, green, blue = bytes.fromhex(text[1:])
    return red, green, blue


def read(path: Path, background: Colour = WHITE) -> UInt8[np.ndarray, "height width 3"]:
    """An image from a file: RGB, 0..255, upright by its EXIF orientation, transparency over the background.

    Greyscale, palette, 16-bit (the high byte) and CMYK become RGB, colour profiles are not applied; an animation gives
    its first frame. Raises InputError with the file's name where it is missing, not an image, truncated, damaged, or
    above `images.PIXEL_LIMIT`.
    """
    try:
        return images.decode(path.read_bytes(), formats=images.every_format(), background=background)
    except FileNotFoundError:
        raise InputError(f"There is no image {path}. Give the path of a file that exists") from None
    except Exception as problem:  # decoders raise many types on damaged files, all with the same remedy
        reason = images.why_unreadable(problem)
        raise fault(problem)(f"The image {path} {reason}. Save it again, as PNG or JPEG, or give another") from problem


def read_mask(path: Path, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """A mask from a file, for an image of that size as it was read: True where the mask is white, to be repainted.

    Colours count by their luma (ITU-R 601); 128 and above is white, as in diffusers. Transparent pixels count as black,
    whatever their colour: they are kept. So a mask may be white strokes on transparency.

    Raises InputError as `read` does, for a mask of another size, and for one that has transparent pixels and no white
    ones.
    """
    mask = _bright(read(path, BLACK))
    if mask.shape != size:
        given, expected = ("{}×{}".format(*each) for each in (mask.shape, size))
        raise InputError(
            f"The mask {path} has height × width {given}, the init image {expected}. Give a mask of the init image's "
            "size"
        )
    if not mask.any() and _bright(read(path, WHITE)).any():
        raise InputError(
            f"The mask {path} has transparent pixels and no white ones, and transparent pixels are kept. Paint white "
            "what is to be repainted, and black what is to be kept"
        )
    return mask


def _bright(image: UInt8[np.ndarray, "height width 3"]) -> Bool[np.ndarray, "height width"]:
    return np.asarray(Image.fromarray(image).convert("L")) >= HALF


def snap(height: int, width: int, multiple: int) -> Size:
    """The size rounded down to multiples, at least one multiple each."""
    assert min(height, width, multiple) > 0
    return Size(max(1, height // multiple) * multiple, max(1, width // multiple) * multiple)


def fit(
    image: UInt8[np.ndarray, "_height _width 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The image resized to cover height × width, then cropped at the centre; `data/transforms.py` resizes.

    An image of that size is returned as it is. Raises InputError for one so elongated that the resized one would be
    above `images.PIXEL_LIMIT`.
    """
    target = Size(height, width)
    own_height, own_width, _ = image.shape
    covering = transforms.cover_size(own_height, own_width, target)
    if covering.height * covering.width > images.PIXEL_LIMIT:
        raise InputError(
            f"An image of height × width {own_height}×{own_width}, resized to cover {height}×{width}, would be "
            f"{covering.height}×{covering.width}. Crop it closer to the aspect ratio of {height}×{width}"
        )
    unused = np.random.default_rng(0)  # a centred crop needs no random numbers
    return transforms.cover_crop(image, target, rng=unused, crop=transforms.CropMode.CENTRE).image


def fit_mask(mask: Bool[np.ndarray, "_height _width"], height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
    """The mask of an image, for the same image after `fit`: True where at least half of a pixel is."""
    grey = np.where(mask, np.uint8(255), np.uint8(0))
    return fit(np.repeat(grey[:, :, None], 3, axis=2), height, width)[:, :, 0] >= HALF


def latent_mask(
    mask: Bool[np.ndarray, "height width"], factor: int
) -> Float32[np.ndarray, "latent_height latent_width 1"]:
    """1 for each latent pixel, a cell of `factor` × `factor` pixels, that the mask touches anywhere, else 0.

    diffusers resizes to the nearest (`prepare_mask_latents`): it reads the top left pixel of each cell, and so keeps
    cells that a thin mask crosses elsewhere. Raises InputError for sides that are not multiples of the factor.
    """
    height, width = mask.shape
    if height % factor or width % factor:
        raise InputError(f"The mask has height × width {height}×{width}. Fit it to multiples of {factor} first")
    touched = reduce(
        mask, "(height cell_height) (width cell_width) -> height width 1", "max", cell_height=factor, cell_width=factor
    )
    return touched.astype(np.float32)


def outpaint(
    image: UInt8[np.ndarray, "_height _width 3"], top: int = 0, right: int = 0, bottom: int = 0, left: int = 0
) -> tuple[UInt8[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """(image on a canvas larger by that many pixels per side, mask that is True on the new area).

    The new area repeats the image's edge: its colours are a start, and unlike a reflection it has nothing that would be
    taken for content at a strength below 1. The sides need not be multiples of anything: the caller chooses.

    Raises InputError for negative numbers, and where the canvas would be above `images.PIXEL_LIMIT`.
    """
    if min(top, right, bottom, left) < 0:
        raise InputError(
            f"--outpaint top {top}, right {right}, bottom {bottom}, left {left}: expected 0 or more pixels per side"
        )
    height, width = image.shape[0] + top + bottom, image.shape[1] + left + right
    if height * width > images.PIXEL_LIMIT:
        raise InputError(
            f"The outpainted image would be {height}×{width}, the limit is {images.PIXEL_LIMIT} pixels. Add fewer"
        )
    sides = (top, bottom), (left, right)
    mask = np.pad(np.zeros(image.shape[:2], bool), sides, constant_values=True)
    return np.pad(image, (*sides, (0, 0)), mode="edge"), mask


def composite(
    original: UInt8[np.ndarray, "height width 3"],
    repainted: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "height width"],
) -> UInt8[np.ndarray, "height width 3"]:
    """The repainted image where the mask is True; elsewhere the original's own pixels, bit for bit."""
    assert original.shape == repainted.shape == (*mask.shape, 3)
    return np.where(mask[:, :, None], repainted, original)
