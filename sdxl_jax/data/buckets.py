"""Buckets: the few image sizes that training compiles for, and which of them an image goes to.

All images of one batch share one size. SDXL trains its last stage on 40 sizes of about 1024² pixels (Podell et al.
2023, arXiv:2307.01952, section 2.3 and appendix I), and an image goes to the one whose aspect ratio is nearest to its
own. Nearness is |ln(h/w) − ln(H/W)|, in which 1:2 and 2:1 are equally far from square.

Sizes are (height, width) in pixels. Not here: resizing and cropping (transforms), batching (pipeline).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int32

from sdxl_jax.arrays import Size
from sdxl_jax.errors import InputError

LATENT_FACTOR = 8
"""Pixels along one axis for one latent pixel: bucket sides are multiples of it."""


Bucket = Size
"""One size that batches come in."""


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
    """Buckets for another pixel count, in the order of the paper's list.

    Rule: both sides are multiples of `multiple`, the area is between 0.9 · pixels and pixels, and neither side is more
    than `max_aspect` times the other. The paper states no rule; for 1024² pixels this one gives its 40 sizes and one
    more, 1344×704, the transpose that the paper's list lacks.

    Raises InputError where a number is out of range or no size satisfies the rule.
    """
    if pixels < 1 or multiple < 1 or multiple % LATENT_FACTOR or max_aspect < 1:
        raise InputError(
            f"Cannot generate buckets of pixels={pixels}, multiple={multiple}, max_aspect={max_aspect}. Expected a "
            f"positive number of pixels, a multiple of {LATENT_FACTOR}, and an aspect of 1 or more, "
            "e.g. 512 * 512, 64, 4.0."
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
            f"No bucket with sides in multiples of {multiple}, an aspect up to {max_aspect}, and 0.9 to 1 times "
            f"{pixels} pixels. Use a smaller multiple (of {LATENT_FACTOR}), or a square of one for the pixels."
        )
    return buckets


def check_buckets(buckets: Sequence[tuple[int, int]]) -> tuple[Bucket, ...]:
    """The same list as Buckets. Raises InputError where it is empty, or a side is no positive multiple of 8."""
    if not buckets:
        raise InputError("data.buckets is empty. Give one (height, width) or more, e.g. ((1024, 1024),).")
    for height, width in buckets:
        if height < 1 or width < 1 or height % LATENT_FACTOR or width % LATENT_FACTOR:
            near = tuple(max(LATENT_FACTOR, round(side / LATENT_FACTOR) * LATENT_FACTOR) for side in (height, width))
            raise InputError(
                f"data.buckets has ({height}, {width}). A bucket is (height, width) in pixels, both positive multiples "
                f"of {LATENT_FACTOR}, the autoencoder's reduction. Use {near}."
            )
    return tuple(Bucket(height, width) for height, width in buckets)


class Nearest(NamedTuple):
    """For each image, the bucket of the nearest aspect ratio, the first of equally near, and how far it is."""

    bucket: Int32[np.ndarray, " images"]
    """Number in the list of buckets."""
    distance: Float64[np.ndarray, " images"]
    """|ln(h/w) − ln(H/W)|: ln 2 where one is twice as long as the other."""


_EQUAL = 1e-9  # of two distances: rounding decides no tie


def _log_aspect(sizes: Int32[np.ndarray, "images 2"]) -> Float64[np.ndarray, " images"]:
    return np.log(sizes[:, 0] / sizes[:, 1])


def assign(sizes: Int32[np.ndarray, "images 2"], buckets: Sequence[tuple[int, int]]) -> Nearest:
    """The nearest bucket for each size (height, width).

    Raises InputError for a bad list of buckets (check_buckets).
    """
    aspects = _log_aspect(np.array(check_buckets(buckets), np.int32))
    ordered = np.argsort(aspects, kind="stable")  # of equal aspects, the first in the list is the first here
    ordered = ordered[np.diff(aspects[ordered], prepend=-np.inf) > _EQUAL].astype(np.int32)
    between = (aspects[ordered][1:] + aspects[ordered][:-1]) / 2
    own = _log_aspect(sizes)
    # One search instead of a distance to each bucket: fifty million images take seconds.
    lower, upper = (ordered[np.searchsorted(between, own + shift)] for shift in (-_EQUAL / 2, _EQUAL / 2))
    number = np.minimum(lower, upper)
    return Nearest(number, np.abs(own - aspects[number]))
