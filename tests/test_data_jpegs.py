"""The promises of sdxl_jax.data.jpegs: complete files decode to the pixels of Pillow, damaged ones are refused."""

import io
import re
import struct

import numpy as np
import pytest
from PIL import Image, ImageFile

from sdxl_jax.data import jpegs
from sdxl_jax.data.images import decode, measure

HEIGHT, WIDTH = 128, 160


def encoded(**options) -> bytes:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH))
    file = io.BytesIO()
    image = Image.fromarray(np.stack([x, y + noise, x ^ y], -1).astype(np.uint8))
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def in_head(data: bytes, inserted: bytes) -> bytes:
    """After the JFIF segment."""
    end = 4 + struct.unpack(">H", data[4:6])[0]
    return data[:end] + inserted + data[end:]


def spectral_selection(data: bytes, value: bytes) -> bytes:
    start = data.index(b"\xff\xda") + 2 + struct.unpack(">H", data[data.index(b"\xff\xda") + 2 :][:2])[0] - 3
    return data[:start] + value + data[start + 3 :]


def second_scan(data: bytes) -> int:
    return data.index(b"\xff\xc4", data.index(b"\xff\xda"))


GOOD, PROGRESSIVE, RESTARTS = encoded(), encoded(progressive=True), encoded(restart_marker_blocks=10)
END = b"\xff\xd9"
HARMLESS = {
    "samsung": spectral_selection(GOOD, b"\0\0\0"),
    "samsung without an end": spectral_selection(GOOD, b"\0\0\0")[:-2],
    "successive approximation": spectral_selection(GOOD, b"\0\x3f\x11"),
    "no end": GOOD[:-2],
    "no end, padded": GOOD[:-2] + bytes(50),
    "one junk byte": GOOD[:-2] + b"\x7f" + END,
    "zeros": GOOD[:-2] + bytes(4) + END,
    "junk": GOOD[:-2] + b"any text at all " * 100 + END,
    "rows that the header does not count": RESTARTS[:-2] + b"\xff\xd0" + RESTARTS[-200:-2] + END,
    "restart markers after the end": GOOD[:-2] + b"left\xff\xd0over\xff\xd1" + END,
    "restarts, padded": RESTARTS[:-2] + b"\x7f" + END,
    "restarts without an end": RESTARTS[:-2],
    "a restart marker of another number": RESTARTS.replace(b"\xff\xd2", b"\xff\xd6", 1),
    "progressive without an end": PROGRESSIVE[:-2],
    "progressive, padded": PROGRESSIVE[:-2] + bytes(9) + END,
    "progressive, junk": PROGRESSIVE[:-2] + b"\x11\x22\x33" + END,
    "progressive, padded between scans": PROGRESSIVE[: second_scan(PROGRESSIVE)]
    + bytes(9)
    + PROGRESSIVE[second_scan(PROGRESSIVE) :],
    "bytes between segments": in_head(GOOD, b"\0\1\2\3"),
    "bytes before the tables": GOOD.replace(b"\xff\xc4", b"\x11\x22\xff\xc4", 1),
    "unknown JFIF": GOOD.replace(b"JFIF\0\1", b"JFIF\0\3", 1),
    "JFIF 0": GOOD.replace(b"JFIF\0\1\1", b"JFIF\0\0\0", 1),
    "unknown transform": GOOD[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\7") + GOOD[20:],
    "profile out of order": in_head(GOOD, segment(0xE2, b"ICC_PROFILE\0\2\1abc")),
    "bytes after the end": GOOD + b"a trailer" * 100,
}
UNKNOWN_TO_PILLOW = {
    "half a profile": in_head(GOOD, segment(0xE2, b"ICC_PROFILE\0")),
    "half an Adobe segment": in_head(GOOD, segment(0xEE, b"Adobe")),
    "index of several images, broken": in_head(GOOD, segment(0xE2, b"MPF\0junkjunkjunk")),
}
FIRST_RESTART = RESTARTS.index(b"\xff\xd0")
MIDDLE = GOOD.index(b"\xff\xda") + (len(GOOD) - GOOD.index(b"\xff\xda")) // 2
DAMAGED = {
    **{f"{cut} bytes missing": GOOD[:-cut] for cut in (6, 9, 100, len(GOOD) // 2)},
    "cut, end": GOOD[: len(GOOD) // 2] + END,
    "cut, zeros": GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2),
    "cut, zeros, end": GOOD[: len(GOOD) // 2] + bytes(len(GOOD) // 2) + END,
    "cut, and a harmless departure": spectral_selection(GOOD, b"\0\0\0")[: len(GOOD) // 2],
    "middle gone": GOOD[:MIDDLE] + GOOD[MIDDLE + 500 :],
    "restarts, cut": RESTARTS[: len(RESTARTS) // 2],
    "restart marker gone": RESTARTS[:FIRST_RESTART] + RESTARTS[FIRST_RESTART + 2 :],
    "restart segment gone": re.sub(rb"(?s)\xff\xd0.*?(\xff\xd1)", rb"\1", RESTARTS, count=1),
    "progressive, cut": PROGRESSIVE[: len(PROGRESSIVE) // 2],
    "progressive, cut, end": PROGRESSIVE[: len(PROGRESSIVE) // 2] + END,
    "progressive, scans missing": PROGRESSIVE[: PROGRESSIVE.rindex(b"\xff\xda")],
}


@pytest.fixture
def as_pillow(monkeypatch):
    """Decodes with Pillow, which by default requires an end marker."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    return lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_departures_are_decoded_pixel_for_pixel_as_by_pillow(name, as_pillow):
    data = HARMLESS[name]
    np.testing.assert_array_equal(decode(data), as_pillow(data))
    assert measure(data) == (HEIGHT, WIDTH)
    intact = next(good for good in (GOOD, PROGRESSIVE, RESTARTS) if np.array_equal(decode(good), decode(data)))
    np.testing.assert_array_equal(decode(data, (30, 30)), decode(intact, (30, 30)))  # downscaled while decoding


@pytest.mark.parametrize("name", UNKNOWN_TO_PILLOW)
def test_metadata_that_pillow_refuses_is_ignored(name):
    np.testing.assert_array_equal(decode(UNKNOWN_TO_PILLOW[name]), decode(GOOD))
    assert measure(UNKNOWN_TO_PILLOW[name]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", DAMAGED)
def test_files_with_missing_rows_or_data_are_refused(name):
    for at_least in (None, (30, 30)):
        with pytest.raises(ValueError, match=r"Premature end|premature end|extraneous bytes before|instead of RST"):
            decode(DAMAGED[name], at_least)


def test_damage_is_reported_though_a_harmless_departure_comes_before_it():
    with pytest.raises(ValueError, match="premature end of data segment"):
        jpegs.decode(spectral_selection(GOOD, b"\0\0\0")[: len(GOOD) // 2])


def test_restart_numbers_that_make_libjpeg_lose_data_are_damage():
    with pytest.raises(ValueError, match="instead of RST2"):
        decode(RESTARTS.replace(b"\xff\xd2", b"\xff\xd3", 1))
