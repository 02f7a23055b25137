"""Tars of captioned pictures, as WebDataset has them: members of the same stem, close together, are one picture.

A tar is read as a stream, front to back, a few pictures at a time; nothing is unpacked to disk. `.txt` and `.json`
beside a picture hold what they hold in a folder (captions). Members that are neither are passed by.

Format: WebDataset, github.com/webdataset/webdataset.

Not here: which files are tars (records).
"""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from sdxl_jax.data.captions import described
from sdxl_jax.data.images import IMAGE_SUFFIXES
from sdxl_jax.data.sources import BYTES_LIMIT, Refused, Sample, Unusable, gone

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_BESIDE = (".txt", ".json")
_OPEN_STEMS = 4  # pictures whose captions may still come


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
        self.refused = False  # one of them is, which says enough

    def close(self, used: set[str]) -> Sample | Refused | None:
        if self.refused or (self.image is None and not self.captions):  # empty where the tar is cut off
            return None
        if self.image is None:
            name, _ = next(iter(self.captions.values()))
            return Refused(name, "caption without an image of the same name close to it in the tar")
        name, image = self.image
        if name in used:
            return Refused(name, "a second image of this name; the first stands")
        used.add(name)
        try:
            text, fields = (self.captions[suffix][1] if suffix in self.captions else None for suffix in _BESIDE)
            return Sample(name, image, *described(text, fields))
        except Unusable as problem:
            far = ", close to it in the tar (`tar --sort=name` writes them so)"
            return Refused(name, f"{problem}{far if text is None and fields is None else ''}")


class TarPiece(NamedTuple):
    """One tar."""

    path: str
    name: str
    """In the source."""

    def samples(self) -> Iterator[Sample | Refused]:
        stems: dict[str, _Stem] = {}  # in the order of their first members
        used: set[str] = set()
        seen = pictures = 0
        last = "the beginning"

        def close(count: int) -> Iterator[Sample | Refused]:
            while len(stems) > count:
                if (closed := stems.pop(next(iter(stems))).close(used)) is not None:
                    yield closed

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
                        continue
                    stem, suffix = posixpath.splitext(path)
                    suffix = suffix.lower()
                    hidden = posixpath.basename(path).startswith(".")
                    if member.isdir() or hidden or suffix not in (*IMAGE_SUFFIXES, *_BESIDE):
                        continue
                    yield from close(_OPEN_STEMS if stem in stems else _OPEN_STEMS - 1)
                    if stem not in stems:
                        stems[stem] = _Stem()
                    group = stems[stem]
                    pictures += suffix in IMAGE_SUFFIXES
                    if not member.isfile():
                        yield Refused(name, "a link or a device, not a file")
                        group.refused = True
                    elif member.size > BYTES_LIMIT:
                        yield Refused(name, f"{member.size} bytes, the limit is {BYTES_LIMIT}")
                        group.refused = True
                    elif suffix in IMAGE_SUFFIXES and group.image is not None:
                        first = posixpath.basename(group.image[0])
                        yield Refused(name, f"a second image of the same stem; {first} stands")
                    else:
                        data = archive.extractfile(member).read()
                        if suffix in IMAGE_SUFFIXES:
                            group.image = name, data
                        else:
                            group.captions.setdefault(suffix, (name, data))
                    last = path
        except (tarfile.TarError, EOFError) as problem:
            yield from (closed for closed in close(0) if isinstance(closed, Sample))  # others miss what the cut took
            yield Refused(self.name, f"cut off or damaged after {last} ({problem}); what comes behind is lost")
        except OSError as problem:
            raise gone(self.path, problem) from problem
        else:
            yield from close(0)
            if not pictures:
                yield Refused(self.name, f"no image ({', '.join(IMAGE_SUFFIXES)}) among its {seen} members")
