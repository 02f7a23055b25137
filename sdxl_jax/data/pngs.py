"""Removes PNG chunks that no pixel depends on, so that limits on texts and colour profiles never refuse an image.

Pillow refuses files whose compressed texts or profile decompress to more than 1 MB, and checks the checksums of chunks
that it does not need. Blender, Adobe's programs and web interfaces of diffusion models write such files.

Format: PNG, third edition, w3.org/TR/png-3.

Not here: decoding, which Pillow does (images).
"""

import io
import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_NEEDED = (b"tRNS", b"eXIf")
"""Ancillary chunks that are kept: transparency, and EXIF for the orientation."""
_ORIENTING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts that may hold the orientation too."""
_TEXT_LIMIT = 16 << 20  # bytes of such a text, decompressed; Pillow's limit is 64 MB for all texts


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _decompressed(data: bytes) -> bytes | None:
    """The decompressed text, None where it is damaged or too long."""
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(data, _TEXT_LIMIT)
    except zlib.error:
        return None
    return None if decompressor.unconsumed_tail else text


def _text(kind: bytes, body: bytes) -> bytes | None:
    """The chunk of a text that may hold the orientation, uncompressed; None for any other, and for a damaged one."""
    keyword, found, rest = body.partition(b"\0")
    if not found or keyword + b"\0" not in _ORIENTING:
        return None
    if kind == b"tEXt":
        return _chunk(kind, body)
    if kind == b"zTXt":
        text = _decompressed(rest[1:])
        return None if text is None else _chunk(b"tEXt", keyword + b"\0" + text)
    if rest[:1] != b"\1":
        return _chunk(kind, body)
    language, _, rest = rest[2:].partition(b"\0")
    translated, _, compressed = rest.partition(b"\0")
    text = _decompressed(compressed)
    return None if text is None else _chunk(kind, b"\0".join([keyword, b"\0", language, translated, text]))


def without_metadata(file: io.BytesIO | io.BufferedReader, *, whole: bool) -> io.BytesIO:
    """The file with its critical chunks and those that hold orientation and transparency; of an animation, the default
    image. Not whole: it ends before the first image data, enough for the image's size."""
    file.seek(len(SIGNATURE))
    chunks = [SIGNATURE]
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT" and not whole:
            chunks.append(head)
            break
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            body = file.read(length + 4)[:length]
            if (text := _text(kind, body)) is not None:
                chunks.append(text)
        elif kind[:1].isupper() or kind in _NEEDED:  # critical ones begin with a capital
            chunks += [head, file.read(length + 4)]
        else:
            file.seek(length + 4, io.SEEK_CUR)
        if kind == b"IEND":
            break
    else:
        chunks.append(head)
    return io.BytesIO(b"".join(chunks))
