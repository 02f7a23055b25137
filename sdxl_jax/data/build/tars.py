"""Tars of captioned images, as WebDataset has them: members of the same stem, close together, are one image.

A tar is streamed, front to back, with a few images in memory; nothing is unpacked to disk. `.txt` and `.json` beside an
image mean what they mean in a folder (captions); `.cls` holds its class, the numeric field "cls". A member counts as an
image by its suffix, in any format (formats), or by its first bytes; other members are ignored.

Format: WebDataset, github.com/webdataset/webdataset.

Not here: which files are tars (records).
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from sdxl_jax.data import formats
from sdxl_jax.data.captions import CaptionLines, class_of, described
from sdxl_jax.data.sources import BYTES_LIMIT, RawExample, Refused, Unusable, gone, open_stream

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_BESIDE = (".txt", ".json", ".cls")
_OPEN_STEMS = 4  # images whose captions may still come


class _Member(tarfile.TarInfo):
    """Raises ReadError for a damaged header, which tarfile itself silently takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tarfile)
        except _END:
            raise
        except _HEADER_ERROR as problem:
            raise _READ_ERROR(str(problem)) from None


_END: Any = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
_HEADER_ERROR, _READ_ERROR = tarfile.HeaderError, tarfile.ReadError


class _Stem:
    """The members with one stem that were read so far."""

    def __init__(self) -> None:
        self.image: tuple[str, bytes] | None = None
        self.captions: dict[str, tuple[str, bytes]] = {}  # by suffix
        self.refused = False  # whether an image of this stem was, so that its captions are not reported as well

    def add(self, name: str, suffix: str, archive: Any, member: tarfile.TarInfo) -> Iterator[Refused]:
        """Adds a member, or yields its refusal."""
        is_image = suffix not in _BESIDE
        if not member.isfile():
            reason = "a link or a device, not a file"
        elif member.size > BYTES_LIMIT:
            reason = f"{member.size} bytes, the limit is {BYTES_LIMIT}"
        elif is_image and (by_name := formats.refused_by_name(name)):
            reason = by_name
        elif is_image and self.image is not None:
            reason = f"a second image of the same stem; {posixpath.basename(self.image[0])} is used"
        else:
            data = archive.extractfile(member).read()
            if is_image:
                self.image = name, data
            else:
                self.captions.setdefault(suffix, (name, data))
            return
        self.refused = True
        yield Refused(name, reason)

    def close(self, used: set[str], caption_lines: CaptionLines | None) -> RawExample | Refused | None:
        """The image with its captions, or its refusal; None where there is nothing to report. `used`: names of images
        so far, to which its own is added."""
        if self.image is None:
            texts = [member for suffix, member in self.captions.items() if suffix != ".cls"]
            if self.refused or not texts:  # no captions where the tar is cut off
                return None
            name, _ = texts[0]
            return Refused(name, "caption without an image of the same name close to it in the tar")
        name, image = self.image
        if name in used:
            return Refused(name, "a second image of this name; the first is used")
        used.add(name)
        try:
            beside = (self.captions[suffix][1] if suffix in self.captions else None for suffix in _BESIDE)
            text, fields, label = beside
            captions, numbers = described(text, fields, caption_lines)
            return RawExample(name, image, captions, numbers if label is None else numbers | class_of(label))
        except Unusable as problem:
            near = ", close to it in the tar (`tar --sort=name` writes them so)"
            return Refused(name, f"{problem}{near if text is None and fields is None else ''}")


class _Stems:
    """The stems to which members may still be added, in the order of their first member."""

    def __init__(self, caption_lines: CaptionLines | None) -> None:
        self.open: dict[str, _Stem] = {}
        self._used: set[str] = set()
        self._caption_lines = caption_lines

    def close(self, count: int) -> Iterator[RawExample | Refused]:
        """Closes the oldest until `count` are left."""
        while len(self.open) > count:
            if (closed := self.open.pop(next(iter(self.open))).close(self._used, self._caption_lines)) is not None:
                yield closed

    def add(
        self, path: str, name: str, archive: Any, member: tarfile.TarInfo, refused: str | None = None
    ) -> Iterator[RawExample | Refused]:
        """Adds a member, or refuses it, for the reason `refused` or another; first closes the oldest stems."""
        stem, suffix = posixpath.splitext(path)
        yield from self.close(_OPEN_STEMS if stem in self.open else _OPEN_STEMS - 1)
        if stem not in self.open:
            self.open[stem] = _Stem()
        if refused:
            self.open[stem].refused = True
            yield Refused(name, refused)
        else:
            yield from self.open[stem].add(name, suffix.lower(), archive, member)


def _refused_by_content(path: str, archive: Any, member: tarfile.TarInfo) -> str | None:
    """Why a member is refused whose first bytes are those of an image, though its suffix is not; None for others."""
    if not member.isfile() or not formats.may_be_image(path):
        return None
    return formats.refused_by_content(archive.extractfile(member).read(formats.PEEK))


class TarPiece(NamedTuple):
    """One tar."""

    path: str
    name: str
    """In the source."""

    @property
    def reads_text_files(self) -> bool:
        """Whether `CaptionLines` may have an effect."""
        return True

    def samples(self, caption_lines: CaptionLines | None = CaptionLines.LINES) -> Iterator[RawExample | Refused]:
        stems = _Stems(caption_lines)
        seen = images = 0
        last = "the beginning"
        try:
            with open_stream(self.path) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as opened:
                archive: Any = opened
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile would keep every header in memory
                    seen += 1
                    path = posixpath.normpath(member.name)
                    name = f"{self.name}/{path}"
                    if path.startswith("/") or ".." in member.name.split("/"):
                        reason = "its path leads out of the tar: absolute, or with .."
                        yield Refused(f"{self.name}/{member.name}", reason)
                    elif member.isdir() or posixpath.basename(path).startswith("."):
                        pass
                    elif formats.is_image_name(path) or path.lower().endswith(_BESIDE):
                        yield from stems.add(path, name, archive, member)
                        images += formats.is_image_name(path)
                        last = path
                    elif reason := _refused_by_content(path, archive, member):
                        yield from stems.add(path, name, archive, member, reason)
                        images += 1
        except (tarfile.TarError, EOFError) as problem:
            # Those without a caption may have lost it to the cut: they are not reported.
            yield from (closed for closed in stems.close(0) if isinstance(closed, RawExample))
            yield Refused(self.name, f"cut off or damaged after {last} ({problem}); what follows is lost")
        except OSError as problem:
            raise gone(self.path, problem) from problem
        else:
            yield from stems.close(0)
            if not images:
                yield Refused(self.name, f"no image ({formats.EXAMPLES}) among its {seen} members")
