"""Captioned images for tests, unusual ones too, as folders, tars and Parquet files, and helpers that read them."""

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.data.build.records import Record, read, units
from sdxl_jax.data.sources import Refused


def random_image(height=8, width=12, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def save(folder: Path, name: str, caption: str | None = "an image", **size) -> Path:
    """Saves an image, in the format of its extension, and its .txt."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(**size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def encoded(kind="JPEG", height=8, width=12, mode="RGB", seed=0, **options) -> bytes:
    file = io.BytesIO()
    random_image(height, width, seed).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png_claiming(height, width) -> bytes:
    """A small PNG file whose header claims that size."""
    data = bytearray(encoded("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def every_image() -> dict[str, tuple[bytes, tuple[int, int] | str]]:
    """{name: (bytes, its upright (height, width) or the reason for its refusal)}."""
    exif = Image.Exif()
    exif[0x0112] = 6
    good, frames = encoded(), [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    grey16 = io.BytesIO()
    Image.fromarray(np.full((8, 12), 40_000, np.uint16)).save(grey16, "PNG")
    return {
        "good.jpg": (good, (8, 12)),
        "wrong_extension.jpg": (encoded("PNG"), (8, 12)),
        "cmyk.jpg": (encoded(mode="CMYK"), (8, 12)),
        "sixteen_bit.png": (grey16.getvalue(), (8, 12)),
        "palette_with_alpha.png": (encoded("PNG", mode="P", transparency=b"\x00\x80\xff"), (8, 12)),
        "grey.jpg": (encoded(mode="L"), (8, 12)),
        "rotated.jpg": (encoded(exif=exif), (12, 8)),
        "animated.webp": (animated.getvalue(), (8, 12)),
        "thin.png": (encoded("PNG", width=1), (8, 1)),
        "empty.jpg": (b"", "zero bytes"),
        "truncated.jpg": (
            encoded(height=64, width=64)[:-500],
            "cannot be read (ValueError: Premature end of JPEG file",
        ),
        "text.png": (b"no image", "cannot be read: in no image format that is read"),
        "huge.png": (png_claiming(30_000, 30_000), "30000×30000 pixels, the limit is"),
    }


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path: Path, files, mode="w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow: Any = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


def everything(source, **options) -> list[Record | Refused]:
    return [found for unit in units(source) for found in read(unit, **options)]


def split(source, **options) -> tuple[dict[str, Record], dict[str, str]]:
    """Records by name, and reasons for refusals by name; names are unique."""
    found = everything(source, **options)
    good = {record.name: record for record in found if isinstance(record, Record)}
    bad = {refused.file: refused.reason for refused in found if isinstance(refused, Refused)}
    assert len(good) + len(bad) == len(found)
    return good, bad


def captions(source) -> dict[str, tuple[str, ...]]:
    good, bad = split(source)
    assert bad == {}
    return {name: record.captions for name, record in good.items()}


def as_folder(path: Path, images: dict[str, bytes]) -> tuple[Path, str]:
    texts = {f"{name.partition('.')[0]}.txt": b"a caption" for name in images}
    return write_folder(path, {**images, **texts}), "{}"


def as_tar(path: Path, images: dict[str, bytes]) -> tuple[Path, str]:
    files = [pair for n, d in images.items() for pair in [(n, d), (f"{n.partition('.')[0]}.txt", b"a caption")]]
    return write_tar(path / "a.tar", files), "a.tar/{}"


def as_parquet(path: Path, images: dict[str, bytes]) -> tuple[Path, str]:
    rows = [{"bytes": data, "path": name} for name, data in images.items()]
    return write_parquet(path / "a.parquet", {"image": rows, "text": ["a caption"] * len(rows)}), "a.parquet:{}"
