"""Parquet files of captioned images: Hugging Face's `image` column, or img2dataset's `jpg`.

An image column holds the bytes of image files, or a struct with a binary field `bytes`; URLs are not downloaded.
Caption columns are as in `captions`, and every numeric column is kept. A piece is a range of row groups; rows are read
page by page, and a page has up to 1024 rows or a row group, as its writer chose. Needs pyarrow, imported only here.

Formats: the Image feature, huggingface.co/docs/datasets/image_dataset; img2dataset, github.com/rom1504/img2dataset.

Not here: which files are Parquet (records).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sdxl_jax.data.captions import CAPTION_FIELDS, NOT_TEXT, UNCAPTIONED, caption_field, captions_of, numbers_of
from sdxl_jax.data.sources import BYTES_LIMIT, RawExample, Refusals, Refused, Unusable, gone, open_stream
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")

_PIECE_BYTES = 256 << 20  # of a piece, at least, unless the file ends
_ROWS = 16  # in memory at once
_READ_BYTES = 1 << 20  # of a column at once


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("Reading Parquet needs pyarrow, which is not installed. Run: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _is_image(arrow: Any, kind: Any) -> bool:
    if arrow.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(arrow, field.type) for field in kind)
    tests = (arrow.types.is_binary, arrow.types.is_large_binary, arrow.types.is_binary_view)
    return any(test(kind) for test in tests)


def _columns(arrow: Any, schema: Any) -> tuple[str | None, str | None, tuple[str, ...]]:
    """The names of the image column, the caption column (None where there is none), and the numeric columns."""
    kinds = {field.name: field.type for field in schema}
    image = next((name for name in IMAGE_COLUMNS if name in kinds and _is_image(arrow, kinds[name])), None)
    numeric = (arrow.types.is_integer, arrow.types.is_floating)
    numbers = tuple(name for name, kind in kinds.items() if any(test(kind) for test in numeric))
    return image, caption_field(kinds), numbers


def holds_images(path: AnyPath) -> bool:
    """Whether a Parquet file has an image column; img2dataset writes a file without one beside each tar."""
    arrow, parquet = _pyarrow()
    try:
        with open_stream(str(path), _READ_BYTES) as file:
            return _columns(arrow, parquet.read_schema(file))[0] is not None
    except (OSError, arrow.ArrowException):
        return False


def _example(name: str, columns: Mapping[str, Any], row: int, piece: "ParquetPiece") -> RawExample | Refused:
    """One row of a batch of columns."""
    try:
        image = columns[piece.image][row].as_py()
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise Unusable("no image bytes in the row")
        if len(image) > BYTES_LIMIT:
            raise Unusable(f"{len(image)} bytes, the limit is {BYTES_LIMIT}")
        try:
            captions = UNCAPTIONED if piece.caption is None else captions_of(columns[piece.caption][row].as_py())
        except UnicodeDecodeError:
            raise Unusable(NOT_TEXT) from None
        return RawExample(name, image, captions, numbers_of({key: columns[key][row].as_py() for key in piece.numbers}))
    except Unusable as problem:
        return Refused(name, str(problem))


class ParquetPiece(NamedTuple):
    """Some row groups of one file."""

    path: str
    name: str
    groups: tuple[int, int]
    """First row group, and the one after the last."""
    row: int
    """Number of its first row in the file."""
    image: str
    caption: str | None
    """None: captions are not used."""
    numbers: tuple[str, ...]

    def samples(self) -> Iterator[RawExample | Refused]:
        arrow, parquet = _pyarrow()
        row = self.row
        try:
            # With a buffer size pyarrow reads page by page, without one a whole column of a row group.
            with (
                open_stream(self.path, _READ_BYTES) as opened,
                parquet.ParquetFile(opened, buffer_size=_READ_BYTES, pre_buffer=False) as file,
            ):
                nested = arrow.types.is_struct(file.schema_arrow.field(self.image).type)
                beside = (*(() if self.caption is None else (self.caption,)), *self.numbers)
                columns = [f"{self.image}.bytes" if nested else self.image, *beside]
                for group in range(*self.groups):
                    end = row + file.metadata.row_group(group).num_rows
                    try:
                        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
                            values = {name: batch.column(name) for name in {self.image, *beside}}
                            for number in range(batch.num_rows):
                                yield _example(f"{self.name}:{row + number}", values, number, self)
                            row += batch.num_rows
                    except (arrow.ArrowException, OSError) as problem:
                        if isinstance(problem, OSError) and problem.errno:  # the file system's; damage has no errno
                            raise
                        reason = f"rows {row} to {end - 1} cannot be read ({' '.join(str(problem).split())})"
                        yield Refused(self.name, reason)
                    row = end
        except OSError as problem:
            raise gone(self.path, problem) from problem
        except arrow.ArrowException as problem:  # its footer, which was readable when the source was listed
            raise InputError(
                f"{self.path} has changed since the source was listed ({problem}). Restore it, or remove the "
                "unfinished shard set to build it again"
            ) from problem


def pieces(paths: list[tuple[AnyPath, str]], captioned: bool = True) -> Iterator[tuple[str, ParquetPiece | Refusals]]:
    """The pieces of Parquet files, each with its name. Reads the files' footers alone.

    paths: of the files, each with its name in the source. captioned: whether captions are used.

    Raises InputError: no pyarrow; a file without an image column, or without a caption column if captions are used; no
    file that can be read.
    """
    arrow, parquet = _pyarrow()
    damaged = []
    for path, name in paths:
        try:
            with open_stream(str(path), _READ_BYTES) as opened, parquet.ParquetFile(opened) as file:
                metadata, schema = file.metadata, file.schema_arrow
        except (arrow.ArrowException, OSError) as problem:
            damaged.append(Refused(name, f"cannot be read as Parquet ({' '.join(str(problem).split())})"))
            continue
        image, caption, numbers = _columns(arrow, schema)
        caption = caption if captioned else None
        if image is None or (captioned and caption is None):
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(
                f"{path} has the columns {columns or '(none)'}. Expected an image column named one of "
                f"{', '.join(IMAGE_COLUMNS)} (binary, or a struct with binary bytes) and a caption column named one of "
                f"{', '.join(CAPTION_FIELDS)}. Rename the columns, give another file, or do without captions "
                "(--no-captions)"
            )
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        first = first_row = row = size = 0
        for number, group in enumerate(groups):
            row, size = row + group.num_rows, size + group.total_byte_size
            if size >= _PIECE_BYTES or number + 1 == len(groups):
                whole = (first, number + 1) == (0, len(groups))
                piece = ParquetPiece(str(path), name, (first, number + 1), first_row, image, caption, numbers)
                yield (name if whole else f"{name}:{first_row}-{row - 1}"), piece
                first, first_row, size = number + 1, row, 0
    if len(damaged) == len(paths):
        raise InputError(
            f"No Parquet file of {len(paths)} can be read: {damaged[0].file} {damaged[0].reason}. Copy them again"
        )
    if damaged:
        yield "refused when listed", Refusals(tuple(damaged))
