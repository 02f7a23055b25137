"""Size and position of one image, in pixels. No jax and no numpy: the command line imports this before it reads its
arguments."""

from typing import NamedTuple


class Size(NamedTuple):
    """Size of one image, in pixels: the one type of a (height, width)."""

    height: int
    width: int


class Position(NamedTuple):
    """Pixels from the image's top left corner."""

    top: int
    left: int
