"""The promises of sdxl_jax.data.pipeline: every image once per epoch, the position is the step, processes agree."""

import dataclasses
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.data import inspection, pipeline
from sdxl_jax.data.build.build import build
from sdxl_jax.data.images import read_image
from sdxl_jax.data.inspection import dump, inspect
from sdxl_jax.data.mixture import Source, Target
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig, SmallBuckets
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.data.transforms import CropMode
from sdxl_jax.errors import InputError

BUCKETS = ((16, 16), (16, 32), (32, 16), (8, 40))
COUNTS = {
    (20, 26): 11,
    (17, 33): 9,
    (70, 33): 2,
}  # with batches of 4: remainders 3 and 1, and a bucket smaller than a batch


def tokenize(captions):
    """The number in the caption, repeated 77 times."""
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
    processes = {name: changes.pop(name) for name in ("process_index", "process_count") if name in changes}
    return BucketedDataset(dataclasses.replace(config, **changes), tokenize, **processes)


def take(dataset, count, start=0) -> Any:
    return list(itertools.islice(dataset.iterate(start), count))


def geometry(batch):
    """Original size, crop and target size of each example, [3, batch, 2]."""
    return np.stack([batch.micro.original_size, batch.micro.crop_top_left, batch.micro.target_size])


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.tokens["clip"], other.tokens["clip"])
        np.testing.assert_array_equal(geometry(one), geometry(other))
        np.testing.assert_array_equal(one.example, other.example)


def epochs_of(dataset, count):
    ends = [dataset.order.steps_before(epoch) for epoch in range(count + 1)]
    batches = take(dataset, ends[-1])
    return [batches[start:end] for start, end in itertools.pairwise(ends)]


def test_every_batched_image_is_seen_once_per_epoch_and_epochs_differ(config):
    dataset = open_dataset(config)
    assert dataset.epoch_steps == 2 + 2 + 0.5
    orders, left_out = [], set()
    for epoch in epochs_of(dataset, 4):
        seen = Counter(int(number) for batch in epoch for number in batch.example)
        large = {number: times for number, times in seen.items() if number < 20}
        assert set(large.values()) == {1} and len(large) == 16
        assert seen[20] == seen[21] == 2 * (len(orders) % 2)  # the small bucket fills its batch in two epochs
        orders.append([batch.example.tolist() for batch in epoch])
        left_out.add(frozenset(set(range(20)) - set(large)))
    assert len({str(order) for order in orders}) == 4
    assert len(left_out) > 1  # no image is left out forever


def test_a_batch_has_one_bucket_which_bucket_of_gives_in_advance(config):
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


def test_processes_together_read_what_one_process_would(config):
    whole = take(open_dataset(config), 6)
    halves = [take(open_dataset(config, process_index=index, process_count=2), 6) for index in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(one.image, np.concatenate([part.image for part in parts]))
        np.testing.assert_array_equal(one.example, np.concatenate([part.example for part in parts]))
        np.testing.assert_array_equal(geometry(one), np.concatenate([geometry(part) for part in parts], axis=1))


def test_crops_and_flips_differ_each_epoch_and_repeat_with_the_seed(config):
    def geometries(seed):
        """(image, left, flipped) of every example in twelve epochs."""
        examples = itertools.islice(open_dataset(config, seed=seed).examples(), 12 * 5 * 4)
        return [(image, int(example.crop_top_left[1]), example.flipped) for image, _, example in examples]

    first = geometries(7)
    assert all(len({each for each in first if each[0] == image}) > 2 for image in range(11))
    assert first == geometries(7) != geometries(8)


def test_order_differs_by_seed_and_zero_is_a_seed(config):
    orders = [str([b.example.tolist() for b in take(open_dataset(config, seed=seed), 10)]) for seed in (0, 1, 2)]
    assert len(set(orders)) == 3


def test_a_single_batch_is_a_dataset(config):
    dataset = open_dataset(config, buckets=((16, 16),), batch_size=30, max_aspect_distance=2.0)
    assert dataset.epoch_steps == 22 / 30
    counts = np.bincount(take(dataset, 1)[0].example)
    assert counts.sum() == 30 and counts.min() == 1 and counts.max() == 2


def test_report_counts_the_images_that_an_epoch_uses_and_leaves_out(config):
    report = [tuple(bucket) for bucket in open_dataset(config).report()]
    assert report == [
        (16, 16, 11, 4, 2, 3, 0, None),
        (16, 32, 9, 4, 2, 1, 0, None),
        (32, 16, 2, 4, 0.5, 0, 2, None),
        (8, 40, 0, 4, 0, 0, 0, None),
    ]


def test_images_that_fit_no_bucket_are_refused_by_name(config):
    with pytest.raises(InputError, match=r"2 entries of .*\n  20\.png: 70×33 .* fits no bucket"):
        open_dataset(config, buckets=((16, 16), (16, 32)))
    dataset = open_dataset(config, buckets=((16, 16), (16, 32)), on_refused=OnRefused.SKIP)
    assert [refused.file for refused in dataset.refused()] == ["20.png", "21.png"]
    assert dataset.refused_count() == 2
    assert sum(bucket.images for bucket in dataset.report()) == 20
    assert all((batch.example < 20).all() for batch in take(dataset, 5))


def test_buckets_that_no_image_fits_are_refused(config):
    with pytest.raises(InputError, match=r"(?s)None of the 22 images .* fits a bucket.*Add buckets"):
        open_dataset(config, buckets=((8, 80),), on_refused=OnRefused.SKIP)
    with pytest.raises(InputError, match=r"(?s)None of the 22 images .*data\.min_size=1000.*\nLower data\.min_size"):
        open_dataset(config, min_size=1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_count": 3}, "batch_size=4 cannot be split over 3 processes. Use a multiple of 3, e.g. 6"),
        ({"batch_size": 0}, "batch_size=0 cannot"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 is out of range. Give 0 to 1"),
        ({"flip_probability": 1.5}, "flip_probability=1.5 is out of range. Give 0 to 1"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"read_ahead": 0}, "read_ahead=0"),
        ({"batch_pixels": 0}, "batch_pixels=0"),
        ({"crop": CropMode.CENTRE, "flip_probability": 0.0, "crops_per_image": 2}, "as many times the same crop"),
        ({"cache_of_other_code": True}, "no effect without data.cache"),
        ({"min_size": 0}, "min_size=0 is out of range. Give 1 or more"),
        ({"crops_per_image": 0}, "crops_per_image=0"),
        ({"max_bad_share": 1.1}, "max_bad_share=1.1"),
        ({"buckets": ()}, "buckets is empty"),
        ({"buckets": ((16, 20),)}, "multiples of 8"),
        ({"folder": "no/such/folder"}, "does not exist"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(config, changes, message):
    with pytest.raises(InputError, match=message):
        open_dataset(config, **changes)


# Images that turn out damaged during training


@pytest.fixture
def damaged(folder, tmp_path):
    """(folder, damage): a copy of the folder, and a function that damages images in it, by number."""
    copied = tmp_path / "damaged"
    shutil.copytree(folder, copied)

    def damage(*images):
        for image in images:
            (copied / f"{image:02d}.png").write_bytes(b"no image")

    return copied, damage


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_image_is_replaced_by_the_next_of_its_bucket_reported_once_and_counted(
    config, damaged, workers, capsys
):
    folder, damage = damaged
    given = {"folder": str(folder), "workers": workers, "max_bad_share": 1.0}
    clean = take(open_dataset(config, **given), 10)
    dataset = open_dataset(config, **given)
    damage(0, 1, 12)
    seen = take(dataset, 10)
    replaced = np.concatenate([batch.replaced for batch in seen])
    before, after = (np.concatenate([batch.example for batch in batches]) for batches in (clean, seen))
    np.testing.assert_array_equal(replaced, np.isin(before, [0, 1, 12]))
    assert replaced.sum() >= 3 and not np.isin(after, [0, 1, 12]).any()
    np.testing.assert_array_equal(before[~replaced], after[~replaced])
    assert all(
        dataset.source.size(a) == dataset.source.size(b) for a, b in zip(before.tolist(), after.tolist(), strict=True)
    )
    output = capsys.readouterr().out
    assert [output.count(f"/{name}.png cannot be read") for name in ("00", "01", "12", "02")] == [1, 1, 1, 0]
    assert_same(take(dataset, 4, start=6), seen[6:])  # the same replacements, whatever the first step


def test_more_damaged_images_than_allowed_stop_the_run_with_an_error(config, damaged, monkeypatch):
    folder, damage = damaged
    monkeypatch.setattr(pipeline, "FEW", 40)
    dataset = open_dataset(config, folder=str(folder), max_bad_share=0.1)
    damage(*range(9))
    with pytest.raises(InputError, match=r"(?s)\d+ of the \d+ examples .* data\.max_bad_share=0\.1.*\.png cannot be"):
        take(dataset, 100)
    strict = open_dataset(config, folder=str(folder), max_bad_share=0.0, verify_images=False, on_refused=OnRefused.SKIP)
    (folder / "20.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 of the \d+ examples"):
        take(strict, 100)


def test_a_bucket_with_only_damaged_images_stops_the_run(config, damaged):
    folder, damage = damaged
    dataset = open_dataset(config, folder=str(folder), max_bad_share=1.0)
    damage(20, 21)
    with pytest.raises(InputError, match=r"2 images of the bucket 32×16 in a row are damaged\. The last one: .*2[01]"):
        take(dataset, 12)


def test_an_image_of_another_size_than_when_listed_counts_as_damaged(config, damaged, capsys):
    folder, _ = damaged
    dataset = open_dataset(config, folder=str(folder), max_bad_share=1.0)
    Image.new("RGB", (64, 64)).save(folder / "00.png")
    assert sum(batch.replaced.sum() for batch in take(dataset, 15)) >= 1
    assert "00.png is decoded to 64×64 (height × width), and was 20×26" in capsys.readouterr().out


# Sizes of images and batches


def test_images_below_the_minimum_size_are_left_out_and_counted_without_an_error(config):
    dataset = open_dataset(config, min_size=18)
    assert dataset.too_small_count() == COUNTS[17, 33] and dataset.refused_count() == 0
    assert [bucket.images for bucket in dataset.report()] == [11, 0, 2, 0]
    assert all(min(dataset.source.size(image)) >= 18 for batch in take(dataset, 5) for image in batch.example.tolist())
    assert next(dataset.too_small()).reason == "17×33 (height × width), below data.min_size=18"
    seen = inspect(open_dataset(config, min_size=18))
    assert seen["too_small"] == 9 and seen["images_usable"] == 13 and not seen["refused"]


def test_small_images_are_upscaled_and_conditioned_on_their_original_size(config):
    dataset = open_dataset(config, buckets=((64, 64), (64, 128), (128, 64)))
    for batch in take(dataset, 5):
        assert (batch.micro.original_size < batch.micro.target_size).any(axis=1).all()


def test_a_pixel_budget_gives_each_bucket_as_many_images_as_fit(config):
    buckets = ((16, 16), (16, 32), (32, 32))
    dataset = open_dataset(config, buckets=buckets, batch_size=2, batch_pixels=6 * 512, on_refused=OnRefused.SKIP)
    assert [bucket.batch_size for bucket in dataset.report()] == [12, 6, 2]
    for step, batch in enumerate(take(dataset, 6)):
        assert len(batch.image) == dataset.batch_size_of(step)
        height, width = dataset.bucket_of(step)
        assert 6 * 512 - 2 * height * width < batch.image[..., 0].size <= 6 * 512
    halves = [
        open_dataset(
            config,
            buckets=buckets,
            batch_size=2,
            batch_pixels=6 * 512,
            on_refused=OnRefused.SKIP,
            process_index=index,
            process_count=2,
        )
        for index in range(2)
    ]
    whole = take(dataset, 4)
    for one, *parts in zip(whole, *(take(half, 4) for half in halves), strict=True):
        np.testing.assert_array_equal(one.image, np.concatenate([part.image for part in parts]))
    with pytest.raises(InputError, match=r"batch_pixels=1000 holds no batch of 2 images of 32×32. Give 2048 or more"):
        open_dataset(config, buckets=buckets, batch_size=2, batch_pixels=1000)


def test_a_small_bucket_can_be_merged_and_is_reported(config):
    report = {bucket[:2]: bucket for bucket in open_dataset(config, small_buckets=SmallBuckets.MERGE).report()}
    assert report[32, 16].merged_into == (16, 16) and report[32, 16].images == 0
    assert report[16, 16].images == 13 and report[16, 16].repeated == 0
    seen = set()
    for batch in take(open_dataset(config, small_buckets=SmallBuckets.MERGE), 50):
        seen.update(batch.example.tolist())
        assert batch.image.shape[1:3] == tuple(batch.micro.target_size[0])
    assert seen == set(range(22))


# Several sources, scores, crops


def test_images_are_seen_as_often_as_the_weights_of_their_sources_say(config, shard_set, tmp_path):
    second = tmp_path / "second"
    second.mkdir()
    for number in range(6):
        Image.new("RGB", (26, 20)).save(second / f"{number}.png")
        (second / f"{number}.txt").write_text(f"image {100 + number}")
    sources = (Source(str(shard_set)), Source(str(second), 2.0))
    dataset = open_dataset(config, folder=None, sources=sources, batch_size=1)
    seen = Counter(int(batch.tokens["clip"][0, 0]) for batch in take(dataset, dataset.epoch_steps))
    assert seen == {**dict.fromkeys(range(22), 1), **dict.fromkeys(range(100, 106), 2)}
    assert [(share.images, round(share.share, 3)) for share in dataset.shares()] == [(22, 0.647), (6, 0.353)]
    assert dataset.source.name(22) == f"{second}/0.png"
    other = open_dataset(config, folder=None, sources=(sources[0], Source(str(second), 1.0)), batch_size=1)
    assert other.fingerprint != dataset.fingerprint
    with pytest.raises(InputError, match=r"the weight 0\.0\. Give a finite number above 0"):
        open_dataset(config, folder=None, sources=(Source(config.folder, 0.0),))
    for given in ({"folder": None}, {"sources": sources}):
        with pytest.raises(InputError, match="Give one folder, or several sources"):
            open_dataset(config, **given)


def test_loss_weights_of_sources_reach_the_batch_with_sizes_of_its_own_for_each_image(config, tmp_path):
    """Prior preservation: images of the class beside those of the subject."""
    for folder, size in (("subject", (26, 20)), ("class", (40, 30))):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", size).save(tmp_path / folder / f"{number}.png")
            (tmp_path / folder / f"{number}.txt").write_text(f"image {number}")
    sources = (Source(str(tmp_path / "subject")), Source(str(tmp_path / "class"), 1.0, 0.5, Target.BASE))
    options = {"folder": None, "batch_size": 2, "on_refused": OnRefused.SKIP}
    dataset = open_dataset(config, sources=sources, **options)
    seen = set()
    for batch in take(dataset, 6):
        for example, weight, size in zip(batch.example, batch.loss_weight, batch.micro.original_size, strict=True):
            assert (weight, tuple(size)) == ((1, (20, 26)) if example < 3 else (0.5, (30, 40)))
            seen.add(int(example))
        np.testing.assert_array_equal(batch.base_target, batch.example >= 3)
    assert seen == set(range(6))
    plain = open_dataset(config, sources=(sources[0], Source(sources[1].folder)), **options)
    halved = open_dataset(config, sources=(sources[0], Source(sources[1].folder, loss_weight=0.5)), **options)
    assert len({plain.fingerprint, halved.fingerprint, dataset.fingerprint}) == 3
    assert take(plain, 1)[0].loss_weight is None and take(plain, 1)[0].base_target is None
    with pytest.raises(InputError, match=r"the loss_weight -1\.0\. Give a finite number, 0 or more"):
        open_dataset(config, sources=(sources[0], Source(sources[1].folder, loss_weight=-1.0)), **options)


def test_captions_are_put_into_the_template_of_their_source(config, tmp_path):
    """Images without captions take a template without {caption}; what training sees is what a dump shows."""
    for folder in ("subject", "class", "plain"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / folder / "0.png")
    (tmp_path / "class/0.txt").write_text("a dog {trigger}\na cat")
    (tmp_path / "plain/0.txt").write_text("a {bird}")
    subject, of_class, plain = (
        Source(str(tmp_path / "subject"), caption_template="a photo of {trigger}"),
        Source(str(tmp_path / "class"), caption_template="{trigger} is not {caption}!"),
        Source(str(tmp_path / "plain")),
    )
    options = {"folder": None, "batch_size": 3, "buckets": ((16, 16),)}
    given = dataclasses.replace(config, sources=(subject, of_class, plain), trigger=" sks dog ", **options)
    dataset = inspection.open_dataset(given)
    expected = [("a photo of sks dog",), ("sks dog is not a dog {trigger}!", "sks dog is not a cat!"), ("a {bird}",)]
    assert [dataset.source.captions(image) for image in range(3)] == expected
    dump(dataset, 3, tmp_path / "dump")
    shown = {json.loads((tmp_path / f"dump/{n:06d}.json").read_text())["caption"] for n in range(3)}
    assert {"a photo of sks dog", "a {bird}"} < shown and shown - {"a photo of sks dog", "a {bird}"} < set(expected[1])
    other = inspection.open_dataset(dataclasses.replace(given, trigger="other"))
    assert [a == b for a, b in zip(other.source.fingerprints, dataset.source.fingerprints, strict=True)] == [
        *(False, False, True)
    ]
    assert other.fingerprint != dataset.fingerprint


def test_a_template_that_cannot_be_used_is_refused(config, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    score = {"file_name": "0.png", "score": 5.0}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(score))
    given = {"folder": str(tmp_path), "buckets": ((16, 16),), "batch_size": 1}
    template = "a {trigger}"
    assert open_dataset(config, **given, caption_template=template, trigger="b", aesthetic="score").source.number(
        0, "score"
    )
    for changes, expected in (
        ({"caption_template": "a {name}"}, r'"a \{name\}" has \{name\}\. Give text with'),
        ({"caption_template": " "}, "is empty"),
        ({"caption_template": template}, "needs data.trigger"),
        ({"caption_template": "a {caption}"}, "image without a caption|expected fields like"),
        ({"caption_template": "a dog", "trigger": "b"}, r'trigger="b" has no effect: no caption_template has'),
        ({"folder": None, "sources": (Source(str(tmp_path)),), "caption_template": "a"}, "give it to each source"),
    ):
        with pytest.raises(InputError, match=expected):
            open_dataset(config, **{**given, **changes})
    with pytest.raises(InputError, match="has no effect: this training uses no captions"):
        BucketedDataset(DataConfig(caption_template="a dog", **given), None)


def test_scores_reach_the_batch_and_images_without_one_are_refused(config, tmp_path):
    lines = []
    for number in range(5):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
        # One image has no score, that of another is infinite.
        score = {"score": 4.5 + number if number > 1 else 1e39} if number else {}
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"image {number}", **score}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    given = {"folder": str(tmp_path), "buckets": ((16, 16),), "batch_size": 2}
    dataset = open_dataset(config, **given, aesthetic="score", on_refused=OnRefused.SKIP)
    assert [refused.reason for refused in dataset.refused()] == ["has no score, which data.aesthetic requires"] * 2
    for batch in take(dataset, 4):
        np.testing.assert_array_equal(batch.micro.aesthetic_score, 4.5 + batch.example)
        assert batch.micro.aesthetic_score.dtype == np.float32
    assert take(open_dataset(config, **given), 1)[0].micro.aesthetic_score is None
    with pytest.raises(InputError, match=r"2 entries of .* cannot be used"):
        open_dataset(config, **given, aesthetic="score")
    with pytest.raises(
        InputError, match=r"data\.aesthetic=scor: .* no numeric field of that name. .*nearest first: score"
    ):
        open_dataset(config, **given, aesthetic="scor")


@pytest.mark.slow
def test_with_fixed_crops_an_image_has_no_more_than_that_number(config):
    def crops(batches):
        found = {}
        for batch in batches:
            for image, content in zip(batch.example.tolist(), batch.image, strict=True):
                found.setdefault(image, set()).add(content.tobytes())
        return found

    fixed = crops(take(open_dataset(config, crops_per_image=2), 60))
    assert {len(contents) for contents in fixed.values()} <= {1, 2} and max(map(len, fixed.values())) == 2
    free = crops(take(open_dataset(config), 60))
    assert max(map(len, free.values())) > 3
    one = crops(take(open_dataset(config, crops_per_image=1), 60))
    assert {len(contents) for contents in one.values()} == {1}


def test_inspection_counts_and_lists_refusals_and_never_stops_at_one(config, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00.txt").unlink()
    report = json.loads(json.dumps(inspect(inspection.open_dataset(dataclasses.replace(config, folder=str(tmp_path))))))
    assert report["images_found"] == 22 and report["images_usable"] == 21 and report["epoch_steps"] == 4.5
    assert [refused["file"] for refused in report["refused"]] == ["00.png"]
    assert "without a caption" in report["refused"][0]["reason"]
    keys = ["height", "width", "images", "batch_size", "batches", "remainder", "repeated", "merged_into"]
    assert report["buckets"][0] == dict(zip(keys, [16, 16, 10, 4, 2, 2, 0, None], strict=True))


def test_dump_writes_the_training_examples_in_training_order(config, folder, tmp_path):
    dump(open_dataset(config), 10, tmp_path / "dump")
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


def test_dump_refuses_a_folder_in_use_and_a_count_of_zero(config, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        dump(open_dataset(config), 1, tmp_path)
    with pytest.raises(InputError, match="Cannot dump 0"):
        dump(open_dataset(config), 0, tmp_path / "new")


def test_photographs_keep_their_sizes_and_their_crops_are_recorded_correctly(tmp_path):
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
    assert dataset.refused_count() == 0
    sizes = {record["file"]: [record["height"], record["width"]] for record in records}
    assert {dataset.source.name(image): size for image, size in enumerate(dataset.source.sizes.tolist())} == sizes
    for image, _, example in itertools.islice(dataset.examples(), 4):
        assert example.original_size.tolist() == sizes[dataset.source.name(image)]
        height, width = dataset.source.size(image)
        target = example.target_size
        top, left = example.crop_top_left
        scale = max(target / (height, width))
        box = (left / scale, top / scale, (left + target[1]) / scale, (top + target[0]) / scale)
        photograph = Image.fromarray(dataset.source.pixels(image, (height, width)))
        if example.flipped:
            photograph = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        right, bottom = min(box[2], float(width)), min(box[3], float(height))
        expected = photograph.resize((target[1], target[0]), Image.Resampling.BICUBIC, box=(*box[:2], right, bottom))
        difference = np.abs(np.asarray(expected, np.float32) - example.image).mean()
        assert difference < 3  # two filters; a crop that is off by some pixels, or mirrored, is above 10


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


def test_the_fingerprint_depends_on_the_content_of_a_shard_set_and_on_buckets(config, shard_set):
    dataset = open_dataset(config, folder=str(shard_set))
    assert dataset.fingerprint == open_dataset(config, folder=str(shard_set)).fingerprint
    others = {"folder": config.folder}, {"buckets": ((16, 16), (16, 32))}, {"max_aspect_distance": 0.1}
    for change in others:
        given = {"folder": str(shard_set), "on_refused": OnRefused.SKIP, **change}
        assert open_dataset(config, **given).fingerprint != dataset.fingerprint


def test_one_of_several_captions_is_chosen_by_the_step(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    Image.new("RGB", (16, 16)).save(source / "a.png")
    (source / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["one 1", "two 2", "three 3"]}))
    build(str(source), tmp_path / "shards", workers=0, progress=False)
    config = DataConfig(folder=str(tmp_path / "shards"), buckets=((16, 16),), batch_size=1)
    chosen = [int(batch.tokens["clip"][0, 0]) for batch in take(open_dataset(config), 40)]
    assert Counter(chosen).keys() == {1, 2, 3}
    assert [int(batch.tokens["clip"][0, 0]) for batch in take(open_dataset(config), 20, start=20)] == chosen[20:]


def test_inspection_of_a_shard_set_counts_the_refusals_of_its_build(tmp_path, folder):
    source = tmp_path / "images"
    shutil.copytree(folder, source)
    (source / "bad.png").write_bytes(b"")
    (source / "bad.txt").write_text("image 99")
    build(str(source), tmp_path / "shards", workers=0, progress=False)
    seen = inspect(inspection.open_dataset(DataConfig(folder=str(tmp_path / "shards"), buckets=BUCKETS, batch_size=4)))
    assert seen["images_found"] == sum(COUNTS.values()) + 1
    assert [entry["file"] for entry in seen["refused"]] == ["bad.png"]
