"""The promises of sdxl_jax.data.captions: the same captions and numeric fields from every source."""

import json
import re

import pytest
from image_sources import encoded, everything, write_folder, write_tar

from sdxl_jax.data.build.build import build
from sdxl_jax.data.build.records import Record
from sdxl_jax.data.captions import NUMBERS_LIMIT, CaptionLines, captions_of, check_number_names
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.inspection import inspect, open_dataset
from sdxl_jax.data.pipeline import open_mixture
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.shards import open_shards
from sdxl_jax.data.sources import Refused, Unusable
from sdxl_jax.errors import InputError


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
def test_a_text_file_holds_one_caption_or_one_per_line(tmp_path, text, expected):
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


def test_captions_come_from_the_text_file_and_numbers_from_the_json(tmp_path):
    files = {"a.jpg": encoded(), "a.json": b'{"caption": "old", "score": 7}', "a.txt": b"new"}
    for source in (write_folder(tmp_path / "f", files), write_tar(tmp_path / "a.tar", files)):
        (record,) = everything(source)
        assert isinstance(record, Record)
        assert (record.captions, record.numbers) == (("new",), {"score": 7.0})


def test_too_many_numeric_fields_are_refused():
    check_number_names({f"n{number}" for number in range(NUMBERS_LIMIT)})
    with pytest.raises(InputError, match=r"more than 256 names \(n0, n1, n10, .*same few names"):
        check_number_names({f"n{number}" for number in range(NUMBERS_LIMIT + 1)})


def test_a_text_file_of_paragraphs_is_one_caption_with_whole(tmp_path):
    files = {"a.jpg": encoded(), "a.txt": "\ufeffA fox.\r\n\r\nIt sleeps.\r\n".encode()}
    for source in (write_folder(tmp_path / "f", files), write_tar(tmp_path / "t" / "a.tar", files)):
        (lines,), (whole,) = everything(source), everything(source, caption_lines=CaptionLines.WHOLE)
        assert isinstance(lines, Record) and isinstance(whole, Record)
        assert lines.captions == ("A fox.", "It sleeps.")
        assert whole.captions == ("A fox.\n\nIt sleeps.",)


def test_an_open_folder_notes_how_many_images_have_several_captions(tmp_path):
    write_folder(tmp_path, {"a.jpg": encoded(), "a.txt": b"one\ntwo\n", "b.jpg": encoded(), "b.txt": b"one\n"})
    write_folder(tmp_path, {"c.jpg": encoded(), "c.json": b'{"captions": ["one", "two"]}'})
    (note,) = open_folder(tmp_path).notes
    assert note.startswith("1 of 3 images have several captions, one for each line of their .txt")
    whole = open_folder(tmp_path, caption_lines=CaptionLines.WHOLE)
    assert whole.notes == () and whole.captions(0) == ("one\ntwo",) and whole.captions(2) == ("one", "two")
    assert whole.fingerprint != open_folder(tmp_path).fingerprint


def test_a_data_set_without_a_second_size_is_noted(tmp_path):
    files = {f"{name}{suffix}": data for name in "abc" for suffix, data in ((".jpg", encoded()), (".txt", b"one"))}
    write_folder(tmp_path, files)
    config = DataConfig(folder=str(tmp_path), buckets=((8, 8),), batch_size=1)
    (note,) = inspect(open_dataset(config))["notes"]
    assert re.fullmatch(r"all 3 images are \d+×\d+: a model that is conditioned on the original size learns .*", note)
    write_folder(tmp_path, {"d.jpg": encoded(height=24), "d.txt": b"one"})
    assert inspect(open_dataset(config))["notes"] == []


def test_metadata_in_a_subfolder_is_noted_as_not_read(tmp_path):
    files = {"train/a.jpg": encoded(), "train/a.txt": b"a", "train/metadata.jsonl": b"{}", "test/metadata.csv": b""}
    (note,) = open_folder(write_folder(tmp_path, files)).notes
    assert note.startswith(
        "test/metadata.csv, train/metadata.jsonl not read: metadata is read only in data.folder itself"
    )


def test_training_reads_captions_whole_or_refuses_where_that_has_no_effect(tmp_path):
    folder = write_folder(tmp_path / "f", {"a.jpg": encoded(), "a.txt": b"one\ntwo"})
    config = DataConfig(folder=str(folder), caption_lines=CaptionLines.WHOLE)
    assert open_mixture(config).captions(0) == ("one\ntwo",)
    assert list(open_mixture(config).notes()) == []
    (note,) = inspect(open_dataset(DataConfig(folder=str(folder), buckets=((8, 8),), batch_size=1)))["notes"]
    assert note.startswith("1 of 1 images have several captions")
    write_folder(tmp_path / "m", {"a.jpg": encoded(), "metadata.jsonl": b'{"file_name": "a.jpg", "text": "one\\ntwo"}'})
    with pytest.raises(InputError, match=r"data\.caption_lines=whole has no effect on .*/m: no caption is read from"):
        open_mixture(DataConfig(folder=str(tmp_path / "m"), caption_lines=CaptionLines.WHOLE))


def test_shards_are_built_with_whole_captions_and_record_it(tmp_path):
    folder = write_folder(tmp_path / "f", {"a.jpg": encoded(), "a.txt": b"one\ntwo"})
    for caption_lines, captions in ((CaptionLines.LINES, ("one", "two")), (CaptionLines.WHOLE, ("one\ntwo",))):
        shards = tmp_path / caption_lines.value
        build(str(folder), shards, workers=0, progress=False, caption_lines=caption_lines)
        assert open_shards(shards).captions(0) == captions
        assert build(str(folder), shards, workers=0, progress=False, caption_lines=caption_lines).was_finished
    config = DataConfig(folder=str(tmp_path / "whole"), caption_lines=CaptionLines.WHOLE)
    assert open_mixture(config).captions(0) == ("one\ntwo",)
    with pytest.raises(InputError, match=r"has no effect on .*/lines: .*data build --caption-lines whole"):
        open_mixture(DataConfig(folder=str(tmp_path / "lines"), caption_lines=CaptionLines.WHOLE))
    with pytest.raises(InputError, match=r"a finished build with caption_lines=lines, and now whole is given"):
        build(str(folder), tmp_path / "lines", workers=0, progress=False, caption_lines=CaptionLines.WHOLE)


def test_shards_built_before_the_setting_existed_count_as_one_caption_per_line(tmp_path):
    folder = write_folder(tmp_path / "f", {"a.jpg": encoded(), "a.txt": b"one\ntwo"})
    build(str(folder), tmp_path / "s", workers=0, progress=False)
    description = json.loads((tmp_path / "s" / "shards.json").read_text())
    assert description.pop("caption_lines") == "lines"
    (tmp_path / "s" / "shards.json").write_text(json.dumps(description))
    assert build(str(folder), tmp_path / "s", workers=0, progress=False).was_finished
    assert not open_shards(tmp_path / "s").whole_captions


def test_a_build_refuses_the_setting_where_no_text_file_is_read(tmp_path):
    folder = write_folder(tmp_path / "f", {"a.jpg": encoded(), "metadata.csv": b"file_name,text\na.jpg,one\n"})
    with pytest.raises(InputError, match=r"--caption-lines whole has no effect: .*/f has no captions in \.txt files"):
        build(str(folder), tmp_path / "s", workers=0, progress=False, caption_lines=CaptionLines.WHOLE)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_and_metadata_are_read_as_windows_writes_them(tmp_path, encoding):
    caption = "caf\xe9\u2028on\x85a\x0cplate"
    lines = {
        "txt/a.txt": caption,
        "jsonl/metadata.jsonl": json.dumps({"file_name": "a.jpg", "text": caption}, ensure_ascii=False) + "\r\n",
        "csv/metadata.csv": f"file_name,text\r\na.jpg,{caption}\r\n",
    }
    for name, text in lines.items():
        folder = tmp_path / name.partition("/")[0]
        write_folder(tmp_path, {f"{folder.name}/a.jpg": encoded(), name: text.encode(encoding)})
        assert open_folder(folder).captions(0) == (json.loads(json.dumps(caption)),), name


def test_captions_may_be_bytes_of_text():
    assert captions_of([b"\xef\xbb\xbfone", "two"]) == ("one", "two")
    with pytest.raises(Unusable, match="caption is not UTF-8 text"):
        captions_of(b"caf\xe9")
