"""Text files from users: prompts, captions, JSON of other programs. All are decoded by the same rules.

The encoding is UTF-8, with or without a byte order mark, which is removed. UTF-16 and UTF-32 are read where they begin
with their byte order mark (Notepad's "Unicode"). Any other encoding is refused, not guessed.

A line ends at LF, CR LF or CR, as in any text editor, and nowhere else: `str.splitlines` also splits at form feeds,
U+0085 and U+2028, which occur inside captions and inside valid lines of JSON.

Not here: the meaning of the text.
"""

import codecs
from collections.abc import Iterator
from pathlib import PurePath

from sdxl_jax.errors import InputError, fault
from sdxl_jax.files.paths import AnyPath

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def encoding_of(beginning: bytes) -> str:
    """Python's name of the encoding of a text that begins with these bytes, at least four."""
    return next((name for mark, name in _MARKS if beginning.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """The text of a file's bytes, without its byte order mark, with its line ends. UnicodeError where it is not text.

    NUL characters are refused: UTF-16 without a byte order mark, read as UTF-8, has them.
    """
    text = data.decode(encoding_of(data))
    if "\0" in text:
        raise UnicodeError("it holds NUL characters, as UTF-16 does")
    return text


def lines(text: str) -> list[str]:
    """The lines of a text without their ends (LF, CR LF or CR). A line end at the end of the text begins no further
    line."""
    found = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return found[:-1] if found[-1] == "" else found


def utf8_lines(path: AnyPath) -> Iterator[bytes]:
    """Streams the lines of a file as undecoded UTF-8, so that a line that is not valid does not affect the others.

    Lines end at LF alone, since CR is white space in JSON. Raises InputError where the byte order mark is that of
    UTF-16 or UTF-32 and the rest is not; OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
        file.seek(0)
        if encoding.startswith("utf-8"):
            yield from file
            return
        try:
            text = decode(file.read())
        except UnicodeError as problem:
            raise InputError(
                f"{path} is not text of the encoding that its byte order mark names ({problem}). Save it as UTF-8"
            ) from problem
        yield from (line.encode(errors="replace") for line in lines(text))


def read_text(path: AnyPath, *, remedy: str = "Save it as UTF-8") -> str:
    """The text of a file, as `decode`. Raises InputError for a file that cannot be read and for one that is not text.

    remedy: last sentence of the error for a file that is not text.
    """
    try:
        return decode(path.read_bytes())
    except UnicodeError as problem:
        raise InputError(f"{path} is not UTF-8 text ({problem}). {remedy}") from problem
    except OSError as problem:
        raise fault(problem)(
            f"{path} cannot be read ({problem.strerror or problem}). Give a text file that can be read"
        ) from problem


def printable(text: PurePath | str) -> str:
    """A path, name or message that UTF-8 can encode, for files, pipes, PNGs and web pages. Bytes that are not UTF-8,
    which Python holds as half surrogate pairs, are written as \\udce9."""
    return str(text).encode("utf-8", "backslashreplace").decode()
