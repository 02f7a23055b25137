"""Masks as weights of the loss: from alpha channels or from a folder, with the crop and flip of their images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.build.build import build
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.images import read_image
from sdxl_jax.data.inspection import dump, open_dataset
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.data.transforms import cover_crop
from sdxl_jax.errors import InputError

SIZES = ((40, 24), (24, 40), (32, 32))
"""(height, width)."""


def shade(height: int, width: int) -> np.ndarray:
    """A mask that is lighter towards the lower right."""
    rows, columns = np.mgrid[:height, :width]
    return (rows * 3 + columns * 2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose red channel is their mask, which is also in masks/ and the alpha channel of those in alpha/."""
    for name in ("images/a", "masks/a", "alpha"):
        (tmp_path / name).mkdir(parents=True)
    for number, (height, width) in enumerate(SIZES):
        mask = shade(height, width)
        pixels = np.repeat(mask[..., None], 3, 2)
        Image.fromarray(pixels).save(tmp_path / f"images/a/{number}.bmp")
        Image.fromarray(mask).save(tmp_path / f"masks/a/{number}.png")
        Image.fromarray(np.concatenate([pixels, mask[..., None]], 2)).save(tmp_path / f"alpha/{number}.png")
    return tmp_path


def data(root: Path, name: str, **changes: Any) -> DataConfig:
    given = DataConfig(folder=str(root / name), buckets=((16, 16),), batch_size=3, flip_probability=0.5)
    return dataclasses.replace(given, **{"masks": str(root / "masks"), **changes})


@pytest.mark.parametrize(("name", "masks"), [("images", None), ("alpha", "alpha")])
def test_a_mask_is_resized_cropped_and_flipped_as_its_image(folder: Path, name: str, masks: str | None) -> None:
    config = data(folder, name, **({} if masks is None else {"masks": masks}))
    batches: Any = BucketedDataset(config, None).iterate()
    for _ in range(3):
        batch = next(batches)
        np.testing.assert_array_equal(batch.mask, batch.image[..., 0])  # the colours beneath alpha are not over white
    batches.close()


def test_the_random_numbers_of_an_image_do_not_depend_on_its_mask() -> None:
    image, options = np.zeros((40, 24, 3), np.uint8), {"bucket": Bucket(16, 16), "flip_probability": 0.5}
    for seed in range(4):
        one, other = (
            cover_crop(image, rng=np.random.default_rng(seed), mask=mask, **options) for mask in (None, shade(40, 24))
        )
        assert one.flipped == other.flipped and (one.crop_top_left == other.crop_top_left).all()


def test_masks_of_jpegs_that_are_downscaled_while_they_are_decoded_are_those_of_their_images(folder: Path) -> None:
    for number in range(len(SIZES)):
        name = folder / f"images/a/{number}.bmp"
        Image.open(name).resize((256, 256)).save(name.with_suffix(".jpg"), quality=95)
        name.unlink()
        mask = folder / f"masks/a/{number}.png"
        Image.open(mask).resize((256, 256)).save(mask)
    batch: Any = next(BucketedDataset(data(folder, "images"), None).iterate())
    assert np.abs(batch.mask.astype(int) - batch.image[..., 0]).mean() < 3


def test_images_without_masks_among_others_count_wholly_and_a_dump_shows_the_masks(folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(folder / "alpha/3.png")
    source = open_folder(folder / "alpha", captioned=False, masks="alpha")
    assert source.notes == ("1 of 4 images have no alpha channel, and all of them counts (data.masks=alpha)",)
    assert source.fingerprint != open_folder(folder / "alpha", captioned=False).fingerprint
    masked, plain = Source(str(folder / "alpha"), masks="alpha"), Source(str(folder / "images"))
    config = data(folder, "images", folder=None, masks=None, sources=(masked, plain), batch_size=7)
    batch: Any = next(BucketedDataset(config, None).iterate())
    assert batch.mask.shape == (7, 16, 16)
    assert {int(number) for number, mask in zip(batch.example, batch.mask, strict=True) if (mask == 255).all()} == {
        *(3, 4, 5, 6)
    }
    dump(open_dataset(config, captioned=False), 7, folder / "dump")
    records = [json.loads(path.read_text()) for path in (folder / "dump").glob("*.json")]
    shown = [folder / "dump" / record["mask"] for record in records if "mask" in record]
    assert len(shown) == 4 and read_image(shown[0]).shape == (16, 16, 3)
    assert next(BucketedDataset(dataclasses.replace(config, sources=(plain,)), None).iterate()).mask is None


def test_masks_that_do_not_fit_are_refused_with_both_files(folder: Path) -> None:
    (folder / "masks/a/0.png").unlink()
    Image.new("L", (41, 24), 255).save(folder / "masks/a/1.png")
    Image.new("L", (32, 32)).save(folder / "masks/a/2.png")
    source = open_folder(folder / "images", captioned=False, masks=str(folder / "masks"), on_refused=OnRefused.SKIP)
    assert len(source.paths) == 1
    (name, missing), (other, size) = source.refused()
    assert name == "a/0.bmp" and missing.startswith(
        "image without a mask: no a/0 with an image's extension in data.mas"
    )
    assert other == "a/1.bmp" and size == (
        f"the mask {folder}/masks/a/1.png cannot be used: it has 24×41 pixels (height × width), the image 24×40"
    )
    with pytest.raises(
        InputError, match=r"(?s)a/1\.bmp: the mask .*masks/a/1\.png.*a/2\.bmp: .* black or transparent all"
    ):
        open_folder(folder / "images", captioned=False, masks=str(folder / "masks"), verify=True)


def test_settings_of_masks_that_cannot_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(expected: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=expected):
            BucketedDataset(data(folder, "images", **changes), None)

    refused("data.masks=nowhere is not a folder", masks="nowhere")
    refused("no image in .*images has an alpha channel", masks="alpha")
    refused("masks=.*images/a is inside .*images, all of whose", masks=str(folder / "images/a"))
    refused("has no effect with data.cache", cache="cache", crops_per_image=1)
    refused("is for data.folder. With data.sources", folder=None, sources=(Source(str(folder / "images")),))
    Image.new("L", (40, 24)).save(folder / "masks/a/1.jpg")
    refused(r"1\.jpg and .*1\.png are masks of the same image")
    build(str(folder / "images"), folder / "shards", captions=False, workers=1)
    refused("shard set, which holds no masks", folder=str(folder / "shards"), masks="alpha")
