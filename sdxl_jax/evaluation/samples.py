"""The images of many prompts in a folder, for metrics: sampled in batches, written one by one, resumable.

Image k of the folder depends on the seed and on k alone, so that a second start samples what is missing and nothing
else. Each PNG holds its settings as text, and a folder whose images have others is refused. Of several processes each
samples a contiguous part, with its own devices, into one folder that all see.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
from PIL import Image

from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.features import own_part
from sdxl_jax.model import Model
from sdxl_jax.models.layers import Compute
from sdxl_jax.progress import tqdm
from sdxl_jax.sampling.contact_sheet import save_png
from sdxl_jax.sampling.generate import generate
from sdxl_jax.sampling.options import Options

_THREADS = 8


class Request(NamedTuple):
    """One image."""

    prompt: str
    negative: str | None
    options: Options
    """Of the image alone: `first_index` is its number, `num_images` 1."""
    text: Mapping[str, str]
    """Its settings, for the PNG."""
    class_: int | None = None


def path_of(folder: Path, number: int) -> Path:
    """Of an image by its number."""
    return folder / f"{number:06d}.png"


def missing(folder: Path, texts: Sequence[Mapping[str, str]]) -> list[int]:
    """The numbers of this process's images that are not in the folder yet. texts: what each PNG should say, in order.

    Raises InputError for images with other settings, and for more of them than there are texts.
    """
    found = {int(path.stem): path for path in folder.glob("[0-9]" * 6 + ".png")} if folder.is_dir() else {}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Give a folder, new or existing")

    def is_other(number: int) -> bool:
        return number >= len(texts) or _text(found[number]) != dict(texts[number])

    with ThreadPool(_THREADS) as pool:
        others = [number for number, other in zip(found, pool.imap(is_other, found), strict=True) if other]
    if others:
        name = found[min(others)].name
        raise InputError(
            f"{folder} holds other images, e.g. {name}: of another model, other prompts or settings, or more of them. "
            "Give a new folder, or remove them"
        )
    return [number for number in own_part(len(texts)) if number not in found]


def wait_for_all(folder: Path, count: int) -> None:
    """Until all processes have written their parts. Raises InputError where this one does not see all `count` of
    them."""
    if jax.process_count() == 1:
        return
    multihost_utils.sync_global_devices(f"images in {folder}")
    seen = sum(path_of(folder, number).is_file() for number in range(count))
    if seen < count:
        raise InputError(
            f"Process {jax.process_index()} sees {seen} of {count} images in {folder}. Give a folder that all "
            "processes share, e.g. on NFS"
        )


def _text(path: Path) -> dict[str, str]:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    except OSError:
        return {}


def sample(model: Model, requests: Sequence[Request], folder: Path, compute: Compute) -> None:
    """Samples the images that the folder lacks. A batch that is interrupted is sampled again by the next start.

    Raises InputError as `missing` and `generate`.
    """
    numbers = missing(folder, [request.text for request in requests])
    total = len(own_part(len(requests)))
    with tqdm(total=total, initial=total - len(numbers), desc="sampling", unit="image") as bar:
        for batch in _batches(numbers, requests):
            first = requests[batch[0]].options
            # A last batch is padded with its last prompt, so that it needs no compilation of its own.
            padded = [requests[number] for number in batch]
            padded += [padded[-1]] * (min(first.batch_size, len(requests)) - len(batch))
            generated = generate(
                model,
                [request.prompt for request in padded],
                negative_prompts=[request.negative for request in padded],
                classes=[request.class_ for request in padded],
                compute=compute,
                options=first,
            )
            for number, image in zip(batch, generated.images, strict=False):
                save_png(Image.fromarray(image), path_of(folder, number), dict(requests[number].text))
                bar.update()


def _batches(numbers: Sequence[int], requests: Sequence[Request]) -> Iterator[list[int]]:
    """Numbers that follow each other, with the same options, in batches."""

    def run(pair: tuple[int, int]) -> tuple[int, Options]:
        place, number = pair
        options = requests[number].options
        return number - place, dataclasses.replace(options, first_index=options.first_index - number)

    for (_, options), members in itertools.groupby(enumerate(numbers), key=run):
        of_run = [number for _, number in members]
        for start in range(0, len(of_run), options.batch_size):
            yield of_run[start : start + options.batch_size]
