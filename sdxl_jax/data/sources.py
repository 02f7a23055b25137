"""A folder of captioned images: what is in it, how large, what cannot be used and why; and the pixels of one image.

Two layouts of captions:

- `metadata.jsonl` in the folder, one `{"file_name": ..., "text": ...}` a line (Hugging Face's imagefolder). Where the
  file is, it gives every caption, and no `.txt` is read;
- else a `.txt` beside each image, with the same stem.

Opening reads headers only; each problem becomes a `Refused` with its reason, so that nothing is left out in silence.
Sizes are (height, width) of the upright image, that is after its EXIF orientation.

Not here: buckets, resizing, network addresses, tar files; colour profiles are not applied.
"""

import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import simplejpeg
from jaxtyping import Int32, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from sdxl_jax.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
PIXEL_LIMIT = 200_000_000
"""Images with more pixels are refused by their header: a small file can unpack to any size. It stands in for Pillow's
limit, which warns at 89 million pixels, in the middle of a run, and gives up at 179 million."""

OnRefused = Literal["error", "skip"]
"""What to do about files that cannot be used: stop with one message, or go on without them."""

_THREADS = 8  # the wait is for the disk, and both decoders release the interpreter's lock
_LISTED = 5  # refusals spelt out in a message
_METADATA = "metadata.jsonl"
_pillow_limit = threading.Lock()


class Refused(NamedTuple):
    """One file, or one line of `metadata.jsonl`, that cannot be used."""

    file: str
    """Relative to the folder."""
    reason: str


@runtime_checkable
class Pictures(Protocol):
    """What is trained on: numbered pictures. Sent to worker processes, so it must pickle."""

    @property
    def folder(self) -> Path: ...

    @property
    def found(self) -> int:
        """Pictures, usable or not."""
        ...

    @property
    def sizes(self) -> Int32[np.ndarray, "images 2"]:
        """(height, width) in pixels, upright, of those that can be used."""
        ...

    @property
    def refused(self) -> list[Refused]:
        """What cannot be used and was not said before."""
        ...

    def refused_before(self) -> list[Refused]:
        """What a build refused, said and listed."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names the content, for resuming."""
        ...

    def name(self, image: int) -> str: ...

    def captions_of(self, image: int) -> tuple[str, ...]:
        """One or several."""
        ...

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        """RGB, 0..255, upright. Raises InputError where the image is damaged."""
        ...


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The usable images of a folder, sorted by name: an image's number is its place in these lists."""

    folder: Path
    found: int
    """Image files in the folder, usable or not."""
    paths: list[Path]
    captions: list[str]
    sizes: Int32[np.ndarray, "images 2"]
    """(height, width) in pixels, upright."""
    refused: list[Refused]

    def name(self, image: int) -> str:
        """Path of one image relative to the folder."""
        return self.paths[image].relative_to(self.folder).as_posix()

    def refused_before(self) -> list[Refused]:
        return []

    def captions_of(self, image: int) -> tuple[str, ...]:
        return (self.captions[image],)

    def pixels(self, image: int) -> UInt8[np.ndarray, "height width 3"]:
        """As `read_image`."""
        return read_image(self.paths[image])

    @property
    def fingerprint(self) -> str:
        """A hash of names, captions and sizes of all images; not of their pixels."""
        rows = [[self.name(n), caption, *self.sizes[n].tolist()] for n, caption in enumerate(self.captions)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8."""
    try:
        # The base method: PNG's own one decodes the whole image to look for EXIF behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parser raises many types, and damage in EXIF does not concern the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _identify(file: Any) -> Image.Image:
    """The image of an open binary file: its header read, no pixel decoded. ValueError above PIXEL_LIMIT."""
    with _pillow_limit:  # Pillow's limit is a global of its module
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=("JPEG", "PNG", "WEBP", "BMP"))
        finally:
            Image.MAX_IMAGE_PIXELS = theirs
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"{image.width}×{image.height} pixels, the limit is {PIXEL_LIMIT} in all")
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) < 5 else (image.width, image.height)


def _measure_file(path: Path) -> tuple[int, int]:
    with io.BufferedReader(io.FileIO(path), 1 << 16) as file:
        file.peek()  # the slow read, outside the lock
        return _upright_size(_identify(file))


def measure(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, upright, from its header alone. Raises as `decode` does."""
    return _upright_size(_identify(io.BytesIO(data)))


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _upright(pixels: UInt8[np.ndarray, "rows columns 3"], orientation: int) -> UInt8[np.ndarray, "height width 3"]:
    """Undoes EXIF orientation: numbers 5 to 8 exchange the axes, then rows and columns may run backwards."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def decode(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of an encoded image, as in `read_image`.

    Raises whatever the decoders raise where it is truncated or damaged, many types; `why_unreadable` makes it a reason.
    """
    image = _identify(io.BytesIO(data))
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):  # simplejpeg does no CMYK to RGB
        pixels = simplejpeg.decode_jpeg(data, strict=True)  # not strict, a truncated file comes out grey at the bottom
    else:
        pixels = _to_rgb(image)
    return _upright(pixels, _orientation(image))


def _decode_file(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    return decode(path.read_bytes())


def why_unreadable(problem: Exception) -> str:
    """The reason of a refusal, from what `measure` or `decode` raised."""
    if isinstance(problem, UnidentifiedImageError):
        return "cannot be read: neither JPEG, PNG, WebP nor BMP"
    return f"cannot be read ({type(problem).__name__}: {problem})"


def read_image(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    """Pixels of one image: RGB, 0..255, upright (EXIF), transparency over white.

    Greyscale, palette, 16-bit (the high byte) and CMYK become RGB; of an animation, the first frame. JPEG is decoded
    by simplejpeg (strict), the rest and CMYK by Pillow.

    Raises InputError with the file's name where it is missing, truncated, damaged, or above PIXEL_LIMIT.
    """
    try:
        return _decode_file(path)
    except Exception as problem:  # decoders raise many types on damaged files; each means the same here
        raise InputError(
            f"The image {path} {why_unreadable(problem)}. Replace or remove it; data.verify_images=true with "
            "data.on_refused=skip finds such files before the work starts, and leaves them out."
        ) from problem


def _size_or_reason(path: Path) -> tuple[int, int] | str:
    try:
        return _measure_file(path)
    except Exception as problem:  # as in read_image
        return why_unreadable(problem)


def _size_or_reason_by_decoding(path: Path) -> tuple[int, int] | str:
    try:
        height, width, _ = _decode_file(path).shape
        return height, width
    except Exception as problem:  # as in read_image
        return why_unreadable(problem)


def _in_threads(function: Callable[[Path], Any], paths: list[Path], what: str) -> list[Any]:
    """function(path) of each path, in order; a bar where it takes more than two seconds at a terminal."""
    with ThreadPool(_THREADS) as pool:
        return list(tqdm(pool.imap(function, paths, chunksize=16), what, len(paths), delay=2, disable=None))


def list_files(folder: Path) -> tuple[list[str], list[Refused]]:
    """Every file below the folder, as sorted relative names, hidden ones left out; links to folders are followed."""
    names, seen, refused = [], set(), []

    def unreadable(problem: OSError) -> None:
        refused.append(Refused(os.path.relpath(problem.filename, folder), f"cannot be listed ({problem.strerror})"))

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(root)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real not in seen:
            names += [(Path(root) / name).relative_to(folder).as_posix() for name in files if not name.startswith(".")]
        seen.add(real)
    return sorted(names), refused


def _captions_of_metadata(folder: Path, images: set[str]) -> tuple[dict[str, str], list[Refused]]:
    captions: dict[str, str] = {}
    refused = []
    for number, line in enumerate((folder / _METADATA).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        keys = ("file_name", "text")
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in keys):
            reason = 'expected JSON with two texts, {"file_name": ..., "text": ...}'
        elif (name := os.path.normpath(record["file_name"])) not in images:
            reason = f"no image {record['file_name']} in the folder ({', '.join(IMAGE_SUFFIXES)})"
        elif name in captions:
            reason = f"{name} has a caption from an earlier line, which stands"
        else:
            captions[name] = record["text"].strip()
            continue
        refused.append(Refused(f"{_METADATA} line {number}", reason))
    return captions, refused


def _text_or_none(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _captions_of_text_files(
    folder: Path, names: Iterable[str], images: list[str]
) -> tuple[dict[str, str], list[Refused]]:
    text_files = {str(PurePosixPath(name).with_suffix("")): name for name in names if name.lower().endswith(".txt")}
    image_of_stem = {str(PurePosixPath(name).with_suffix("")) for name in images}
    texts = _in_threads(_text_or_none, [folder / name for name in text_files.values()], "Reading captions")
    caption_of_stem = dict(zip(text_files, texts, strict=True))
    refused = []
    for stem, name in text_files.items():
        if stem not in image_of_stem:
            refused.append(Refused(name, "caption without an image of the same name"))
        elif caption_of_stem[stem] is None:
            refused.append(Refused(name, "caption is not UTF-8 text"))
    captions = ((name, caption_of_stem.get(str(PurePosixPath(name).with_suffix("")))) for name in images)
    return {name: caption for name, caption in captions if caption is not None}, refused


def summary(refused: list[Refused]) -> str:
    """The first refusals, one a line, and how many more there are."""
    lines = [f"  {file}: {reason}" for file, reason in refused[:_LISTED]]
    if len(refused) > _LISTED:
        lines.append(f"  and {len(refused) - _LISTED} more")
    return "\n".join(lines)


def stop_if_refused(folder: Path, refused: list[Refused], on_refused: OnRefused) -> None:
    """Raises one InputError for all refusals, unless they are to be skipped."""
    if refused and on_refused == "error":
        raise InputError(
            f"{len(refused)} entries of {folder} cannot be used:\n{summary(refused)}\nFix or remove them, or set "
            "data.on_refused=skip to train without them (`sdxl-jax data inspect` counts and lists them)."
        )


def open_folder(folder: str | Path, *, on_refused: OnRefused = "error", verify: bool = False) -> FolderSource:
    """Lists a folder of captioned images, recursively, hidden files left out.

    Reads each image's header. With `verify` it decodes every image too, so that damaged pixels show now instead of
    during training; that costs one full pass over the images: reading them all, and some 15 ms of one core a megapixel
    of JPEG, in eight threads.

    Refused are: an image that cannot be read or exceeds PIXEL_LIMIT, an image with an empty caption or without one, a
    caption without its image, a line of `metadata.jsonl` that is not as expected or repeats a file.

    Raises InputError: no such folder; no image in it; none usable; any refusal where on_refused is "error".
    """
    folder = Path(folder)
    expected = f"Expected a folder of images ({', '.join(IMAGE_SUFFIXES)}) with captions"
    if not folder.exists():
        raise InputError(f"data.folder={folder} does not exist. {expected}. Check the path, seen from {Path.cwd()}.")
    if not folder.is_dir():
        raise InputError(f"data.folder={folder} is not a folder. {expected}. Give the folder that holds the images.")
    names, refused = list_files(folder)
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise InputError(
            f"data.folder={folder} holds no images among its {len(names)} files. {expected}. "
            "Convert other formats, or give another folder."
        )
    if _METADATA in names:
        captions, problems = _captions_of_metadata(folder, set(images))
        missing = f"image without a caption: no usable line in {_METADATA} names it"
    else:
        captions, problems = _captions_of_text_files(folder, names, images)
        missing = f"image without a caption: neither {_METADATA} nor a readable .txt beside it"
    refused += problems
    refused += [Refused(name, missing) for name in images if name not in captions]
    refused += [Refused(name, "empty caption") for name in images if captions.get(name) == ""]

    candidates = [name for name in images if captions.get(name)]
    paths = [folder / name for name in candidates]
    if verify:
        sizes = _in_threads(_size_or_reason_by_decoding, paths, "Decoding every image")
    else:
        sizes = _in_threads(_size_or_reason, paths, "Reading image headers")
    refused += [Refused(name, size) for name, size in zip(candidates, sizes, strict=True) if isinstance(size, str)]
    usable = [number for number, size in enumerate(sizes) if not isinstance(size, str)]
    if not usable:
        raise InputError(
            f"None of the {len(images)} images in data.folder={folder} can be used:\n{summary(refused)}\n"
            f'{expected}: {_METADATA} with {{"file_name": ..., "text": ...}} a line, or a .txt beside each image.'
        )
    stop_if_refused(folder, refused, on_refused)
    return FolderSource(
        folder=folder,
        found=len(images),
        paths=[paths[number] for number in usable],
        captions=[captions[candidates[number]] for number in usable],
        sizes=np.array([sizes[number] for number in usable], np.int32),
        refused=refused,
    )
