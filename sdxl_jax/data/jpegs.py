"""Decodes JPEG files: all that are complete, however far they depart from the standard, and none that are damaged.

libjpeg reports both as warnings, and of several only the first. So a file that a strict decoder accepts is decoded as
it is. Of any other, a copy is made that conforms to the standard wherever libjpeg tolerates a departure:

- comments, thumbnails, colour profiles and whatever else no pixel depends on are left out, and bytes between segments;
- the spectral selection of sequential scans is 0 to 63, JFIF's version is known, Adobe's colour transform too;
- restart markers are numbered in order, and segments beyond those that the image's size needs are left out;
- the end marker is present.

What the strict decoder still refuses is damage, with one exception: bytes that are left over when every block of the
image is decoded. Cameras pad with them, scanners write rows that the header does not count. In the middle of an image,
before a restart marker or another scan, they are what remains where data is missing; only padding with zeros is
accepted there. Zeros themselves are not decoded as data, unlike in libjpeg: they are what an interrupted copy leaves.

The pixels are those of libjpeg without these corrections, and of Pillow with it. Standard: ITU-T T.81; libjpeg-turbo.

Not here: colour spaces other than grey and RGB, orientation, other formats (images).
"""

import dataclasses
import io
import re
import struct

import numpy as np
import simplejpeg
from jaxtyping import UInt8

SIGNATURE = b"\xff\xd8"

_SOS, _EOI, _DRI, _APP0, _APP1, _APP14, _COMMENT = 0xDA, 0xD9, 0xDD, 0xE0, 0xE1, 0xEE, 0xFE
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
_PROGRESSIVE = (0xC2, 0xCA)
_READ_OF_APP1 = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
_END_OF_SCAN = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # a marker, neither a restart nor a stuffed byte
_RESTART = re.compile(rb"\xff+([\xd0-\xd7])")
_LEFT_OVER = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
_FEW = 64
"""Bytes left over at the end of a file of several scans that do not indicate damage; lost data leaves more."""

_ZEROS = (0, 2)
"""Zeros at the end of a scan that are tried as data: a scan may end in some, though encoders pad with ones."""


class Unsupported(Exception):
    """A kind of JPEG that this decoder does not read, damaged or not."""


# Segments


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def _next_segment(file: io.BytesIO | io.BufferedReader) -> tuple[int, bytes] | None:
    """(marker, body of its segment), None at the end of the file. Bytes between segments are skipped."""
    while byte := file.read(1):
        if byte != b"\xff":
            continue
        while byte == b"\xff":
            byte = file.read(1)
        if not byte:
            return None
        marker = byte[0]
        if marker == 0 or marker in _ALONE:
            continue
        if marker == _EOI:
            return marker, b""
        length = int.from_bytes(file.read(2), "big") - 2
        body = file.read(max(0, length))
        return (marker, body) if len(body) == length else None
    return None


def _is_jfif(body: bytes) -> bool:
    return body.startswith(b"JFIF\0") and len(body) >= 14


def _is_adobe(body: bytes) -> bool:
    return body.startswith(b"Adobe") and len(body) >= 12


def without_metadata(file: io.BytesIO | io.BufferedReader, *, whole: bool) -> io.BytesIO:
    """The file without metadata, except EXIF and XMP, which may hold the orientation, and segments that colours depend
    on. Not whole: it ends before the data of the first scan, enough for the image's size."""
    file.seek(len(SIGNATURE))
    segments = [SIGNATURE]
    while (found := _next_segment(file)) is not None:
        marker, body = found
        if _APP0 <= marker < _APP0 + 16 or marker == _COMMENT:
            orients = marker == _APP1 and body.startswith(_READ_OF_APP1)
            if not (orients or (marker == _APP0 and _is_jfif(body)) or (marker == _APP14 and _is_adobe(body))):
                continue
        segments.append(_segment(marker, body) if marker != _EOI else b"\xff\xd9")
        if marker in (_SOS, _EOI):
            break
    if whole:
        segments.append(file.read())
    return io.BytesIO(b"".join(segments))


# The copy that conforms to the standard


@dataclasses.dataclass
class _Copy:
    """A file split into parts, with departures from the standard corrected."""

    parts: list[bytes]
    """Segments and the data of scans, in order."""
    scans: list[int]
    """Indices of the parts that are data of scans."""
    ended: bool = False
    """It had an end marker."""
    every_restart: bool = True
    """Every scan has as many restart markers as its size requires."""
    renumbered: bool = False
    """Restart markers had to be renumbered."""
    complete: bool = False
    """Its scans hold every component with all its bits."""

    def data(self, zeros: int) -> bytes:
        """The bytes of the copy, with at most `zeros` zeros at the end of each scan."""
        parts = list(self.parts)
        for number in self.scans:
            scan = parts[number].rstrip(b"\0")
            if scan.endswith(b"\xff"):  # FF 00 is one byte, FF
                scan += b"\0"
            parts[number] = scan + bytes(min(zeros, len(parts[number]) - len(scan)))
        return b"".join([SIGNATURE, *parts, b"\xff\xd9"])


@dataclasses.dataclass(frozen=True)
class _Frame:
    marker: int
    height: int
    width: int
    sampling: dict[int, tuple[int, int]]
    """(horizontal, vertical) of each component by its number."""

    @classmethod
    def of(cls, marker: int, body: bytes) -> "_Frame":
        _, height, width, count = struct.unpack(">BHHB", body[:6])
        components = [body[6 + 3 * number : 9 + 3 * number] for number in range(count)]
        return cls(marker, height, width, {each[0]: (each[1] >> 4, each[1] & 15) for each in components})

    def units(self, components: list[int]) -> int:
        """Number of minimum coded units in a scan of these components, T.81 A.2."""
        across, down = (max(pair[axis] for pair in self.sampling.values()) for axis in (0, 1))
        if len(components) > 1:
            return -(-self.width // (8 * across)) * -(-self.height // (8 * down))
        horizontal, vertical = self.sampling[components[0]]
        width, height = -(-self.width * horizontal // across), -(-self.height * vertical // down)
        return -(-width // 8) * -(-height // 8)


def _corrected(marker: int, body: bytes, frame: _Frame | None) -> bytes | None:
    """The body of a segment, as the standard and libjpeg define it; None for a segment that no pixel depends on."""
    if marker == _APP0:
        return b"JFIF\0\1\1" + body[7:12] + b"\0\0" if _is_jfif(body) else None
    if marker == _APP14:
        # libjpeg reads an unknown transform as YCbCr
        return body[:11] + bytes([min(body[11], 1)]) if _is_adobe(body) else None
    if _APP0 <= marker < _APP0 + 16 or marker == _COMMENT:
        return None
    if marker == _SOS and frame is not None and frame.marker in _SEQUENTIAL:
        return body[:-3] + b"\0\x3f\0"
    return body


def _copy(data: bytes) -> _Copy | None:
    """None for a file without a scan. Raises struct.error, IndexError, KeyError, ValueError for truncated headers."""
    file = io.BytesIO(data)
    file.seek(len(SIGNATURE))
    copy, frame, interval = _Copy([], []), None, 0
    lowest: dict[tuple[int, int], int] = {}  # for each component and coefficient, the lowest bit that a scan holds
    while (found := _next_segment(file)) is not None:
        marker, body = found
        if marker == _EOI:
            copy.ended = True
            break
        if marker in _FRAMES:
            frame = _Frame.of(marker, body)
        if marker == _DRI:
            (interval,) = struct.unpack(">H", body)
        if (body := _corrected(marker, body, frame)) is not None:
            copy.parts.append(_segment(marker, body))
        if marker != _SOS or body is None:
            continue
        if frame is None:
            return None
        components = [body[1 + 2 * number] for number in range(body[0])]
        first, last, bit = body[-3], body[-2], body[-1] & 15
        lowest |= {(component, place): bit for component in components for place in range(first, min(last, 63) + 1)}
        copy.scans.append(len(copy.parts))
        copy.parts.append(_scan(data, file, copy, -(-frame.units(components) // interval) if interval else 1))
    if frame is None or not copy.scans:
        return None
    places = range(64) if frame.marker in _PROGRESSIVE else range(1)
    copy.complete = all(lowest.get((component, place)) == 0 for component in frame.sampling for place in places)
    return copy


def _scan(data: bytes, file: io.BytesIO, copy: _Copy, restarts: int) -> bytes:
    """The data of the scan that begins here, in `restarts` segments; leaves the file after the scan."""
    start = file.tell()
    end = found.start() if (found := _END_OF_SCAN.search(data, start)) else len(data)
    file.seek(end)
    parts = _RESTART.split(data[start:end])  # data, number, data, number, …, data
    segments, numbers = parts[::2][:restarts], parts[1::2][: restarts - 1]
    copy.every_restart &= len(segments) == restarts
    expected = [bytes([0xD0 + number % 8]) for number in range(len(numbers))]
    copy.renumbered |= numbers != expected
    markers = [b"", *(b"\xff" + number for number in expected)]
    return b"".join(marker + segment for marker, segment in zip(markers, segments, strict=True))


# Decoding


def decode(data: bytes, height: int = 0, width: int = 0) -> UInt8[np.ndarray, "_height _width 3"]:
    """RGB, 0..255, not rotated, of a JPEG in grey, YCbCr or RGB.

    It is downscaled as far as its sides stay at least `height` and `width`; 0: full size.

    Raises ValueError, with libjpeg's message, where it is truncated or damaged; Unsupported where the decoder does not
    read such files at all.
    """

    def pixels(data: bytes, strict: bool) -> UInt8[np.ndarray, "_height _width 3"]:
        # Not strict, a truncated file comes out grey at the bottom.
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2, strict=strict)

    try:
        return pixels(data, True)
    except ValueError as error:
        damage = error
    try:
        copy = _copy(data)
    except (struct.error, IndexError, KeyError, ValueError, ZeroDivisionError):
        copy = None
    if copy is None or not (copy.ended or copy.complete):
        raise damage
    warning = damage
    for attempt in map(copy.data, _ZEROS):
        try:
            found = pixels(attempt, True)
            break
        except ValueError as error:
            warning = error
            if _only_left_over(str(error), copy):
                found = pixels(attempt, False)
                break
    else:
        try:
            pixels(copy.data(0), False)
        except ValueError as error:
            raise Unsupported(str(error)) from error
        # The first warning may be a harmless one.
        raise damage if "Premature end of JPEG file" in str(damage) else warning
    if copy.renumbered and not np.array_equal(found, pixels(data, False)):
        raise damage  # libjpeg reads some numbers as missing data
    return found


def _only_left_over(warning: str, copy: _Copy) -> bool:
    """Whether the first warning of a copy is the only one, and is about bytes after the last block of the image."""
    if (found := _LEFT_OVER.search(warning)) is None or int(found[2], 16) != _EOI or not copy.every_restart:
        return False
    return len(copy.scans) == 1 or int(found[1]) <= _FEW
