"""Captions and numeric fields from text files, JSON and tables; the same rules for every source.

A `.txt` holds one caption per line that is not empty, or one caption altogether (`CaptionLines`). A field named "text",
"caption" or "captions" (the first of them that is present) holds a string or a list of strings. Captions are stripped,
empty ones left out; they may be of any length. Numeric fields keep their names and values; non-finite ones (NaN or inf)
are left out.

A template makes the captions of a source from them: "a photo of {trigger}, {caption}". One without {caption} is the
caption of every image, which then needs none.

Not here: where each source has its fields (folders; tars, parquet and tfds of build/).
"""

import enum
import json
import math
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from sdxl_jax.data.sources import Unusable
from sdxl_jax.errors import InputError
from sdxl_jax.files.text import decode, lines, printable

CAPTION_FIELDS = ("text", "caption", "captions")
NUMBERS_LIMIT = 256
"""Largest number of numeric fields in one source: each is a column of its own."""
NOT_TEXT = "caption is not UTF-8 text"


class CaptionLines(enum.Enum):
    """What the lines of a `.txt` beside an image are."""

    LINES = "lines"
    """One caption each; every training example takes one of them at random."""
    WHOLE = "whole"
    """Together one caption, e.g. a description in several paragraphs; its line ends are kept."""


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a string or a list of strings, each str or UTF-8 bytes. Raises Unusable where there is none."""
    if value is None:
        raise Unusable("no caption")
    values = [value] if isinstance(value, str | bytes) else value
    captions = []
    for text in values if isinstance(values, list | tuple) else [values]:
        try:
            if isinstance(text, bytes):
                text = decode(text)
            if not isinstance(text, str):
                raise Unusable(f"caption is not text but {type(text).__name__}")
            text.encode()  # fails for half a surrogate pair, which JSON can spell
        except UnicodeError:
            raise Unusable(NOT_TEXT) from None
        if text := text.strip():
            captions.append(text)
    if not captions:
        raise Unusable("empty caption")
    return tuple(captions)


def caption_field(names: Iterable[str]) -> str | None:
    """The name of the field that holds the captions, None where there is none."""
    names = set(names)
    return next((name for name in CAPTION_FIELDS if name in names), None)


def numbers_of(fields: Mapping[str, Any]) -> dict[str, float]:
    """The numeric fields with finite values."""
    found = {}
    for name, value in fields.items():
        if isinstance(value, Real) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number):
                found[printable(name)] = number
    return found


def check_number_names(names: Mapping[str, Any] | set[str]) -> None:
    """Raises InputError where a source has more than NUMBERS_LIMIT numeric fields."""
    if len(names) > NUMBERS_LIMIT:
        some = ", ".join(sorted(names)[:5])
        raise InputError(
            f"The source has numeric fields of more than {NUMBERS_LIMIT} names ({some}, …), and each would be a column "
            "of its own. Use the same few names for all images, or remove the numeric fields"
        )


def json_fields(data: bytes, what: str) -> dict[str, Any]:
    """The fields of a JSON object. Raises Unusable, which calls it `what`, where it is not one."""
    try:
        fields = json.loads(decode(data))
    except UnicodeError:
        raise Unusable(f"{what} is not UTF-8 text") from None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise Unusable(f"{what} is not a JSON object")
    return fields


def class_of(data: bytes) -> dict[str, float]:
    """The numeric field "cls" from the content of an image's `.cls`, as WebDataset has it. Raises Unusable for anything
    but a number."""
    try:
        number = int(decode(data))
    except (UnicodeError, ValueError):
        raise Unusable("its .cls is not a whole number") from None
    return numbers_of({"cls": number})


CAPTION, TRIGGER = "{caption}", "{trigger}"
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def with_trigger(template: str, trigger: str | None) -> str:
    """A template with the trigger word in its place. Raises InputError: an empty template or one with unknown
    placeholders, and a trigger word that is needed and not given."""
    unknown = set(_PLACEHOLDER.findall(template)) - {CAPTION, TRIGGER}
    if unknown or not template.strip():
        has = f"has {min(unknown)}" if unknown else "is empty"
        raise InputError(
            f'The caption_template "{template}" {has}. Give text with {CAPTION} for the image\'s own, {TRIGGER} for '
            'the words of data.trigger, e.g. "a photo of {trigger}, {caption}"; one without {caption} is that of '
            "every image"
        )
    if TRIGGER in template and not (trigger or "").strip():
        raise InputError(
            f'The caption_template "{template}" needs data.trigger. Give the words, e.g. data.trigger="sks"'
        )
    return template.replace(TRIGGER, (trigger or "").strip())


def filled(template: str, captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions of an image in a template of `with_trigger`."""
    return tuple(template.replace(CAPTION, caption) for caption in captions) if CAPTION in template else (template,)


UNCAPTIONED = ("",)
"""The captions of an image where captions are not used."""


def described(
    text: bytes | None, fields: bytes | None, caption_lines: CaptionLines | None = CaptionLines.LINES
) -> tuple[tuple[str, ...], dict[str, float]]:
    """Captions and numeric fields from the contents of an image's `.txt` and `.json`, None where there is no such file.

    Captions come from the `.txt` where there is one, and numeric fields always from the `.json`. caption_lines: None
    where captions are not used. Raises Unusable where neither has a caption.
    """
    found = {} if fields is None else json_fields(fields, "its .json")
    if caption_lines is None:
        return UNCAPTIONED, numbers_of(found)
    name = caption_field(found)
    if text is not None:
        try:
            of_text = lines(decode(text))
        except UnicodeError:
            raise Unusable(NOT_TEXT) from None
        captions = captions_of("\n".join(of_text) if caption_lines is CaptionLines.WHOLE else of_text)
    elif name is not None:
        captions = captions_of(found[name])
    elif fields is not None:
        raise Unusable(f"image without a caption: no .txt, and none of {', '.join(CAPTION_FIELDS)} in its .json")
    else:
        raise Unusable("image without a caption: no .txt or .json of the same name")
    return captions, numbers_of(found)
