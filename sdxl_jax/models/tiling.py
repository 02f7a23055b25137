"""A stretch of convolutions over a large image, tile after tile, with the result of the whole; memory is a tile's.

Two things go wrong where a network sees tiles. Near a tile's border it sees zeros in the place of the neighbour: tiles
overlap, and of each only what no border reaches is kept. And a group norm takes mean and variance of the tile, where it
would take those of the whole, so that tiles differ in colour and contrast.

The usual remedy takes all norms' moments from one run over the image shrunk to a tile's size. Its tiles fit together,
but differ from the whole: by 1 to 4 of 255 levels on average over photographs, with up to 18. Here the moments are
those of the whole. Every tile measures its own; weighed by area they add up, if what comes before the norm is right.
The first norm's are, after one run over all tiles; with them the second's after another; n norms take n + 1 runs. That
is why a decoder is taken level by level, each from the whole result of the level before (`vae.decode_tiled`).

Nothing here knows what the network is.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from sdxl_jax.errors import InputError

Network = Callable[[jax.Array], jax.Array]


class Axis(NamedTuple):
    """How the tiles of one axis lie."""

    starts: tuple[int, ...]
    """The first position of each."""
    size: int
    """Positions of each."""

    @classmethod
    def of(cls, length: int, size: int, border: int) -> "Axis":
        """As few tiles as share 2 · border positions with the next, spread evenly. A short axis is one tile."""
        if length <= size:
            return cls((0,), length)
        count = math.ceil((length - 2 * border) / (size - 2 * border))
        return cls(tuple(round(number * (length - size) / (count - 1)) for number in range(count)), size)

    def own(self, factor: int) -> Bool[np.ndarray, "tiles positions"]:
        """Which positions of each tile's result are kept: every one of the whole once, none within a border.

        factor: positions of the result for one of the tile.
        """
        seams = [(start + before + self.size) // 2 for before, start in zip(self.starts, self.starts[1:], strict=False)]
        bounds = [0, *seams, self.starts[-1] + self.size]
        rows = []
        for number, start in enumerate(self.starts):
            places = np.arange(self.size * factor) + start * factor
            rows.append((bounds[number] * factor <= places) & (places < bounds[number + 1] * factor))
        return np.array(rows)


class Moments(NamedTuple):
    """Of the channels of each group of a norm, over positions. `tiles` is an axis where there are those of several."""

    mean: Float[jax.Array, "*tiles batch groups"]
    variance: Float[jax.Array, "*tiles batch groups"]
    share: Float[jax.Array, "*tiles"]
    """Share of all positions."""


Statistics = dict[str, Moments]
"""By the path of the norm."""


def apply(
    network: Network, x: Float[jax.Array, "batch height width channels"], tile: int, border: int, factor: int
) -> Float[jax.Array, "batch height_out width_out channels_out"]:
    """network(x), from tiles of `tile` positions a side. Runs inside jit.

    network: convolutions, and group norms of Linen in any place; its result is `factor` times as high and wide as what
    it is given. tile, border: positions of the result; `border` is how far a zero at the edge reaches into it.

    Raises InputError for tiles that are hardly more than border.
    """
    size, margin = tile // factor, math.ceil(border / factor)
    if size < 4 * margin:
        raise InputError(f"Tiles of {tile} positions have borders of {border}. Give tiles of {4 * margin * factor}")
    rows, columns = (Axis.of(length, size, margin) for length in x.shape[1:3])
    if len(rows.starts) == len(columns.starts) == 1:
        return network(x)

    def pass_over(given: Statistics) -> tuple[jax.Array, Statistics]:
        whole, each = _over_tiles(lambda cut, own: _measured(network, cut, own, given), x, rows, columns, factor)
        return whole, {path: _together(moments) for path, moments in each.items()}

    sizes = jax.eval_shape(lambda: pass_over({}))
    if not sizes[1]:
        return pass_over({})[0]
    # What the first run takes for the moments of the second norm and on, it measures nothing by that counts.
    start: tuple[jax.Array, Statistics] = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), sizes)
    return jax.lax.fori_loop(0, len(sizes[1]) + 1, lambda _, before: pass_over(before[1]), start)[0]


def _measured(
    network: Network, x: jax.Array, own: Callable[[int, int], jax.Array], given: Statistics
) -> tuple[jax.Array, Statistics]:
    """(network(x) with the moments that are given in the place of its own, its own).

    own: (height, width) to the positions that count, of an input of the norm that is so large.
    """
    measured: Statistics = {}

    def intercept(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        if not isinstance(norm, nn.GroupNorm) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        (x,) = args
        assert norm.num_groups is not None
        grouped = jnp.asarray(x, jnp.float32).reshape(*x.shape[:3], norm.num_groups, -1)
        counts = own(*x.shape[1:3])[None, :, :, None, None]
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


def _together(tiles: Moments) -> Moments:
    """Of the whole, from those of its tiles: the variance is that within them and that between them."""
    total = tiles.share.sum()
    shares = (tiles.share / total)[:, None, None]
    mean = (shares * tiles.mean).sum(0)
    return Moments(mean, (shares * (tiles.variance + jnp.square(tiles.mean - mean))).sum(0), total)


def _over_tiles(
    function: Callable[[jax.Array, Callable[[int, int], jax.Array]], tuple[jax.Array, Any]],
    x: jax.Array,
    rows: Axis,
    columns: Axis,
    factor: int,
) -> tuple[jax.Array, Any]:
    """(the function of the whole, put together of its tiles; what it returned besides for each, stacked)."""
    factors = range(1, factor + 1)
    down, across = ({each: jnp.asarray(axis.own(each), jnp.float32) for each in factors} for axis in (rows, columns))
    i, j = (place.ravel() for place in np.indices((len(rows.starts), len(columns.starts))))
    numbers = i, j, np.array(rows.starts)[i], np.array(columns.starts)[j]

    def one(number: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        i, j, top, left = number
        cut = jax.lax.dynamic_slice(x, (0, top, left, 0), (x.shape[0], rows.size, columns.size, x.shape[3]))

        def own(height: int, width: int) -> jax.Array:
            return down[height // rows.size][i][:, None] * across[width // columns.size][j]

        made, besides = function(cut, own)
        return made * own(*made.shape[1:3])[..., None].astype(made.dtype), besides

    def add(whole: jax.Array, number: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        made, besides = one(number)
        corner = (0, factor * number[2], factor * number[3], 0)
        there = jax.lax.dynamic_slice(whole, corner, made.shape)
        return jax.lax.dynamic_update_slice(whole, there + made, corner), besides

    stacked = jax.tree.map(jnp.asarray, numbers)
    made = jax.eval_shape(one, jax.tree.map(lambda column: column[0], stacked))[0]
    height, width = (factor * length for length in x.shape[1:3])
    return jax.lax.scan(add, jnp.zeros((x.shape[0], height, width, made.shape[3]), made.dtype), stacked)
