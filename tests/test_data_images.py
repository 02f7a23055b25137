"""The promises of sdxl_jax.data.images: upright sizes, correct pixels, never smaller than `at_least`."""

import io

import numpy as np
import pytest
from image_sources import png_claiming, random_image, save
from jaxtyping import UInt8
from PIL import Image, ImageOps

from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.images import decode, measure, read_image, usable_size
from sdxl_jax.data.sources import Unusable
from sdxl_jax.errors import InputError


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_and_pixels_are_upright(tmp_path, orientation, suffix):
    path = save(tmp_path, f"a.{suffix}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (48, 32))  # large blocks, which JPEG changes little
    image.paste((255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 255, 0), (32, 0, 48, 16))
    image.save(path, exif=exif, quality=100)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    pixels = read_image(path)
    np.testing.assert_allclose(pixels.astype(int), expected.astype(int), atol=3)  # two builds of the JPEG decoder
    assert open_folder(tmp_path).sizes.tolist() == [list(pixels.shape[:2])]
    assert open_folder(tmp_path, verify=True).sizes.tolist() == [list(pixels.shape[:2])]


def test_transparency_is_composited_over_white(tmp_path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=b"\x00\xff")
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_every_pixel_format_is_converted_to_rgb(tmp_path):
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


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "a.webp").tolist() == [[[255, 0, 0]] * 12] * 8


def test_a_wrong_suffix_does_not_matter(tmp_path):
    random_image().save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), np.asarray(random_image()))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
def test_a_truncated_image_raises_when_read(tmp_path, suffix):
    path = save(tmp_path, f"cut.{suffix}", height=64, width=64)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"cut\.{suffix} cannot be read .*data\.verify_images=true"):
        read_image(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot be read: zero bytes"),
        (b"no image", "cannot be read: in no image format that is read"),
        (png_claiming(30_000, 30_000), "cannot be read: 30000×30000 pixels, the limit is 200000000 in all"),
    ],
    ids=["empty", "text", "huge"],
)
def test_unusable_data_is_refused_with_and_without_decoding(data, reason):
    for verify in (False, True):
        with pytest.raises(Unusable, match=reason):
            usable_size(data, verify=verify)


def test_a_missing_image_raises_with_its_name(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        read_image(tmp_path / "gone.png")


# Downscaling while decoding


def smooth(height, width) -> UInt8[np.ndarray, "height width 3"]:
    """A smooth image that varies over many blocks, in all channels."""
    y, x = np.mgrid[0:height, 0:width] / 60
    waves = [np.sin(y + 2 * x), np.cos(3 * y - x), np.sin(x * y / 8)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def jpeg(pixels, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [
        (None, (401, 603)),
        ((401, 603), (401, 603)),
        ((900, 900), (401, 603)),
        ((202, 1), (401, 603)),
        ((1, 303), (401, 603)),
        ((201, 302), (201, 302)),
        ((152, 1), (201, 302)),
        ((151, 227), (151, 227)),
        ((101, 151), (101, 151)),
        ((51, 76), (51, 76)),
        ((1, 1), (51, 76)),
    ],
)
def test_a_jpeg_is_downscaled_as_far_as_both_sides_allow(at_least, expected):
    data = jpeg(smooth(401, 603))
    assert decode(data, at_least).shape == (*expected, 3)
    progressive = jpeg(smooth(401, 603), progressive=True)
    assert decode(progressive, at_least).shape == (*expected, 3)


def test_a_decoded_jpeg_is_never_smaller_than_at_least():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 200, (10, 2)).tolist():
        data = jpeg(smooth(height, width))
        for at_least in rng.integers(1, 200, (20, 2)).tolist():
            shape = decode(data, tuple(at_least)).shape
            assert shape[0] >= min(at_least[0], height) and shape[1] >= min(at_least[1], width)
            assert shape[:2] == (height, width) or (shape[0] >= at_least[0] and shape[1] >= at_least[1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_at_least_is_a_size_of_the_upright_image(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(smooth(160, 480), exif=exif)
    upright = (160, 480) if orientation < 5 else (480, 160)
    half = upright[0] // 2, upright[1] // 2
    assert measure(data) == upright
    assert decode(data, half).shape[:2] == half
    expected = Image.fromarray(decode(data)).resize((half[1], half[0]), Image.Resampling.BOX)
    assert psnr(decode(data, half), np.asarray(expected)) > 40
    too_high = (half[0] + 1, 1)
    assert decode(data, too_high).shape[:2] == upright


def psnr(left: UInt8[np.ndarray, "height width 3"], right: UInt8[np.ndarray, "height width 3"]) -> float:
    """Peak signal-to-noise ratio in dB; above 40 two images look the same."""
    error = np.mean((left.astype(np.float64) - right) ** 2)
    return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("eighths", [4, 3, 2, 1])
def test_downscaling_while_decoding_agrees_with_an_area_filter(eighths):
    """45 dB on a smooth image: both average, the decoder by cutting off frequencies; an 8-bit step is 48 dB."""
    data = jpeg(smooth(512, 768))
    height, width = 512 * eighths // 8, 768 * eighths // 8
    expected = Image.fromarray(decode(data)).resize((width, height), Image.Resampling.BOX)
    assert psnr(decode(data, (height, width)), np.asarray(expected)) > 45


def test_greyscale_is_downscaled_and_other_formats_keep_their_size(tmp_path):
    image = Image.fromarray(smooth(64, 96))
    image.convert("L").save(tmp_path / "grey.jpg")
    assert read_image(tmp_path / "grey.jpg", at_least=(8, 8)).shape == (8, 12, 3)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    for suffix in ("png", "webp", "bmp"):
        image.save(tmp_path / f"a.{suffix}")
    for name in ("cmyk.jpg", "a.png", "a.webp", "a.bmp"):
        whole = read_image(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, at_least=(8, 8)), whole, err_msg=name)


def test_a_truncated_jpeg_is_refused_when_downscaled_too():
    data = jpeg(smooth(64, 64))
    with pytest.raises(ValueError, match="Premature end"):
        decode(data[: len(data) // 2], (8, 8))
