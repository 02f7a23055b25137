"""Contact sheets: images in a grid with their captions under them, as one PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sdxl_jax.files import atomic

_MARGIN, _LINE, _FONT = 6, 13, 11


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "_height _width 3"]], captions: Sequence[str], columns: int, scale: int = 1
) -> Image.Image:
    """Rows of images, each row as high as its highest image, wrapped captions under them. `scale` enlarges images."""
    font = ImageFont.load_default(_FONT)
    cell = max(image.shape[1] for image in images) * scale
    wrapped = [textwrap.wrap(caption, max(8, cell // 6))[:3] for caption in captions]
    starts = range(0, len(images), columns)
    heights = [
        max(image.shape[0] for image in images[start : start + columns]) * scale
        + max(len(lines) for lines in wrapped[start : start + columns]) * _LINE
        for start in starts
    ]
    columns = min(columns, len(images))
    size = (columns * (cell + _MARGIN) + _MARGIN, sum(heights) + (len(heights) + 1) * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for start, height in zip(starts, heights, strict=True):
        for column, (image, lines) in enumerate(
            zip(images[start : start + columns], wrapped[start : start + columns], strict=True)
        ):
            tile = Image.fromarray(np.ascontiguousarray(image))
            tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.BICUBIC)
            left = _MARGIN + column * (cell + _MARGIN) + (cell - tile.width) // 2
            sheet.paste(tile, (left, top))
            for number, line in enumerate(lines):
                middle = left + tile.width / 2
                position = (middle, top + tile.height + number * _LINE)
                draw.text(position, line, fill="black", font=font, anchor="ma")
        top += height + _MARGIN
    return sheet


def first_row(
    sheet: Image.Image, columns: int, height: int, width: int
) -> list[UInt8[np.ndarray, "height width 3"]] | None:
    """The images of a contact sheet's first row; None if they are not so many of that size."""
    if sheet.width != columns * (width + _MARGIN) + _MARGIN or sheet.height < height + 2 * _MARGIN:
        return None
    lefts = [_MARGIN + column * (width + _MARGIN) for column in range(columns)]
    boxes = [(left, _MARGIN, left + width, _MARGIN + height) for left in lefts]
    return [np.asarray(sheet.crop(box).convert("RGB")) for box in boxes]


def labelled_grid(
    rows: Sequence[Sequence[UInt8[np.ndarray, "_height _width 3"]]], columns: Sequence[str], labels: Sequence[str]
) -> Image.Image:
    """Images in a grid, `columns` above, `labels` on the left, both wrapped. Images below 160 pixels are enlarged."""
    largest = max(max(image.shape[:2]) for row in rows for image in row)
    scale = max(1, 160 // largest)
    font = ImageFont.load_default(_FONT)
    widths = [max(row[column].shape[1] for row in rows) * scale for column in range(len(columns))]
    heights = [max(image.shape[0] for image in row) * scale for row in rows]
    tops = [textwrap.wrap(text, max(8, width // 6)) for text, width in zip(columns, widths, strict=True)]
    sides = [[line for part in text.splitlines() for line in textwrap.wrap(part, 22)] for text in labels]
    left = _MARGIN + (22 * 6 if any(sides) else 0)
    top = _MARGIN + max(map(len, tops)) * _LINE + _MARGIN
    size = (left + sum(widths) + (len(widths) + 1) * _MARGIN, top + sum(heights) + (len(heights) + 1) * _MARGIN)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    x = left + _MARGIN
    for lines, width, column in zip(tops, widths, range(len(columns)), strict=True):
        draw.multiline_text((x + width / 2, _MARGIN), "\n".join(lines), "black", font, anchor="ma", align="center")
        y = top
        for row, height in zip(rows, heights, strict=True):
            tile = Image.fromarray(np.ascontiguousarray(row[column]))
            tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.BICUBIC)
            grid.paste(tile, (x + (width - tile.width) // 2, y))
            y += height + _MARGIN
        x += width + _MARGIN
    y = top
    for lines, height in zip(sides, heights, strict=True):
        draw.multiline_text((_MARGIN, y + _MARGIN), "\n".join(lines[: max(1, height // _LINE)]), "black", font)
        y += height + _MARGIN
    return grid


def save_png(image: Image.Image, path: Path, text: dict[str, str] | None = None) -> None:
    """An atomic write of a PNG, with `text` as its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=info)
