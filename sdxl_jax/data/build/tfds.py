"""Data sets of tensorflow-datasets, prepared as ArrayRecord: `tfds:NAME[:SPLIT]`. Read without TensorFlow.

The images are the Image feature called "image", or else the first one; the captions are a text feature, which may be
nested as in coco_captions; every numeric feature is kept, class labels among them. Needs tensorflow-datasets, imported
only here.

Format: tensorflow.org/datasets/data_source.

Not here: preparing a data set; an error says how to do it.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sdxl_jax.data.captions import CAPTION_FIELDS, UNCAPTIONED, caption_field, captions_of, numbers_of
from sdxl_jax.data.sources import RawExample, Refused, Unusable, gone
from sdxl_jax.errors import InputError

PREFIX = "tfds:"


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError:
        raise InputError(
            "A source tfds:… needs tensorflow-datasets, which is not installed. Run: pip install tensorflow-datasets"
        ) from None
    return tensorflow_datasets


def _captions(value: Any) -> tuple[str, ...]:
    """As `captions_of`, of a feature."""
    if isinstance(value, dict):  # coco_captions nests them
        value = value.get("text")
    return captions_of(value.tolist() if isinstance(value, np.ndarray) else value)


class TfdsPiece(NamedTuple):
    """A range of records of one shard."""

    directory: str
    shard: str
    records: tuple[int, int]
    """First record of the shard, and the one after the last."""
    image: str
    caption: str | None
    """None: captions are not used."""

    def samples(self) -> Iterator[RawExample | Refused]:
        tfds = _tfds()
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        start, end = self.records
        path = f"{self.directory}/{self.shard}"
        try:
            features = tfds.builder_from_directory(self.directory).info.features
            source = ArrayRecordDataSource([f"{path}[{start}:{end}]"])
            for number in range(end - start):
                record = source[number]
                name = f"{self.shard}:{start + number}"
                try:
                    decoders = {self.image: tfds.decode.SkipDecoding()}
                    fields = features.deserialize_example_np(record, decoders=decoders)
                    captions = UNCAPTIONED if self.caption is None else _captions(fields[self.caption])
                    yield RawExample(name, fields[self.image], captions, numbers_of(fields))
                except Unusable as problem:
                    yield Refused(name, str(problem))
        except OSError as problem:
            raise gone(path, problem) from problem
        except (RuntimeError, ValueError, IndexError) as problem:  # array_record's: a shard missing or cut off
            raise InputError(
                f"{path} cannot be read ({' '.join(str(problem).split())}). Prepare the data set again"
            ) from problem


def pieces(source: str, captioned: bool = True) -> Iterator[tuple[str, TfdsPiece]]:
    """The pieces of `tfds:NAME[:SPLIT]`, each with its name. captioned: whether captions are used.

    Raises InputError: no tensorflow-datasets; not prepared; no such split; no images among its features, or no captions
    if they are used.
    """
    tfds = _tfds()
    version = r"(?::(?:\d+|\*)\.(?:\d+|\*)\.(?:\d+|\*))?"
    match = re.fullmatch(rf"tfds:([^:]+{version})(?::(.+))?", source)
    if match is None:
        raise InputError(
            f"{source} is not the name of a TFDS data set. Expected tfds:NAME[:SPLIT], e.g. "
            "tfds:coco_captions:train[:10%]. Correct it"
        )
    name, split = match[1], match[2] or "train"
    prepare = (
        'Prepare it once, where TensorFlow is installed: python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"'{name}', file_format='array_record').download_and_prepare()\""
    )
    try:
        # From its files alone: the code of many data sets imports TensorFlow.
        if os.path.isdir(name):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.core.read_only_builder.builder_from_files(name)
    except (tfds.core.DatasetNotFoundError, OSError) as problem:
        raise InputError(
            f"{source}: no prepared data set {name} found ({' '.join(str(problem).split())}). {prepare}. If it is in "
            "another folder, set TFDS_DATA_DIR, or give that folder: tfds:/path/to/NAME/VERSION"
        ) from None
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        found = builder.info.file_format and builder.info.file_format.value
        raise InputError(f"{source} is prepared as {found}. Expected array_record. {prepare}")
    features = builder.info.features
    images = [key for key in sorted(features) if type(features[key]) is tfds.features.Image]
    image = "image" if "image" in images else next(iter(images), None)
    caption = caption_field(features) if captioned else None
    if image is None or (captioned and caption is None):
        known = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise InputError(
            f"{source} has the features {known}. Expected an Image, and one of {', '.join(CAPTION_FIELDS)}. "
            "Give a data set with captions, or do without (--no-captions)"
        )
    try:
        instructions = builder.info.splits[split].file_instructions
    except (KeyError, ValueError) as problem:
        known = ", ".join(builder.info.splits)
        raise InputError(
            f"{source} has no split {split} ({problem}). Give one of {known}, or a part of one, e.g. train[:10%]"
        ) from None
    for part in instructions:
        shard = os.path.basename(part.filename)
        first, end = part.skip, part.skip + part.take
        yield f"{shard}:{first}-{end - 1}", TfdsPiece(str(builder.data_path), shard, (first, end), image, caption)
