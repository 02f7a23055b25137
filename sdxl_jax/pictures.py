"""Contact sheets: pictures in a grid with their captions under them, as one PNG."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE, _FONT = 6, 13, 11


def contact_sheet(
    pictures: Sequence[UInt8[np.ndarray, "_height _width 3"]], captions: Sequence[str], columns: int, scale: int = 1
) -> Image.Image:
    """Rows of pictures, each as high as its highest, captions wrapped under them. `scale` enlarges small pictures."""
    font = ImageFont.load_default(_FONT)
    cell = max(picture.shape[1] for picture in pictures) * scale
    wrapped = [textwrap.wrap(caption, max(8, cell // 6))[:3] for caption in captions]
    starts = range(0, len(pictures), columns)
    heights = [
        max(picture.shape[0] for picture in pictures[start : start + columns]) * scale
        + max(len(lines) for lines in wrapped[start : start + columns]) * _LINE
        for start in starts
    ]
    columns = min(columns, len(pictures))
    size = (columns * (cell + _MARGIN) + _MARGIN, sum(heights) + (len(heights) + 1) * _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for start, height in zip(starts, heights, strict=True):
        for column, (picture, lines) in enumerate(
            zip(pictures[start : start + columns], wrapped[start : start + columns], strict=True)
        ):
            tile = Image.fromarray(np.ascontiguousarray(picture))
            tile = tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.BICUBIC)
            left = _MARGIN + column * (cell + _MARGIN) + (cell - tile.width) // 2
            sheet.paste(tile, (left, top))
            for number, line in enumerate(lines):
                middle = left + tile.width / 2
                position = (middle, top + tile.height + number * _LINE)
                draw.text(position, line, fill="black", font=font, anchor="ma")
        top += height + _MARGIN
    return sheet


def save_png(image: Image.Image, path: Path, text: dict[str, str] | None = None) -> None:
    """Writes a PNG whole or not at all, with `text` as its text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    image.save(partial, format="PNG", pnginfo=info)
    partial.replace(path)
