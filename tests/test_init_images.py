"""The promises of sdxl_jax.sampling.init_images: every format, upright; the given size; only the mask repainted."""

from pathlib import Path

import numpy as np
import pytest
from image_sources import png_claiming, random_image
from PIL import Image, ImageOps, features

from sdxl_jax.errors import InputError
from sdxl_jax.sampling import init_images

LOSSLESS = ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.tga", "a.pcx"]
LOSSY = ["a.jpg", "a.webp", "a.jp2", *(["a.avif"] if features.check("avif") else [])]


def blocks(height: int = 32, width: int = 48) -> Image.Image:
    """Two coloured corners: every turn and mirror image differs from every other by 30 grey levels on average."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 255, 0), (width - 16, 0, width, 16))
    return image


LOSS = 8
"""Grey levels, on average, that compression may change `blocks`: colours have half the resolution."""


def unlike(given: np.ndarray, expected: np.ndarray) -> float:
    assert given.shape == expected.shape
    return float(np.abs(given.astype(int) - expected).mean())


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


# Reading


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_lossless_format_is_read_bit_for_bit(tmp_path, name):
    path = saved(tmp_path, random_image(), name)
    np.testing.assert_array_equal(init_images.read(path), np.asarray(random_image()))


@pytest.mark.parametrize("name", LOSSY)
def test_every_lossy_format_is_read(tmp_path, name):
    options = {} if name == "a.jp2" else {"quality": 100}
    path = saved(tmp_path, blocks(), name, **options)
    assert unlike(init_images.read(path), np.asarray(blocks())) < LOSS


def test_the_first_frame_of_a_gif_and_a_tiff_is_read(tmp_path):
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.tiff"):
        path = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert init_images.read(path).tolist() == [[[255, 0, 0]] * 12] * 8, name


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, blocks(), name, exif=exif, **({} if name == "a.tiff" else {"quality": 100}))
    turned = blocks()
    turned.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(turned))
    assert expected.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    assert unlike(init_images.read(path), expected) < LOSS


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (10, 200, 30)])
def test_transparency_lies_over_the_background(tmp_path, background):
    image = Image.new("RGBA", (3, 1), (90, 50, 30, 255))
    image.putpixel((1, 0), (7, 8, 9, 0))
    image.putpixel((2, 0), (100, 100, 100, 51))
    for name in ("a.png", "a.tiff", "a.tga"):
        opaque, clear, half = init_images.read(saved(tmp_path, image, name), background)[0].tolist()
        assert (opaque, clear) == ([90, 50, 30], list(background)), name
        np.testing.assert_allclose(half, 0.2 * 100 + 0.8 * np.array(background), atol=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    for name in ("p.png", "p.gif"):
        path = saved(tmp_path, palette, name, transparency=0)
        assert init_images.read(path, background)[0].tolist() == [list(background), [4, 5, 6]], name


def test_without_a_background_transparency_is_white(tmp_path):
    path = saved(tmp_path, Image.new("RGBA", (1, 1), (1, 2, 3, 0)))
    assert init_images.read(path).tolist() == [[[255, 255, 255]]]


def test_the_high_byte_of_sixteen_bits_is_read(tmp_path):
    grey = Image.fromarray(np.array([[0, 256, 0x1234, 65535]], np.uint16))
    for name in ("a.png", "a.tiff"):
        assert init_images.read(saved(tmp_path, grey, name))[0].tolist() == [[0] * 3, [1] * 3, [0x12] * 3, [255] * 3]


def test_every_mode_becomes_rgb(tmp_path):
    for mode, name in [("L", "l.png"), ("1", "1.tiff"), ("LA", "la.png"), ("P", "p.gif"), ("CMYK", "c.tiff")]:
        image = random_image().convert(mode)
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(init_images.read(saved(tmp_path, image, name)), expected, err_msg=name)
    cmyk = Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK")
    path = saved(tmp_path, cmyk, "c.jpg", quality=100)
    np.testing.assert_allclose(init_images.read(path).astype(int), np.full((16, 16, 3), (200, 100, 50)), atol=3)


# Refusals


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY, "a.gif"])
def test_a_truncated_image_is_refused_with_its_name(tmp_path, name):
    path = saved(tmp_path, random_image(64, 64), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"The image .*{name} cannot be read.* Save it again, as PNG or JPEG"):
        init_images.read(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"no image", "in no known image format"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "in the format PostScript, which is not read; convert .*",
        ),
        (png_claiming(30_000, 30_000), "30000×30000 pixels, the limit is 200000000 in all"),
    ],
    ids=["empty", "text", "a program", "huge"],
)
def test_a_file_that_is_not_an_image_is_refused_with_the_reason(tmp_path, data, reason):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.png cannot be read: {reason}\. Save it again"):
        init_images.read(tmp_path / "a.png")


def test_pixels_of_unknown_range_are_refused(tmp_path):
    for dtype, said in ((np.float32, "floating-point"), (np.int32, "32 bits")):
        path = saved(tmp_path, Image.fromarray(np.array([[0, 100_000]], dtype)), "a.tiff")
        with pytest.raises(InputError, match=rf"a\.tiff cannot be read: {said} .*of unknown range"):
            init_images.read(path)


def test_a_missing_image_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"There is no image .*gone\.png\. Give the path of a file that exists"):
        init_images.read(tmp_path / "gone.png")
    with pytest.raises(InputError, match="cannot be read"):
        init_images.read(tmp_path)


def test_backgrounds_are_names_or_hexadecimal():
    given = {"white": (255, 255, 255), "black": (0, 0, 0), "#0a80FF": (10, 128, 255)}
    assert {text: init_images.parse_background(text) for text in given} == given
    for text in ("", "red", "#fff", "0a80ff", "#0a80fg", "#0a80ff00", "#0a80ff\n"):
        with pytest.raises(InputError, match="Give white, black, or a colour as #rrggbb"):
            init_images.parse_background(text)


# Sizes


def test_an_image_of_the_given_size_is_not_changed():
    image = np.asarray(random_image(24, 40))
    np.testing.assert_array_equal(init_images.fit(image, 24, 40), image)


def test_an_image_is_cropped_at_the_centre_and_resized_as_a_whole():
    image = np.asarray(random_image(20, 40))
    np.testing.assert_array_equal(init_images.fit(image, 20, 30), image[:, 5:35])
    np.testing.assert_array_equal(init_images.fit(image, 10, 40), image[5:15])
    ramp = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 48, axis=0).repeat(3, axis=2)
    for height, width in ((24, 32), (96, 128), (40, 40), (7, 61)):
        fitted = init_images.fit(ramp, height, width)
        scale = max(height / 48, width / 64)
        place = (np.arange(width) - (width - 1) / 2) / scale / 63 + 0.5  # of each column, 0..1 along the ramp
        # A few grey levels: rounding to bytes and whole pixels, and bicubic overshoot at the ends.
        assert np.abs(fitted[:, 1:-1, 0] - 255 * place[None, 1:-1]).max() < 255 / 63 * 1.5


def test_a_line_of_pixels_cannot_cover_a_square():
    with pytest.raises(InputError, match="height × width 1×1000, resized to cover 512×512, would be 512×512000"):
        init_images.fit(np.zeros((1, 1000, 3), np.uint8), 512, 512)


def test_sizes_are_rounded_down_but_never_to_zero():
    assert init_images.snap(1023, 1024, 64) == (960, 1024)
    assert init_images.snap(5, 9, 8) == (8, 8)


# Masks


@pytest.mark.parametrize("name", ["m.png", "m.bmp", "m.tiff", "m.gif"])
def test_white_from_128_on_is_repainted(tmp_path, name):
    grey = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8))
    mask = init_images.read_mask(saved(tmp_path, grey, name), (1, 4))
    assert (mask.dtype, mask.tolist()) == (np.bool_, [[False, False, True, True]])


def test_a_mask_is_turned_upright_as_its_image_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(np.array([[0, 255, 255]], np.uint8)), exif=exif)
    assert init_images.read_mask(path, (3, 1)).tolist() == [[False], [True], [True]]


def test_transparent_pixels_are_kept(tmp_path):
    strokes = Image.new("RGBA", (3, 1), (255, 255, 255, 0))
    strokes.putpixel((1, 0), (255, 255, 255, 255))
    assert init_images.read_mask(saved(tmp_path, strokes), (1, 3)).tolist() == [[False, True, False]]


def test_a_mask_that_marks_by_transparency_alone_is_refused(tmp_path):
    hole = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    hole.putpixel((1, 0), (0, 0, 0, 0))
    with pytest.raises(InputError, match=r"The mask .*a\.png has transparent pixels and no white ones.*Paint white"):
        init_images.read_mask(saved(tmp_path, hole), (1, 3))
    assert not init_images.read_mask(saved(tmp_path, Image.new("L", (3, 1))), (1, 3)).any()


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path):
    path = saved(tmp_path, Image.new("L", (8, 6)))
    with pytest.raises(InputError, match=r"The mask .*a\.png has height × width 6×8, the init image 8×6"):
        init_images.read_mask(path, (8, 6))


def test_a_mask_is_fitted_as_its_image():
    image = np.zeros((60, 100, 3), np.uint8)
    image[20:40, 30:70] = 255
    mask = image[:, :, 0] > 0
    for height, width in ((60, 100), (32, 32), (120, 168), (24, 100)):
        fitted = init_images.fit_mask(mask, height, width)
        assert fitted.dtype == np.bool_
        np.testing.assert_array_equal(fitted, init_images.fit(image, height, width)[:, :, 0] >= 128)
        assert 0.05 < fitted.mean() < 0.5


def test_a_latent_pixel_is_repainted_if_the_mask_touches_it_anywhere():
    mask = np.zeros((24, 16), bool)
    mask[7, 15] = mask[8:16, 3] = True  # the last pixel of a cell; a line that misses its top left
    latent = init_images.latent_mask(mask, 8)
    assert (latent.dtype, latent.shape) == (np.float32, (3, 2, 1))
    assert latent[:, :, 0].tolist() == [[0, 1], [1, 0], [0, 0]]
    assert not mask[::8, ::8].any(), "diffusers would keep all of it"


def test_a_mask_that_is_not_a_multiple_of_the_latent_factor_is_refused():
    with pytest.raises(InputError, match=r"The mask has height × width 16×20\. Fit it to multiples of 8 first"):
        init_images.latent_mask(np.zeros((16, 20), bool), 8)


# Canvases


def test_outpainting_keeps_the_image_and_continues_its_edge():
    image = np.asarray(random_image(6, 9))
    canvas, mask = init_images.outpaint(image, top=1, right=20, bottom=3, left=4)
    assert canvas.shape == (10, 33, 3) and mask.shape == (10, 33)
    np.testing.assert_array_equal(canvas[1:7, 4:13], image)
    assert not mask[1:7, 4:13].any() and mask.sum() == 10 * 33 - 6 * 9
    np.testing.assert_array_equal(canvas[1:7, :4], np.repeat(image[:, :1], 4, axis=1))
    np.testing.assert_array_equal(canvas[7:, 13:], np.broadcast_to(image[-1, -1], (3, 20, 3)))
    same, mask = init_images.outpaint(image)
    np.testing.assert_array_equal(same, image)
    assert not mask.any()


def test_a_canvas_cannot_shrink_nor_grow_beyond_the_limit():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(InputError, match="--outpaint top 0, right -1, bottom 0, left 0: expected 0 or more pixels"):
        init_images.outpaint(image, right=-1)
    with pytest.raises(InputError, match="The outpainted image would be 4×100000004, the limit is 200000000 pixels"):
        init_images.outpaint(image, left=100_000_000)


def test_pixels_outside_of_the_mask_are_the_originals_bit_for_bit():
    original, repainted = (np.asarray(random_image(16, 24, seed)) for seed in (0, 1))
    mask = np.random.default_rng(2).random((16, 24)) < 0.5
    together = init_images.composite(original, repainted, mask)
    np.testing.assert_array_equal(together[~mask], original[~mask])
    np.testing.assert_array_equal(together[mask], repainted[mask])
