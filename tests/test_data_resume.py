"""The promise of sdxl_jax.data that the position is the step: from any step a run resumes with the same bytes, with any
number of workers and processes, from images and from a cache."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import pytest
from jaxtyping import BFloat16, Int32, Int64
from ml_dtypes import bfloat16
from PIL import Image

from sdxl_jax.arrays import Batch
from sdxl_jax.data.cache import Crop, PieceWriter, Text, begin, open_cache
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.order import Order
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig

TESTS = str(Path(__file__).parent)

Fields = dict[str, np.ndarray]

# Images per (height, width). Images of the first source are seen twice per epoch, of the second 0.7 times.
FIRST = {(20, 26): 11, (17, 33): 9, (70, 33): 1}
SECOND = {(40, 44): 6, (20, 41): 3, (64, 34): 1}
DAMAGED = {"first": (3,), "second": (9,)}
"""Their headers are intact, so that they are listed; the last one is in a bucket smaller than a batch."""
EPOCH = 8
"""Steps of the first epoch: 27 places in batches of 8, 21 in batches of 4, and 3 that fill no batch of 4 yet."""
STOPS = (0, 1, 4, EPOCH - 1, EPOCH, 10**6)
STEPS = 6
"""Steps read from each: into the next epoch, and more than there are workers."""


def tokenize(captions: list[str]) -> dict[str, Int32[np.ndarray, "batch 77"]]:
    """The number in the caption, repeated 77 times."""
    return {"clip": np.array([[int(caption.split()[-1])] * 77 for caption in captions], np.int32)}


def tokenize_slowly(captions: list[str]) -> dict[str, Int32[np.ndarray, "batch 77"]]:
    """As `tokenize`, so slow that a kill falls between two batches."""
    time.sleep(0.02)
    return tokenize(captions)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder of two sources, with two or three captions and a score per image."""
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for source, (name, counts) in enumerate({"first": FIRST, "second": SECOND}.items()):
        folder = root / name
        folder.mkdir()
        lines = []
        for number, (height, width) in enumerate(size for size, count in counts.items() for _ in range(count)):
            file = folder / f"{number:02d}.png"
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file)
            if number in DAMAGED[name]:
                file.write_bytes(file.read_bytes()[:200])
            first = 1000 * source + 10 * number
            texts = [f"caption {first + caption}" for caption in range(2 + number % 2)]
            lines.append(json.dumps({"file_name": file.name, "text": texts, "score": 4 + number / 8}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return root


def open_dataset(sources: Path, **changes: Any) -> BucketedDataset:
    processes = {name: changes.pop(name) for name in ("process_index", "process_count") if name in changes}
    config = DataConfig(
        sources=(Source(str(sources / "first"), 2.0), Source(str(sources / "second"), 0.7)),
        buckets=((16, 16), (16, 32), (32, 16)),
        batch_size=4,
        batch_pixels=8 * 256,
        flip_probability=0.5,
        aesthetic="score",
        verify_images=False,
        max_bad_share=1.0,
        seed=7,
    )
    text = changes.pop("tokenize", tokenize)
    return BucketedDataset(dataclasses.replace(config, **changes), text, **processes)


def fields(batch: Batch) -> Fields:
    """All arrays of a batch, by name."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}


def digest(batch: Batch) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for name, array in sorted(fields(batch).items()):
        hashed.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return hashed.hexdigest()


def read(dataset: BucketedDataset, start: int, count: int) -> list[Fields]:
    batches = dataset.iterate(start)
    # It reports the damaged images each time, which would hide the table below.
    with contextlib.closing(batches), contextlib.redirect_stdout(io.StringIO()):
        return [fields(batch) for batch in itertools.islice(batches, count)]


def joined(processes: list[list[Fields]]) -> list[Fields]:
    """Each step's global batch, from the rows of all processes."""
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*processes, strict=True)
    ]


def assert_same(left: list[Fields], right: list[Fields]) -> None:
    assert len(left) == len(right)
    for step, (one, other) in enumerate(zip(left, right, strict=True)):
        assert one.keys() == other.keys()
        for name, array in one.items():
            assert array.dtype == other[name].dtype, name
            np.testing.assert_array_equal(array, other[name], err_msg=f"{name}, batch {step} of those read")


@pytest.fixture(scope="module")
def uninterrupted(sources) -> Callable[[int], list[Fields]]:
    """The batches that one process without workers reads from a step on, in an uninterrupted run: one from step 0, or,
    for step 1,000,000, from shortly before."""
    dataset = open_dataset(sources)
    near = read(dataset, 0, EPOCH + STEPS)
    far = read(dataset, STOPS[-1] - 3, 3 + STEPS)[3:]
    return lambda start: far if start == STOPS[-1] else near[start : start + STEPS]


def assert_processes_resume(sources, expected, workers, processes, stop):
    given = [
        open_dataset(sources, workers=workers, process_index=process, process_count=processes)
        for process in range(processes)
    ]
    assert_same(joined([read(dataset, stop, STEPS) for dataset in given]), expected)


def test_the_test_data_covers_damage_captions_crops_and_scores(sources):
    dataset = open_dataset(sources)
    assert [bucket[2:7] for bucket in dataset.report()] == [(17, 8, 3, 3, 0), (12, 4, 5, 1, 0), (2, 4, 0.75, 0, 2)]
    assert dataset.epoch_steps == 8.75 and dataset.order.steps_before(1) == EPOCH
    batches = read(dataset, 0, 3 * EPOCH)
    seen = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0] if name != ".image"}
    first = sum(FIRST.values())
    damaged = [*DAMAGED["first"], *(first + number for number in DAMAGED["second"])]
    assert seen[".replaced"].any() and not np.isin(seen[".example"], damaged).any()
    image, caption = np.divmod(seen[".tokens['clip']"][:, 0], 10)
    np.testing.assert_array_equal(image, np.where(seen[".example"] < first, 0, 100 - first) + seen[".example"])
    assert set(caption.tolist()) == {0, 1, 2}
    assert len(set(map(tuple, seen[".micro.crop_top_left"].tolist()))) > 6
    assert len(set(seen[".micro.aesthetic_score"])) > 9


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("stop", STOPS)
def test_threads_resume_from_any_step_with_any_number_of_processes(sources, uninterrupted, processes, stop):
    assert_processes_resume(sources, uninterrupted(stop), 0, processes, stop)


@pytest.mark.slow
def test_four_workers_on_two_processes_resume_at_the_end_of_an_epoch(sources, uninterrupted):
    assert_processes_resume(sources, uninterrupted(EPOCH - 1), 4, 2, EPOCH - 1)


@pytest.mark.slow
def test_any_workers_and_processes_resume_from_any_step(sources, uninterrupted):
    """The whole matrix; -s shows it."""
    print("\nworkers processes    stop: equal")
    differences = []
    for workers, processes, stop in itertools.product((0, 2, 4), (1, 2, 4), STOPS):
        started, before = time.monotonic(), len(differences)
        try:
            assert_processes_resume(sources, uninterrupted(stop), workers, processes, stop)
        except AssertionError as difference:
            differences.append(f"{workers} workers, {processes} processes, from step {stop}: {difference}")
        equal = "yes" if len(differences) == before else "NO"
        print(f"{workers:7} {processes:5} {stop:7}: {equal:5} {time.monotonic() - started:5.1f} s", flush=True)
    assert not differences, "\n".join(differences)


# Grain's own test


def check_states(sources, workers, stop):
    # Grain compares with np.testing.assert_equal, which traverses named tuples and also compares strings and None.
    dataset = open_dataset(sources, workers=workers)
    grain.experimental.assert_equal_output_after_checkpoint(dataset.iter_dataset(EPOCH - 3, stop))


def test_grain_restores_every_state_with_threads(sources):
    check_states(sources, 0, EPOCH + 3)


@pytest.mark.slow
def test_grain_restores_every_state_with_workers(sources):
    check_states(sources, 2, EPOCH + 1)


def test_grains_test_detects_a_difference(sources):
    calls = itertools.count()
    steps = open_dataset(sources).iter_dataset(0, 3)
    different = steps.map(lambda loaded: loaded._replace(bad=(*loaded.bad, str(next(calls)))))
    with pytest.raises(AssertionError, match="Restored values mismatch"):
        grain.experimental.assert_equal_output_after_checkpoint(different)


# Kills


IN_CHILD = """
import sys
from test_data_resume import append_digests
append_digests(*sys.argv[1:])
"""


def append_digests(sources: str, file: str, steps: str) -> None:
    """Appends the digest of each batch that is missing in the file. Runs in a process that gets killed."""
    with open(file, "a+") as digests:
        digests.seek(0)
        done = len(digests.readlines())
        batches = open_dataset(Path(sources), workers=2, tokenize=tokenize_slowly).iterate(done)
        with contextlib.closing(batches):
            for batch in itertools.islice(batches, int(steps) - done):
                digests.write(digest(batch) + "\n")
                digests.flush()


def start_child(sources: Path, file: Path, steps: int) -> subprocess.Popen:
    with open(file.with_suffix(".messages"), "a") as messages:
        return subprocess.Popen(
            [sys.executable, "-c", IN_CHILD, str(sources), str(file), str(steps)],
            # In a folder of the test, which checks that no temporary file stays.
            env=os.environ | {"PYTHONPATH": TESTS, "TMPDIR": str(file.parent), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=messages,
            start_new_session=True,  # so that its workers can be found
        )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def processes_of(session: int) -> dict[int, str]:
    """Command lines of the processes of that session that are still running."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = status.read_text().rsplit(")", 1)[1].split()[:4]
            if int(of) == session and state != "Z":
                found[int(status.parent.name)] = (status.parent / "cmdline").read_text()
    return found


def check_killed(sources, folder, kills, steps):
    file, rng = folder / "digests.txt", np.random.default_rng(kills)
    file.touch()

    def done() -> int:
        return len(file.read_text().splitlines())

    for kill in range(kills):
        child, before = start_child(sources, file, steps), done()
        try:
            if kill % 3 == 1:  # while it starts
                time.sleep(rng.uniform(0.1, 3))
            else:  # while it reads
                enough = before + int(rng.integers(1, steps // kills))
                wait_until(lambda child=child, enough=enough: done() >= enough or child.poll() is not None)
                time.sleep(rng.uniform(0, 0.03))
            child.kill()
            assert child.wait() == -signal.SIGKILL, file.with_suffix(".messages").read_text()
        finally:
            child.kill()
            wait_until(lambda child=child: not processes_of(child.pid))
        assert {path.suffix for path in folder.iterdir()} <= {".txt", ".messages"}
        print(f"killed after batch {done()}")
    child = start_child(sources, file, steps)
    try:
        assert child.wait(120) == 0, file.with_suffix(".messages").read_text()
    finally:
        child.kill()
        wait_until(lambda child=child: not processes_of(child.pid))
    batches = open_dataset(sources).iterate()
    assert file.read_text().splitlines() == [digest(batch) for batch in itertools.islice(batches, steps)]


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_batches_of_an_uninterrupted_one(sources, tmp_path):
    check_killed(sources, tmp_path, 2, 40)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_has_the_batches_of_an_uninterrupted_one(sources, tmp_path):
    check_killed(sources, tmp_path, 10, 400)


# From a cache


@pytest.fixture(scope="module")
def cached(sources, tmp_path_factory) -> Callable[..., BucketedDataset]:
    """As `open_dataset`, from a cache of random numbers: its images are in the order of `Order.numbers`, some
    refused."""
    dataset, made_from = open_dataset(sources, crops_per_image=2), {"what": "random numbers"}
    images = len(dataset.order.numbers)
    plan = begin(
        tmp_path_factory.mktemp("cache") / "cache",
        made_from=made_from,
        images=images,
        crops=2,
        towers=("clip",),
        piece_images=12,
    )
    rng = np.random.default_rng(0)

    def random(*shape: int) -> BFloat16[np.ndarray, "..."]:
        return rng.standard_normal(shape).astype(bfloat16)

    def crop(image: int) -> Crop:
        (bucket,) = (size for number, size in enumerate(dataset.buckets) if image in dataset.order.run(number))
        size, corner = rng.integers(0, 1000, (2, 2), np.int32)
        latent = (bucket.height // 8, bucket.width // 8, 4)
        return Crop(random(*latent), random(*latent), size, corner, np.array(bucket, np.int32), bool(rng.integers(2)))

    def text() -> Text:
        return Text({"clip": rng.integers(0, 1000, 77, np.int32)}, random(77, 8), random(5))

    for piece in range(plan.pieces):
        with PieceWriter(plan, piece) as writer:
            for image in plan.images_of(piece):
                if image % 6 == 5:
                    writer.refuse("it is the wrong colour")
                else:
                    writer.add([crop(image), crop(image)], [text() for _ in range(2 + image % 2)])
            writer.finish()
    return lambda **changes: open_dataset(sources, crops_per_image=2, **changes).reading(
        open_cache(plan.folder, made_from)
    )


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (0, 2), (0, 4), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_reading_a_cache_resumes_from_any_step_with_any_number_of_processes(cached, workers, processes):
    expected = read(cached(), 0, 10 + STEPS)
    assert any(batch[".replaced"].any() for batch in expected[10:])
    assert expected[0][".encoded.mean"].dtype == bfloat16 and ".image" not in expected[0]
    given = [cached(workers=workers, process_index=process, process_count=processes) for process in range(processes)]
    assert_same(joined([read(dataset, 10, STEPS) for dataset in given]), expected[10:])


# The order alone


EPOCHS = 6


def random_order(rng: np.random.Generator) -> tuple[Order, list[list[Int32[np.ndarray, "_"]]], list[float]]:
    """(order, members, weights)"""
    buckets, sources = rng.integers(1, 5), rng.integers(1, 4)
    weights = [float(weight) for weight in rng.choice([1, 1, 2, 3, 0.5, 0.3, 0.07, 1.5, 2.2], sources)]
    counts = rng.integers(0, 40, (buckets, sources)) * (rng.random((buckets, sources)) < 0.8)
    counts[0, 0] += 1
    shuffled = np.split(rng.permutation(counts.sum()).astype(np.int32), np.cumsum(counts)[:-1])
    members = [shuffled[bucket * sources : (bucket + 1) * sources] for bucket in range(buckets)]
    sizes = [int(size) for size in rng.integers(1, 12, buckets)]
    return Order(members, weights, sizes, int(rng.integers(2**32))), members, weights


def places_of(order: Order, bucket: int, epoch: int) -> Int32[np.ndarray, "places"]:
    """The images of all places of a bucket in an epoch, including those that are left over."""
    own = order.buckets[bucket]
    return order.numbers[[own._at(epoch, place) for place in range(own.places)]]


def batches_of(order: Order, epoch: int) -> list[tuple[int, Int32[np.ndarray, "batch"]]]:
    """(bucket, images) of each step."""
    found = []
    for step in range(order.steps_before(epoch), order.steps_before(epoch + 1)):
        bucket = order.bucket(step)
        rows = range(order.buckets[bucket].batch_size)
        found.append((bucket, order.numbers[[order.position(step, row) for row in rows]]))
    return found


def occurrences(
    images: Int32[np.ndarray, "images"], numbers: Int32[np.ndarray, "numbers"]
) -> Int64[np.ndarray, "numbers"]:
    """How often each of the numbers is among the images."""
    return (images[:, None] == numbers).sum(axis=0)


@pytest.mark.parametrize("seed", range(40))
def test_any_order_uses_each_image_as_often_as_its_weight_says_and_no_batch_mixes_buckets(seed):
    order, members, weights = random_order(np.random.default_rng(seed))
    taken = [[np.zeros(0, np.int32)] * EPOCHS for _ in members]
    for epoch in range(EPOCHS):
        batches = batches_of(order, epoch)
        for number, own in enumerate(order.buckets):
            of_bucket = [images for bucket, images in batches if bucket == number]
            assert len(of_bucket) == own.batches_before(epoch + 1) - own.batches_before(epoch)
            taken[number][epoch] = np.concatenate([*of_bucket, np.zeros(0, np.int32)])
            assert np.isin(taken[number][epoch], np.concatenate(members[number])).all()
    for number, own in enumerate(order.buckets):
        if not own.places:
            assert not any(map(len, members[number]))
            continue
        places = [places_of(order, number, epoch) for epoch in range(EPOCHS)]
        for images, weight in zip(members[number], weights, strict=True):
            if not len(images):
                continue
            due = np.stack([occurrences(found, images) for found in places])
            # Each image has had as many places as any other, or one more. A fraction of a place is rounded up, once per
            # bucket and source.
            each = due.sum(axis=0)
            assert each.max() - each.min() <= 1
            too_many = due.sum(axis=1) - weight * len(images)
            assert (too_many > -1e-9).all() and (too_many < 1 - 1e-9).all()
            if weight == int(weight):
                assert (due == weight).all()
            # Each of these places is used once per epoch, or is one of those that are left over; of a small bucket all
            # are used, those of the last epochs when they fill a batch.
            had = np.stack([occurrences(found, images) for found in taken[number]])
            if own.small:
                assert (had.sum(axis=0) <= each).all() and (each - had.sum(axis=0)).sum() < own.batch_size
            else:
                assert (had <= due).all()
                if not own.remainder:
                    np.testing.assert_array_equal(had, due)
        total = sum(len(found) for found in taken[number])
        if own.small:
            assert 0 <= EPOCHS * own.places - total < own.batch_size and not own.remainder
        else:
            assert total == EPOCHS * own.batches * own.batch_size and own.remainder < own.batch_size


def test_images_that_are_left_over_differ_each_epoch():
    """No more images are left out of six consecutive epochs than expected by chance, and none of 24: at most a third of
    a bucket is left out of an epoch, where it has at least two batches; (1/3)⁶ = 0.14 %, (1/3)²⁴ = 4 · 10⁻¹²."""
    rng, never, expected, total = np.random.default_rng(0), 0, 0.0, 0
    for _ in range(60):
        batch_size = int(rng.integers(2, 12))
        count = 2 * batch_size + int(rng.integers(1, 3 * batch_size))
        images = np.arange(count, dtype=np.int32)
        order = Order([[images]], [1.0], [batch_size], int(rng.integers(2**32)))
        taken = np.stack([
            occurrences(np.concatenate([found for _, found in batches_of(order, epoch)]), images) for epoch in range(24)
        ])  # fmt: skip
        assert (taken <= 1).all() and taken.any(axis=0).all()
        never += sum(int((~taken[first : first + 6].any(axis=0)).sum()) for first in range(0, 24, 6))
        expected += 4 * count * (order.buckets[0].remainder / count) ** 6
        total += 4 * count
    print(f"left out of six epochs: {never} of {total} images, {expected:.1f} by chance")
    assert never <= expected + 5 * np.sqrt(expected) + 1


def test_a_large_order_uses_each_image_once_per_epoch():
    """Above 2¹⁴ images Grain shuffles."""
    images = np.arange(20_000, dtype=np.int32)
    order = Order([[images]], [1.0], [64], seed=3)
    taken = [np.concatenate([found for _, found in batches_of(order, epoch)]) for epoch in (0, 1)]
    left_out = [np.setdiff1d(images, found) for found in taken]
    assert all(len(np.unique(found)) == len(found) == 20_000 - 20_000 % 64 for found in taken)
    assert (taken[0] != taken[1]).any() and (left_out[0] != left_out[1]).any()
