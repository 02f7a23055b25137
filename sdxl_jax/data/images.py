"""An encoded image to pixels, from a file or from bytes: the formats of `formats`; others where they are asked for.

Sizes are (height, width) of the upright image, that is after its EXIF orientation; pixels are RGB, 0..255, upright.

Where less is needed than the image has, `at_least` lets the JPEG decoder shrink while it decodes: of each 8×8 block it
transforms the low frequencies alone, so that the block comes out with 4, 3, 2 or 1 pixels a side. That costs less than
decoding the whole, and a resize has 4 to 64 times less to read afterwards: both together are several times faster.

What no pixel depends on, texts and colour profiles, is taken out of JPEG and PNG before a decoder sees it, so that
nothing in it decides whether the image is read. Of an animation, and of several pages, the first one is read.

Not here: resizing to a given size, captions, network addresses; colour profiles are not applied.
"""

import contextlib
import io
import threading
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from sdxl_jax.data import formats as known_formats
from sdxl_jax.data import jpegs, pngs
from sdxl_jax.data.sources import Unusable
from sdxl_jax.errors import InputError

_File = io.BytesIO | io.BufferedReader
FORMATS = known_formats.readable()
"""Of training images, as Pillow names them."""
WHITE = (255, 255, 255)
PIXEL_LIMIT = 200_000_000
"""Images with more pixels are refused by their header: a small file can unpack to any size. It stands in for Pillow's
limit, which warns at 89 million pixels, in the middle of a run, and gives up at 179 million."""

_pillow_limit = threading.Lock()
_TGA_END = b"TRUEVISION-XFILE.\0"


def every_format() -> tuple[str, ...]:
    """All that Pillow reads, for images that somebody chose. Without EPS, a program that Ghostscript would run."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8."""
    if image.format == "TIFF":  # Pillow turns these itself while it loads them, and its sizes are upright
        return 1
    try:
        # The base method: PNG's own one decodes the whole image to look for EXIF after the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises many types, and damage in EXIF does not concern the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _without_metadata(file: io.BytesIO | io.BufferedReader, beginning: bytes, whole: bool) -> _File:
    for kind in (jpegs, pngs):
        if beginning.startswith(kind.SIGNATURE):
            return kind.without_metadata(file, whole=whole)
    return file


def _has_tga_end(file: _File) -> bool:
    """TGA has no mark at its beginning; without that at its end, anything could be one."""
    if file.seek(0, io.SEEK_END) < len(_TGA_END):
        return False
    file.seek(-len(_TGA_END), io.SEEK_END)
    return file.read() == _TGA_END


def _unknown(beginning: bytes, every: bool) -> str:
    """Why there is no image; every: all formats that Pillow has were tried."""
    kind = known_formats.kind_of(beginning)
    if kind is not None and (kind in known_formats.NEVER_READ or not (every or kind in known_formats.READ)):
        return f"in the format {kind}, which is not read; convert it to JPEG or PNG"
    if kind is not None:
        return f"begins as {kind}, but is damaged, or of a kind that Pillow does not read"
    return "in no image format that is known" if every else f"in no image format that is read ({known_formats.READ})"


def _identify(
    file: io.BytesIO | io.BufferedReader, formats: tuple[str, ...] | None = None, *, whole: bool
) -> Image.Image:
    """The image of an open binary file: its header read, no pixel decoded. Unusable above PIXEL_LIMIT.

    whole: its pixels are wanted too.
    """
    beginning = file.read(512)
    if not beginning:
        raise Unusable("zero bytes")
    if not (every := formats is not None):
        formats = ("TGA",) if known_formats.kind_of(beginning) is None and _has_tga_end(file) else FORMATS
    file.seek(0)
    file = _without_metadata(file, beginning, whole)
    with _pillow_limit:  # Pillow's limit is a global of its module
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise Unusable(_unknown(beginning, every)) from None
        finally:
            Image.MAX_IMAGE_PIXELS = theirs
    if image.width * image.height > PIXEL_LIMIT:
        raise Unusable(f"{image.width}×{image.height} pixels, the limit is {PIXEL_LIMIT} in all")
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) < 5 else (image.width, image.height)


def measure(image: bytes | io.BufferedReader) -> tuple[int, int]:
    """(height, width) of an encoded image, upright, from its header alone. Raises as `decode` does."""
    return _upright_size(_identify(io.BytesIO(image) if isinstance(image, bytes) else image, whole=False))


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        grey = np.asarray(image) >> 8
        if image.mode == "I" and (grey.min() < 0 or grey.max() > 255):
            raise Unusable("32 bits a pixel, of unknown range; 8 and 16 bits are read")
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise Unusable("floating-point pixels, of unknown range; integers of 8 and 16 bits are read")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _upright(pixels: UInt8[np.ndarray, "rows columns 3"], orientation: int) -> UInt8[np.ndarray, "height width 3"]:
    """Undoes EXIF orientation: numbers 5 to 8 exchange the axes, then rows and columns may run backwards."""
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
    background: tuple[int, int, int] = WHITE,
) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of an encoded image, as in `read_image`, transparency over the background. formats: those that may be
    read, as Pillow names them; None: those of training images.

    With `at_least`, an upright (height, width), a JPEG comes out at 1/2, 3/8, 1/4 or 1/8 of its size, sides rounded up:
    the smallest of these whose sides are both at least as long. Where none is, the image is whole; so is one in CMYK,
    and one that is no JPEG.

    Raises whatever the decoders raise where it is truncated or damaged, many types; `why_unreadable` makes it a reason.
    """
    image = _identify(io.BytesIO(data), formats, whole=True)
    orientation = _orientation(image)
    pixels = None
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # simplejpeg does no CMYK to RGB
        height, width = at_least or (0, 0)  # 0: whole
        if orientation >= 5:  # the decoder counts as stored
            height, width = width, height
        with contextlib.suppress(jpegs.Unsupported):
            pixels = jpegs.decode(data, height, width)
    if pixels is None:
        pixels = _to_rgb(image, background)
    return _upright(pixels, orientation)


def why_unreadable(problem: Exception) -> str:
    """The reason of a refusal, from what `measure` or `decode` raised."""
    said = f": {problem}" if isinstance(problem, Unusable) else f" ({type(problem).__name__}: {problem})"
    return f"cannot be read{said}"


def usable_size(image: bytes | io.BufferedReader, *, verify: bool) -> tuple[int, int]:
    """(height, width), upright, of an image that can be used: by decoding all of it, or only its header.

    Raises Unusable alone, with the reason, where it cannot.
    """
    try:
        if not verify:
            return measure(image)
        height, width, _ = decode(image if isinstance(image, bytes) else image.read()).shape
        return height, width
    except Exception as problem:  # decoders raise many types on damaged files; each means the same here
        raise Unusable(why_unreadable(problem)) from problem


def read_image(path: Path, at_least: tuple[int, int] | None = None) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of one image: RGB, 0..255, upright (EXIF), transparency over white; `at_least` as in `decode`.

    Greyscale, palette, 16-bit (the high byte) and CMYK become RGB; of an animation, the first frame. JPEG is decoded
    as in `jpegs`, the rest and CMYK by Pillow.

    Raises InputError with the file's name where it is missing, truncated, damaged, or above PIXEL_LIMIT.
    """
    try:
        return decode(path.read_bytes(), at_least)
    except Exception as problem:  # as in usable_size
        raise InputError(
            f"The image {path} {why_unreadable(problem)}. Replace or remove it; data.verify_images=true with "
            "data.on_refused=skip finds such files before the work starts, and leaves them out."
        ) from problem
