"""The promises of sdxl_jax.data.transforms: the recorded crop and flip agree with the pixels."""

import numpy as np
import pytest
from jaxtyping import UInt8

from sdxl_jax.data.buckets import SDXL_BUCKETS, Bucket
from sdxl_jax.data.transforms import CropMode, cover_crop, cover_size

CASES = [
    pytest.param((60, 200), Bucket(48, 96), id="cropped in width"),
    pytest.param((200, 60), Bucket(96, 48), id="cropped in height"),
    pytest.param((50, 100), Bucket(80, 80), id="upscaled"),
]


def coordinates(height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """An image whose red is its column and whose green is its row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def assert_record_is_true(example, height, width, bucket):
    """The recorded crop and flip give the original position of each pixel, which its colour encodes."""
    resized = cover_size(height, width, bucket)
    top, left = example.crop_top_left
    y = (np.arange(bucket.height) + top + 0.5) * height / resized.height - 0.5
    x = (np.arange(bucket.width) + left + 0.5) * width / resized.width - 0.5
    if example.flipped:
        x = width - 1 - x  # the record is for the mirrored image
    inner = np.s_[4:-4, 4:-4]  # at the border the filter sees one side only
    np.testing.assert_allclose(example.image[..., 0][inner], np.broadcast_to(x, bucket)[inner], atol=1.0)
    np.testing.assert_allclose(example.image[..., 1][inner], np.broadcast_to(y[:, None], bucket)[inner], atol=1.0)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", CropMode)
@pytest.mark.parametrize(("size", "bucket"), CASES)
def test_recorded_crop_and_flip_are_those_of_the_pixels(size: tuple[int, int], bucket, crop, flip):
    rng = np.random.default_rng(0)
    for _ in range(8):
        example = cover_crop(coordinates(*size), bucket, rng=rng, crop=crop, flip_probability=flip)
        assert example.image.shape == (*bucket, 3)
        assert example.flipped == bool(flip)
        assert_record_is_true(example, *size, bucket)


def test_a_flip_mirrors_the_same_crop():
    image = np.random.default_rng(0).integers(0, 256, (40, 100, 3), np.uint8)
    plain, flipped = (
        cover_crop(image, Bucket(40, 48), rng=np.random.default_rng(3), flip_probability=p) for p in (0.0, 1.0)
    )
    np.testing.assert_array_equal(flipped.image, plain.image[:, ::-1])
    assert plain.crop_top_left[1] + flipped.crop_top_left[1] == 100 - 48
    assert plain.crop_top_left[0] == flipped.crop_top_left[0] == 0


def test_original_size_is_height_and_width_before_the_resize():
    example = cover_crop(coordinates(60, 200), Bucket(48, 96), rng=np.random.default_rng(0))
    assert example.original_size.tolist() == [60, 200]
    assert example.target_size.tolist() == [48, 96]
    assert all(array.dtype == np.int32 for array in example[1:4])


def test_random_crops_reach_both_ends_equally_often_and_centre_is_the_middle():
    image, bucket, rng = coordinates(16, 19), Bucket(16, 16), np.random.default_rng(0)
    lefts = [cover_crop(image, bucket, rng=rng).crop_top_left[1] for _ in range(400)]
    assert np.bincount(lefts, minlength=4).min() > 70  # 100 expected at each of 0, 1, 2, 3
    assert cover_crop(image, bucket, rng=rng, crop=CropMode.CENTRE).crop_top_left.tolist() == [0, 1]


def test_images_are_flipped_with_the_given_probability():
    rng = np.random.default_rng(0)
    flips = [cover_crop(coordinates(16, 16), Bucket(16, 16), rng=rng, flip_probability=0.25) for _ in range(400)]
    assert 70 < sum(example.flipped for example in flips) < 130


def test_the_resized_image_covers_every_bucket_and_matches_one_side():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 5000, (500, 2)).tolist():
        bucket = SDXL_BUCKETS[rng.integers(40)]
        resized = cover_size(height, width, bucket)
        assert resized.height >= bucket.height and resized.width >= bucket.width
        assert resized.height == bucket.height or resized.width == bucket.width
        scale = max(bucket.height / height, bucket.width / width)
        assert abs(resized.height - height * scale) <= 0.5 and abs(resized.width - width * scale) <= 0.5


def test_an_image_of_the_buckets_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    np.testing.assert_array_equal(cover_crop(image, Bucket(32, 48), rng=np.random.default_rng(0)).image, image)
