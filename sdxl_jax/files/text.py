"""Text that people write: prompts, captions, JSON of other programs. One reader, so that all of it is read by one rule.

Text is UTF-8, with or without the byte order mark that Windows puts before it, which is no part of the text. UTF-16,
and UTF-32, are read where their mark says so (Notepad's "Unicode"). Anything else is refused, not guessed.

A line ends at LF, CR LF or CR, as in any text editor, and nowhere else: `str.splitlines` also cuts at form feeds,
U+0085 and U+2028, which stand inside captions, and inside valid lines of JSON.

Not here: what the text means.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path

from sdxl_jax.errors import InputError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(beginning: bytes) -> str:
    """The encoding, as Python names it, of a text that begins with these bytes, four at least."""
    return next((name for mark, name in _MARKS if beginning.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """The text of a file's bytes, without its byte order mark, line ends as they are. UnicodeError for no text.

    NUL is no text: it is what UTF-16 without a mark looks like when it is read as UTF-8.
    """
    text = data.decode(encoding_of(data))
    if "\0" in text:
        raise UnicodeError("it holds NUL characters, as UTF-16 does")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text without their ends: LF, CR LF or CR. A text that ends with a line's end has no line more."""
    found = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return found[:-1] if found[-1] == "" else found


def utf8_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may be long, each as UTF-8 that is still to be decoded: one that is no text spoils no
    other. They end at LF alone: what else ends lines is space to JSON. OSError as of any file."""
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
        file.seek(0)
        if encoding.startswith("utf-8"):
            yield from file
            return
        try:
            text = decode(file.read())
        except UnicodeError as problem:
            raise InputError(f"{path} is not text, as its first bytes say ({problem}). Save it as UTF-8") from problem
        yield from (line.encode(errors="replace") for line in lines(text))


def read_text(path: Path, *, remedy: str = "Save it as UTF-8") -> str:
    """The text of a file, as `decode`. Raises InputError, which ends with the remedy, for one that cannot be read and
    for one that is no text."""
    try:
        return decode(path.read_bytes())
    except UnicodeError as problem:
        raise InputError(f"{path} is not UTF-8 text ({problem}). {remedy}") from problem
    except OSError as problem:
        raise InputError(
            f"{path} cannot be read ({problem.strerror or problem}). Give a text file that can be read"
        ) from problem
