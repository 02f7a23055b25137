"""Aspect ratio buckets: the few image sizes that training compiles for, and which of them each image is assigned to.

All images of one batch share one size. SDXL trains its last stage on 40 sizes of about 1024² pixels (Podell et al.
2023, arXiv:2307.01952, section 2.3 and appendix I), and an image is assigned to the bucket of the nearest aspect ratio.
The distance is |ln(h/w) − ln(H/W)|, by which 1:2 and 2:1 are equally far from square.

Sizes are (height, width) in pixels. Not here: resizing and cropping (transforms), batching (pipeline).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32

from sdxl_jax.errors import InputError
from sdxl_jax.sizes import Size

LATENT_FACTOR = 8
"""Image pixels per latent pixel along one axis: bucket sides are multiples of it."""


Bucket = Size
"""One size (height, width) that batches come in."""


_SDXL_WIDTHS = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024, 960),
    1088: (960, 896),
    1152: (896, 832),
    1216: (832,),
    1280: (768,),
    1344: (768,),
    1408: (704,),
    1472: (704,),
    1536: (640,),
    1600: (640,),
    1664: (576,),
    1728: (576,),
    1792: (576,),
    1856: (512,),
    1920: (512,),
    1984: (512,),
    2048: (512,),
}

SDXL_BUCKETS = tuple(Bucket(height, width) for height, widths in _SDXL_WIDTHS.items() for width in widths)
"""The 40 sizes of arXiv:2307.01952, appendix I, in its order. 704×1344 has no transpose there."""


def generate_buckets(pixels: int, multiple: int = 64, max_aspect: float = 4.0) -> tuple[Bucket, ...]:
    """Buckets for another number of pixels, in the order of the paper's list.

    Rule: both sides are multiples of `multiple`, the area is between 0.9 · pixels and pixels, and neither side is more
    than `max_aspect` times the other. The paper states no rule; for 1024² pixels this one gives its 40 sizes and one
    more, 1344×704, the transpose that the paper's list lacks.

    Raises InputError where a number is out of range or no size satisfies the rule.
    """
    if pixels < 1 or multiple < 1 or multiple % LATENT_FACTOR or max_aspect < 1:
        raise InputError(
            f"Cannot generate buckets of pixels={pixels}, multiple={multiple}, max_aspect={max_aspect}. Expected a "
            f"positive number of pixels, a multiple of {LATENT_FACTOR}, and an aspect of 1 or more, "
            "e.g. 512 * 512, 64, 4.0"
        )
    sides = range(multiple, int((pixels * max_aspect) ** 0.5) + multiple, multiple)
    buckets = tuple(
        Bucket(height, width)
        for height in sides
        for width in reversed(sides)
        if 0.9 * pixels <= height * width <= pixels and max(height, width) <= max_aspect * min(height, width)
    )
    if not buckets:
        raise InputError(
            f"No bucket has sides in multiples of {multiple}, an aspect up to {max_aspect}, and 0.9 to 1 times "
            f"{pixels} pixels. Use a smaller multiple (of {LATENT_FACTOR}), or as many pixels as a square of such sides"
        )
    return buckets


def check_buckets(buckets: Sequence[tuple[int, int]]) -> tuple[Bucket, ...]:
    """The same sizes as `Bucket`s. Raises InputError where there is none, or a side is not a positive multiple of 8."""
    if not buckets:
        raise InputError("data.buckets is empty. Give one (height, width) or more, e.g. ((1024, 1024),)")
    for height, width in buckets:
        if height < 1 or width < 1 or height % LATENT_FACTOR or width % LATENT_FACTOR:
            nearest = (max(LATENT_FACTOR, round(side / LATENT_FACTOR) * LATENT_FACTOR) for side in (height, width))
            raise InputError(
                f"data.buckets has ({height}, {width}). A bucket is (height, width) in pixels, both positive multiples "
                f"of {LATENT_FACTOR}, the autoencoder's downsampling factor. Use ({', '.join(map(str, nearest))})"
            )
    return tuple(Bucket(height, width) for height, width in buckets)


class Nearest(NamedTuple):
    """For each image, the bucket of the nearest aspect ratio (the first of several equally near) and its distance."""

    bucket: Int32[np.ndarray, " images"]
    """Index into the list of buckets."""
    distance: Float64[np.ndarray, " images"]
    """|ln(h/w) − ln(H/W)|: ln 2 where one aspect ratio is twice the other."""


_TIE = 1e-9  # distances that differ by less are equal, so that rounding never decides


def _log_aspect(sizes: Int32[np.ndarray, "images 2"]) -> Float64[np.ndarray, " images"]:
    return np.log(sizes[:, 0] / sizes[:, 1])


def assign(sizes: Int32[np.ndarray, "images 2"], buckets: Sequence[tuple[int, int]]) -> Nearest:
    """Assigns each size (height, width) to the bucket of the nearest aspect ratio.

    Raises InputError as `check_buckets`.
    """
    aspects = _log_aspect(np.array(check_buckets(buckets), np.int32))
    ordered = np.argsort(aspects, kind="stable")  # stable: of equal aspect ratios, the first in the list stays first
    ordered = ordered[np.diff(aspects[ordered], prepend=-np.inf) > _TIE].astype(np.int32)
    between = (aspects[ordered][1:] + aspects[ordered][:-1]) / 2
    of_images = _log_aspect(sizes)
    # A binary search instead of the distance to every bucket: fifty million images take seconds.
    lower, upper = (ordered[np.searchsorted(between, of_images + shift)] for shift in (-_TIE / 2, _TIE / 2))
    bucket = np.minimum(lower, upper)
    return Nearest(bucket, np.abs(of_images - aspects[bucket]))
