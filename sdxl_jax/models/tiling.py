"""Tiled evaluation of a convolutional network over a large image: the result of the whole, with the memory of a tile.

Two things go wrong where a network sees tiles. Near a tile's border it sees zero padding in the place of the neighbour:
tiles overlap, and each keeps only the positions that no border reaches. And a group norm takes the moments of the tile,
where it would take those of the whole image, so that tiles differ in colour and contrast.

The usual remedy takes all norms' moments from one pass over the image shrunk to a tile's size. Its tiles fit together,
but differ from the whole: by 1 to 4 of 255 levels on average over photographs, with up to 18. Here the moments are
those of the whole image. Every tile measures its own; their mean weighted by area is right if the input of the norm is.
The first norm's is after one pass over all tiles; then the second's after another; n norms take n + 1 passes. That is
why a decoder is evaluated level by level, each from the whole result of the level before (`vae.decode_tiled`).

The network is a function that is passed in.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from sdxl_jax.errors import InputError

Network = Callable[
    [Float[jax.Array, "batch height width channels"]], Float[jax.Array, "batch height_out width_out channels_out"]
]
Mask = Callable[[int, int], Float[jax.Array, "height width"]]
"""(height, width) of an array of tiles -> 1 for positions that the tile keeps, 0 elsewhere."""


class Axis(NamedTuple):
    """How the tiles of one axis lie."""

    starts: tuple[int, ...]
    """The first position of each tile."""
    size: int
    """Positions per tile."""

    @classmethod
    def of(cls, length: int, size: int, border: int) -> "Axis":
        """The fewest tiles of which each overlaps the next by 2 · border positions, spread evenly. A short axis is one
        tile."""
        if length <= size:
            return cls((0,), length)
        count = math.ceil((length - 2 * border) / (size - 2 * border))
        return cls(tuple(round(number * (length - size) / (count - 1)) for number in range(count)), size)

    def own(self, factor: int) -> Bool[np.ndarray, "tiles positions"]:
        """Which positions of each tile's result are kept: every position of the whole once, none within a border.

        factor: positions of the result per position of the tile.
        """
        seams = [(start + before + self.size) // 2 for before, start in zip(self.starts, self.starts[1:], strict=False)]
        bounds = [0, *seams, self.starts[-1] + self.size]
        kept = []
        for number, start in enumerate(self.starts):
            positions = np.arange(self.size * factor) + start * factor
            kept.append((bounds[number] * factor <= positions) & (positions < bounds[number + 1] * factor))
        return np.array(kept)


class Moments(NamedTuple):
    """Mean and variance of each group of a norm, over channels and positions. With the leading axis `tiles`: those of
    several tiles."""

    mean: Float[jax.Array, "*tiles batch groups"]
    variance: Float[jax.Array, "*tiles batch groups"]
    positions: Float[jax.Array, "*tiles"]
    """Number of positions that they are taken over."""


Statistics = dict[str, Moments]
"""Moments by the path of the norm."""


def apply(
    network: Network, x: Float[jax.Array, "batch height width channels"], tile: int, border: int, factor: int
) -> Float[jax.Array, "batch height_out width_out channels_out"]:
    """network(x), from tiles of `tile` positions a side. Runs inside jit.

    network: convolutions, and group norms of Linen anywhere; its result is `factor` times as high and wide as its
    input. tile, border: positions of the result; `border` is how far zero padding at the edge reaches into it.

    Raises InputError for tiles that are little more than border.
    """
    size, margin = tile // factor, math.ceil(border / factor)
    if size < 4 * margin:
        raise InputError(
            f"A tile of {tile} positions is too small for the borders of {border} positions that this network needs. "
            f"Give tiles of {4 * margin * factor} or more"
        )
    rows, columns = (Axis.of(length, size, margin) for length in x.shape[1:3])
    if len(rows.starts) == len(columns.starts) == 1:
        return network(x)

    def pass_over(
        given: Statistics,
    ) -> tuple[Float[jax.Array, "batch height_out width_out channels_out"], Statistics]:
        whole, each = _over_tiles(lambda cut, mask: _measured(network, cut, mask, given), x, rows, columns, factor)
        return whole, {path: _combined(moments) for path, moments in each.items()}

    sizes = jax.eval_shape(lambda: pass_over({}))
    if not sizes[1]:
        return pass_over({})[0]
    # Any moments of these shapes do for a start: each pass measures those of one more norm rightly.
    start: tuple[jax.Array, Statistics] = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), sizes)
    return jax.lax.fori_loop(0, len(sizes[1]) + 1, lambda _, before: pass_over(before[1]), start)[0]


def _measured(
    network: Network, x: Float[jax.Array, "batch height width channels"], mask: Mask, given: Statistics
) -> tuple[Float[jax.Array, "batch height_out width_out channels_out"], Statistics]:
    """(network(x) with the given moments in the place of its own, its own moments over the masked positions)."""
    measured: Statistics = {}

    def intercept(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not isinstance(norm, nn.GroupNorm) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        (x,) = args
        assert norm.num_groups is not None
        grouped = jnp.asarray(x, jnp.float32).reshape(*x.shape[:3], norm.num_groups, -1)
        counts = mask(*x.shape[1:3])[None, :, :, None, None]
        total = counts.sum()
        mean = (grouped * counts).mean((1, 2, 4), keepdims=True) * (counts.size / total)
        variance = (jnp.square(grouped - mean) * counts).mean((1, 2, 4), keepdims=True) * (counts.size / total)
        path = "/".join(norm.path)
        measured[path] = Moments(mean[:, 0, 0, :, 0], variance[:, 0, 0, :, 0], total)
        if path in given:
            mean, variance = (moment[:, None, None, :, None] for moment in given[path][:2])
        normed = ((grouped - mean) * jax.lax.rsqrt(variance + norm.epsilon)).reshape(x.shape)
        scale, bias = (norm.get_variable("params", name) for name in ("scale", "bias"))
        return jnp.asarray(normed * scale + bias, norm.dtype)

    with nn.intercept_methods(intercept):
        return network(x), measured


def _combined(tiles: Moments) -> Moments:
    """Moments of the whole from those of its tiles: the variance is that within tiles plus that between them."""
    total = tiles.positions.sum()
    shares = (tiles.positions / total)[:, None, None]
    mean = (shares * tiles.mean).sum(0)
    return Moments(mean, (shares * (tiles.variance + jnp.square(tiles.mean - mean))).sum(0), total)


def _over_tiles(
    function: Callable[
        [Float[jax.Array, "batch height width channels"], Mask],
        tuple[Float[jax.Array, "batch height_out width_out channels_out"], Statistics],
    ],
    x: Float[jax.Array, "batch height width channels"],
    rows: Axis,
    columns: Axis,
    factor: int,
) -> tuple[Float[jax.Array, "batch height_out width_out channels_out"], Statistics]:
    """(the function of the whole, assembled from its tiles; the moments of all tiles, stacked)."""
    factors = range(1, factor + 1)
    down, across = ({each: jnp.asarray(axis.own(each), jnp.float32) for each in factors} for axis in (rows, columns))
    i, j = (index.ravel() for index in np.indices((len(rows.starts), len(columns.starts))))
    tiles = i, j, np.array(rows.starts)[i], np.array(columns.starts)[j]

    def one(
        tile: tuple[Int[jax.Array, ""], ...],
    ) -> tuple[Float[jax.Array, "batch tile_height tile_width channels_out"], Statistics]:
        i, j, top, left = tile
        cut = jax.lax.dynamic_slice(x, (0, top, left, 0), (x.shape[0], rows.size, columns.size, x.shape[3]))

        def mask(height: int, width: int) -> Float[jax.Array, "{height} {width}"]:
            return down[height // rows.size][i][:, None] * across[width // columns.size][j]

        result, moments = function(cut, mask)
        return result * mask(*result.shape[1:3])[..., None].astype(result.dtype), moments

    def add(
        whole: Float[jax.Array, "batch height_out width_out channels_out"], tile: tuple[Int[jax.Array, ""], ...]
    ) -> tuple[Float[jax.Array, "batch height_out width_out channels_out"], Statistics]:
        result, moments = one(tile)
        corner = (0, factor * tile[2], factor * tile[3], 0)
        before = jax.lax.dynamic_slice(whole, corner, result.shape)
        return jax.lax.dynamic_update_slice(whole, before + result, corner), moments

    stacked = jax.tree.map(jnp.asarray, tiles)
    result = jax.eval_shape(one, jax.tree.map(lambda column: column[0], stacked))[0]
    height, width = (factor * length for length in x.shape[1:3])
    return jax.lax.scan(add, jnp.zeros((x.shape[0], height, width, result.shape[3]), result.dtype), stacked)
