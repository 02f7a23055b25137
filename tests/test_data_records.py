"""The promises of sdxl_jax.data.records: each source gives the same records, and names what it cannot give."""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.data import records
from sdxl_jax.data.records import Record, read, units
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError

pyarrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")


def encoded(kind="JPEG", height=8, width=12, mode="RGB", seed=0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png_claiming(height, width) -> bytes:
    """A small file whose header claims any size."""
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def every_picture() -> dict[str, tuple[bytes, tuple[int, int] | str]]:
    """{name: (bytes, its upright (height, width) or the reason of its refusal)}."""
    exif = Image.Exif()
    exif[0x0112] = 6
    good, frames = encoded(), [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    grey16 = io.BytesIO()
    Image.fromarray(np.full((8, 12), 40_000, np.uint16)).save(grey16, "PNG")
    return {
        "good.jpg": (good, (8, 12)),
        "wrong_extension.jpg": (encoded("PNG"), (8, 12)),
        "cmyk.jpg": (encoded(mode="CMYK"), (8, 12)),
        "sixteen_bit.png": (grey16.getvalue(), (8, 12)),
        "palette_with_alpha.png": (encoded("PNG", mode="P", transparency=b"\x00\x80\xff"), (8, 12)),
        "grey.jpg": (encoded(mode="L"), (8, 12)),
        "rotated.jpg": (encoded(exif=exif), (12, 8)),
        "animated.webp": (animated.getvalue(), (8, 12)),
        "thin.png": (encoded("PNG", width=1), (8, 1)),
        "empty.jpg": (b"", "zero bytes"),
        "truncated.jpg": (
            encoded(height=64, width=64)[:-500],
            "cannot be read (ValueError: Premature end of JPEG file",
        ),
        "text.png": (b"no image", "cannot be read: neither JPEG, PNG, WebP nor BMP"),
        "huge.png": (png_claiming(30_000, 30_000), "30000×30000 pixels, the limit is"),
    }


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path: Path, files, mode="w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def everything(source, **options) -> list[Record | Refused]:
    return [found for unit in units(source) for found in read(unit, **options)]


def split(source, **options) -> tuple[dict[str, Record], dict[str, str]]:
    """Records by name, reasons by name; names are unique."""
    found = everything(source, **options)
    good = {record.name: record for record in found if isinstance(record, Record)}
    bad = {refused.file: refused.reason for refused in found if isinstance(refused, Refused)}
    assert len(good) + len(bad) == len(found)
    return good, bad


def captions(source) -> dict[str, tuple[str, ...]]:
    good, bad = split(source)
    assert bad == {}
    return {name: record.captions for name, record in good.items()}


def as_folder(path: Path, pictures: dict[str, bytes]) -> tuple[Path, str]:
    texts = {f"{name.partition('.')[0]}.txt": b"a caption" for name in pictures}
    return write_folder(path, {**pictures, **texts}), "{}"


def as_tar(path: Path, pictures: dict[str, bytes]) -> tuple[Path, str]:
    files = [pair for n, d in pictures.items() for pair in [(n, d), (f"{n.partition('.')[0]}.txt", b"a caption")]]
    return write_tar(path / "a.tar", files), "a.tar/{}"


def as_parquet(path: Path, pictures: dict[str, bytes]) -> tuple[Path, str]:
    rows = [{"bytes": data, "path": name} for name, data in pictures.items()]
    return write_parquet(path / "a.parquet", {"image": rows, "text": ["a caption"] * len(rows)}), "a.parquet:{}"


@pytest.mark.parametrize("make", [as_folder, as_tar, as_parquet])
def test_every_odd_picture_is_taken_upright_or_refused_with_its_reason(tmp_path, make):
    pictures = every_picture()
    source, form = make(tmp_path / "source", {name: data for name, (data, _) in pictures.items()})
    good, bad = split(source)
    for number, (name, (data, outcome)) in enumerate(pictures.items()):
        place = form.format(number if make is as_parquet else name)
        if isinstance(outcome, str):
            assert outcome in bad.pop(place), name
        else:
            assert good.pop(place) == Record(place, data, outcome, ("a caption",), {}), name
    assert (good, bad) == ({}, {})


@pytest.mark.parametrize("make", [as_folder, as_tar, as_parquet])
def test_without_verify_headers_alone_are_read(tmp_path, make):
    source, _ = make(tmp_path / "source", {"cut.jpg": every_picture()["truncated.jpg"][0]})
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
    monkeypatch.setattr(records, "_FILES", 2)
    pictures = {f"{number}.jpg": encoded(seed=number) for number in range(5)}
    sources = [make(tmp_path / make.__name__, pictures)[0] for make in (as_folder, as_tar, as_parquet)]
    for source in sources:
        found = units(source)
        assert found == units(str(source))
        assert [unit.number for unit in found] == list(range(len(found)))
        assert len({unit.name for unit in found}) == len(found)
        again = [record for unit in pickle.loads(pickle.dumps(found)) for record in read(unit)]
        assert again == everything(source)
        assert [record.image for record in again if isinstance(record, Record)] == list(pictures.values())
    assert [unit.name for unit in units(sources[0])] == ["pictures 0-1", "pictures 2-3", "pictures 4-4"]


# Captions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b" a cat \n", ("a cat",)),
        (b"one\r\n\r\ntwo\n", ("one", "two")),
        (b"\xef\xbb\xbfcaf\xc3\xa9", ("café",)),
        (b"x" * 10_000, ("x" * 10_000,)),
        (b"one\xe2\x80\xa8line", ("one\u2028line",)),
        (b" \n ", "empty caption"),
        (b"caf\xe9", "caption is not UTF-8 text"),
    ],
)
def test_a_text_file_holds_one_caption_or_one_a_line(tmp_path, text, expected):
    folder = write_folder(tmp_path / "f", {"a.jpg": encoded(), "a.txt": text})
    tar = write_tar(tmp_path / "t" / "a.tar", {"a.jpg": encoded(), "a.txt": text})
    for source in (folder, tar):
        (found,) = everything(source)
        assert (found.reason if isinstance(found, Refused) else found.captions) == expected


@pytest.mark.parametrize(
    ("fields", "expected", "numbers"),
    [
        ({"caption": "a cat", "punsafe": 0.25, "n": 3}, ("a cat",), {"punsafe": 0.25, "n": 3.0}),
        ({"captions": ["a", " ", "b "], "ok": True, "s": "1"}, ("a", "b"), {}),
        ({"text": "first", "caption": "second", "x": float("nan"), "y": 10**400}, ("first",), {}),
        ({"caption": ""}, "empty caption", {}),
        ({"caption": None}, "no caption", {}),
        ({"caption": 3}, "caption is not text but int", {}),
        ({"caption": "\ud800"}, "caption is not UTF-8 text", {}),
        ({"url": "x"}, "none of text, caption, captions in its .json", {}),
        (["a cat"], "its .json is not a JSON object", {}),
    ],
)
def test_a_json_gives_captions_and_finite_numbers(tmp_path, fields, expected, numbers):
    data = json.dumps(fields).encode()
    folder = write_folder(tmp_path / "f", {"a.jpg": encoded(), "a.json": data})
    tar = write_tar(tmp_path / "t" / "a.tar", {"a.jpg": encoded(), "a.json": data})
    for source in (folder, tar):
        (found,) = everything(source)
        if isinstance(found, Refused):
            assert expected in found.reason
        else:
            assert (found.captions, found.numbers) == (expected, numbers)


def test_a_text_file_stands_before_the_json_which_gives_the_numbers(tmp_path):
    files = {"a.jpg": encoded(), "a.json": b'{"caption": "old", "score": 7}', "a.txt": b"new"}
    for source in (write_folder(tmp_path / "f", files), write_tar(tmp_path / "a.tar", files)):
        (record,) = everything(source)
        assert isinstance(record, Record)
        assert (record.captions, record.numbers) == (("new",), {"score": 7.0})


# Folders


def test_a_folder_without_metadata_names_what_lacks_its_partner(tmp_path):
    write_folder(tmp_path, {"sub/a.PNG": encoded("PNG"), "sub/a.TXT": b"a", "bare.jpg": encoded(), "alone.txt": b"x"})
    write_folder(tmp_path, {"notes.json": b"[]", ".hidden.jpg": b"", "c.txt": b"c", "pipe.txt": b"p"})
    (tmp_path / "c.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jpg")
    good, bad = split(tmp_path)
    assert list(good) == ["sub/a.PNG"]
    assert bad == {
        "alone.txt": "caption without an image of the same name",
        "bare.jpg": "image without a caption: no .txt or .json of the same name",
        "c.jpg": "a link to nothing",
        "pipe.jpg": "not a regular file",
    }


def test_metadata_jsonl_gives_captions_numbers_and_refusals(tmp_path):
    images = {name: encoded() for name in ("a.jpg", "sub/b.jpg", "list.jpg", "none.jpg", "blank.jpg")}
    write_folder(tmp_path, {**images, "a.txt": b"not read"})
    lines = [
        b'{"file_name": "./a.jpg", "text": " alpha ", "score": 5}',
        b'{"file_name": "sub/b.jpg", "caption": "beta"}',
        b"",
        b'{"file_name": "list.jpg", "text": ["one", "two"]}',
        b'{"file_name": "a.jpg", "text": "again"}',
        b'{"file_name": "../a.jpg", "text": "x"}',
        b"not json",
        b'{"file_name": "a.jpg"}',
        b'{"file_name": "a.jpg", "text": "caf\xe9"}',
        b'{"file_name": "blank.jpg", "text": " "}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    good, bad = split(tmp_path)
    assert {name: record.captions for name, record in good.items()} == {
        "a.jpg": ("alpha",),
        "list.jpg": ("one", "two"),
        "sub/b.jpg": ("beta",),
    }
    assert good["a.jpg"].numbers == {"score": 5.0}
    assert bad == {
        "metadata.jsonl line 5": "a.jpg has a caption from an earlier line, which stands",
        "metadata.jsonl line 6": "no image ../a.jpg in the folder (.bmp, .jpeg, .jpg, .png, .webp)",
        "metadata.jsonl line 7": "the line is not a JSON object",
        "metadata.jsonl line 8": 'expected fields like {"file_name": ..., "text": ...}',
        "metadata.jsonl line 9": "the line is not UTF-8 text",
        "metadata.jsonl line 10": "blank.jpg: empty caption",
        "none.jpg": "image without a caption: no usable line in metadata.jsonl names it",
    }


def test_metadata_csv_gives_a_caption_a_line(tmp_path):
    write_folder(tmp_path, {"a.jpg": encoded(), "b.jpg": encoded(), "c.jpg": encoded()})
    text = b'file_name,score,text,by\na.jpg,5.5,"one, quoted",me\na.jpg,6,two,2\nb.jpg,nan,b,\n'
    (tmp_path / "metadata.csv").write_bytes(text + b"c.jpg,1,a cat, sitting,me\nc.jpg,1,caf\xe9,me\n\n")
    good, bad = split(tmp_path)
    assert good["a.jpg"].captions == ("one, quoted", "two") and good["a.jpg"].numbers == {"score": 5.5, "by": 2.0}
    assert good["b.jpg"].captions == ("b",) and good["b.jpg"].numbers == {}
    assert bad == {
        "metadata.csv line 5": "5 fields where the first line has 4; quote texts with commas",
        "metadata.csv line 6": "c.jpg: caption is not UTF-8 text",
    }


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds none of these among its 0 files"),
        ({"a.gif": b""}, "holds none of these among its 1 files"),
        (
            {"a.jpg": b"", "metadata.csv": b"image,words\n"},
            "has the columns image, words. Expected file_name and one of",
        ),
        ({"a.jpg": b"", "metadata.csv": b""}, r"has the columns \(none\)"),
        ({"a.jpg": b"", "metadata.csv": b"", "metadata.jsonl": b""}, "holds both metadata.jsonl and metadata.csv"),
        ({"a.jpg": b"", "b.tar": b""}, r"1 pictures \(a.jpg, …\) and 1 tars \(b.tar, …\)"),
        ({"a.parquet": b"PAR1"}, "No Parquet file can be read: a.parquet"),
    ],
)
def test_a_folder_that_is_no_source_says_what_is_expected(tmp_path, files, expected):
    with pytest.raises(InputError, match=expected):
        units(write_folder(tmp_path, files))


def test_a_path_that_is_no_source_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r"gone does not exist\. Expected a folder of pictures"):
        units(tmp_path / "gone")
    (tmp_path / "a.jpg").write_bytes(encoded())
    with pytest.raises(InputError, match=r"a\.jpg holds none of these"):
        units(tmp_path / "a.jpg")


def test_names_that_are_not_utf8_are_spelt_so_that_every_file_takes_them(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    tar = write_tar(tmp_path / "t" / "a.tar", {name: encoded(), os.fsdecode(b"caf\xe9.txt"): b"a"})
    folder = write_folder(tmp_path / "f", {name: encoded(), os.fsdecode(b"caf\xe9.txt"): b"a"})
    assert list(captions(folder)) == [r"caf\udce9.jpg"]
    assert list(captions(tar)) == [r"a.tar/caf\udce9.jpg"]


# Tars


def test_a_folder_of_tars_is_read_in_order_and_img2dataset_parquet_beside_is_passed_by(tmp_path):
    for name in ("b/1.tar", "a.tar"):
        write_tar(tmp_path / name, {"./x/0.jpg": encoded(), "./x/0.txt": name.encode()})
    write_tar(tmp_path / "c.tgz", {"0.webp": encoded("WEBP"), "0.json": b'{"caption": "c"}'}, "w:gz")
    write_parquet(tmp_path / "a.parquet", {"caption": ["a"], "width": [12]})
    assert captions(tmp_path) == {"a.tar/x/0.jpg": ("a.tar",), "b/1.tar/x/0.jpg": ("b/1.tar",), "c.tgz/0.webp": ("c",)}
    assert [unit.name for unit in units(tmp_path)] == ["a.tar", "b/1.tar", "c.tgz"]


def test_members_that_lead_out_of_the_tar_are_refused_by_name_and_nothing_is_written(tmp_path):
    files = {
        "../evil.jpg": encoded(),
        "/abs.jpg": encoded(),
        "a/../../b.txt": b"x",
        "ok.jpg": encoded(),
        "ok.txt": b"a",
    }
    good, bad = split(write_tar(tmp_path / "t" / "a.tar", files))
    assert list(good) == ["a.tar/ok.jpg"]
    assert list(bad) == ["a.tar/../evil.jpg", "a.tar//abs.jpg", "a.tar/a/../../b.txt"]
    assert set(bad.values()) == {"its path leads out of the tar: absolute, or with .."}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "t"]


def test_members_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MEMBER_LIMIT", 10_000)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:

        def add(name, data=b"", **fields):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))

        add("a", type=tarfile.DIRTYPE)
        add("a.jpg", encoded())
        add("a.cls", b"7")
        add("a.seg.png", encoded("PNG"))
        add("a.txt", b"a")
        add("a.png", encoded("PNG"))
        add("link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("link.txt", b"x")
        add("large.jpg", b"x" * 10_001)
        add("large.txt", b"x")
        add("alone.txt", b"x")
        add("alone.json", b"{}")
        add("._a.jpg", b"x")
        for _ in range(2):
            add("twice.jpg", encoded())
            add("twice.txt", b"t")
            for number in range(4):
                add(f"{_}{number}.jpg", encoded())
                add(f"{_}{number}.txt", b"t")
    good, bad = split(tmp_path / "a.tar")
    assert [record.captions for record in good.values()] == [("a",)] + [("t",)] * 9
    first, *_ = good
    assert first == "a.tar/a.jpg"
    assert bad == {
        "a.tar/a.png": "a second image of the same stem; a.jpg stands",
        "a.tar/link.jpg": "a link or a device, not a file",
        "a.tar/large.jpg": "10001 bytes, the limit is 10000",
        "a.tar/a.seg.png": "image without a caption: no .txt or .json of the same name, close to it in the tar "
        "(`tar --sort=name` writes them so)",
        "a.tar/alone.txt": "caption without an image of the same name close to it in the tar",
        "a.tar/twice.jpg": "a second image of this name; the first stands",
    }


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_cut_off_gives_what_stands_before_the_cut_and_says_so(tmp_path, mode):
    files = {f"{n}.{kind}": encoded(seed=n) if kind == "jpg" else b"x" for n in range(6) for kind in ("jpg", "txt")}
    whole = write_tar(tmp_path / "whole.tar", files, mode).read_bytes()
    lengths = {len(whole) * share // 8 for share in range(8)} if mode == "w:gz" else range(0, 6 * 2560, 256)
    counts = set()
    for length in lengths:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        *before, cut = everything(tmp_path / "a.tar")
        assert isinstance(cut, Refused) and cut.file == "a.tar"
        assert "cut off or damaged after" in cut.reason and "what comes behind is lost" in cut.reason
        assert [record.image for record in before if isinstance(record, Record)] == [
            encoded(seed=n) for n in range(len(before))
        ]
        counts.add(len(before))
    assert counts == set(range(7)) if mode == "w" else len(counts) > 2
    assert len(everything(tmp_path / "whole.tar")) == 6


def test_a_tar_damaged_in_the_middle_says_so_instead_of_ending(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}.{kind}": b"x" for n in range(4) for kind in ("jpg", "txt")})
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 512] = b"\xff" * 512  # the third picture's header
    path.write_bytes(data)
    *_, last = everything(path)
    assert isinstance(last, Refused)
    assert last.reason.startswith("cut off or damaged after 1.txt")


def test_a_tar_without_images_says_so(tmp_path):
    assert everything(write_tar(tmp_path / "a.tar", {"a.cls": b"1", "b.npy": b"2"})) == [
        Refused("a.tar", "no image (.bmp, .jpeg, .jpg, .png, .webp) among its 2 members")
    ]


def test_a_long_tar_is_read_a_few_pictures_at_a_time(tmp_path, monkeypatch):
    def members():
        for number in range(300):
            yield f"{number}.bmp", bytes(100_000)
            yield f"{number}.txt", b"x"

    path = write_tar(tmp_path / "a.tar", members())
    held = 0

    class Counted(records._Stem):
        def __init__(self) -> None:
            nonlocal held
            super().__init__()
            held += 1

        def close(self, used):
            nonlocal held
            held -= 1
            return super().close(used)

    monkeypatch.setattr(records, "_Stem", Counted)
    most = 0
    for _ in read(units(path)[0], verify=False):
        most = max(most, held)
    assert held == 0 and most <= records._OPEN_STEMS


# Parquet


def test_img2dataset_parquet_gives_numbers_and_refuses_rows_without_image_or_caption(tmp_path):
    columns = {
        "jpg": [encoded(), None, encoded(), encoded(), encoded()],
        "caption": ["a", "b", None, " ", "e"],
        "punsafe": pyarrow.array([0.5, 0, 0, 0, float("inf")], pyarrow.float32()),
        "width": [12, 0, 0, 0, None],
        "key": ["k"] * 5,
        "nsfw": [True] * 5,
    }
    good, bad = split(write_parquet(tmp_path / "a.parquet", columns))
    assert good["a.parquet:0"] == Record("a.parquet:0", encoded(), (8, 12), ("a",), {"punsafe": 0.5, "width": 12.0})
    assert good["a.parquet:4"].numbers == {}
    assert bad == {
        "a.parquet:1": "no image bytes in the row",
        "a.parquet:2": "no caption",
        "a.parquet:3": "empty caption",
    }


def test_parquet_captions_may_be_lists_and_bytes_that_are_not_utf8_are_refused(tmp_path):
    texts = pyarrow.array([["one", "two"], ["caf"], []], pyarrow.list_(pyarrow.string()))
    path = write_parquet(tmp_path / "a.parquet", {"image": [encoded()] * 3, "captions": texts}, compression="none")
    data = path.read_bytes()
    assert data.count(b"caf") >= 1
    path.write_bytes(data.replace(b"\x03\x00\x00\x00caf", b"\x03\x00\x00\x00ca\xe9"))
    good, bad = split(path)
    assert good["a.parquet:0"].captions == ("one", "two")
    assert bad == {"a.parquet:1": "caption is not UTF-8 text", "a.parquet:2": "empty caption"}


def test_row_groups_are_units_and_rows_keep_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_UNIT_BYTES", 1)
    columns = {"image": [encoded(seed=n) for n in range(50)], "text": [str(n) for n in range(50)]}
    write_parquet(tmp_path / "data" / "train.parquet", columns, row_group_size=20)
    names = [unit.name for unit in units(tmp_path)]
    assert names == [f"data/train.parquet:{rows}" for rows in ("0-19", "20-39", "40-49")]
    assert captions(tmp_path) == {f"data/train.parquet:{n}": (str(n),) for n in range(50)}
    monkeypatch.undo()
    assert [unit.name for unit in units(tmp_path)] == ["data/train.parquet"]
    assert captions(tmp_path / "data" / "train.parquet") == {f"train.parquet:{n}": (str(n),) for n in range(50)}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"picture": [b"x"], "text": ["a"]},
            r"has the columns picture \(binary\), text \(string\)\. Expected an image",
        ),
        ({"image": [b"x"], "words": ["a"]}, "a caption column named one of text, caption, captions"),
        ({"image": ["https://a.b/c.jpg"], "text": ["a"]}, r"image \(string\), text"),
    ],
)
def test_a_parquet_file_without_the_columns_names_those_it_has(tmp_path, columns, expected):
    with pytest.raises(InputError, match=expected):
        units(write_parquet(tmp_path / "a.parquet", columns))


def test_damaged_parquet_is_refused_and_the_rest_is_read(tmp_path):
    rng = np.random.default_rng(0)
    columns = {"image": [rng.bytes(3000) for _ in range(40)], "text": ["a"] * 40}
    path = write_parquet(tmp_path / "b.parquet", columns, row_group_size=20, use_dictionary=False, compression="none")
    data = bytearray(path.read_bytes())
    data[4:40] = b"\xff" * 36  # the first row group's first page header
    path.write_bytes(data)
    (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
    write_parquet(tmp_path / "c.parquet", {"image": [encoded()], "text": ["c"]})
    found = everything(tmp_path)
    (good,) = [record for record in found if isinstance(record, Record)]
    assert good.name == "c.parquet:0"
    reasons = {refused.file: refused.reason for refused in found if isinstance(refused, Refused)}
    assert reasons["b.parquet"].startswith("rows 0 to 19 cannot be read (")
    assert reasons["a.parquet"].startswith("cannot be read as Parquet (")
    assert reasons["b.parquet:20"] == "cannot be read: neither JPEG, PNG, WebP nor BMP"


@pytest.mark.parametrize(("package", "pip"), [("pyarrow", "pyarrow"), ("tensorflow_datasets", "tensorflow-datasets")])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package, pip):
    write_parquet(tmp_path / "a.parquet", {"image": [b""], "text": [""]})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"pip install {pip}"):
        units(tmp_path if package == "pyarrow" else "tfds:any")


# tensorflow-datasets


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> Path:
    """A data set prepared as ArrayRecord, five pictures, without TensorFlow."""
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    nested = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
    features = {"image": tfds.features.Image(), "captions": nested, "score": np.float32, "name": tfds.features.Text()}

    class TinyCaptions(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(5):
                texts = [{"id": 1, "text": f"é{number}"}, {"id": 2, "text": " b "}] if number else []
                fields = {"captions": texts, "score": number / 2, "name": "n"}
                yield number, {"image": encoded("PNG", seed=number), **fields}

    folder = tmp_path_factory.mktemp("tfds")
    TinyCaptions(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder / "tiny_captions" / "1.0.0"


def test_tfds_is_read_without_tensorflow(tfds_folder):
    loaded = "tensorflow" in sys.modules
    good, bad = split(f"tfds:{tfds_folder}")
    assert ("tensorflow" in sys.modules) == loaded
    assert list(bad.values()) == ["empty caption"]
    assert sorted(record.captions for record in good.values()) == [(f"é{number}", "b") for number in range(1, 5)]
    assert sorted(record.numbers["score"] for record in good.values()) == [0.5, 1.0, 1.5, 2.0]
    assert {record.size for record in good.values()} == {(8, 12)}
    whole = everything(f"tfds:{tfds_folder}:train")
    assert everything(f"tfds:{tfds_folder}:train[1:3]") == whole[1:3]
    (unit,) = units(f"tfds:{tfds_folder}")
    assert list(read(pickle.loads(pickle.dumps(unit)))) == whole


def test_tfds_problems_name_their_remedy(tfds_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no prepared data set no_such_thing:1\.0\.0 found .*download_and_prepare"):
        units("tfds:no_such_thing:1.0.0:train")
    with pytest.raises(InputError, match=r"no prepared data set .*download_and_prepare"):
        units(f"tfds:{tmp_path}")
    with pytest.raises(InputError, match=r"has no split test .*Expected one of train"):
        units(f"tfds:{tfds_folder}:test")
    with pytest.raises(InputError, match=r"is not understood\. Expected tfds:NAME"):
        units("tfds:")
    monkeypatch.setattr(records, "CAPTION_FIELDS", ("title",))
    with pytest.raises(InputError, match=r"has the features .*Expected an Image, and one of title"):
        units(f"tfds:{tfds_folder}")
    monkeypatch.undo()
    (unit,) = units(f"tfds:{tfds_folder}")
    (shard,) = tfds_folder.glob("*array_record-*")
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"{shard.name} cannot be read"):
        list(read(unit))
    (tmp_path / "elsewhere").rename(shard)


# Real ones


@pytest.fixture(scope="module")
def samples() -> Path:
    """Output of img2dataset and others in $SDXL_JAX_TEST_DATA/webdataset_samples."""
    root = Path(os.environ.get("SDXL_JAX_TEST_DATA", "")) / "webdataset_samples"
    if not (root / "dalle2pytorch_0.tar").is_file():
        pytest.skip("SDXL_JAX_TEST_DATA names no folder with webdataset_samples/dalle2pytorch_0.tar")
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


def test_other_real_tars_are_read_or_refused_picture_by_picture(samples):
    found = captions(samples / "dalle2pytorch_0.tar")
    assert len(found) == 7 and found["dalle2pytorch_0.tar/0.jpg"] == ("cat",)
    classes = everything(samples / "webdataset_sample_png_cls.tgz")
    assert len(classes) == 90
    assert all(isinstance(image, Refused) and "image without a caption" in image.reason for image in classes)
