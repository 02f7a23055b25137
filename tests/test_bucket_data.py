"""Data in a bucket: shard sets and caches are read there and written there, to the bit as in a folder."""

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import bucket_server
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from image_sources import encoded, write_folder, write_parquet, write_tar
from test_data_cache import MADE_FROM, assert_holds_all, start, write, write_piece
from test_data_resume import fields

from sdxl_jax.commands import data
from sdxl_jax.data import record_files
from sdxl_jax.data.build.build import build
from sdxl_jax.data.cache import DESCRIPTION, open_cache
from sdxl_jax.data.inspection import inspect, open_dataset
from sdxl_jax.data.mixture import Source
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.record_files import Unavailable
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.shards import open_shards
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import buckets, objects
from sdxl_jax.files.paths import in_bucket, located

STEPS = 6


def remote(path: str) -> epath.Path:
    found = located(path, "the path")
    assert in_bucket(found)
    return found


def upload(folder: Path, target: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            buckets.upload(path, remote(target) / path.relative_to(folder).as_posix(), "target")
    return target


def content(target: str) -> dict[str, bytes]:
    """The bytes of all objects by name."""
    folder = remote(target)
    return {name: buckets.read_bytes(folder / name, "target") or b"" for name in buckets.files(folder, "target")}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    """The folder for copies of indexes, which no test shares with another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_home"))
    return tmp_path / "cache_home"


def make_images(count=9) -> dict[str, bytes]:
    images = {f"{n:02d}.jpg": encoded(height=16 + n, width=40 - n, seed=n) for n in range(count)}
    images["05.jpg"] = images["02.jpg"]
    texts = {f"{n:02d}.txt": f"caption {n} of ä\ncaption {n + 100}".encode() for n in range(count)}
    return {**images, **texts}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    tars = root / "tars"
    names = sorted(make_images())
    for tar, part in enumerate((names[:6], names[6:])):
        write_tar(tars / f"{tar}.tar", {name: make_images()[name] for name in part})
    build(str(tars), root / "shards", workers=0, progress=False)
    return root / "shards"


def tokenize(captions: list[str]) -> dict[str, np.ndarray]:
    return {"clip": np.array([[sum(caption.encode())] * 77 for caption in captions], np.int32)}


def batches(**changes) -> list[dict[str, np.ndarray]]:
    config = DataConfig(buckets=((16, 32), (32, 32)), batch_size=4, flip_probability=0.5, seed=3)
    dataset = BucketedDataset(dataclasses.replace(config, **changes), tokenize)
    return [fields(batch) for batch in itertools.islice(dataset.iterate(), STEPS)]


def equal(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> bool:
    return len(one) == len(other) == STEPS and all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


# Reading


def test_batches_from_a_bucket_are_those_of_the_folder(bucket, shards, cache_home):
    target = upload(shards, f"{bucket}/some/shards")
    local = batches(folder=str(shards))
    assert equal(batches(folder=target), local)
    (copy,) = [path.parent for path in cache_home.rglob("shards.json")]
    assert files(copy) == {name: data for name, data in files(shards).items() if not name.startswith("shards/")}
    weights = 2.0, 0.7
    of_both = [tuple(map(Source, folders, weights)) for folders in ((str(shards), str(shards)), (str(shards), target))]
    assert equal(batches(sources=of_both[0]), batches(sources=of_both[1]))


@pytest.mark.slow  # worker processes import everything
def test_batches_from_a_bucket_in_worker_processes_are_those_of_the_folder(bucket, shards):
    target = upload(shards, f"{bucket}/shards")
    assert equal(batches(folder=target, workers=2), batches(folder=str(shards)))


def test_inspection_and_fingerprint_are_those_of_the_folder(bucket, shards):
    target = upload(shards, f"{bucket}/shards")
    local, remote = (inspect(open_dataset(DataConfig(folder=folder))) for folder in (str(shards), target))
    assert remote["sources"][0].pop("folder") == target and local["sources"][0].pop("folder") == str(shards)
    assert remote == local
    assert open_shards(target).fingerprint == open_shards(shards).fingerprint


def test_the_index_is_copied_once(bucket, shards, monkeypatch):
    target = upload(shards, f"{bucket}/shards")
    open_shards(target)
    monkeypatch.setattr(buckets, "download", None)
    assert len(open_shards(target)) == 9


def open_in_child(target: str, queue) -> None:
    queue.put(open_shards(target).captions(3))


def test_one_process_copies_while_the_others_wait(bucket, shards, monkeypatch):
    target = upload(shards, f"{bucket}/shards")
    downloads, real = [], buckets.download

    def slow(path, *arguments):
        downloads.append(path)
        threading.Event().wait(0.05)
        real(path, *arguments)

    monkeypatch.setattr(buckets, "download", slow)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    threads = [threading.Thread(target=open_in_child, args=(target, queue)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [queue.get() for _ in threads] == [open_shards(shards).captions(3)] * 3
    assert len(downloads) == len(set(downloads)) == 11


def test_an_interrupted_copy_is_made_again(bucket, shards, monkeypatch, cache_home):
    target = upload(shards, f"{bucket}/shards")
    real = buckets.download

    def stops(path, *arguments):
        if path.name == "names.bin":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *arguments)

    monkeypatch.setattr(buckets, "download", stops)
    with pytest.raises(MachineError, match=r"cannot be copied to .*XDG_CACHE_HOME"):
        open_shards(target)
    monkeypatch.setattr(buckets, "download", real)
    assert open_shards(target).name(0) == open_shards(shards).name(0)
    assert not list(cache_home.rglob("*.partial"))


def test_a_set_that_was_built_again_is_copied_again_and_refused_by_who_has_it_open(
    bucket, shards, tmp_path, cache_home
):
    target = upload(shards, f"{bucket}/shards")
    before = open_shards(target)
    write_tar(tmp_path / "b.tar", {"x.jpg": encoded(), "x.txt": b"another"})
    build(str(tmp_path / "b.tar"), tmp_path / "other", workers=0, progress=False)
    upload(tmp_path / "other", target)
    assert open_shards(target).captions(0) == ("another",)
    assert len(list(cache_home.rglob("shards.json"))) == 1
    function, arguments = before.__reduce__()
    with pytest.raises(InputError, match="was replaced while it was in use"):
        function(*arguments)


def test_a_set_that_is_replaced_while_its_index_is_copied_is_refused(bucket, shards, monkeypatch, cache_home):
    target = upload(shards, f"{bucket}/shards")
    real = buckets.download

    def replaces(path, *arguments):
        description = remote(target) / "shards.json"
        description.write_text(description.read_text().replace('"source"', '"origin"'))
        real(path, *arguments)

    monkeypatch.setattr(buckets, "download", replaces)
    with pytest.raises(InputError, match="replaced while its index was copied"):
        open_shards(target)
    assert not list(cache_home.rglob("shards.json"))


def test_no_room_for_the_copy_is_said_before_it_begins(bucket, shards, monkeypatch):
    target = upload(shards, f"{bucket}/shards")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(MachineError, match=r"less room in .*XDG_CACHE_HOME"):
        open_shards(target)


def test_a_folder_of_images_in_a_bucket_names_the_remedy(bucket, tmp_path):
    target = upload(write_folder(tmp_path / "images", make_images(6)), f"{bucket}/images")
    with pytest.raises(InputError, match=rf"not a shard set.*data build {target}"):
        batches(folder=target)
    with pytest.raises(InputError, match="there is no bucket this-one-is-missing"):
        batches(folder="gs://this-one-is-missing/shards")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "shards/00000.array_record").unlink(), "no such object"),
        (lambda folder: (folder / "shards/00000.array_record").write_bytes(b"x" * 70000), "has 70000 bytes where"),
        (lambda folder: (folder / "captions.bin").unlink(), r"has no captions\.bin"),
        (lambda folder: (folder / "index/size.npy").write_bytes(b"x"), "Remove .*cache_home.* copied from the bucket"),
    ],
)
def test_what_is_missing_or_damaged_in_the_bucket_is_named(bucket, shards, change, message):
    target = upload(shards, f"{bucket}/shards")
    change(remote(target))
    with pytest.raises(InputError, match=message):
        open_shards(target).read(0)


def test_a_bucket_that_stops_answering_ends_the_data_and_replaces_no_image(bucket, shards, monkeypatch):
    """ArrayRecord's own client would wait for ever."""
    target = upload(shards, f"{bucket}/shards")
    monkeypatch.setattr(record_files, "DEADLINE_SECONDS", 0.3)

    dataset = BucketedDataset(DataConfig(folder=target, buckets=((16, 32),), batch_size=4), tokenize)
    monkeypatch.setattr(ArrayRecordDataSource, "__getitem__", lambda self, record: threading.Event().wait())
    with pytest.raises(Unavailable, match=rf"{target}/shards/0000\d.* was not read within 0\.3 s"):
        next(dataset.iterate())


@pytest.mark.slow
def test_a_server_that_is_gone_while_shards_are_read_ends_the_data(shards, monkeypatch):
    """The clients of real life, without a stand-in."""
    monkeypatch.setattr(record_files, "DEADLINE_SECONDS", 3.0)
    buckets._client.cache_clear()
    with bucket_server.serving() as url, bucket_server.in_environment(url):
        buckets._client().create_bucket("a-bucket")
        target = upload(shards, "gs://a-bucket/shards")
        dataset = BucketedDataset(DataConfig(folder=target, buckets=((16, 32),), batch_size=4, read_ahead=1), tokenize)
        iterator = dataset.iterate()
        next(iterator)
    buckets._client.cache_clear()
    with pytest.raises(Unavailable, match=r"was not read within 3 s: the bucket does not answer"):
        for _ in range(5):
            next(iterator)


# The command line


def test_build_and_inspect_take_buckets(bucket, tmp_path, capsys):
    source = upload(as_tars(tmp_path / "tars"), f"{bucket}/tars")
    data.run(["build", source, f"{bucket}/shards", "--workers", "0"])
    assert f"{bucket}/shards finished: 7 images" in capsys.readouterr().out
    data.run(["inspect", f"{bucket}/shards", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["images_found"] == 8 and report["sources"][0]["folder"] == f"{bucket}/shards"
    for arguments in (["build", str(tmp_path), "s3://b/x"], ["inspect", "s3://b/x"]):
        with pytest.raises(InputError, match="s3:// is neither read nor written"):
            data.run(arguments)


# Building


def as_tars(folder: Path) -> Path:
    names = sorted(make_images())
    for tar, part in enumerate((names[:6], names[6:10], names[10:])):
        write_tar(folder / f"{tar}.tar.gz", {name: make_images()[name] for name in part}, "w:gz")
    (folder / "1.tar.gz").write_bytes((folder / "1.tar.gz").read_bytes()[:-900])  # cut off: refused
    return folder


def as_table(folder: Path) -> Path:
    images = [data for name, data in sorted(make_images().items()) if name.endswith(".jpg")]
    columns = {"image": [*images, b"no image"], "text": [f"row {n}" for n in range(len(images) + 1)]}
    write_parquet(folder / "a.parquet", columns, row_group_size=4)
    write_parquet(folder / "b.parquet", columns, row_group_size=4)
    return folder


def as_folder(folder: Path) -> Path:
    write_folder(folder, {f"sub/{name}": data for name, data in make_images().items()})
    return write_folder(folder, {"bad.jpg": b"no image", "bad.txt": b"text", "alone.txt": b"no image", "x": encoded()})


def as_metadata(folder: Path) -> Path:
    images = {name: data for name, data in make_images().items() if name.endswith(".jpg")}
    rows = "".join(f'{name},"text, of {name}"\n' for name in images)
    return write_folder(folder, {**images, "metadata.csv": f"file_name,text\n{rows}none.jpg,x\n".encode("utf-16")})


SOURCES = {"tars": as_tars, "table": as_table, "folder": as_folder, "metadata": as_metadata}


def built(source: object, target: object) -> None:
    build(str(source), located(str(target), "target"), workers=0, progress=False)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_in_a_bucket_is_built_to_the_bytes_of_the_same_folder(bucket, tmp_path, kind):
    """All but the source's own path, in shards.json."""
    local = SOURCES[kind](tmp_path / "source")
    built(local, tmp_path / "local")
    source = upload(local, f"{bucket}/source")
    built(source, tmp_path / "remote")
    one, other = files(tmp_path / "local"), files(tmp_path / "remote")
    described, of_bucket = json.loads(one.pop("shards.json")), json.loads(other.pop("shards.json"))
    assert one == other and one["refused.jsonl"]
    assert of_bucket["source"] == source
    assert {**described, "source": "", "pieces": ""} == {**of_bucket, "source": "", "pieces": ""}


def test_a_set_built_in_a_bucket_has_the_bytes_of_the_folder(bucket, shards, tmp_path):
    tars = as_tars(tmp_path / "tars")
    built(tars, tmp_path / "local")
    built(tars, f"{bucket}/shards")
    assert content(f"{bucket}/shards") == files(tmp_path / "local")
    built(f"{bucket}/shards", f"{bucket}/copy")
    copy, local = open_shards(f"{bucket}/copy"), open_shards(tmp_path / "local")
    assert [(copy.read(n), copy.captions(n)) for n in range(len(local))] == [
        (local.read(n), local.captions(n)) for n in range(len(local))
    ]


def test_an_interrupted_build_in_a_bucket_is_no_set_and_is_resumed(bucket, tmp_path, monkeypatch):
    tars, target, uploads = as_tars(tmp_path / "tars"), f"{bucket}/shards", []
    built(tars, tmp_path / "local")
    real = buckets.upload

    def stops(source, path, *arguments):
        uploads.append(str(path).removeprefix(f"{target}/"))
        if len(uploads) in stops_at:
            raise KeyboardInterrupt
        real(source, path, *arguments)

    monkeypatch.setattr(buckets, "upload", stops)
    stops_at = {5}  # in the second piece
    with pytest.raises(KeyboardInterrupt):
        built(tars, target)
    assert "shards.json" not in content(target)
    with pytest.raises(InputError, match="is not finished: run the same command again"):
        open_shards(target)
    with pytest.raises(InputError, match=r"an unfinished build with source="):
        built(as_table(tmp_path / "table"), target)
    built(tars, target)
    assert content(target) == files(tmp_path / "local")
    assert uploads.count("parts/00000/columns.npz") == 1, "no finished piece is written again"
    before = content(target)
    built(tars, target)
    assert content(target) == before


def test_a_destination_in_a_bucket_that_holds_something_else_is_refused(bucket, shards, tmp_path):
    upload(write_folder(tmp_path / "other", {"a": b"b"}), f"{bucket}/other")
    tars = as_tars(tmp_path / "tars")
    with pytest.raises(InputError, match="holds other files and is not a shard set"):
        built(tars, f"{bucket}/other")
    target = upload(shards, f"{bucket}/shards")
    with pytest.raises(InputError, match="holds a finished build with source="):
        built(tars, target)
    with pytest.raises(InputError, match="does not exist: the bucket has no object of that name"):
        built(f"{bucket}/nowhere", tmp_path / "local")
    with pytest.raises(InputError, match="has no usable image"):
        built(upload(write_folder(tmp_path / "bad", {"a.jpg": b"x", "a.txt": b"y"}), f"{bucket}/bad"), f"{bucket}/x")
    assert content(f"{bucket}/x") == {}


def test_an_object_that_is_deleted_while_it_is_read_is_an_error(bucket):
    path = remote(f"{bucket}/object")
    objects.write_bytes(path, b"0123456789" * 100, "")
    with objects.open_object(path, "", 100) as file:
        assert file.read(5) == b"01234" and file.seek(-3, 2) == 997 and file.read() == b"789"
        file.seek(500)
        buckets.delete(path, "")  # the server of the tests does not compare generations
        with pytest.raises(OSError, match="replaced or deleted"):
            file.read(200)
    with pytest.raises(FileNotFoundError):
        objects.open_object(remote(f"{bucket}/none"), "")


# Caches


def test_a_cache_in_a_bucket_reads_as_the_folder_does(bucket, tmp_path):
    target = upload(write(tmp_path / "cache"), f"{bucket}/cache")
    assert_holds_all(open_cache(target, MADE_FROM))


def test_a_cache_written_to_a_bucket_has_the_bytes_of_the_folder(bucket, tmp_path):
    target = f"{bucket}/cache"
    for share in (1, 0):
        write(target, share=share, shares=2)
    assert content(target) == files(write(tmp_path / "cache"))


def test_a_cache_in_a_bucket_is_continued_and_is_not_open_until_it_is_complete(bucket, tmp_path, monkeypatch):
    target = f"{bucket}/cache"
    plan = start(target)
    write_piece(plan, 1)
    real = buckets.upload

    def stops(source, path, *arguments):
        if "latents" in str(path):
            raise KeyboardInterrupt
        real(source, path, *arguments)

    monkeypatch.setattr(buckets, "upload", stops)
    with pytest.raises(KeyboardInterrupt):
        write_piece(plan, 0)
    monkeypatch.setattr(buckets, "upload", real)
    assert start(target).missing() == [0, 2]
    with pytest.raises(InputError, match="2 of its 3 pieces are missing"):
        open_cache(target, MADE_FROM)
    assert content(write(target)) == files(write(tmp_path / "cache"))


def test_a_cache_in_a_bucket_is_refused_as_in_a_folder(bucket, tmp_path):
    target = f"{bucket}/cache"
    with pytest.raises(InputError, match=f"is not a cache: it has no {DESCRIPTION}"):
        open_cache(target, MADE_FROM)
    buckets.upload(Path(__file__), remote(target) / "a file", "")
    with pytest.raises(InputError, match="holds other files"):
        start(target)
    write(f"{bucket}/second")
    with pytest.raises(InputError, match="made from something else"):
        open_cache(f"{bucket}/second", {**MADE_FROM, "seed": 1})
