"""PNG files without what no pixel depends on, so that no guard on texts and colour profiles decides about the pixels.

Pillow refuses files whose compressed texts or profile unpack to more than 1 MB, and checks the sums of chunks that it
does not need. Blender, Adobe's programs and web interfaces of diffusion models write such files.

Format: PNG, third edition, w3.org/TR/png-3.

Not here: decoding; it stays Pillow's (images).
"""

import io
import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_NEEDED = (b"tRNS", b"eXIf")
"""Of the chunks that are not critical: transparency, and EXIF for the orientation."""
_ORIENTING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts that may say the orientation too."""
_TEXT_LIMIT = 16 << 20  # bytes of such a text, unpacked; Pillow's own limit is 64 MB of all texts


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _unpacked(data: bytes) -> bytes | None:
    """None where it is damaged or too long."""
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(data, _TEXT_LIMIT)
    except zlib.error:
        return None
    return None if unpack.unconsumed_tail else text


def _text(kind: bytes, body: bytes) -> bytes | None:
    """The chunk of a text that may say the orientation, not compressed; None for any other, and for a damaged one."""
    keyword, found, rest = body.partition(b"\0")
    if not found or keyword + b"\0" not in _ORIENTING:
        return None
    if kind == b"tEXt":
        return _chunk(kind, body)
    if kind == b"zTXt":
        text = _unpacked(rest[1:])
        return None if text is None else _chunk(b"tEXt", keyword + b"\0" + text)
    if rest[:1] != b"\1":
        return _chunk(kind, body)
    language, _, rest = rest[2:].partition(b"\0")
    translated, _, packed = rest.partition(b"\0")
    text = _unpacked(packed)
    return None if text is None else _chunk(kind, b"\0".join([keyword, b"\0", language, translated, text]))


def without_metadata(file: io.BytesIO | io.BufferedReader, *, whole: bool) -> io.BytesIO:
    """The file from its beginning, with critical chunks and what the orientation and transparency follow from; of an
    animation, the default image. Not whole, it ends before the first data: enough to know its size."""
    file.seek(len(SIGNATURE))
    kept = [SIGNATURE]
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" and not whole:
            kept.append(head)
            break
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            body = file.read(length + 4)[:length]
            if (text := _text(kind, body)) is not None:
                kept.append(text)
        elif kind[:1].isupper() or kind in _NEEDED:  # critical ones begin with a capital
            kept += [head, file.read(length + 4)]
        else:
            file.seek(length + 4, io.SEEK_CUR)
        if kind == b"IEND":
            break
    else:
        kept.append(head)
    return io.BytesIO(b"".join(kept))
