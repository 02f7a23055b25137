"""Images to features: decoded and prepared in threads, then through a network in batches over this process's devices.

    images ── threads: decode, prepare ── batches, the last one padded ── network on the local mesh ── rows, in order

While the devices compute a batch, the threads prepare the next ones. Of several processes each takes a contiguous part
of the images; what they found is joined at the end (`Moments.of_all_processes`, `of_all_processes`).
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, Shaped, UInt8

from sdxl_jax import processors
from sdxl_jax.arrays import Params
from sdxl_jax.evaluation import resize
from sdxl_jax.evaluation.image_sets import ImageSet
from sdxl_jax.evaluation.settings import ResizeMode
from sdxl_jax.evaluation.statistics import INCEPTION, Gaussian, Moments, Statistics
from sdxl_jax.progress import tqdm

Rows = Any
"""A tree of arrays with one row per image."""
_AHEAD = 2
"""Batches that are prepared ahead of the devices, and that run on them."""


class Network(NamedTuple):
    """A network that images go through."""

    name: str
    prepare: Callable[[UInt8[np.ndarray, "height width 3"]], Any]
    """An image to what the network takes; called in threads."""
    apply: Callable[[Params, Any], Rows]
    """Parameters and a batch of prepared images to rows; compiled (jax.jit)."""
    params: Params


def local_mesh() -> Mesh:
    """This process's devices along one axis, which batches are split over."""
    return Mesh(np.array(jax.local_devices()), ("batch",))


def is_first() -> bool:
    """Whether this is the process that reports."""
    return jax.process_index() == 0


def own_part(count: int) -> range:
    """The numbers of this process's images: a contiguous part."""
    index, processes = jax.process_index(), jax.process_count()
    return range(index * count // processes, (index + 1) * count // processes)


def rows(
    network: Network,
    load: Callable[[int], Any],
    numbers: Sequence[int],
    batch_size: int,
    title: str,
    mesh: Mesh | None = None,
) -> Iterator[Rows]:
    """The network's rows for batches of images, in order, as numpy, without the padding.

    load: the input of an image by its number, called in threads. batch_size: is rounded up to a multiple of the
    devices. title: of the progress bar.
    """
    mesh = mesh or local_mesh()
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["batch"], []))
    batch_size = -(-min(batch_size, len(numbers)) // mesh.size) * mesh.size
    params = jax.device_put(network.params, whole)
    running: deque[tuple[Rows, int]] = deque()
    with tqdm(total=len(numbers), desc=title, unit="image") as bar:

        def finished() -> Rows:
            result, count = running.popleft()
            on_host = jax.tree.map(lambda array: np.asarray(array)[:count], result)
            bar.update(count)
            return on_host

        for batch in _batches(load, numbers, batch_size):
            count = len(batch)
            batch += [batch[-1]] * (batch_size - count)
            stacked = jax.tree.map(lambda *each: np.stack(each), *batch)
            running.append((network.apply(params, jax.device_put(stacked, split)), count))
            if len(running) == _AHEAD:
                yield finished()
        while running:
            yield finished()


def _batches(load: Callable[[int], Any], numbers: Sequence[int], batch_size: int) -> Iterator[list[Any]]:
    """Loaded images in lists of batch_size, the last one shorter; no more than two batches are loaded ahead."""
    threads = processors.usable()
    waiting: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        batch = []
        for number in numbers:
            waiting.append(pool.submit(load, number))
            if len(waiting) == _AHEAD * batch_size:
                batch.append(waiting.popleft().result())
            if len(batch) == batch_size:
                yield batch
                batch = []
        while waiting:
            batch.append(waiting.popleft().result())
            if len(batch) == batch_size or not waiting:
                yield batch
                batch = []
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def of_all_processes(values: Shaped[np.ndarray, "part *shape"], count: int) -> Shaped[np.ndarray, "count *shape"]:
    """The rows of all processes, in order of the images. Every process calls it. count: of all images."""
    if jax.process_count() == 1:
        return values
    most = -(-count // jax.process_count())
    padded = np.zeros((most, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    bounds = [index * count // len(gathered) for index in range(len(gathered) + 1)]
    return np.concatenate(
        [part[: stop - start] for part, start, stop in zip(gathered, bounds, bounds[1:], strict=False)]
    )


class Wanted(NamedTuple):
    """Which features of Inception are needed."""

    spatial: bool = False
    """Moments of spatial features, for sFID."""
    features: bool = False
    """All features and not their moments alone: for KID, precision, recall, and classes."""


def inception(params: Params, mode: ResizeMode, spatial: bool) -> Network:
    """FID's network. The rows are (pool, spatial features or None)."""
    from sdxl_jax.models import inception as network

    def apply(params: Params, x: Float32[jax.Array, "batch 299 299 3"]) -> Rows:
        features = network.features(params, x)
        return features.pool, features.spatial if spatial else None

    options = network.CPU_OPTIONS if jax.default_backend() == "cpu" else None
    apply = jax.jit(apply, compiler_options=options)
    return Network(INCEPTION, functools.partial(resize.prepare, mode=mode), apply, params)


def statistics_of(
    network: Network, images: ImageSet, mode: ResizeMode, wanted: Wanted = Wanted(), batch_size: int = 32
) -> Statistics:
    """The statistics of Inception's features of a set of images. network: of `inception`, with the same mode."""
    count = len(images.names)

    def load(number: int) -> Float32[np.ndarray, "side side 3"]:
        return network.prepare(images.pixels(number))

    title = f"features of {images.source}"
    return collected(rows(network, load, own_part(count), batch_size, title), mode, wanted, count, images.source)


def collected(batches: Iterator[Rows], mode: ResizeMode, wanted: Wanted, count: int, source: str) -> Statistics:
    """Statistics of batches of `inception`'s rows, those of all processes together. count: of all images."""
    pool, spatial, kept = None, None, list[Float32[np.ndarray, "_batch features"]]()
    for pool_rows, spatial_rows in batches:
        pool = pool or Moments(pool_rows.shape[1])
        pool.add(pool_rows)
        if spatial_rows is not None:
            spatial = spatial or Moments(spatial_rows.shape[1])
            spatial.add(spatial_rows)
        if wanted.features:
            kept.append(pool_rows)
    assert pool is not None, "a set has images"
    return Statistics(
        pool=Gaussian.of(pool.of_all_processes()),
        spatial=None if spatial is None else Gaussian.of(spatial.of_all_processes()),
        features=of_all_processes(np.concatenate(kept), count) if wanted.features else None,
        network=INCEPTION,
        resize=mode,
        images=count,
        source=source,
    )
