"""Tars of captioned images, as WebDataset has them: members of the same stem, close together, are one image.

A tar is read as a stream, front to back, a few images at a time; nothing is unpacked to disk. `.txt` and `.json`
beside an image hold what they hold in a folder (captions). What goes by the name of an image counts, in any format
(formats), and so does what begins as one; other members are passed by.

Format: WebDataset, github.com/webdataset/webdataset.

Not here: which files are tars (records).
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from sdxl_jax.data import formats
from sdxl_jax.data.captions import CaptionLines, described
from sdxl_jax.data.sources import BYTES_LIMIT, RawExample, Refused, Unusable, gone

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_BESIDE = (".txt", ".json")
_OPEN_STEMS = 4  # images whose captions may still come


class _Member(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, and says nothing."""

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
    """What has come of the members with one stem."""

    def __init__(self) -> None:
        self.image: tuple[str, bytes] | None = None
        self.captions: dict[str, tuple[str, bytes]] = {}  # by suffix
        self.refused = False  # an image of them is, which says enough of captions without one

    def add(self, name: str, suffix: str, archive: Any, member: tarfile.TarInfo) -> Iterator[Refused]:
        """Takes a member in, or refuses it."""
        is_image = suffix not in _BESIDE
        if not member.isfile():
            reason = "a link or a device, not a file"
        elif member.size > BYTES_LIMIT:
            reason = f"{member.size} bytes, the limit is {BYTES_LIMIT}"
        elif is_image and (by_name := formats.refused_by_name(name)):
            reason = by_name
        elif is_image and self.image is not None:
            reason = f"a second image of the same stem; {posixpath.basename(self.image[0])} stands"
        else:
            data = archive.extractfile(member).read()
            if is_image:
                self.image = name, data
            else:
                self.captions.setdefault(suffix, (name, data))
            return
        self.refused = True
        yield Refused(name, reason)

    def close(self, used: set[str], caption_lines: CaptionLines) -> RawExample | Refused | None:
        if self.image is None:
            if self.refused or not self.captions:  # empty where the tar is cut off
                return None
            name, _ = next(iter(self.captions.values()))
            return Refused(name, "caption without an image of the same name close to it in the tar")
        name, image = self.image
        if name in used:
            return Refused(name, "a second image of this name; the first stands")
        used.add(name)
        try:
            text, fields = (self.captions[suffix][1] if suffix in self.captions else None for suffix in _BESIDE)
            return RawExample(name, image, *described(text, fields, caption_lines))
        except Unusable as problem:
            far = ", close to it in the tar (`tar --sort=name` writes them so)"
            return Refused(name, f"{problem}{far if text is None and fields is None else ''}")


class _Stems:
    """The stems that may still get members, in the order of their first."""

    def __init__(self, caption_lines: CaptionLines) -> None:
        self.open: dict[str, _Stem] = {}
        self._used: set[str] = set()
        self._caption_lines = caption_lines

    def close(self, count: int) -> Iterator[RawExample | Refused]:
        """Closes the oldest until so many are left."""
        while len(self.open) > count:
            if (closed := self.open.pop(next(iter(self.open))).close(self._used, self._caption_lines)) is not None:
                yield closed

    def add(
        self, path: str, name: str, archive: Any, member: tarfile.TarInfo, refused: str | None = None
    ) -> Iterator[RawExample | Refused]:
        """Takes a member in, or refuses it, for that reason or another; first closes what may be closed."""
        stem, suffix = posixpath.splitext(path)
        yield from self.close(_OPEN_STEMS if stem in self.open else _OPEN_STEMS - 1)
        if stem not in self.open:
            self.open[stem] = _Stem()
        if refused:
            self.open[stem].refused = True
            yield Refused(name, refused)
        else:
            yield from self.open[stem].add(name, suffix.lower(), archive, member)


def _refused_all_the_same(path: str, archive: Any, member: tarfile.TarInfo) -> str | None:
    """Why a member is refused that is named neither as an image nor as a caption; None where it is neither indeed."""
    if not member.isfile() or not formats.may_be_image(path):
        return None
    return formats.refused_all_the_same(archive.extractfile(member).read(formats.PEEK))


class TarPiece(NamedTuple):
    """One tar."""

    path: str
    name: str
    """In the source."""

    @property
    def reads_text_files(self) -> bool:
        """Whether `CaptionLines` may concern it."""
        return True

    def samples(self, caption_lines: CaptionLines = CaptionLines.LINES) -> Iterator[RawExample | Refused]:
        stems = _Stems(caption_lines)
        seen = images = 0
        last = "the beginning"
        try:
            with tarfile.open(self.path, "r|*", tarinfo=_Member) as opened:
                archive: Any = opened
                while (member := archive.next()) is not None:
                    archive.members.clear()  # else it keeps every header of a tar of any length
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
                    elif reason := _refused_all_the_same(path, archive, member):
                        yield from stems.add(path, name, archive, member, reason)
                        images += 1
        except (tarfile.TarError, EOFError) as problem:
            # Others miss what the cut took.
            yield from (closed for closed in stems.close(0) if isinstance(closed, RawExample))
            yield Refused(self.name, f"cut off or damaged after {last} ({problem}); what comes after is lost")
        except OSError as problem:
            raise gone(self.path, problem) from problem
        else:
            yield from stems.close(0)
            if not images:
                yield Refused(self.name, f"no image ({formats.EXAMPLES}) among its {seen} members")
