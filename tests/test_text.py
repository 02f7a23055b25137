"""The promises of sdxl_jax.files.text: one reader for text files of any editor."""

import pytest

from sdxl_jax.errors import InputError
from sdxl_jax.files import text
from sdxl_jax.weights.formats import json_files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_the_mark_of_an_encoding_is_heeded_and_is_no_part_of_the_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("a café\r\nand more\n".encode(encoding))
    assert text.read_text(tmp_path / "a.txt") == "a café\r\nand more\n"
    (tmp_path / "b.txt").write_bytes("\ufeffbig".encode("utf-16-be"))
    assert text.read_text(tmp_path / "b.txt") == "big"


@pytest.mark.parametrize("data", [b"caf\xe9", "a fox".encode("utf-16-le"), b"\xff\xfea"])
def test_what_is_no_text_is_refused_with_the_file_and_the_remedy(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text \(.*\)\. Save it as UTF-8$"):
        text.read_text(tmp_path / "a.txt")


def test_what_cannot_be_read_is_an_error_of_input(tmp_path):
    for path in (tmp_path, tmp_path / "gone.txt"):
        with pytest.raises(InputError, match=r"cannot be read \("):
            text.read_text(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a\nb\r\nc\rd", ["a", "b", "c", "d"]),
        ("a\n\nb\n", ["a", "", "b"]),
        ("", []),
        *((f"a{inside}b", [f"a{inside}b"]) for inside in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"),
    ],
)
def test_lines_end_where_editors_end_them_and_nowhere_else(given, expected):
    assert text.lines(given) == expected


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_long_files_are_read_line_by_line_by_the_same_rules(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes("one\u2028\ntwo\r\n".encode(encoding))
    assert [text.decode(line).strip("\r\n") for line in text.utf8_lines(tmp_path / "a.jsonl")] == ["one\u2028", "two"]


def test_json_of_other_programs_may_begin_with_a_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert json_files.read(tmp_path / "config.json") == {"a": 1}
    (tmp_path / "config.json").write_bytes(b'{"a": "caf\xe9"}')
    with pytest.raises(InputError, match=r"config\.json is not UTF-8 text .*Download it again"):
        json_files.read(tmp_path / "config.json")
