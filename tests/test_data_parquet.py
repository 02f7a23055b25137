"""sdxl_jax.data.build.parquet: rows keep their numbers, and what cannot be read is reported."""

from typing import Any

import numpy as np
import pytest
from image_sources import captions, encoded, everything, split, write_parquet

from sdxl_jax.data.build import parquet
from sdxl_jax.data.build.records import Record, units
from sdxl_jax.data.sources import Refused
from sdxl_jax.errors import InputError

pyarrow: Any = pytest.importorskip("pyarrow")


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


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (
            {"photo": [b"x"], "text": ["a"]},
            r"has the columns photo \(binary\), text \(string\)\. Expected an image",
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
    assert reasons["b.parquet:20"].startswith("cannot be read: in no image format that is read (")


def test_row_groups_are_units_and_rows_keep_their_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_PIECE_BYTES", 1)
    columns = {"image": [encoded(seed=n) for n in range(50)], "text": [str(n) for n in range(50)]}
    write_parquet(tmp_path / "data" / "train.parquet", columns, row_group_size=20)
    names = [unit.name for unit in units(tmp_path)]
    assert names == [f"data/train.parquet:{rows}" for rows in ("0-19", "20-39", "40-49")]
    assert captions(tmp_path) == {f"data/train.parquet:{n}": (str(n),) for n in range(50)}
    monkeypatch.undo()
    assert [unit.name for unit in units(tmp_path)] == ["data/train.parquet"]
    assert captions(tmp_path / "data" / "train.parquet") == {f"train.parquet:{n}": (str(n),) for n in range(50)}
