"""sdxl_jax.data.build.tfds: data sets are read without TensorFlow, and errors name their remedy."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sources import encoded, everything, split

from sdxl_jax.data import captions
from sdxl_jax.data.build import tfds as tfds_module
from sdxl_jax.data.build.records import read, units
from sdxl_jax.errors import InputError


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> Path:
    """A data set prepared as ArrayRecord, five images, without TensorFlow."""
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    nested = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
    features = {"image": tfds.features.Image(), "captions": nested, "score": np.float32, "name": tfds.features.Text()}
    features["label"] = tfds.features.ClassLabel(num_classes=3)

    class TinyCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(5):
                texts = [{"id": 1, "text": f"é{number}"}, {"id": 2, "text": " b "}] if number else []
                fields = {"captions": texts, "score": number / 2, "name": "n", "label": number % 3}
                yield number, {"image": encoded("PNG", seed=number), **fields}

    folder = tmp_path_factory.mktemp("tfds")
    TinyCaptions(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "tiny_captions" / "1.0.0"


def test_tfds_is_read_without_tensorflow(tfds_folder):
    loaded = "tensorflow" in sys.modules
    good, bad = split(f"tfds:{tfds_folder}")
    assert ("tensorflow" in sys.modules) == loaded
    assert list(bad.values()) == ["empty caption"]
    assert sorted(record.captions for record in good.values()) == [(f"é{number}", "b") for number in range(1, 5)]
    assert sorted(record.numbers["score"] for record in good.values()) == [0.5, 1.0, 1.5, 2.0]
    assert sorted(record.numbers["label"] for record in good.values()) == [0, 1, 1, 2]
    assert {record.size for record in good.values()} == {(8, 12)}
    whole = everything(f"tfds:{tfds_folder}:train")
    assert everything(f"tfds:{tfds_folder}:train[1:3]") == whole[1:3]
    (unit,) = units(f"tfds:{tfds_folder}")
    assert list(read(pickle.loads(pickle.dumps(unit)))) == whole


def test_tfds_problems_name_their_remedy(tfds_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no prepared data set no_such_thing:1\.0\.0 found .*download_and_prepare"):
        units("tfds:no_such_thing:1.0.0:train")
    with pytest.raises(InputError, match=r"no prepared data set .*download_and_prepare"):
        units(f"tfds:{tmp_path}")
    with pytest.raises(InputError, match=r"has no split test .*Give one of train"):
        units(f"tfds:{tfds_folder}:test")
    with pytest.raises(InputError, match=r"is not the name of a TFDS data set\. Expected tfds:NAME"):
        units("tfds:")
    for module in (captions, tfds_module):
        monkeypatch.setattr(module, "CAPTION_FIELDS", ("title",))
    with pytest.raises(InputError, match=r"has the features .*Expected an Image, and one of title"):
        units(f"tfds:{tfds_folder}")
    monkeypatch.undo()
    (unit,) = units(f"tfds:{tfds_folder}")
    (shard,) = tfds_folder.glob("*array_record-*")
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"{shard.name} cannot be read"):
        list(read(unit))
    (tmp_path / "elsewhere").rename(shard)
