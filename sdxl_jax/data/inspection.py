"""What training will see: the counts of `sdxl-jax data inspect --json`, and its `--dump`.

Both go through the training pipeline itself, so that they show what training gets. Refused files are left out and
listed, whatever `data.on_refused` is: listing them is the purpose of an inspection.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from PIL import Image

from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.errors import InputError
from sdxl_jax.progress import tqdm


def _no_tokens(captions: list[str]) -> dict[str, Int32[np.ndarray, "batch 77"]]:
    return {}


def open_dataset(config: DataConfig, captioned: bool = True) -> BucketedDataset:
    """The data set that training would read, without refused files and without tokens. captioned: whether training uses
    captions."""
    return BucketedDataset(dataclasses.replace(config, on_refused=OnRefused.SKIP), _no_tokens if captioned else None)


def inspect(dataset: BucketedDataset) -> dict[str, Any]:
    """Counts of the images that training would use, ready for JSON.

    `images_found` counts image files; `refused` also has captions and lines of metadata without an image. `too_small`
    counts the images that `data.min_size` leaves out. `notes` are warnings about the images. Each of `buckets` is a
    pipeline.BucketReport, each of `sources` a mixture.Share. `numbers` are the names of the numeric fields that every
    source has. `classes`, with data.label, are their number and the images of the rarest and of the commonest.
    `epoch_steps` sums the batches.
    """
    buckets = [bucket._asdict() for bucket in dataset.report()]
    refused = itertools.chain(dataset.source.refused(built=True), dataset.refused())
    return {
        "images_found": dataset.source.found,
        "images_usable": sum(bucket["images"] for bucket in buckets),
        "refused": [entry._asdict() for entry in refused],
        "notes": list(dataset.notes()),
        "too_small": dataset.too_small_count(),
        "sources": [share._asdict() for share in dataset.shares()],
        "numbers": sorted(set.intersection(*(set(source.numbers) for source in dataset.source.sources))),
        **_classes(dataset),
        "buckets": buckets,
        "epoch_steps": dataset.epoch_steps,
    }


def _classes(dataset: BucketedDataset) -> dict[str, Any]:
    if dataset.config.label is None:
        return {}
    counts = np.unique(dataset.labels(), return_counts=True)[1]
    return {"classes": {"found": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}}


def dump(dataset: BucketedDataset, count: int, directory: str | Path) -> None:
    """Writes the first `count` training examples, in training order, as NNNNNN.png and NNNNNN.json.

    The image is what the model sees, before normalisation. The JSON has source (relative to the folder),
    original_size [height, width], crop_top_left [top, left], target_size [height, width], flipped, caption. With masks
    there is NNNNNN-mask.png too, named in the JSON's mask.

    Raises InputError where count is below 1 or the directory is not empty.
    """
    directory = Path(directory)
    if count < 1:
        raise InputError(f"Cannot dump {count} examples. Give 1 or more")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is not an empty folder. Give a new or an empty one for the dump")
    directory.mkdir(parents=True, exist_ok=True)
    examples = itertools.islice(dataset.examples(), count)
    for number, (image, caption, example) in enumerate(
        tqdm(examples, "Writing examples", count, delay=2, disable=None)
    ):
        Image.fromarray(example.image).save(directory / f"{number:06d}.png")
        record = {
            "source": dataset.source.name(image),
            "original_size": example.original_size.tolist(),
            "crop_top_left": example.crop_top_left.tolist(),
            "target_size": example.target_size.tolist(),
            "flipped": example.flipped,
            "caption": caption,
        }
        if example.mask is not None:
            record["mask"] = f"{number:06d}-mask.png"
            Image.fromarray(example.mask).save(directory / record["mask"])
        if (name := dataset.config.label) is not None:
            record["label"] = int(dataset.source.number(image, name))
        text = json.dumps(record, ensure_ascii=False, indent=2) + "\n"
        (directory / f"{number:06d}.json").write_text(text, encoding="utf-8")
