"""The promises of sdxl_jax.data.buckets: the paper's sizes, and assignment to the nearest aspect ratio."""

import math

import numpy as np
import pytest
from jaxtyping import Int32

from sdxl_jax.data.buckets import SDXL_BUCKETS, Bucket, assign, check_buckets, generate_buckets
from sdxl_jax.errors import InputError

PAPER = """
512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472
704x1408 704x1344 768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024
1024x1024 1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704
1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512
"""


def sizes(*pairs: tuple[int, int]) -> Int32[np.ndarray, "images 2"]:
    return np.array(pairs, np.int32)


def test_buckets_are_the_forty_of_the_paper_in_its_order():
    assert [f"{height}x{width}" for height, width in SDXL_BUCKETS] == PAPER.split()


def test_generated_buckets_are_the_papers_and_one_transpose():
    generated = generate_buckets(1024 * 1024)
    assert set(generated) - set(SDXL_BUCKETS) == {Bucket(1344, 704)}
    assert [bucket for bucket in generated if bucket != (1344, 704)] == list(SDXL_BUCKETS)


@pytest.mark.parametrize(("pixels", "multiple", "aspect"), [(512**2, 64, 4.0), (256**2, 32, 2.0), (768**2, 64, 1.0)])
def test_generated_buckets_satisfy_their_rule(pixels, multiple, aspect):
    buckets = generate_buckets(pixels, multiple, aspect)
    assert {Bucket(width, height) for height, width in buckets} == set(buckets)
    assert Bucket(math.isqrt(pixels), math.isqrt(pixels)) in buckets
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert 0.9 * pixels <= height * width <= pixels
        assert 1 / aspect <= height / width <= aspect


@pytest.mark.parametrize("arguments", [(0,), (512**2, 60), (512**2, 64, 0.5), (100**2, 64)])
def test_impossible_bucket_rules_are_refused(arguments):
    with pytest.raises(InputError, match="pixels"):
        generate_buckets(*arguments)


def test_every_bucket_is_assigned_to_itself():
    assert assign(sizes(*SDXL_BUCKETS), SDXL_BUCKETS).bucket.tolist() == list(range(40))


def test_images_are_assigned_to_the_nearest_aspect_ratio_whatever_their_size():
    buckets = ((1024, 1024), (512, 2048), (2048, 512))
    given = sizes((100, 100), (30, 50), (10, 90), (9000, 1000), (1, 2), (2, 1))
    assert assign(given, buckets).bucket.tolist() == [
        0,
        0,
        1,
        2,
        0,
        0,
    ]  # 1:2 is as far from 1:1 as from 1:4: the first wins


def test_ties_go_to_the_first_bucket():
    assert assign(sizes((7, 14), (3, 6)), ((64, 64), (64, 256))).bucket.tolist() == [0, 0]
    assert assign(sizes((7, 14), (3, 6)), ((64, 256), (64, 64))).bucket.tolist() == [0, 0]
    assert assign(sizes((100, 100)), ((64, 64), (128, 128))).bucket.tolist() == [0]


def test_the_distance_is_the_log_of_the_factor_between_aspect_ratios():
    distance = assign(sizes((100, 200), (200, 100), (50, 50)), ((64, 64),)).distance
    np.testing.assert_allclose(distance, [math.log(2), math.log(2), 0])


@pytest.mark.parametrize("seed", range(3))
def test_assignment_agrees_with_the_definition(seed):
    rng = np.random.default_rng(seed)
    buckets = tuple(SDXL_BUCKETS[number] for number in rng.permutation(40)[:17])
    given = rng.integers(1, 60, (2000, 2)).astype(np.int32)
    differences = np.log(given[:, None, 0] / given[:, None, 1]) - np.log([h / w for h, w in buckets])
    distances = np.abs(differences).round(10)
    np.testing.assert_array_equal(assign(given, buckets).bucket, distances.argmin(axis=1))
    np.testing.assert_allclose(assign(given, buckets).distance, distances.min(axis=1), atol=1e-9)


def test_an_empty_bucket_list_is_refused():
    with pytest.raises(InputError, match=r"data\.buckets is empty\. Give one"):
        assign(sizes((1, 1)), ())


@pytest.mark.parametrize("bucket", [(1020, 1024), (0, 64), (64, -64)])
def test_a_bucket_that_the_autoencoder_cannot_take_is_refused(bucket):
    with pytest.raises(InputError, match=rf"\({bucket[0]}, {bucket[1]}\).*multiples of 8.*Use \("):
        check_buckets(((64, 64), bucket))
