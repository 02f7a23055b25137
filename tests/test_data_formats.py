"""The promises of sdxl_jax.data.formats and pngs: content decides what is read, metadata does not, all is counted."""

import io
import json

import numpy as np
import pytest
from image_sources import as_folder, as_tar, encoded, everything, random_image, split, write_folder, write_tar
from PIL import Image, ImageOps, PngImagePlugin

from sdxl_jax.data import formats
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.images import decode, measure
from sdxl_jax.data.sources import OnRefused, Refused, Unusable
from sdxl_jax.errors import InputError
from sdxl_jax.sampling import init_images

LARGE = json.dumps(list(range(300_000)))
XMP = "XML:com.adobe.xmp"


def png(*texts: tuple[str, str, bool], **options) -> bytes:
    """A PNG with compressed texts: (keyword, text, whether it is an international text, which may be XMP)."""
    info = PngImagePlugin.PngInfo()
    for keyword, text, international in texts:
        if international:
            info.add_itxt(keyword, text, zip=True)
        else:
            info.add_text(keyword, text, zip=True)
    return encoded("PNG", pnginfo=info, **options)


def xmp_rotated(text: str = "") -> str:
    return f'<x:xmpmeta tiff:Orientation="6">{text}</x:xmpmeta>'


def with_damaged_chunk() -> bytes:
    data = bytearray(encoded("PNG", dpi=(72, 72)))
    data[data.index(b"pHYs") + 13] ^= 1
    return bytes(data)


PNGS = {
    "text": png(("note", LARGE, False)),
    "international text": png(("note", LARGE, True)),
    "many texts": png(*((f"note {number}", "x" * 1_000_000, False) for number in range(70))),
    "profile": encoded("PNG", icc_profile=b"0123456789abcdef" * 100_000),
    "no end": encoded("PNG")[:-12],
    "a checksum of another chunk": with_damaged_chunk(),
}


@pytest.mark.parametrize("name", PNGS)
def test_texts_and_profiles_of_a_png_never_stop_its_decoding(name, tmp_path):
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    np.testing.assert_array_equal(decode(PNGS[name]), np.asarray(random_image()))
    assert measure(PNGS[name]) == measure(io.BufferedReader(io.BytesIO(PNGS[name]))) == (8, 12)
    (tmp_path / "a.png").write_bytes(PNGS[name])
    np.testing.assert_array_equal(init_images.read(tmp_path / "a.png"), np.asarray(random_image()))
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize("text", [xmp_rotated(), xmp_rotated(" " * 2_000_000)], ids=["small", "large"])
def test_the_orientation_in_xmp_is_applied_to_a_png(text):
    data = png((XMP, text, True), ("note", LARGE, False))
    np.testing.assert_array_equal(decode(data), np.rot90(np.asarray(random_image()), -1))
    assert measure(data) == (12, 8)


def test_transparency_palettes_and_the_first_frame_of_an_animation_are_kept():
    palette = encoded("PNG", mode="P", transparency=b"\x00\x80\xff", pnginfo=None)
    with Image.open(io.BytesIO(palette)) as image:
        expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    np.testing.assert_array_equal(decode(palette), np.asarray(expected.convert("RGB")))
    file = io.BytesIO()
    random_image().save(file, "PNG", save_all=True, append_images=[random_image(seed=1)])
    np.testing.assert_array_equal(decode(file.getvalue()), np.asarray(random_image()))


def test_a_truncated_png_is_refused():
    data = png(("note", LARGE, False), height=64, width=64)
    for cut in (100, 5000):
        with pytest.raises(OSError, match=r"truncated|broken"):
            decode(data[:-cut])
    with pytest.raises(Unusable, match="begins as PNG, but is damaged"):
        decode(data[:1000])


# Formats


READ = {
    "a.jfif": "JPEG",
    "b.jpe": "JPEG",
    "c.tif": "TIFF",
    "d.TIFF": "TIFF",
    "e.gif": "GIF",
    "f.avif": "AVIF",
    "g.jp2": "JPEG2000",
    "h.ppm": "PPM",
    "i.tga": "TGA",
    "j.qoi": "QOI",
    "k.apng": "PNG",
    "l.heic": "JPEG",
    "m.psd": "WEBP",
    "n.png": "AVIF",
}
REFUSED = {
    "heic.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "in the format HEIF, which is not read; convert"),
    "renamed.jpg": (
        b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100),
        "in the format HEIF, which is not read; convert",
    ),
    "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="">', "in the format SVG, which is not read"),
    "layers.psd": (b"8BPS\0\1" + bytes(100), "in the format Photoshop, which is not read"),
    "icon.ico": (encoded("ICO"), "in the format Windows icons, which is not read"),
    "next.jxl": (b"\xff\x0a" + bytes(100), "in the format JPEG XL, which is not read"),
    "preview.nef": (encoded("TIFF"), "a camera's raw file (.nef), which is not read; develop it to JPEG or PNG"),
    "photo": (encoded(), "begins as an image (JPEG), but its name is not one's; rename it"),
    "large.jpg_large": (encoded(), "begins as an image (JPEG), but its name is not one's"),
    "old.bak": (encoded("PNG"), "begins as an image (PNG), but its name is not one's"),
}
IGNORED = {
    "Thumbs.db": b"\xd0\xcf\x11\xe0",
    "README": b"read me",
    "notes.md": b"# Notes",
    "a.npz": b"PK",
    "x.mp4": b"1",
}


def readable(kind: str) -> bool:
    return kind == "TGA" or kind in formats.readable()


@pytest.mark.parametrize("as_source", [as_folder, as_tar])
def test_every_format_that_is_read_is_used_whatever_its_name(tmp_path, as_source):
    images = {name: encoded(kind) for name, kind in READ.items() if readable(kind)}
    assert len(images) >= len(READ) - 3
    source, name = as_source(tmp_path / "s", images)
    for verify in (False, True):
        good, bad = split(source, verify=verify)
        assert (set(good), bad) == ({name.format(each) for each in images}, {})
        assert {record.size for record in good.values()} == {(8, 12)}


@pytest.mark.parametrize("as_source", [as_folder, as_tar])
def test_other_formats_are_counted_and_refused_by_format_and_their_captions_are_not(tmp_path, as_source):
    images = {"good.jpg": encoded(), **{name: data for name, (data, _) in REFUSED.items()}}
    source, name_in = as_source(tmp_path / "s", images)
    good, bad = split(source)
    assert list(good) == [name_in.format("good.jpg")]
    assert set(bad) == {name_in.format(name) for name in REFUSED}
    for name, (_, reason) in REFUSED.items():
        assert reason in bad[name_in.format(name)], name


def test_training_counts_the_same_and_ignores_files_that_are_not_images(tmp_path):
    files = {"good.jpg": encoded(), "good.txt": b"a", **{name: data for name, (data, _) in REFUSED.items()}}
    source = open_folder(write_folder(tmp_path / "f", files | IGNORED), on_refused=OnRefused.SKIP)
    reasons = dict(source.refused())
    assert set(reasons) == set(REFUSED) and source.found == len(REFUSED) + 1 and len(source.paths) == 1
    with pytest.raises(InputError, match=r"None of the 1 images .*\n  photo: begins as an image \(JPEG\)"):
        open_folder(write_folder(tmp_path / "g", {"photo": encoded()}))


def test_members_of_a_tar_that_are_not_images_are_ignored_and_images_without_captions_named(tmp_path):
    files = {
        "a.jpg": encoded(),
        "a.txt": b"a",
        "a.cls": b"7",
        "a.npy": b"\x93NUMPY",
        "b.avif": b"x",
        "c": encoded("GIF"),
    }
    found = everything(write_tar(tmp_path / "a.tar", files))
    assert sorted(each.file for each in found if isinstance(each, Refused)) == ["a.tar/b.avif", "a.tar/c"]


def test_an_image_is_read_though_one_of_the_same_stem_is_refused(tmp_path):
    files = {
        "a.nef": encoded("TIFF"),
        "a.jpg": encoded(),
        "a.txt": b"a",
        "b.jpg": encoded(),
        "b.nef": b"",
        "b.txt": b"b",
    }
    for source in (write_folder(tmp_path / "f", files), write_tar(tmp_path / "a.tar", files)):
        good, bad = split(source)
        assert [name.rpartition("/")[2] for name in good] == ["a.jpg", "b.jpg"]
        assert [name.rpartition("/")[2] for name in bad] == ["a.nef", "b.nef"]


@pytest.mark.parametrize("kind", ["TIFF", "AVIF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_other_formats_are_upright_too(kind, orientation):
    if not readable(kind):
        pytest.skip(f"Pillow without {kind}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    assert measure(data) == expected.shape[:2]


def test_the_first_frame_or_page_is_read():
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        assert decode(file.getvalue()).tolist() == [[[255, 0, 0]] * 12] * 8
