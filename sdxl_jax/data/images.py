"""Decodes an encoded image, a file or bytes, to pixels: the formats of `formats`, or others that the caller allows.

Sizes are (height, width) of the upright image, that is after its EXIF orientation; pixels are RGB, 0..255, upright.

Where fewer pixels are needed than the image has, `at_least` lets the JPEG decoder downscale while it decodes: of each
8×8 block it transforms the low frequencies alone, so that the block comes out with 4, 3, 2 or 1 pixels per side. That
costs less than decoding all of it, and the resize then reads 4 to 64 times less: both together are several times
faster.

Metadata that no pixel depends on, texts and colour profiles, is removed from JPEG and PNG before decoding, so that it
never decides whether the image can be read. Of an animation the first frame is read, of several pages the first page.

Not here: resizing to a given size, captions, network addresses; colour profiles are not applied.
"""

import contextlib
import io
import threading
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from sdxl_jax.data import jpegs, pngs
from sdxl_jax.data.formats import NEVER_READ, READ, kind_of, readable
from sdxl_jax.data.sources import Unusable
from sdxl_jax.errors import InputError

_File = io.BytesIO | io.BufferedReader
FORMATS = readable()
"""The formats of training images, by Pillow's names."""
WHITE = (255, 255, 255)
PIXEL_LIMIT = 200_000_000
"""Images with more pixels are refused by their header: a small file can decompress to any size. It replaces Pillow's
limit, which warns at 89 million pixels, in the middle of a run, and raises at 179 million."""

_pillow_limit = threading.Lock()
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"


def every_format() -> tuple[str, ...]:
    """All formats that Pillow reads, for an image that the user chose. Without EPS, which is a program that Ghostscript
    would run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8."""
    if image.format == "TIFF":  # Pillow applies it while it loads these, and their sizes are upright
        return 1
    try:
        # The base method: that of PNG decodes the whole image to find EXIF after the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises many types, and damaged EXIF does not affect the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _without_metadata(file: io.BytesIO | io.BufferedReader, beginning: bytes, whole: bool) -> _File:
    for kind in (jpegs, pngs):
        if beginning.startswith(kind.SIGNATURE):
            return kind.without_metadata(file, whole=whole)
    return file


def _has_tga_footer(file: _File) -> bool:
    """TGA has no signature at its beginning; without the footer, any file could be one."""
    if file.seek(0, io.SEEK_END) < len(_TGA_FOOTER):
        return False
    file.seek(-len(_TGA_FOOTER), io.SEEK_END)
    return file.read() == _TGA_FOOTER


def _unknown(beginning: bytes, every: bool) -> str:
    """The reason why no decoder took the file. every: all of Pillow's formats were tried."""
    kind = kind_of(beginning)
    if kind is not None and (kind in NEVER_READ or not (every or kind in READ)):
        return f"in the format {kind}, which is not read; convert it to JPEG or PNG"
    if kind is not None:
        return f"begins as {kind}, but is damaged, or of a variant that Pillow does not read"
    return "in no known image format" if every else f"in no image format that is read ({READ})"


def _identify(
    file: io.BytesIO | io.BufferedReader, formats: tuple[str, ...] | None = None, *, whole: bool
) -> Image.Image:
    """The image of an open binary file, its header read and no pixel decoded. Raises Unusable above PIXEL_LIMIT.

    whole: its pixels are decoded afterwards.
    """
    beginning = file.read(512)
    if not beginning:
        raise Unusable("zero bytes")
    if not (every := formats is not None):
        formats = ("TGA",) if kind_of(beginning) is None and _has_tga_footer(file) else FORMATS
    file.seek(0)
    file = _without_metadata(file, beginning, whole)
    with _pillow_limit:  # Pillow's limit is a global of its module
        pillows_own, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise Unusable(_unknown(beginning, every)) from None
        finally:
            Image.MAX_IMAGE_PIXELS = pillows_own
    if image.width * image.height > PIXEL_LIMIT:
        raise Unusable(f"{image.width}×{image.height} pixels, the limit is {PIXEL_LIMIT} in all")
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) < 5 else (image.width, image.height)


def measure(image: bytes | io.BufferedReader) -> tuple[int, int]:
    """(height, width) of an encoded image, upright, from its header alone. Raises as `decode` does."""
    return _upright_size(_identify(io.BytesIO(image) if isinstance(image, bytes) else image, whole=False))


def _to_rgb(image: Image.Image, background: tuple[int, int, int] | None) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion clips at 255
        grey = np.asarray(image) >> 8
        if image.mode == "I" and (grey.min() < 0 or grey.max() > 255):
            raise Unusable("32 bits per pixel, of unknown range; 8 and 16 bits are read")
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise Unusable("floating-point pixels, of unknown range; integers of 8 and 16 bits are read")
    if background is not None and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _upright(
    pixels: UInt8[np.ndarray, "_height _width *channels"], orientation: int
) -> UInt8[np.ndarray, "height width *channels"]:
    """Applies EXIF orientation: 5 to 8 swap the axes, then either axis may be reversed."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def decode(
    data: bytes,
    at_least: tuple[int, int] | None = None,
    *,
    formats: tuple[str, ...] | None = None,
    background: tuple[int, int, int] | None = WHITE,
) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of an encoded image, as in `read_image`, transparency over the background; None: without transparency, the
    colours that are stored.

    formats: those that are allowed, by Pillow's names; None: those of training images.

    With `at_least`, an upright (height, width), a JPEG comes out at 1/2, 3/8, 1/4 or 1/8 of its size, sides rounded up:
    the smallest of these whose sides are both at least as long. Where none is, it comes out at full size, as do CMYK
    and all other formats.

    Raises whatever the decoders raise for truncated or damaged data, many types; `why_unreadable` turns it into a
    reason.
    """
    image = _identify(io.BytesIO(data), formats, whole=True)
    orientation = _orientation(image)
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # simplejpeg does no CMYK to RGB
        height, width = at_least or (0, 0)  # 0: full size
        if orientation >= 5:  # the decoder's sides are those of the stored image
            height, width = width, height
        with contextlib.suppress(jpegs.Unsupported):
            pixels = jpegs.decode(data, height, width)
    if pixels is None:
        pixels = _to_rgb(image, background)
    return _upright(pixels, orientation)


def has_alpha(image: io.BufferedReader) -> bool:
    """Whether an encoded image has an alpha channel, or a transparent colour, from its header. Raises as `decode`."""
    return _identify(image, whole=False).has_transparency_data


def decode_alpha(data: bytes) -> UInt8[np.ndarray, "height width"]:
    """The alpha channel of an encoded image, 0..255 (opaque, as where it has none), upright. Raises as `decode`."""
    image = _identify(io.BytesIO(data), whole=True)
    orientation = _orientation(image)
    return _upright(np.array(image.convert("RGBA").getchannel("A")), orientation)


def why_unreadable(problem: Exception) -> str:
    """The reason for a refusal, from the exception that `measure` or `decode` raised."""
    detail = f": {problem}" if isinstance(problem, Unusable) else f" ({type(problem).__name__}: {problem})"
    return f"cannot be read{detail}"


def usable_size(image: bytes | io.BufferedReader, *, verify: bool) -> tuple[int, int]:
    """(height, width), upright, of an image that can be used. verify: decode all of it, not only its header.

    Raises Unusable, and nothing else, with the reason, where it cannot be used.
    """
    try:
        if not verify:
            return measure(image)
        height, width, _ = decode(image if isinstance(image, bytes) else image.read()).shape
        return height, width
    except Exception as problem:  # decoders raise many types on damaged files; each means the same here
        raise Unusable(why_unreadable(problem)) from problem


def read_image(
    path: Path, at_least: tuple[int, int] | None = None, background: tuple[int, int, int] | None = WHITE
) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of one image: RGB, 0..255, upright (EXIF), transparency over the background; arguments as in `decode`.

    Greyscale, palette, 16-bit (the high byte) and CMYK become RGB; of an animation, the first frame. JPEG is decoded
    as in `jpegs`, the rest and CMYK by Pillow.

    Raises InputError with the file's name where it is missing, truncated, damaged, or above PIXEL_LIMIT.
    """
    try:
        return decode(path.read_bytes(), at_least, background=background)
    except Exception as problem:  # as in usable_size
        raise InputError(
            f"The image {path} {why_unreadable(problem)}. Replace or remove it; data.verify_images=true with "
            "data.on_refused=skip finds such files before training starts, and leaves them out"
        ) from problem
