"""Sets of images that metrics are computed of: a folder, the images of an .npz (`arr_0`), an array.

Images are uint8, as files are: FID between rounded and unrounded images is not 0. All headers are read before work
begins, so that what cannot be read is named at once.
"""

import itertools
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import PurePath
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from sdxl_jax.data.folders import images_among, list_files
from sdxl_jax.data.images import decode, usable_size, why_unreadable
from sdxl_jax.data.sources import Refused, Unusable, open_stream, summary
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import statistics
from sdxl_jax.evaluation.resize import centred_square
from sdxl_jax.files.paths import AnyPath, located
from sdxl_jax.progress import tqdm
from sdxl_jax.weights.formats.local_copies import local_copy

_THREADS = 8
"""They wait for the disk."""


@runtime_checkable
class ImageSet(Protocol):
    """Images, numbered from 0."""

    @property
    def source(self) -> str:
        """Where they are from, for messages and reports."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """One per image. Pairs of two sets have the same names."""
        ...

    @property
    def sizes(self) -> Int64[np.ndarray, "images 2"]:
        """(height, width) in pixels."""
        ...

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        """One image, 0..255. Raises InputError, with its name, where it is damaged."""
        ...


class FolderImages(NamedTuple):
    """The images of a folder and its subfolders, by name."""

    folder: AnyPath
    names: Sequence[str]
    sizes: Int64[np.ndarray, "images 2"]

    @property
    def source(self) -> str:
        return str(self.folder)

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        path = self.folder / self.names[image]
        try:
            with open_stream(str(path)) as file:
                return decode(file.read())
        except Exception as problem:  # decoders raise many types
            raise InputError(f"The image {path} {why_unreadable(problem)}. Replace or remove it") from problem


class ArrayImages(NamedTuple):
    """Images in memory, all of one size."""

    source: str
    images: UInt8[np.ndarray, "images height width 3"]

    @property
    def names(self) -> Sequence[str]:
        return [f"{number:06d}" for number in range(len(self.images))]

    @property
    def sizes(self) -> Int64[np.ndarray, "images 2"]:
        return np.tile(np.array(self.images.shape[1:3], np.int64), (len(self.images), 1))

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        return self.images[image]


class Squares(NamedTuple):
    """Images of a set as squares, by number: what an autoencoder reconstructs."""

    images: ImageSet
    count: int
    """The first ones."""
    side: int

    @property
    def source(self) -> str:
        return f"{self.images.source} at {self.side}²"

    @property
    def names(self) -> Sequence[str]:
        return [f"{number:06d}.png" for number in range(self.count)]

    @property
    def sizes(self) -> Int64[np.ndarray, "images 2"]:
        return np.full((self.count, 2), self.side, np.int64)

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        return centred_square(self.images.pixels(image), self.side)


def open_images(path: str | PurePath, what: str) -> ImageSet:
    """The images of a folder, or those in the `arr_0` of an .npz. what: their role, for messages.

    Raises InputError: no such path; fewer than two images; images that cannot be read, the first of which it lists;
    values that are not uint8 0..255.
    """
    where = located(path, what)
    if not where.exists():
        raise InputError(f"{what} is {where}, which does not exist. Give a folder of images, or an .npz")
    if where.is_dir():
        return _open_folder(where, what)
    if where.suffix != ".npz":
        raise InputError(f"{what} is the file {where}. Give a folder of images, or an .npz")
    copy = local_copy(where)
    with statistics.open_arrays(copy) as arrays:
        if "arr_0" not in arrays:
            names = ", ".join(arrays.files) or "nothing"
            raise InputError(f"{what} is {where}, which holds {names} and no images (arr_0). Give images")
        return of_array(statistics.read_array(arrays, "arr_0", copy), str(where))


def of_array(images: Shaped[np.ndarray, "..."], source: str) -> ArrayImages:
    """Images in an array, checked. Raises InputError for any but two or more images of uint8 0..255, channels last."""
    if images.dtype != np.uint8:
        span = f", values {images.min():g} to {images.max():g}" if images.size and images.dtype != object else ""
        raise InputError(
            f"{source} holds {images.dtype}{span}. Images are uint8, 0 to 255: round and clip them first, as saving "
            "them as PNG would"
        )
    if images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"{source} has the shape {' × '.join(map(str, images.shape))}. Expected images × height × width × 3"
        )
    _check_count(len(images), source)
    if images.max() <= 1:
        raise InputError(f"{source} has no value above 1. Expected 0 to 255: multiply by 255 before rounding to uint8")
    return ArrayImages(source, images)


def check_one_size(images: ImageSet) -> None:
    """Raises InputError for images of several sizes, which only a resize mode that the user named makes comparable."""
    sizes, counts = np.unique(images.sizes, axis=0, return_counts=True)
    if len(sizes) > 1:
        listed = ", ".join(
            f"{count} of {height}×{width}" for (height, width), count in zip(sizes[:3], counts[:3], strict=True)
        )
        raise InputError(
            f"{images.source} has images of {len(sizes)} sizes ({listed}{', …' if len(sizes) > 3 else ''}). Say how "
            "they are resized, with --resize tf1, clean or pytorch; or crop them to one size first"
        )


def _check_count(count: int, source: str) -> None:
    if count < 2:
        raise InputError(f"{source} has {count} image{'' if count == 1 else 's'}. A covariance needs two or more")


def _open_folder(folder: AnyPath, what: str) -> FolderImages:
    files, unlisted = list_files(folder)
    names = images_among(files)
    _check_count(len(names), f"{what}, {folder},")

    def size(name: str) -> tuple[int, int] | Refused:
        try:
            with open_stream(str(folder / name)) as file:
                return usable_size(file, verify=False)
        except (Unusable, OSError) as problem:
            return Refused(name, str(problem))

    with ThreadPool(_THREADS) as pool:
        shown = tqdm(pool.imap(size, names, chunksize=16), "Reading image headers", len(names), delay=2, disable=None)
        sizes = list(shown)
    if refused := [*unlisted, *(each for each in sizes if isinstance(each, Refused))]:
        raise InputError(
            f"{len(refused)} entries of {folder} cannot be read:\n{summary(refused, len(refused))}\nReplace or remove "
            "them"
        )
    usable = itertools.chain.from_iterable(each for each in sizes if not isinstance(each, Refused))
    return FolderImages(folder, names, np.fromiter(usable, np.int64).reshape(-1, 2))
