"""The promises of sdxl_jax.data.cache: encoded data is read back bit for bit, unfinished pieces never."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from sdxl_jax.data.cache import DESCRIPTION, LATENTS, TEXT, Crop, PieceWriter, Text, Unencoded, begin, open_cache
from sdxl_jax.data.record_files import RecordFiles
from sdxl_jax.errors import InputError

TESTS = str(Path(__file__).parent)
MADE_FROM = {"shards": "4f5e", "autoencoder": {"path": "weights/vae.safetensors", "hash": "00ff"}, "seed": 0}
TWO, ONE = ("clip_l", "clip_g"), ("clip_g",)
IMAGES, CROPS, PIECE = 7, 2, 3
UNREADABLE = 4
"""The image that cannot be encoded."""


def any_bits(rng, *shape):
    """Random bit patterns, NaN among them."""
    return rng.integers(0, 1 << 16, shape, np.uint16).view(bfloat16)


def encoded(image, towers=TWO):
    """An encoder's output for that image, always the same: two crops, and as many captions as its number."""
    rng = np.random.default_rng(image)
    height, width = 2 + image % 3, 5 - image % 2

    def pair():
        return rng.integers(0, 2000, 2, np.int32)

    crops = [
        Crop(any_bits(rng, height, width, 4), any_bits(rng, height, width, 4), pair(), pair(), pair(), k == 1)
        for k in range(CROPS)
    ]
    texts = [
        Text(
            {tower: rng.integers(0, 49408, 77, np.int32) for tower in towers},
            any_bits(rng, 77, 6),
            any_bits(rng, 5) if len(towers) == 2 else None,
        )
        for _ in range(image)
    ]
    return crops, texts


def start(folder, towers=TWO):
    return begin(folder, made_from=MADE_FROM, images=IMAGES, crops=CROPS, towers=towers, piece_images=PIECE)


def write_piece(plan, piece):
    with PieceWriter(plan, piece) as writer:
        for image in plan.images_of(piece):
            if image == UNREADABLE:
                writer.refuse("truncated ä.jpg")
            else:
                writer.add(*encoded(image, plan.towers))
        writer.finish()


def write(folder, towers=TWO, share=0, shares=1):
    plan = start(folder, towers)
    for piece in plan.missing(share, shares):
        write_piece(plan, piece)
    return folder


def files(folder):
    """The bytes of all files but partial ones, by name."""
    every = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".partial"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in every}


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def assert_holds_all(cache, towers=TWO):
    for image in set(range(IMAGES)) - {UNREADABLE}:
        crops, texts = encoded(image, towers)
        for k, expected in enumerate(crops):
            crop, captions = cache.crop(image, k)
            for found, given in zip(crop, expected, strict=True):
                assert_same_bits(np.asarray(found), np.asarray(given))
            assert type(crop.flipped) is bool
            assert len(captions) == len(texts)
        for caption, expected in enumerate(texts):
            text = captions[caption]
            assert list(text.tokens) == list(towers)
            for tower in towers:
                assert_same_bits(text.tokens[tower], expected.tokens[tower])
            assert_same_bits(text.context, expected.context)
            if expected.pooled is None:
                assert text.pooled is None
            else:
                assert_same_bits(text.pooled, expected.pooled)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("written") / "cache")


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "cache")


# Reading back


@pytest.mark.parametrize("towers", [TWO, ONE], ids=["two towers, pooled", "one tower, not pooled"])
def test_what_was_written_is_read_back_bit_for_bit(tmp_path, towers):
    cache = open_cache(write(tmp_path / "cache", towers), MADE_FROM)
    assert (cache.images, len(cache), cache.crops, cache.towers) == (IMAGES, IMAGES, CROPS, towers)
    assert cache.made_from == MADE_FROM and cache.folder == tmp_path / "cache"
    assert_holds_all(cache, towers)


def test_an_image_that_could_not_be_encoded_raises_the_reason(written):
    for k in range(CROPS):
        with pytest.raises(Unencoded, match=r"^Image 4 of .* could not be encoded: truncated ä\.jpg\. .*run `sdxl-jax"):
            open_cache(written, MADE_FROM).crop(UNREADABLE, k)


def test_a_reason_that_is_not_utf8_is_stored_escaped(tmp_path):
    plan = begin(tmp_path / "cache", made_from={}, images=1, crops=1, towers=())
    with PieceWriter(plan, 0) as writer:
        writer.refuse("a\udcff.jpg")
        writer.finish()
    with pytest.raises(Unencoded, match=r"a\\udcff\.jpg"):
        open_cache(plan.folder, {}).crop(0, 0)


def test_the_captions_of_an_image_can_be_iterated_over(written):
    _, captions = open_cache(written, MADE_FROM).crop(3, 0)
    for text, expected in zip(captions, encoded(3)[1], strict=True):
        assert_same_bits(text.context, expected.context)
    assert len(open_cache(written, MADE_FROM).crop(0, 0)[1]) == 0


def test_captions_are_read_only_when_they_are_indexed(folder):
    cache = open_cache(folder, MADE_FROM)
    shutil.rmtree(folder / TEXT)
    _, captions = cache.crop(2, 1)
    assert len(captions) == 2
    with pytest.raises(InputError, match=r"text/00000\.array_record cannot be read \(No such file"):
        captions[0]


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: cache.crop(-1, 0),
        lambda cache: cache.crop(IMAGES, 0),
        lambda cache: cache.crop(0, -1),
        lambda cache: cache.crop(0, CROPS),
        lambda cache: cache.crop(2, 0)[1][-1],
        lambda cache: cache.crop(2, 0)[1][2],
    ],
)
def test_a_number_out_of_range_is_an_index_error(written, read):
    with pytest.raises(IndexError, match=r"(crop|caption) -?\d of \d, image"):
        read(open_cache(written, MADE_FROM))


# Writing


def test_equal_content_makes_equal_files(written, tmp_path):
    assert files(write(tmp_path / "again")) == files(written)


def test_two_shares_write_the_same_bytes_as_one(written, tmp_path):
    plan = start(tmp_path / "cache")
    assert (plan.missing(0, 2), plan.missing(1, 2), plan.missing(), plan.done()) == ([0, 2], [1], [0, 1, 2], 0)
    assert [list(plan.images_of(piece)) for piece in range(plan.pieces)] == [[0, 1, 2], [3, 4, 5], [6]]
    write(plan.folder, share=1, shares=2)
    assert (plan.missing(0, 2), plan.missing(1, 2), plan.done()) == ([0, 2], [], 1)
    write(plan.folder, share=0, shares=2)
    assert plan.missing() == [] and plan.done() == plan.pieces
    assert files(plan.folder) == files(written)


def test_a_piece_exists_when_both_its_files_do(folder, written):
    plan = start(folder)
    plan.path(LATENTS, 1).unlink()
    plan.path(TEXT, 2).unlink()
    plan.path(TEXT, 1).write_bytes(b"text alone")
    assert plan.missing() == [1, 2]
    for kind in (LATENTS, TEXT):
        plan.path(kind, 1).with_name("00001.array_record.partial").write_bytes(b"interrupted" * 100_000)
    assert files(write(folder)) == files(written)
    plan.clean()
    assert not list(folder.rglob("*.partial"))


def test_two_writers_of_the_same_piece_do_no_harm(tmp_path, written):
    folder = tmp_path / "cache"
    with PieceWriter(start(folder), 1) as interrupted:
        interrupted.refuse("another process writes it too")
        write(folder)
    assert files(folder) == files(written)
    assert not list(folder.rglob("*.partial"))


def test_a_piece_that_was_not_finished_does_not_exist(tmp_path):
    plan = start(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt), PieceWriter(plan, 0) as writer:
        writer.add(*encoded(0))
        raise KeyboardInterrupt
    assert plan.missing() == [0, 1, 2]
    with pytest.raises(AssertionError, match="1 images of 3"), PieceWriter(plan, 0) as writer:
        writer.add(*encoded(0))
        writer.finish()
    assert plan.missing() == [0, 1, 2]


def test_a_failing_disk_raises_os_error(tmp_path):
    plan = start(tmp_path / "cache")
    shutil.rmtree(plan.folder / LATENTS)
    with pytest.raises(OSError, match="No such file"), PieceWriter(plan, 0) as writer:
        for image in range(3):
            writer.add(*encoded(image))
        writer.finish()


KILLED_ANYWHERE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sdxl_jax.data.cache import _AtomicRecordWriter
from sdxl_jax.errors import InputError
from test_data_cache import MADE_FROM, files, open_cache, write

reference, folder = files(Path(sys.argv[2])), sys.argv[3]

def in_child(destination, kill_at):
    if (child := os.fork()) == 0:
        seen = 0
        def count():
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        def audit(event, arguments):
            touches = event == "open" or event.startswith("os.")
            if touches and any(str(argument).startswith(destination) for argument in arguments):
                count()
        sys.addaudithook(audit)
        for name in ("write", "close"):
            def counted(*arguments, original=getattr(_AtomicRecordWriter, name)):
                count()
                original(*arguments)
            setattr(_AtomicRecordWriter, name, counted)
        write(Path(destination))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

moment, unfinished = 1, 0
while True:
    destination = f"{folder}/{moment}"
    if in_child(destination, moment) == 0:
        break
    found = files(Path(destination))
    assert all(reference[name] == found[name] for name in found), moment
    try:
        open_cache(destination, MADE_FROM)
        assert found == reference, moment
    except InputError:
        assert found != reference, moment
        unfinished += 1
    assert in_child(destination, None) == 0, moment
    assert files(Path(destination)) == reference, moment
    moment += 1
print(moment, unfinished)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_resumes_to_the_same_bytes(written, tmp_path):
    """Killed before each time that it opens, makes, lists or renames a file, or writes a record or completes a file."""
    command = [sys.executable, "-c", KILLED_ANYWHERE, TESTS, str(written), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    moments, unfinished = map(int, run.stdout.split())
    assert moments > 60 and unfinished > 50


# Begin


def test_many_processes_can_begin_the_same_cache_at_once(tmp_path):
    for attempt in range(10):
        together = threading.Barrier(8)

        def one(number, together=together, folder=tmp_path / str(attempt)):
            together.wait()
            plan = start(folder)
            if number == 0:
                write_piece(plan, 2)
            return plan

        with ThreadPoolExecutor(8) as pool:
            plans = list(pool.map(one, range(8)))
        assert all(plan == plans[0] for plan in plans)
        assert plans[0].missing() == [0, 1]
        assert not list(plans[0].folder.glob("*.partial"))


def test_a_cache_can_begin_in_an_empty_folder_and_after_an_interruption(tmp_path):
    (tmp_path / f"{DESCRIPTION}.1234.partial").write_text("{")
    assert start(str(tmp_path)).done() == 0


@pytest.mark.parametrize(
    ("changed", "differences"),
    [
        ({"crops": 3}, ["crops: 2 -> 3"]),
        (
            {"images": 8, "piece_images": 4},
            ["images: 7 -> 8", "piece_images: 3 -> 4"],
        ),
        ({"towers": ("clip_g", "clip_l")}, ["towers: ['clip_l', 'clip_g'] -> ['clip_g', 'clip_l']"]),
        ({"made_from": MADE_FROM | {"seed": 1}}, ["made_from.seed: 0 -> 1"]),
    ],
)
def test_a_folder_with_another_cache_is_refused_with_all_differences(folder, changed, differences):
    given = dict(made_from=MADE_FROM, images=IMAGES, crops=CROPS, towers=TWO, piece_images=PIECE) | changed
    with pytest.raises(InputError, match="holds a cache of something else") as raised:
        begin(folder, **given)
    lines = str(raised.value).splitlines()
    assert lines[1:-1] == [f"  {line}" for line in differences]
    assert "another folder" in lines[-1] and "remove this one" in lines[-1]


def test_a_folder_that_is_not_a_cache_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds other files and is not a cache\. Give a new or an empty folder"):
        start(tmp_path)
    with pytest.raises(InputError, match=r"cannot be made \(File exists\). Give another one"):
        start(tmp_path / "holiday.jpg")
    assert os.listdir(tmp_path) == ["holiday.jpg"]


@pytest.mark.parametrize("name", ["images", "crops", "piece_images"])
def test_a_number_below_one_is_refused(tmp_path, name):
    given = {"images": 1, "crops": 1, "piece_images": 1} | {name: 0}
    with pytest.raises(InputError, match=f"{name}=0 is out of range. Give 1 or more"):
        begin(tmp_path / "cache", made_from={}, towers=(), **given)
    assert not (tmp_path / "cache").exists()


# Opening


def test_opening_opens_no_piece(folder):
    for path in folder.rglob("*.array_record"):
        path.write_bytes(b"")
    open_cache(folder, MADE_FROM)


def test_a_missing_folder_and_one_that_is_not_a_cache_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere.*`sdxl-jax data encode`.*Check the path"):
        open_cache(tmp_path / "nowhere", MADE_FROM)
    with pytest.raises(
        InputError, match=r"is not a cache: it has no cache\.json\. Expected a folder that `sdxl-jax data en"
    ):
        open_cache(tmp_path, MADE_FROM)


@pytest.mark.parametrize("use", [lambda folder: open_cache(folder, MADE_FROM), start], ids=["open", "begin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"format": 99}',
            "has format 99, this version of sdxl-jax reads format 1. Run `sdxl-jax data encode` into a n",
        ),
        ('{"format"', "cache.json cannot be read .*Copy it again"),
        ("[]", "cannot be read .it has no format number"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(folder, content, message, use):
    (folder / DESCRIPTION).write_text(content)
    with pytest.raises(InputError, match=message):
        use(folder)


def test_a_description_that_lacks_something_is_refused(folder):
    (folder / DESCRIPTION).write_text('{"format": 1}')
    with pytest.raises(InputError, match=r"cache\.json is damaged .KeyError: 'images'.*Copy it again"):
        open_cache(folder, MADE_FROM)
    with pytest.raises(InputError, match="images: None -> 7"):
        start(folder)


def test_a_cache_of_something_else_is_refused_with_all_differences(written):
    given = json.loads(json.dumps(MADE_FROM)) | {"seed": 1, "size": [8, 8]}
    given["autoencoder"]["hash"] = "ff00"
    del given["shards"]
    with pytest.raises(InputError, match="was made from something else") as raised:
        open_cache(written, given)
    lines = str(raised.value).splitlines()
    assert lines[1:-1] == [
        "  shards: 4f5e -> None",
        "  autoencoder.hash: 00ff -> ff00",
        "  seed: 0 -> 1",
        "  size: None -> [8, 8]",
    ]
    assert lines[-1] == ("Run `sdxl-jax data encode` into a new folder, or train with what the cache was made from")


def test_long_values_are_shown_where_they_differ(tmp_path):
    plan = begin(tmp_path / "cache", made_from={"path": "a" * 500 + "b" * 500}, images=1, crops=1, towers=())
    with pytest.raises(InputError) as raised:
        open_cache(plan.folder, {"path": "a" * 500 + "c" * 500})
    line = str(raised.value).splitlines()[1]
    assert "aaabbb" in line and "aaaccc" in line and len(line) < 170 and line.count("…") == 4


def test_values_are_compared_as_json(tmp_path):
    made_from = {"sizes": [(8, 8)], "nan": float("nan"), "list": [{"a": 1, "b": 2}]}
    plan = begin(tmp_path / "cache", made_from=made_from, images=1, crops=1, towers=())
    with PieceWriter(plan, 0) as writer:
        writer.refuse("x")
        writer.finish()
    open_cache(tmp_path / "cache", {"nan": float("nan"), "list": [{"b": 2, "a": 1}], "sizes": ((8, 8),)})
    with pytest.raises(InputError, match=r"empty: None -> {}"):
        open_cache(tmp_path / "cache", made_from | {"empty": {}})


def test_a_cache_that_is_not_finished_is_refused(folder):
    (folder / LATENTS / "00001.array_record").unlink()
    with pytest.raises(InputError, match=r"1 of its 3 pieces are missing\. Run the same `sdxl-jax data encode` again"):
        open_cache(folder, MADE_FROM)
    shutil.rmtree(folder / TEXT)
    with pytest.raises(InputError, match=r"3 of its 3 pieces are missing"):
        open_cache(folder, MADE_FROM)


# Damage


def read_all(cache):
    for image in set(range(IMAGES)) - {UNREADABLE}:
        for k in range(CROPS):
            _, captions = cache.crop(image, k)
            for text in captions:
                assert text.context.shape == (77, 6)


def cut_off(data):
    return data[: len(data) // 2]


def cut_to_a_block(data):
    """Such a file can be opened, but its records are empty."""
    return data[: 1 << 16]


def flip_a_bit(data):
    crops, texts = encoded(2)
    at = max(data.find(array.tobytes()) for array in (crops[1].mean, texts[1].context))
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("kind", [LATENTS, TEXT])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "is damaged"),
        (cut_to_a_block, "is damaged"),
        (flip_a_bit, "is damaged .*hash mismatch"),
        (lambda data: bytes(len(data)), "is damaged"),
        (lambda data: b"", "is damaged"),
        (None, "cannot be read .No such file"),
    ],
    ids=["cut off", "cut to a block", "a bit", "zeros", "empty", "missing"],
)
def test_a_damaged_file_is_named_with_the_remedy(folder, kind, damage, message):
    cache, path = open_cache(folder, MADE_FROM), folder / kind / "00000.array_record"
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    with pytest.raises(InputError, match=rf"{kind}/00000\.array_record {message}") as raised:
        read_all(cache)
    assert not isinstance(raised.value, Unencoded)
    assert "Copy it again" in str(raised.value) and "run the same `sdxl-jax data encode` again" in str(raised.value)


@pytest.mark.parametrize("kind", [LATENTS, TEXT])
def test_a_file_in_the_place_of_another_is_refused(folder, kind):
    shutil.copy(folder / kind / "00002.array_record", folder / kind / "00000.array_record")
    with pytest.raises(InputError, match=r"00000\.array_record is damaged .it belongs to image 6, not to image [01]"):
        read_all(open_cache(folder, MADE_FROM))


def test_the_remedy_helps(folder, written):
    (folder / TEXT / "00000.array_record").unlink()
    read_all(open_cache(write(folder), MADE_FROM))
    assert files(folder) == files(written)


# Threads and processes


def test_few_open_files_serve_many_threads(tmp_path):
    plan = begin(tmp_path / "many", made_from={}, images=8, crops=CROPS, towers=TWO, piece_images=1)
    for piece in plan.missing():
        with PieceWriter(plan, piece) as writer:
            writer.add(*encoded(piece))
            writer.finish()
    cache = open_cache(plan.folder, {})
    cache._files = RecordFiles("", open_files=3)
    expected = [encoded(image) for image in range(8)]

    def read(seed):
        for image in np.random.default_rng(seed).integers(1, 8, 200).tolist():
            crop, captions = cache.crop(image, 1)
            assert_same_bits(crop.mean, expected[image][0][1].mean)
            assert_same_bits(captions[image - 1].context, expected[image][1][image - 1].context)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    opened = [link for link in Path("/proc/self/fd").iterdir() if str(plan.folder) in os.path.realpath(link)]
    assert len(opened) <= 3


AFTER_A_FORK = """
import os, sys, threading, warnings
sys.path.insert(0, sys.argv[1])
from test_data_cache import MADE_FROM, assert_holds_all, open_cache, read_all

warnings.simplefilter("ignore")
cache = open_cache(sys.argv[2], MADE_FROM)
running = True

def read():
    while running:
        read_all(cache)

thread = threading.Thread(target=read)
thread.start()
for _ in range(10):
    with cache._files._state.lock:  # as the other thread may hold it
        child = os.fork()
        if child == 0:
            assert_holds_all(cache)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
running = False
thread.join()
"""


def test_reading_works_after_a_fork_while_another_thread_reads(written):
    command = [sys.executable, "-c", AFTER_A_FORK, TESTS, str(written)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr


def answer(cache, answers):
    answers.put(cache.crop(2, 1)[0].mean.tobytes())


def test_a_pickle_is_small_and_opens_again_in_another_process(written):
    cache = open_cache(written, MADE_FROM)
    expected = cache.crop(2, 1)[0].mean.tobytes()
    assert len(pickle.dumps(cache)) < 500
    assert_holds_all(pickle.loads(pickle.dumps(cache)))
    assert len(pickle.loads(pickle.dumps(cache.crop(2, 1)))[1]) == 2
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=answer, args=(cache, answers))
    process.start()
    assert answers.get(timeout=60) == expected
    process.join()


def test_a_cache_that_was_replaced_is_not_opened_again(folder):
    pickled = pickle.dumps(open_cache(folder, MADE_FROM))
    description = json.loads((folder / DESCRIPTION).read_text())
    description["made_from"]["seed"] = 1
    (folder / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(InputError, match="made from something else"):
        pickle.loads(pickled)


def test_the_error_for_an_unencoded_image_can_be_pickled(written):
    with pytest.raises(Unencoded) as raised:
        open_cache(written, MADE_FROM).crop(UNREADABLE, 0)
    unpickled = pickle.loads(pickle.dumps(raised.value))
    assert type(unpickled) is Unencoded and str(unpickled) == str(raised.value)


def test_a_file_of_another_size_than_expected_is_not_read(written):
    path = written / LATENTS / "00000.array_record"
    size = path.stat().st_size
    assert RecordFiles("Fix it").read(path, 0, size)
    with pytest.raises(InputError, match=rf"has {size} bytes where {size + 1} are expected: it was cut off.*Fix it$"):
        RecordFiles("Fix it").read(path, 0, size + 1)
    with pytest.raises(InputError, match=r"^Record 6 of .* is damaged .*out of bound.*Fix it$"):
        RecordFiles("Fix it").read(path, 6)
