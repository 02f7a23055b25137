"""Captions and numbers out of fields, text and JSON; the same rules for every source.

A `.txt` holds one caption on each line that is not empty, or one in all, as `CaptionLines` says. A field named "text",
"caption" or "captions" (the first of them that is there) holds a text or a list of texts. Captions are stripped, empty
ones left out; they may be of any length. Numeric fields are kept as they are, whatever they mean; those that are not
finite are left out.

Not here: where the fields stand in each source (folders; tars, parquet and tfds of build/).
"""

import enum
import json
import math
import numbers as abstract
from collections.abc import Iterable, Mapping
from typing import Any

from sdxl_jax.data.sources import Unusable, printable
from sdxl_jax.errors import InputError
from sdxl_jax.files import text as texts

CAPTION_FIELDS = ("text", "caption", "captions")
NUMBERS_LIMIT = 256
"""Most names of numbers that one source can have: each is a column of its own."""
NOT_TEXT = "caption is not UTF-8 text"


class CaptionLines(enum.Enum):
    """What the lines of a `.txt` beside an image are."""

    LINES = "lines"
    """Captions, one each; training is told one of them each time."""
    WHOLE = "whole"
    """One caption together, e.g. a description in several paragraphs; its line ends are kept."""


def captions_of(value: Any) -> tuple[str, ...]:
    """Captions of a text or a list of texts, as str or UTF-8 bytes. Unusable where there is none."""
    if value is None:
        raise Unusable("no caption")
    values = [value] if isinstance(value, str | bytes) else value
    captions = []
    for text in values if isinstance(values, list | tuple) else [values]:
        try:
            if isinstance(text, bytes):
                text = texts.decode(text)
            if not isinstance(text, str):
                raise Unusable(f"caption is not text but {type(text).__name__}")
            text.encode()  # half a surrogate pair, as JSON may spell it, is no text either
        except UnicodeError:
            raise Unusable(NOT_TEXT) from None
        if text := text.strip():
            captions.append(text)
    if not captions:
        raise Unusable("empty caption")
    return tuple(captions)


def caption_field(names: Iterable[str]) -> str | None:
    """Which of the names is that of the captions."""
    names = set(names)
    return next((name for name in CAPTION_FIELDS if name in names), None)


def numbers_of(fields: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among the fields."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, abstract.Real) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number):
                found[printable(name)] = number
    return found


def check_number_names(names: Mapping[str, Any] | set[str]) -> None:
    """InputError where there are too many for a column each."""
    if len(names) > NUMBERS_LIMIT:
        some = ", ".join(sorted(names)[:5])
        raise InputError(
            f"The source has numbers of more than {NUMBERS_LIMIT} names ({some}, …), and each would be a column of its "
            "own. Use the same few names for all images, or remove the numbers."
        )


def json_fields(data: bytes, what: str) -> dict[str, Any]:
    """The fields of a JSON object, which a refusal calls `what`. Unusable where it is none."""
    try:
        fields = json.loads(texts.decode(data))
    except UnicodeError:
        raise Unusable(f"{what} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise Unusable(f"{what} is not a JSON object")
    return fields


def described(
    text: bytes | None, fields: bytes | None, caption_lines: CaptionLines = CaptionLines.LINES
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Captions and numbers of the contents of an image's `.txt` and `.json`, None where there is no such file.

    The `.txt` stands before the `.json`, which may still give numbers. Unusable where there is no caption in them.
    """
    found = {} if fields is None else json_fields(fields, "its .json")
    name = caption_field(found)
    if text is not None:
        try:
            lines = texts.lines(texts.decode(text))
        except UnicodeError:
            raise Unusable(NOT_TEXT) from None
        captions = captions_of("\n".join(lines) if caption_lines is CaptionLines.WHOLE else lines)
    elif name is not None:
        captions = captions_of(found[name])
    elif fields is not None:
        raise Unusable(f"image without a caption: no .txt, and none of {', '.join(CAPTION_FIELDS)} in its .json")
    else:
        raise Unusable("image without a caption: no .txt or .json of the same name")
    return captions, numbers_of(found)
