"""The promises of sdxl_jax.data.sources: nothing in silence, upright sizes, true pixels."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdxl_jax.data.sources import open_folder, read_image
from sdxl_jax.errors import InputError


def picture(height=8, width=12, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def save(folder, name, caption: str | None = "a picture", **size):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(**size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def metadata(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refused(folder, **options):
    """{file: reason} of what a folder with one good image, good.png, has besides."""
    save(folder, "good.png")
    source = open_folder(folder, on_refused="skip", **options)
    assert "good.png" in map(source.name, range(len(source.paths)))
    return dict(source.refused)


def png_of_any_size(path, height, width):
    """A small file whose header claims height × width."""
    picture().save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def test_folder_is_read_recursively_in_order_without_hidden_files(tmp_path):
    for name in ("b.png", "a/z.JPG", "c.webp", "a.bmp", "d.jpeg", ".hidden.png", ".git/x.png"):
        save(tmp_path, name, caption=f" {name}\n")
    source = open_folder(str(tmp_path))
    assert [source.name(number) for number in range(source.found)] == ["a.bmp", "a/z.JPG", "b.png", "c.webp", "d.jpeg"]
    assert source.captions == ["a.bmp", "a/z.JPG", "b.png", "c.webp", "d.jpeg"]
    assert source.sizes.tolist() == [[8, 12]] * 5 and source.sizes.dtype == np.int32
    assert source.refused == []


def test_linked_folders_are_followed_and_circles_end(tmp_path):
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
    assert source.captions == ["beta", "älpha"]
    assert source.refused == []


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_and_pixels_are_upright(tmp_path, orientation, suffix):
    path = save(tmp_path, f"a.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (48, 32))  # broad blocks, so that JPEG changes little
    image.paste((255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 255, 0), (32, 0, 48, 16))
    image.save(path, exif=exif, quality=100)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    pixels = read_image(path)
    np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=3)  # two builds of the JPEG decoder
    assert open_folder(tmp_path).sizes.tolist() == [list(pixels.shape[:2])]
    assert open_folder(tmp_path, verify=True).sizes.tolist() == [list(pixels.shape[:2])]


def test_transparency_lies_over_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=b"\x00\xff")
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_every_pixel_format_becomes_rgb(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "16.png")
    assert read_image(tmp_path / "16.png")[0, :, 0].tolist() == [0, 1, 255]
    for mode, name in [
        ("L", "l.jpg"),
        ("L", "l.png"),
        ("1", "1.png"),
        ("LA", "la.png"),
        ("P", "p.bmp"),
        ("CMYK", "c.jpg"),
    ]:
        image = Image.new("RGB", (16, 16), (128, 128, 128)).convert(mode)
        image.save(tmp_path / name, quality=100)
        expected = np.asarray(image.convert("RGB")).astype(int)
        np.testing.assert_allclose(read_image(tmp_path / name).astype(int), expected, atol=3, err_msg=name)


def test_a_wrong_suffix_does_not_matter(tmp_path):
    picture().save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(picture()))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_image_raises_when_read_and_is_found_by_verify(tmp_path, suffix):
    path = save(tmp_path, f"cut.{suffix}", height=64, width=64)
    truncate(path)
    with pytest.raises(InputError, match=rf"cut\.{suffix} cannot be read .*data\.verify_images=true"):
        read_image(path)
    assert "cannot be read" in refused(tmp_path, verify=True)[f"cut.{suffix}"]


def test_a_missing_image_raises_with_its_name(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        read_image(tmp_path / "gone.png")


def test_problems_of_text_files_are_refused_with_reasons(tmp_path):
    save(tmp_path, "bare.png", caption=None)
    save(tmp_path, "empty.png", caption=" \n")
    save(tmp_path, "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "alone.txt").write_text("nobody")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "text.txt").write_text("caption")
    reasons = refused(tmp_path)
    assert sorted(reasons) == ["alone.txt", "bare.png", "empty.png", "latin.png", "latin.txt", "text.png"]
    assert "without a caption" in reasons["bare.png"]
    assert reasons["empty.png"] == "empty caption"
    assert "UTF-8" in reasons["latin.txt"]
    assert "without an image" in reasons["alone.txt"]
    assert reasons["text.png"] == "cannot be read: neither JPEG, PNG, WebP nor BMP"


def test_problems_of_metadata_are_refused_with_line_numbers(tmp_path):
    for name in ("a.png", "b.png", "empty.png"):
        save(tmp_path, name, caption=None)
    good = [json.dumps({"file_name": name, "text": "x"}) for name in ("good.png", "a.png")]
    bad = ["not json", '{"file_name": "b.png"}', '{"file_name": "gone.png", "text": "x"}', '["a"]', good[1]]
    lines = [*good, "", *bad, '{"file_name": "empty.png", "text": " "}', '{"file_name": "../a.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    reasons = refused(tmp_path)
    numbers = (4, 5, 6, 7, 8, 10)
    assert sorted(reasons) == sorted(["b.png", "empty.png", *(f"metadata.jsonl line {number}" for number in numbers)])
    assert "expected JSON" in reasons["metadata.jsonl line 4"]
    assert "expected JSON" in reasons["metadata.jsonl line 5"]
    assert "no image gone.png" in reasons["metadata.jsonl line 6"]
    assert "earlier line" in reasons["metadata.jsonl line 8"]
    assert reasons["empty.png"] == "empty caption"


def test_our_pixel_limit_holds_and_pillows_does_not_surface(tmp_path):
    save(tmp_path, "large.png")
    save(tmp_path, "huge.png")
    png_of_any_size(tmp_path / "large.png", 10_000, 19_000)  # Pillow would raise at 179 million
    png_of_any_size(tmp_path / "huge.png", 10_000, 20_001)
    theirs = Image.MAX_IMAGE_PIXELS
    reasons = refused(tmp_path)
    assert list(reasons) == ["huge.png"]
    assert "the limit is 200000000" in reasons["huge.png"]
    assert theirs == Image.MAX_IMAGE_PIXELS


def test_refusals_are_one_error_by_default_with_the_count_and_the_remedy(tmp_path):
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
def test_a_folder_without_anything_to_use_is_refused_whatever_the_policy(tmp_path, make, expected):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=expected):
        open_folder(tmp_path / "data", on_refused="skip")
