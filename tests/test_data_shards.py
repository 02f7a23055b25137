"""The promises of sdxl_jax.data.shards: what was written is read back, and damage is named."""

import functools
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from image_sources import encoded

from sdxl_jax.data.build.shard_writing import Columns, FinishedPart, IndexWriter, PartWriter, select
from sdxl_jax.data.captions import NUMBERS_LIMIT
from sdxl_jax.data.images import decode
from sdxl_jax.data.record_files import RecordFiles
from sdxl_jax.data.shards import CAPTIONS, DESCRIPTION, FORMAT, open_shards, shard_name
from sdxl_jax.data.sources import ImageSource, Refused
from sdxl_jax.errors import InputError

PIECES = [
    [
        ("a.jpg", b"first" * 99, (4, 6), ("a dog", "ein Hund"), {"score": 0.5}),
        ("ordner/ä.png", b"\0", (7, 1), ("Käse 🧀",), {}),
    ],
    [],
    [("\udcff.webp", b"third", (30000, 2), ("", "", "x" * 10_000), {"age": 3.0, "score": 1e300})],
]
"""The images of three shards; the last name is not UTF-8."""


def write(folder: Path, pieces=PIECES) -> Path:
    """Writes a shard set of those pieces, one shard each, as a build does."""
    parts = []
    for number, images in enumerate(pieces):
        (folder / "parts" / str(number)).mkdir(parents=True)
        with PartWriter(folder / "parts" / str(number)) as writer:
            for image in images:
                writer.add(*image)
            writer.refuse(Refused(f"bad {number}\udcff", "it is bad"))
            writer.finish()
        parts.append(FinishedPart(folder / "parts" / str(number)))
    (folder / "shards").mkdir()
    with IndexWriter(folder, sorted({name for part in parts for name in part.number_names()})) as index:
        for number, part in enumerate(parts):
            record = np.arange(part.count(), dtype=np.uint32)
            index.append(part.columns(), np.full_like(record, number), record)
            size = 0
            if part.records.exists():
                os.rename(part.records, folder / shard_name(number))
                size = (folder / shard_name(number)).stat().st_size
            index.append_shard(part.count(), size)
        description = index.finish()
    (folder / "refused.jsonl").write_bytes(b"".join(part.refused() for part in parts))
    description |= {"format": FORMAT, "source": "pieces", "refused": len(pieces), "duplicates": 0}
    (folder / DESCRIPTION).write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written") / "shards")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "shards")


def assert_holds_pieces(shards):
    images = [image for piece in PIECES for image in piece]
    assert len(shards) == len(images)
    for number, (name, data, size, captions, _) in enumerate(images):
        assert shards.read(number) == data
        assert shards.name(number) == name
        assert shards.captions(number) == captions
        assert shards.sizes[number].tolist() == list(size)


def test_what_was_written_is_read_back(folder):
    shards = open_shards(folder)
    assert_holds_pieces(shards)
    assert shards.captions_count == 6
    assert set(shards.numbers) == {"age", "score"}
    np.testing.assert_array_equal(shards.numbers["age"], np.array([np.nan, np.nan, 3], np.float32))
    np.testing.assert_array_equal(shards.numbers["score"], np.array([0.5, np.nan, np.inf], np.float32))
    assert [entry.file for entry in shards.refused()] == [f"bad {number}\udcff" for number in range(3)]
    for beyond in (-1, 3):
        for method in (shards.read, shards.name, shards.captions):
            with pytest.raises(IndexError, match=f"image {beyond} of 3"):
                method(beyond)


def test_an_open_shard_set_is_an_image_source(tmp_path):
    good = encoded(height=64, width=96)
    pieces = [[("a.jpg", good, (64, 96), ("a",), {}), ("b.jpg", good[:-500], (64, 96), ("b",), {})]]
    shards = open_shards(write(tmp_path / "shards", pieces))
    assert isinstance(shards, ImageSource) and shards.built
    assert shards.path == tmp_path / "shards" and shards.found == 2 + 1
    np.testing.assert_array_equal(shards.pixels(0), decode(good))
    np.testing.assert_array_equal(shards.pixels(0, (16, 24)), decode(good, (16, 24)))
    with pytest.raises(
        InputError, match=rf"The image b\.jpg of the shard set {shards.path} cannot be read .*Premature"
    ):
        shards.pixels(1)


def test_the_index_is_memory_mapped_and_read_only(folder):
    shards = open_shards(folder)
    for array in (shards.sizes, shards.hashes, *shards.numbers.values()):
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable


def test_the_fingerprint_is_equal_for_the_same_content_only(folder, tmp_path):
    same = open_shards(write(tmp_path / "same"))
    assert same.fingerprint == open_shards(folder).fingerprint
    name, data, size, captions, numbers = PIECES[0][0]
    for number, changed in enumerate(
        [
            ("b.jpg", data, size, captions, numbers),
            (name, data + b"!", size, captions, numbers),
            (name, data, (6, 4), captions, numbers),
            (name, data, size, ("a dogein", " Hund"), numbers),
            (name, data, size, captions, {"score": 0.25}),
            (name, data, size, captions, {"scores": 0.5}),
        ]
    ):
        pieces = [[changed, PIECES[0][1]], *PIECES[1:]]
        assert open_shards(write(tmp_path / str(number), pieces)).fingerprint != same.fingerprint


def read_all(shards, answers):
    answers.put([shards.read(image) for image in range(len(shards))])


def test_a_pickle_is_small_and_opens_again_in_another_process(folder):
    shards = open_shards(folder)
    shards.read(0)
    assert len(pickle.dumps(shards)) < 500
    assert_holds_pieces(pickle.loads(pickle.dumps(shards)))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=read_all, args=(shards, answers))
    process.start()
    assert answers.get(timeout=60) == [shards.read(image) for image in range(len(shards))]
    process.join()


def test_a_shard_set_that_was_replaced_is_not_opened_again(folder, tmp_path):
    pickled = pickle.dumps(open_shards(folder))
    os.rename(folder, tmp_path / "old")
    write(folder, PIECES[:1])
    with pytest.raises(InputError, match="was replaced while it was in use"):
        pickle.loads(pickled)


def test_few_open_files_serve_many_threads_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("sdxl_jax.data.shards.RecordFiles", functools.partial(RecordFiles, open_files=3))
    pieces = [[(f"{k}-{n}", f"{k}-{n}".encode() * 50, (8, 8), ("x",), {}) for n in range(4)] for k in range(8)]
    shards = open_shards(write(tmp_path / "many", pieces))
    wrong = []

    def read(seed):
        for image in np.random.default_rng(seed).integers(0, 32, 300).tolist():
            if shards.read(image) != f"{image // 4}-{image % 4}".encode() * 50:
                wrong.append(image)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    opened = [link for link in Path("/proc/self/fd").iterdir() if "many/shards" in os.path.realpath(link)]
    assert len(opened) <= 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: None, "No such file"),
        (lambda data: data[: len(data) // 2], "bytes where .* are expected: it was cut off"),
        (lambda data: data[:40_000] + bytes([data[40_000] ^ 1]) + data[40_001:], "is damaged .*hash mismatch"),
        (lambda data: data[:66_000] + bytes([data[66_000] ^ 1]) + data[66_001:], "is damaged .*hash mismatch"),
        (lambda data: bytes(len(data)), "is damaged"),
    ],
    ids=["missing", "cut off", "first record", "second record", "zeros"],
)
def test_a_damaged_shard_is_named_when_its_record_is_read(tmp_path, damage, message):
    rng = np.random.default_rng(0)
    pieces = [[(f"{n}", rng.bytes(65_000), (8, 8), ("x",), {}) for n in range(2)] for _ in range(2)]
    folder = write(tmp_path / "shards", pieces)
    path = folder / shard_name(0)
    damaged = damage(path.read_bytes())
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    shards = open_shards(folder)
    assert shards.read(2) == pieces[1][0][1]
    with pytest.raises(InputError, match=message) as raised:
        [shards.read(image) for image in range(2)]
    assert "00000.array_record" in str(raised.value) and "again" in str(raised.value)


@pytest.mark.parametrize("damage", ["missing", "cut off", "empty", "not numpy", "other shape", "longer"])
@pytest.mark.parametrize(
    "file",
    [
        "index/size.npy",
        "index/first_caption.npy",
        "index/hash.npy",
        "index/number_001.npy",
        "captions.bin",
        "names.bin",
    ],
)
def test_an_index_that_does_not_fit_is_refused_when_opening(folder, file, damage):
    path = folder / file
    data = path.read_bytes()
    path.unlink()
    if damage == "other shape" and file.endswith(".npy"):
        np.save(path, np.zeros((2, 2), np.int32))
    elif damage != "missing":
        changed = {"cut off": data[:-1], "empty": b"", "not numpy": b"x" * (len(data) + 1)}
        path.write_bytes(changed.get(damage, data + data))
    if damage == "longer" and file.endswith(".npy"):
        open_shards(folder)  # bytes after the array do no harm
        return
    with pytest.raises(InputError, match="does not fit its shards") as raised:
        open_shards(folder)
    assert str(path) in str(raised.value)


def test_the_index_of_another_build_is_refused(folder, tmp_path):
    other = write(tmp_path / "other", [[("a.jpg", b"first", (4, 6), ("one", "two"), {}), *PIECES[0][1:]], *PIECES[1:]])
    (other / "captions.bin").rename(folder / "captions.bin")
    with pytest.raises(InputError, match=r"captions.bin cannot be used .*expected"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"[]", "has no format number"),
        (b'{"format": 99}', "has format 99, this version of sdxl-jax reads format 1"),
        (b'{"format": 1}', "does not fit"),
        (b'{"format": 1, "images": "3", "captions": 6}', "does not fit"),
    ],
)
def test_a_description_of_another_format_or_content_is_refused(folder, content, message):
    (folder / DESCRIPTION).write_bytes(content)
    with pytest.raises(InputError, match=message):
        open_shards(folder)


def test_a_folder_that_is_not_a_complete_shard_set_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        open_shards(tmp_path / "nowhere")
    (folder / DESCRIPTION).unlink()
    with pytest.raises(InputError, match="is not a shard set"):
        open_shards(folder)
    (folder / "build.json").write_text("{}")
    with pytest.raises(InputError, match="not finished: run the same command again"):
        open_shards(folder)


def test_selecting_images_selects_all_their_columns(tmp_path):
    folder = write(tmp_path / "shards", [[image for piece in PIECES for image in piece]])
    columns = FinishedPart(folder / "parts" / "0").columns()
    chosen = select(columns, np.array([False, True, True]))
    write(tmp_path / "fewer", [[PIECES[0][1], PIECES[2][0]]])
    expected = FinishedPart(tmp_path / "fewer" / "parts" / "0").columns()
    for name in Columns._fields[:-1]:
        np.testing.assert_array_equal(getattr(chosen, name), getattr(expected, name))
    for name, values in expected.numbers.items():
        np.testing.assert_array_equal(chosen.numbers[name], values)


def test_an_image_whose_caption_is_not_utf8_is_refused(tmp_path):
    with PartWriter(tmp_path) as writer:
        writer.add("a.jpg", b"x", (1, 1), ("good", "half \ud83d"), {})
        writer.finish()
    part = FinishedPart(tmp_path)
    assert part.count() == 0 and not part.records.exists()
    assert json.loads(part.refused()) == {"file": "a.jpg", "reason": "caption is not UTF-8 text"}


def test_too_many_numeric_fields_are_refused(tmp_path):
    numbers = {f"n{number}": 1.0 for number in range(NUMBERS_LIMIT + 1)}
    with PartWriter(tmp_path) as writer, pytest.raises(InputError, match="more than 256 names"):
        writer.add("a.jpg", b"x", (1, 1), ("x",), numbers)


MEASURE = """
import sys, time
def status(key): return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
def peak(): return status("VmHWM")  # MiB; not getrusage's, which counts the process before its exec
from sdxl_jax.data.shards import open_shards
before, start = peak(), time.perf_counter()
shards = open_shards(sys.argv[1])
opened, after = time.perf_counter() - start, peak()
start = time.perf_counter()
pixels = 0
for first in range(0, len(shards), 1 << 20):
    part = shards.sizes[first : first + (1 << 20)]
    pixels += int((part[:, 0].astype("int64") * part[:, 1]).sum())
captions = [shards.captions(image)[0] for image in range(0, len(shards), len(shards) // 1000)]
assert captions[:2] == ["caption 00000000", f"caption {len(shards) // 1000:08d}"] and shards.name(7) == "00000007.jpg"
print(len(shards), opened, after, after - before, time.perf_counter() - start, status("RssAnon"), peak())
"""


@pytest.mark.slow
def test_the_index_of_50_million_images_opens_within_30_seconds_and_2_gib(tmp_path):
    images, block = 50_000_000, 1_000_000
    rng = np.random.default_rng(0)
    with IndexWriter(tmp_path, ["aesthetic"]) as index:
        for start in range(0, images, block):
            digits = (np.arange(start, start + block)[:, None] // 10 ** np.arange(7, -1, -1) % 10 + 48).astype(np.uint8)

            def text(before: bytes, after: bytes, digits=digits):
                rows = [np.broadcast_to(np.frombuffer(part, np.uint8), (block, len(part))) for part in (before, after)]
                return np.concatenate([rows[0], digits, rows[1]], axis=1).reshape(-1)

            columns = Columns(
                size=rng.integers(256, 6000, (block, 2), np.int32),
                hash=rng.integers(0, 256, (block, 16), np.uint8),
                name_lengths=np.full(block, 12),
                name_bytes=text(b"", b".jpg"),
                caption_counts=np.ones(block, np.int64),
                caption_lengths=np.full(block, 16),
                caption_bytes=text(b"caption ", b""),
                numbers={"aesthetic": rng.random(block, np.float32)},
            )
            index.append(columns, np.full(block, start // block, np.uint32), np.arange(block, dtype=np.uint32))
            index.append_shard(block, 1)
        description = index.finish() | {"format": FORMAT, "source": "synthetic", "refused": 0, "duplicates": 0}
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    found, opened, peak, grown, walked, own, all_pages = map(float, run.stdout.split())
    print(f"opened in {opened:.3f} s, at {peak:.0f} MiB, of which {grown:.0f} MiB are new")
    print(
        f"all sizes and 1000 captions in {walked:.1f} s, at {own:.0f} MiB; {all_pages:.0f} MiB with pages of the files"
    )
    assert found == images
    assert opened < 30 and peak < 2048
    assert own < 512  # the other pages are the system's cache, which it frees when it needs memory


def test_damaged_captions_name_the_image(tmp_path):
    folder = write(tmp_path / "set", [[("a.jpg", b"a", (8, 8), ("ok", "ä"), {}), ("b.jpg", b"b", (8, 8), ("b",), {})]])
    content = bytearray((folder / CAPTIONS).read_bytes())
    content[3] = 0xFF
    (folder / CAPTIONS).write_bytes(content)
    shards = open_shards(folder)
    with pytest.raises(InputError, match=r"captions of a\.jpg in .*captions\.bin are damaged .*Copy the whole"):
        shards.captions(0)
    assert shards.captions(1) == ("b",)
