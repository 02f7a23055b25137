"""The promises of sdxl_jax.data.pipeline: every image once an epoch, the position is the step, hosts agree."""

import dataclasses
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.data.build import build
from sdxl_jax.data.inspection import dump, inspect
from sdxl_jax.data.pipeline import BucketedDataset, DataConfig
from sdxl_jax.data.sources import read_image
from sdxl_jax.errors import InputError

BUCKETS = ((16, 16), (16, 32), (32, 16), (8, 40))
COUNTS = {(20, 26): 11, (17, 33): 9, (70, 33): 2}  # with batches of 4: remainders 3 and 1, and a bucket too small


def tokenize(captions):
    """77 times the number in the caption."""
    return {"clip": np.array([[int(caption.split()[-1])] * 77 for caption in captions], np.int32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    sizes = [size for size, count in COUNTS.items() for _ in range(count)]
    for number, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"image {number}")
    return folder


@pytest.fixture
def config(folder):
    return DataConfig(folder=str(folder), buckets=BUCKETS, batch_size=4, flip_probability=0.5, seed=7)


def open_dataset(config, **changes):
    hosts = {name: changes.pop(name) for name in ("host_index", "host_count") if name in changes}
    return BucketedDataset(dataclasses.replace(config, **changes), tokenize, **hosts)


def take(dataset, count, start=0):
    return list(itertools.islice(dataset.iterate(start), count))


def pixels(batch):
    """original size, crop, target size of each example"""
    return np.stack([batch.micro.original_size, batch.micro.crop_top_left, batch.micro.target_size])


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.tokens["clip"], other.tokens["clip"])
        np.testing.assert_array_equal(pixels(one), pixels(other))
        np.testing.assert_array_equal(one.example, other.example)


def epochs_of(dataset, count):
    batches = take(dataset, count * dataset.epoch_steps)
    return [batches[start : start + dataset.epoch_steps] for start in range(0, len(batches), dataset.epoch_steps)]


def test_every_batched_image_comes_once_an_epoch_and_epochs_differ(config):
    dataset = open_dataset(config)
    assert dataset.epoch_steps == 2 + 2 + 1
    orders, left_out = [], set()
    for epoch in epochs_of(dataset, 4):
        seen = Counter(int(number) for batch in epoch for number in batch.example)
        large = {number: times for number, times in seen.items() if number < 20}
        assert set(large.values()) == {1} and len(large) == 16
        assert seen[20] == seen[21] == 2  # the small bucket is repeated to fill its one batch
        orders.append([batch.example.tolist() for batch in epoch])
        left_out.add(frozenset(set(range(20)) - set(large)))
    assert len({str(order) for order in orders}) == 4
    assert len(left_out) > 1  # no image is left out for ever


def test_a_batch_is_of_one_bucket_and_bucket_of_knows_it_beforehand(config):
    dataset = open_dataset(config)
    for step, batch in enumerate(take(dataset, 15)):
        bucket = dataset.bucket_of(step)
        assert batch.image.shape == (4, *bucket, 3) and batch.image.dtype == np.uint8
        np.testing.assert_array_equal(batch.micro.target_size, [bucket] * 4)
        np.testing.assert_array_equal(batch.micro.original_size, dataset.source.sizes[batch.example])
        assert batch.example.dtype == batch.micro.crop_top_left.dtype == np.int32


def test_tokens_are_those_of_the_captions(config):
    for batch in take(open_dataset(config), 5):
        np.testing.assert_array_equal(batch.tokens["clip"], np.repeat(batch.example[:, None], 77, axis=1))


def test_the_position_is_the_step(config):
    dataset = open_dataset(config)
    assert_same(take(dataset, 12)[7:], take(dataset, 5, start=7))
    assert_same(take(dataset, 2, start=10**6), take(open_dataset(config), 2, start=10**6))


def test_worker_processes_change_nothing(config):
    threads = take(open_dataset(config), 5, start=3)
    processes = open_dataset(config, workers=2).iterate(3)
    assert_same(threads, list(itertools.islice(processes, 5)))
    processes.close()


def test_hosts_together_read_what_one_host_would(config):
    whole = take(open_dataset(config), 6)
    halves = [take(open_dataset(config, host_index=index, host_count=2), 6) for index in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(one.image, np.concatenate([part.image for part in parts]))
        np.testing.assert_array_equal(one.example, np.concatenate([part.example for part in parts]))
        np.testing.assert_array_equal(pixels(one), np.concatenate([pixels(part) for part in parts], axis=1))


def test_crops_and_flips_are_drawn_anew_each_epoch_and_repeat_with_the_seed(config):
    def draws(seed):
        """Of each image: (left, flipped) wherever it came up in twelve epochs."""
        examples = itertools.islice(open_dataset(config, seed=seed).examples(), 12 * 5 * 4)
        return [(image, int(example.crop_top_left[1]), example.flipped) for image, _, example in examples]

    first = draws(7)
    assert all(len({draw for draw in first if draw[0] == image}) > 2 for image in range(11))
    assert first == draws(7) != draws(8)


def test_order_differs_by_seed_and_zero_is_a_seed(config):
    orders = [str([b.example.tolist() for b in take(open_dataset(config, seed=seed), 10)]) for seed in (0, 1, 2)]
    assert len(set(orders)) == 3


def test_a_single_batch_is_a_dataset(config):
    dataset = open_dataset(config, buckets=((16, 16),), batch_size=30, max_aspect_distance=2.0)
    assert dataset.epoch_steps == 1
    counts = np.bincount(take(dataset, 1)[0].example)
    assert counts.sum() == 30 and counts.min() == 1 and counts.max() == 2


def test_report_counts_what_an_epoch_takes_and_leaves(config):
    report = [tuple(bucket) for bucket in open_dataset(config).report()]
    assert report == [(16, 16, 11, 2, 3, 0), (16, 32, 9, 2, 1, 0), (32, 16, 2, 1, 0, 2), (8, 40, 0, 0, 0, 0)]


def test_images_that_fit_no_bucket_are_refused_by_name(config):
    with pytest.raises(InputError, match=r"2 entries of .*\n  20\.png: 70×33 .* fits no bucket"):
        open_dataset(config, buckets=((16, 16), (16, 32)))
    dataset = open_dataset(config, buckets=((16, 16), (16, 32)), on_refused="skip")
    assert [refused.file for refused in dataset.refused] == ["20.png", "21.png"]
    assert sum(bucket.images for bucket in dataset.report()) == 20
    assert all((batch.example < 20).all() for batch in take(dataset, 5))


def test_buckets_that_no_image_fits_are_refused(config):
    with pytest.raises(InputError, match=r"(?s)None of the 22 images .* fits a bucket.*Add buckets"):
        open_dataset(config, buckets=((8, 80),), on_refused="skip")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host_count": 3}, "batch_size=4 cannot be split over 3 hosts. Use a multiple of 3, e.g. 6"),
        ({"batch_size": 0}, "batch_size=0 cannot"),
        ({"host_index": 2, "host_count": 2}, "Expected 0 to 1"),
        ({"flip_probability": 1.5}, "flip_probability=1.5 is out of range. Expected 0 to 1"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"read_ahead": 0}, "read_ahead=0"),
        ({"buckets": ()}, "buckets is empty"),
        ({"buckets": ((16, 20),)}, "multiples of 8"),
        ({"folder": "no/such/folder"}, "does not exist"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(config, changes, message):
    with pytest.raises(InputError, match=message):
        open_dataset(config, **changes)


def test_an_image_damaged_after_opening_stops_training_with_its_name(config, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("image 0")
    dataset = open_dataset(config, folder=str(tmp_path), batch_size=1)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        next(dataset.iterate())


def test_inspection_counts_and_lists_and_never_stops_at_a_refusal(config, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00.txt").unlink()
    report = json.loads(json.dumps(inspect(dataclasses.replace(config, folder=str(tmp_path)))))
    assert report["images_found"] == 22 and report["images_usable"] == 21 and report["epoch_steps"] == 5
    assert [refused["file"] for refused in report["refused"]] == ["00.png"]
    assert "without a caption" in report["refused"][0]["reason"]
    keys = ["height", "width", "images", "batches", "remainder", "repeated"]
    assert report["buckets"][0] == dict(zip(keys, [16, 16, 10, 2, 2, 0], strict=True))


def test_dump_shows_the_training_examples_in_training_order(config, folder, tmp_path):
    dump(config, 10, tmp_path / "dump")
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == sorted(
        f"{number:06d}.{suffix}" for number in range(10) for suffix in ("png", "json")
    )
    batches = take(open_dataset(config), 3)
    for number in range(10):
        record = json.loads((tmp_path / "dump" / f"{number:06d}.json").read_text())
        batch, row = batches[number // 4], number % 4
        image = int(batch.example[row])
        np.testing.assert_array_equal(read_image(tmp_path / "dump" / f"{number:06d}.png"), batch.image[row])
        assert record["source"] == f"{image:02d}.png" and record["caption"] == f"image {image}"
        for key in ("original_size", "crop_top_left", "target_size"):
            assert record[key] == getattr(batch.micro, key)[row].tolist()
        assert set(record) == {"source", "original_size", "crop_top_left", "target_size", "flipped", "caption"}


def test_dump_refuses_a_used_folder_and_no_examples(config, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        dump(config, 1, tmp_path)
    with pytest.raises(InputError, match="Cannot dump 0"):
        dump(config, 0, tmp_path / "new")


def test_real_photographs_keep_their_sizes_and_true_records(tmp_path):
    """Photographs of $SDXL_JAX_TEST_DATA/coco363: val2017/ and captions.json."""
    root = Path(os.environ.get("SDXL_JAX_TEST_DATA", "")) / "coco363"
    if not (root / "captions.json").exists():
        pytest.skip("SDXL_JAX_TEST_DATA names no folder with coco363/captions.json")
    records = [record for record in json.loads((root / "captions.json").read_text()) if "val2017/" in record["file"]]
    lines = [{"file_name": record["file"], "text": record["captions"][0]} for record in records]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "val2017").symlink_to((root / "val2017").resolve())
    config = DataConfig(folder=str(tmp_path), batch_size=4, flip_probability=0.5, verify_images=True)
    dataset = BucketedDataset(config, lambda captions: {})
    assert dataset.refused == []
    sizes = {record["file"]: [record["height"], record["width"]] for record in records}
    assert {dataset.source.name(image): size for image, size in enumerate(dataset.source.sizes.tolist())} == sizes
    for image, _, example in itertools.islice(dataset.examples(), 4):
        assert example.original_size.tolist() == sizes[dataset.source.name(image)]
        height, width = dataset.source.sizes[image]
        target = example.target_size
        top, left = example.crop_top_left
        scale = max(target / (height, width))
        box = (left / scale, top / scale, (left + target[1]) / scale, (top + target[0]) / scale)
        photograph = Image.fromarray(dataset.source.pixels(image))
        if example.flipped:
            photograph = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        right, bottom = min(box[2], float(width)), min(box[3], float(height))
        expected = photograph.resize((target[1], target[0]), Image.Resampling.BICUBIC, box=(*box[:2], right, bottom))
        difference = np.abs(np.asarray(expected, np.float32) - example.image).mean()
        assert difference < 3  # two filters; a crop that is off by some pixels, or the wrong way round, is above 10


# Shard sets


@pytest.fixture(scope="module")
def shard_set(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("built") / "shards"
    build(str(folder), destination, workers=0, progress=False)
    return destination


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_set_gives_the_batches_of_the_folder_it_was_built_from(config, shard_set, workers):
    expected = take(open_dataset(config), 7, start=3)
    assert_same(take(open_dataset(config, folder=str(shard_set), workers=workers), 7, start=3), expected)


def test_a_shard_set_can_be_built_from_a_shard_set(config, shard_set, tmp_path):
    build(str(shard_set), tmp_path / "again", workers=0, progress=False)
    expected = take(open_dataset(config, folder=str(shard_set)), 5)
    assert_same(take(open_dataset(config, folder=str(tmp_path / "again")), 5), expected)


def test_a_shard_sets_fingerprint_is_that_of_its_content_and_buckets(config, shard_set):
    dataset = open_dataset(config, folder=str(shard_set))
    assert dataset.fingerprint == open_dataset(config, folder=str(shard_set)).fingerprint
    others = {"folder": config.folder}, {"buckets": ((16, 16), (16, 32))}, {"max_aspect_distance": 0.1}
    for change in others:
        given = {"folder": str(shard_set), "on_refused": "skip", **change}
        assert open_dataset(config, **given).fingerprint != dataset.fingerprint


def test_several_captions_of_an_image_take_turns_and_repeat_with_the_step(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    Image.new("RGB", (16, 16)).save(source / "a.png")
    (source / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["one 1", "two 2", "three 3"]}))
    build(str(source), tmp_path / "shards", workers=0, progress=False)
    config = DataConfig(folder=str(tmp_path / "shards"), buckets=((16, 16),), batch_size=1)
    told = [int(batch.tokens["clip"][0, 0]) for batch in take(open_dataset(config), 40)]
    assert Counter(told).keys() == {1, 2, 3}
    assert [int(batch.tokens["clip"][0, 0]) for batch in take(open_dataset(config), 20, start=20)] == told[20:]


def test_inspection_of_a_shard_set_counts_what_was_refused_when_it_was_built(tmp_path, folder):
    source = tmp_path / "images"
    shutil.copytree(folder, source)
    (source / "bad.png").write_bytes(b"")
    (source / "bad.txt").write_text("image 99")
    build(str(source), tmp_path / "shards", workers=0, progress=False)
    seen = inspect(DataConfig(folder=str(tmp_path / "shards"), buckets=BUCKETS, batch_size=4))
    assert seen["images_found"] == sum(COUNTS.values()) + 1
    assert [entry["file"] for entry in seen["refused"]] == ["bad.png"]
