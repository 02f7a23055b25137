"""sdxl_jax.data.build.records: each kind of source gives the same records, and names the images that are refused."""

import os
import pickle
import sys
from pathlib import Path

import pytest
from image_sources import (
    as_folder,
    as_parquet,
    as_tar,
    captions,
    encoded,
    every_image,
    everything,
    split,
    write_folder,
    write_parquet,
    write_tar,
)

from sdxl_jax.data import folders
from sdxl_jax.data.build.records import Record, read, units
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError


@pytest.mark.parametrize("make", [as_folder, as_tar, as_parquet])
def test_every_odd_image_is_read_upright_or_refused_with_its_reason(tmp_path, make):
    images = every_image()
    source, form = make(tmp_path / "source", {name: data for name, (data, _) in images.items()})
    good, bad = split(source)
    for number, (name, (data, outcome)) in enumerate(images.items()):
        record = form.format(number if make is as_parquet else name)
        if isinstance(outcome, str):
            assert outcome in bad.pop(record), name
        else:
            assert good.pop(record) == Record(record, data, outcome, ("a caption",), {}), name
    assert (good, bad) == ({}, {})


@pytest.mark.parametrize("make", [as_folder, as_tar, as_parquet])
def test_without_verify_only_headers_are_read(tmp_path, make):
    source, _ = make(tmp_path / "source", {"cut.jpg": every_image()["truncated.jpg"][0]})
    (record,) = everything(source, verify=False)
    assert isinstance(record, Record) and record.size == (64, 64)


@pytest.mark.parametrize("make", [as_folder, as_tar, as_parquet])
def test_a_source_that_disappears_is_named(tmp_path, make):
    source, _ = make(tmp_path / "source", {"a.jpg": encoded()})
    (unit,) = units(source)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"{source}.* cannot be read any more .*Bring it back") as error:
        list(read(unit))
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_units_and_records_are_the_same_every_time_and_units_can_be_pickled(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_PIECE_IMAGES", 2)
    images = {f"{number}.jpg": encoded(seed=number) for number in range(5)}
    sources = [make(tmp_path / make.__name__, images)[0] for make in (as_folder, as_tar, as_parquet)]
    for source in sources:
        found = units(source)
        assert found == units(str(source))
        assert [unit.number for unit in found] == list(range(len(found)))
        assert len({unit.name for unit in found}) == len(found)
        again = [record for unit in pickle.loads(pickle.dumps(found)) for record in read(unit)]
        assert again == everything(source)
        assert [record.image for record in again if isinstance(record, Record)] == list(images.values())
    assert [unit.name for unit in units(sources[0])] == ["images 0-1", "images 2-3", "images 4-4"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "has no such files among its 0. Expected a folder of images"),
        ({"a.cls": b""}, "has no such files among its 1. Expected a folder of images"),
        (
            {"a.jpg": b"", "metadata.csv": b"image,words\n"},
            "has the columns image, words. Expected file_name and one of",
        ),
        ({"a.jpg": b"", "metadata.csv": b""}, r"has the columns \(none\)"),
        ({"a.jpg": b"", "metadata.csv": b"", "metadata.jsonl": b""}, "holds both metadata.jsonl and metadata.csv"),
        ({"a.jpg": b"", "b.tar": b""}, r"1 images \(a.jpg, …\) and 1 tars \(b.tar, …\)"),
        ({"a.parquet": b"PAR1"}, "No Parquet file of 1 can be read: a.parquet"),
    ],
)
def test_a_folder_that_is_not_a_source_says_what_is_expected(tmp_path, files, expected):
    with pytest.raises(InputError, match=expected):
        units(write_folder(tmp_path, files))


def test_a_path_that_is_not_a_source_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r"gone does not exist\. Expected a folder of images"):
        units(tmp_path / "gone")
    (tmp_path / "a.jpg").write_bytes(encoded())
    with pytest.raises(InputError, match=r"a\.jpg is a file of another kind\. Expected a folder of images"):
        units(tmp_path / "a.jpg")


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    tar = write_tar(tmp_path / "t" / "a.tar", {name: encoded(), os.fsdecode(b"caf\xe9.txt"): b"a"})
    folder = write_folder(tmp_path / "f", {name: encoded(), os.fsdecode(b"caf\xe9.txt"): b"a"})
    assert list(captions(folder)) == [r"caf\udce9.jpg"]
    assert list(captions(tar)) == [r"a.tar/caf\udce9.jpg"]


@pytest.mark.parametrize(("package", "pip"), [("pyarrow", "pyarrow"), ("tensorflow_datasets", "tensorflow-datasets")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package, pip):
    write_parquet(tmp_path / "a.parquet", {"image": [b""], "text": [""]})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {pip}"):
        units(tmp_path if package == "pyarrow" else "tfds:any")


@pytest.fixture(scope="module")
def samples() -> Path:
    """Output of img2dataset and others in $SDXL_JAX_TEST_DATA/webdataset_samples."""
    root = Path(os.environ.get("SDXL_JAX_TEST_DATA", "")) / "webdataset_samples"
    if not (root / "dalle2pytorch_0.tar").is_file():
        pytest.skip("SDXL_JAX_TEST_DATA is not a folder with webdataset_samples/dalle2pytorch_0.tar")
    return root


def test_real_img2dataset_tars_and_parquet_are_read_whole(samples):
    good, bad = split(samples / "img2dataset_coco_ccby_webdataset")
    assert bad == {}
    assert [sum(name.startswith(f"0000{tar}.tar/") for name in good) for tar in range(3)] == [40, 40, 20]
    for record in good.values():
        assert record.size == (record.numbers["height"], record.numbers["width"])
    rows, bad = split(samples / "img2dataset_coco_ccby_parquet")
    assert bad == {} and len(rows) == 60
    assert rows["00000.parquet:1"].captions == good["00000.tar/0000001.jpg"].captions
    for record in rows.values():
        assert record.size == (record.numbers["height"], record.numbers["width"])


def test_other_real_tars_are_read_or_refused_image_by_image(samples):
    found = captions(samples / "dalle2pytorch_0.tar")
    assert len(found) == 7 and found["dalle2pytorch_0.tar/0.jpg"] == ("cat",)
    classes = everything(samples / "webdataset_sample_png_cls.tgz")
    assert len(classes) == 90
    assert all(isinstance(image, Refused) and "image without a caption" in image.reason for image in classes)
