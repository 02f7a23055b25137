"""The promises of sdxl_jax.data.captions: the same captions and numbers out of every source."""

import json

import pytest
from picture_sources import encoded, everything, write_folder, write_tar

from sdxl_jax.data.build.records import Record
from sdxl_jax.data.captions import NUMBERS_LIMIT, check_number_names
from sdxl_jax.data.sources import Refused
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


def test_numbers_of_too_many_names_are_refused():
    check_number_names({f"n{number}" for number in range(NUMBERS_LIMIT)})
    with pytest.raises(InputError, match=r"more than 256 names \(n0, n1, n10, .*same few names"):
        check_number_names({f"n{number}" for number in range(NUMBERS_LIMIT + 1)})
