"""The promises of sdxl_jax.data.folders: nothing is left out silently, and training reads the same as a build."""

import json
import os
import pickle

import numpy as np
import pytest
from image_sources import encoded, every_image, png_claiming, save, split, write_folder
from PIL import Image

from sdxl_jax.data import folders
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.sources import ImageSource, OnRefused
from sdxl_jax.errors import InputError


def metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def refused(folder, **options):
    """{file: reason} of the refusals in a folder, to which one good image, good.png, is added."""
    save(folder, "good.png")
    source = open_folder(folder, on_refused=OnRefused.SKIP, **options)
    assert "good.png" in names_of(source)
    return dict(source.refused())


def names_of(source: ImageSource) -> list[str]:
    return [source.name(image) for image in range(len(source.sizes))]


def captions_of(source: ImageSource) -> list[tuple[str, ...]]:
    return [source.captions(image) for image in range(len(source.sizes))]


def test_a_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.png", "a/z.JPG", "c.webp", "a.bmp", "d.jpeg", ".hidden.png", ".git/x.png"):
        save(tmp_path, name, caption=f" {name}\n")
    source = open_folder(str(tmp_path))
    assert names_of(source) == ["a.bmp", "a/z.JPG", "b.png", "c.webp", "d.jpeg"]
    assert captions_of(source) == [("a.bmp",), ("a/z.JPG",), ("b.png",), ("c.webp",), ("d.jpeg",)]
    assert source.found == 5
    assert source.sizes.tolist() == [[8, 12]] * 5 and source.sizes.dtype == np.int32
    assert list(source.refused()) == []


def test_links_to_folders_are_followed_and_cycles_end(tmp_path):
    save(tmp_path / "elsewhere", "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert open_folder(tmp_path / "data").paths == [tmp_path / "data" / "link" / "a.png"]


def test_metadata_gives_the_captions_and_text_files_are_not_read(tmp_path):
    save(tmp_path, "sub/a.png", caption="wrong")
    save(tmp_path, "b.png", caption=None)
    metadata(tmp_path, {"file_name": "./b.png", "text": "beta"}, {"file_name": "sub/a.png", "text": "älpha", "more": 1})
    source = open_folder(tmp_path)
    assert captions_of(source) == [("beta",), ("älpha",)]
    assert list(source.refused()) == []


def test_bad_text_files_are_refused_with_reasons(tmp_path):
    save(tmp_path, "bare.png", caption=None)
    save(tmp_path, "empty.png", caption=" \n")
    save(tmp_path, "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "alone.txt").write_text("nobody")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.txt").write_text("caption")
    reasons = refused(tmp_path)
    assert sorted(reasons) == ["alone.txt", "bare.png", "empty.png", "latin.png", "text.png"]
    assert "without a caption" in reasons["bare.png"]
    assert reasons["empty.png"] == "empty caption"
    assert reasons["latin.png"] == "caption is not UTF-8 text"
    assert "without an image" in reasons["alone.txt"]
    assert reasons["text.png"].startswith("cannot be read: in no image format that is read (JPEG, PNG, ")


def test_bad_lines_of_metadata_are_refused_with_line_numbers(tmp_path):
    for name in ("a.png", "b.png", "empty.png"):
        save(tmp_path, name, caption=None)
    good = [json.dumps({"file_name": name, "text": "x"}) for name in ("good.png", "a.png")]
    bad = ["not json", '{"file_name": "b.png"}', '{"file_name": "gone.png", "text": "x"}', '["a"]', good[1]]
    lines = [*good, "", *bad, '{"file_name": "empty.png", "text": " "}', '{"file_name": "../a.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    reasons = refused(tmp_path)
    numbers = (4, 5, 6, 7, 8, 9, 10)
    assert sorted(reasons) == sorted(["b.png", *(f"metadata.jsonl line {number}" for number in numbers)])
    assert reasons["metadata.jsonl line 4"] == reasons["metadata.jsonl line 7"] == "the line is not a JSON object"
    assert "expected fields like" in reasons["metadata.jsonl line 5"]
    assert "no image gone.png" in reasons["metadata.jsonl line 6"]
    assert "earlier line" in reasons["metadata.jsonl line 8"]
    assert reasons["metadata.jsonl line 9"] == "empty.png: empty caption"


def test_our_pixel_limit_replaces_that_of_pillow(tmp_path):
    save(tmp_path, "large.png")
    save(tmp_path, "huge.png")
    (tmp_path / "large.png").write_bytes(png_claiming(10_000, 19_000))  # Pillow would raise at 179 million
    (tmp_path / "huge.png").write_bytes(png_claiming(10_000, 20_001))
    pillows_own = Image.MAX_IMAGE_PIXELS
    reasons = refused(tmp_path)
    assert list(reasons) == ["huge.png"]
    assert "the limit is 200000000" in reasons["huge.png"]
    assert pillows_own == Image.MAX_IMAGE_PIXELS


def test_refusals_are_one_error_by_default_with_their_number_and_the_remedy(tmp_path):
    save(tmp_path, "good.png")
    for number in range(7):
        save(tmp_path, f"bare{number}.png", caption=None)
    with pytest.raises(InputError) as error:
        open_folder(tmp_path)
    message = str(error.value)
    assert message.startswith(f"7 entries of {tmp_path} cannot be used:")
    assert "bare4.png" in message and "bare5.png" not in message and "and 2 more" in message
    assert "data.on_refused=skip" in message


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist. Expected a folder of images"),
        (lambda path: path.write_text(""), "is not a folder. Expected a folder of images"),
        (lambda path: path.mkdir(), "holds no images among its 0 files"),
        (lambda path: (path.mkdir(), (path / "a.txt").write_text("a")), "holds no images among its 1 files"),
        (lambda path: save(path, "a.png", caption=None), "None of the 1 images"),
    ],
)
def test_a_folder_without_usable_images_is_refused_even_with_skip(tmp_path, make, expected):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=expected):
        open_folder(tmp_path / "data", on_refused=OnRefused.SKIP)


def test_metadata_of_both_kinds_or_without_the_columns_is_an_error(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("image,words\n")
    with pytest.raises(InputError, match=r"has the columns image, words\. Expected file_name and one of"):
        open_folder(tmp_path, on_refused=OnRefused.SKIP)
    metadata(tmp_path, {"file_name": "a.png", "text": "a"})
    with pytest.raises(InputError, match=r"holds both metadata\.jsonl and metadata\.csv"):
        open_folder(tmp_path, on_refused=OnRefused.SKIP)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_image_is_found_by_verify(tmp_path, suffix):
    path = save(tmp_path, f"cut.{suffix}", height=64, width=64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cannot be read" in refused(tmp_path, verify=True)[f"cut.{suffix}"]


def test_every_unusual_image_is_read_upright_or_refused_with_its_reason(tmp_path):
    images = every_image()
    write_folder(tmp_path, {name: data for name, (data, _) in images.items()})
    write_folder(tmp_path, {f"{name.partition('.')[0]}.txt": b"a caption" for name in images})
    source = open_folder(tmp_path, on_refused=OnRefused.SKIP, verify=True)
    sizes = {name: tuple(size) for name, size in zip(names_of(source), source.sizes.tolist(), strict=True)}
    reasons = dict(source.refused())
    for name, (_, outcome) in images.items():
        if isinstance(outcome, str):
            assert outcome in reasons.pop(name), name
        else:
            assert sizes.pop(name) == outcome, name
    assert (sizes, reasons) == ({}, {})


def test_an_image_that_disappears_is_named(tmp_path, monkeypatch):
    save(tmp_path, "a.png")
    gone = save(tmp_path, "b.png")
    listed = folders.list_files(tmp_path)
    gone.unlink()
    monkeypatch.setattr(folders, "list_files", lambda folder: listed)
    with pytest.raises(InputError, match=r"b\.png cannot be read any more .*Bring it back"):
        open_folder(tmp_path, on_refused=OnRefused.SKIP)


def test_numeric_fields_are_columns_with_nan_where_an_image_has_none(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path, name, caption=None)
    (tmp_path / "a.json").write_text('{"caption": "a", "score": 0.5, "far": 1e300}')
    (tmp_path / "b.json").write_text('{"captions": ["b", "bb"], "age": 3}')
    source = open_folder(tmp_path)
    assert list(source.numbers) == ["age", "far", "score"]
    np.testing.assert_array_equal(source.numbers["age"], np.array([np.nan, 3], np.float32))
    np.testing.assert_array_equal(source.numbers["far"], np.array([np.inf, np.nan], np.float32))
    np.testing.assert_array_equal(source.numbers["score"], np.array([0.5, np.nan], np.float32))
    assert captions_of(source) == [("a",), ("b", "bb")]


def test_an_open_folder_is_an_image_source_that_can_be_pickled(tmp_path):
    save(tmp_path, "a.jpg", height=64, width=96)
    source = open_folder(tmp_path)
    assert isinstance(source, ImageSource) and not source.built and source.path == tmp_path
    unpickled = pickle.loads(pickle.dumps(source))
    assert unpickled.fingerprint == source.fingerprint
    assert unpickled.pixels(0).shape == (64, 96, 3) and unpickled.pixels(0, (16, 24)).shape == (16, 24, 3)


def test_the_fingerprint_depends_on_captions_numbers_and_file_lengths(tmp_path):
    save(tmp_path, "b.png", caption="ä b")
    save(tmp_path, "a.png", caption="a", height=9)
    seen = [open_folder(tmp_path).fingerprint]
    assert seen == [open_folder(tmp_path).fingerprint]
    for text in ("a\nb", "a\nc", "b"):
        (tmp_path / "a.txt").write_text(text)
        seen.append(open_folder(tmp_path).fingerprint)
    for score in (1, 2):
        (tmp_path / "a.json").write_text(json.dumps({"score": score}))
        seen.append(open_folder(tmp_path).fingerprint)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b" ")
    seen.append(open_folder(tmp_path).fingerprint)
    assert len(set(seen)) == 7


# The same as a shard build


def assert_same_for_training_and_build(folder):
    """Names, captions, sizes, numeric fields and refusals of both, with every image decoded and with headers alone."""
    for verify in (False, True):
        source = open_folder(folder, on_refused=OnRefused.SKIP, verify=verify)
        good, bad = split(folder, verify=verify)
        assert names_of(source) == list(good)
        assert captions_of(source) == [record.captions for record in good.values()]
        assert source.sizes.tolist() == [list(record.size) for record in good.values()]
        assert set(source.numbers) == {name for record in good.values() for name in record.numbers}
        for name, values in source.numbers.items():
            expected = [record.numbers.get(name, np.nan) for record in good.values()]
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
                np.testing.assert_array_equal(values, np.array(expected).astype(np.float32))
        assert dict(source.refused()) == bad and len(list(source.refused())) == len(bad)
        assert source.found >= len(good)


def test_training_and_build_read_the_same_from_files_beside_the_images(tmp_path):
    unusual = every_image()
    write_folder(tmp_path, {f"odd/{name}": data for name, (data, _) in unusual.items()})
    write_folder(tmp_path, {f"odd/{name.partition('.')[0]}.txt": b"a caption" for name in unusual})
    described = {
        "long.txt": b"x" * 10_000,
        "lines.txt": b"one\r\n\r\n two \n",
        "bom.txt": b"\xef\xbb\xbfcaf\xc3\xa9",
        "upper.TXT": b"a",
        "latin.txt": b"caf\xe9",
        "empty.txt": b" \n",
        "both.txt": b"text",
        "both.json": b'{"caption": "json", "score": 7, "far": 1e300}',
        "list.json": b'{"captions": ["a", " ", "b "], "score": 0.5, "ok": true}',
        "surrogate.json": b'{"caption": "\\ud800"}',
        "number.json": b'{"caption": 3}',
        "nothing.json": b'{"url": "x"}',
        "no_object.json": b"[1]",
        "no_json.json": b"{",
    }
    write_folder(tmp_path, described)
    write_folder(tmp_path, {f"{name.partition('.')[0]}.jpg": encoded() for name in described})
    write_folder(tmp_path, {"bare.jpg": encoded(), "alone.txt": b"x", "alone.json": b"[]", ".hidden.jpg": b"x"})
    write_folder(tmp_path, {os.fsdecode(b"caf\xe9.png"): encoded("PNG"), os.fsdecode(b"caf\xe9.txt"): b"a"})
    write_folder(tmp_path, {os.fsdecode(b"bad\xe9.png"): b"", os.fsdecode(b"bad\xe9.txt"): b"a"})
    write_folder(tmp_path, {"link.txt": b"a", "pipe.txt": b"a", "folder.jpg/a.txt": b"alone", "folder.txt": b"a"})
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert_same_for_training_and_build(tmp_path)
    source = open_folder(tmp_path, on_refused=OnRefused.SKIP)
    captions = dict(zip(names_of(source), captions_of(source), strict=True))
    assert captions["long.jpg"] == ("x" * 10_000,)
    assert captions["lines.jpg"] == ("one", "two") and captions["both.jpg"] == ("text",)


def write_images_for_metadata(folder):
    images = ("a.jpg", "sub/b.jpg", "list.jpg", "none.jpg", "blank.jpg", "cut.jpg")
    write_folder(folder, {**{name: encoded() for name in images}, "cut.jpg": encoded(height=64, width=64)[:-500]})
    write_folder(folder, {"a.txt": b"not read", "zero.jpg": b""})


def test_training_and_build_read_the_same_from_metadata_jsonl(tmp_path):
    write_images_for_metadata(tmp_path)
    lines = [
        b'{"file_name": "./a.jpg", "text": " alpha ", "score": 5}',
        b'{"file_name": "sub/b.jpg", "caption": "beta", "age": 1}',
        b"",
        b'{"file_name": "list.jpg", "text": ["one", "two"]}',
        b'{"file_name": "a.jpg", "text": "again"}',
        b'{"file_name": "../a.jpg", "text": "x"}',
        b"not json",
        b'{"file_name": "a.jpg"}',
        b'{"file_name": "a.jpg", "text": "caf\xe9"}',
        b'{"file_name": "blank.jpg", "text": " "}',
        b'{"file_name": "cut.jpg", "text": "cut"}',
        b'{"file_name": "zero.jpg", "text": "zero"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    assert_same_for_training_and_build(tmp_path)


def test_training_and_build_read_the_same_from_metadata_csv(tmp_path):
    write_images_for_metadata(tmp_path)
    text = b'file_name,score,text,by\na.jpg,5.5,"one, quoted",me\na.jpg,6,two,2\nsub/b.jpg,nan,b,\n'
    text += b"cut.jpg,1,cut,\nlist.jpg,1,a cat, sitting,me\nblank.jpg,1,,me\nc.jpg,1,c,me\nnone.jpg,1,caf\xe9,me\n\n"
    (tmp_path / "metadata.csv").write_bytes(text)
    assert_same_for_training_and_build(tmp_path)


def test_images_without_captions_and_captions_without_images_are_named(tmp_path):
    write_folder(tmp_path, {"sub/a.PNG": encoded("PNG"), "sub/a.TXT": b"a", "bare.jpg": encoded(), "alone.txt": b"x"})
    write_folder(tmp_path, {"notes.json": b"[]", ".hidden.jpg": b"", "c.txt": b"c", "pipe.txt": b"p"})
    (tmp_path / "c.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jpg")
    good, bad = split(tmp_path)
    assert list(good) == ["sub/a.PNG"]
    assert bad == {
        "alone.txt": "caption without an image of the same name",
        "bare.jpg": "image without a caption: no .txt or .json of the same name",
        "c.jpg": "a broken link",
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
        "metadata.jsonl line 6": "no image ../a.jpg in the folder (.jpg, .png, .webp, .avif, .gif, .tiff, .bmp, …)",
        "metadata.jsonl line 7": "the line is not a JSON object",
        "metadata.jsonl line 8": 'expected fields like {"file_name": ..., "text": ...}',
        "metadata.jsonl line 9": "the line is not UTF-8 text",
        "metadata.jsonl line 10": "blank.jpg: empty caption",
        "none.jpg": "image without a caption: no usable line in metadata.jsonl names it",
    }


def test_metadata_csv_gives_one_caption_per_line(tmp_path):
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
