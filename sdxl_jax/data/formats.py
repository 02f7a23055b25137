"""Image formats: which are read, the file name extensions of images, and detection of a format by its first bytes.

The extension decides whether a file is treated as an image, and counted; the content decides whether it can be read. So
an image under a wrong extension is used, and one in a format that is not read is refused by the format's name.

Not here: decoding (images).
"""

import posixpath
from functools import cache

from PIL import Image, features

READ_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".mpo", ".png", ".apng", ".webp", ".avif", ".gif", ".tif", ".tiff"),
    *(".bmp", ".dib", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".qoi", ".tga"),
)
"""Extensions of images that are read, in lower case."""
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".heics", ".avifs", ".jxl", ".jxr", ".wdp", ".hdp", ".bpg", ".flif", ".svg", ".svgz"),
    *(".psd", ".psb", ".xcf", ".kra", ".ora", ".clip", ".ai", ".eps", ".wmf", ".emf", ".exr", ".hdr", ".pfm", ".dds"),
    *(".ico", ".icns", ".cur", ".ani", ".pcx", ".sgi", ".rgb", ".ras", ".xbm", ".xpm", ".pict", ".pct", ".mng", ".jng"),
    *(".jps", ".pns", ".fits", ".icb", ".vda", ".vst", ".iff", ".lbm", ".ilbm", ".cin", ".dpx", ".djvu", ".wbmp"),
)
"""Extensions of images that are not read, unless their content is in a format that is."""
RAW_SUFFIXES = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw"),
    *(".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
"""Extensions of cameras' raw files. Most hold a small preview as TIFF, which must not be taken for the image."""
IMAGE_SUFFIXES = (*READ_SUFFIXES, *OTHER_SUFFIXES, *RAW_SUFFIXES)
"""Extensions of all files that count as images."""
EXAMPLES = ".jpg, .png, .webp, .avif, .gif, .tiff, .bmp, …"
"""Extensions that are read, for messages."""
READ = "JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, JPEG 2000, PPM, QOI or TGA"
"""The formats that are read, for messages."""
NEVER_READ = ("HEIF", "SVG", "JPEG XL", "JPEG XR", "a camera's raw format", "OpenEXR", "GIMP", "PostScript")
"""Results of `kind_of` that Pillow never reads, even where all its formats are allowed."""
NEVER_IMAGES = (
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".htm", ".yaml", ".yml", ".toml", ".ini", ".log"),
    *(".npy", ".npz", ".pt", ".pth", ".pkl", ".safetensors", ".ckpt", ".parquet", ".arrow", ".tar", ".gz", ".tgz"),
    *(".zip", ".7z", ".rar", ".db", ".caption", ".py", ".sh", ".pdf", ".mp3", ".wav", ".flac", ".cls", ".index"),
)
"""Extensions of files that are not opened to detect an image by its content."""

PEEK = 300
"""Bytes that `kind_of` needs."""
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    b"crx ": "a camera's raw format",
}
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"qoif": "QOI",
    b"8BPS": "Photoshop",
    b"gimp xcf": "GIMP",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"%!PS-Adobe": "PostScript",
    b"DDS ": "DirectDraw",
    b"icns": "Apple's icons",
    b"\0\0\1\0": "Windows icons",
    b"FUJIFILMCCD-RAW": "a camera's raw format",
    b"IIU\0": "a camera's raw format",
    b"IIRO": "a camera's raw format",
    b"IIRS": "a camera's raw format",
    b"II\xbc\x01": "JPEG XR",
    b"BPG\xfb": "BPG",
    b"FLIF": "FLIF",
    b"\x01\xda\x01\x01": "SGI",
}


def kind_of(beginning: bytes) -> str | None:
    """The image format detected from a file's first bytes, None where there is none.

    Formats without a signature, such as TGA, and those with one of two letters, BMP and PPM, are not detected.
    """
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
        return "WebP"
    if beginning[4:8] == b"ftyp":
        return _BRANDS.get(beginning[8:12])
    for signature, name in _SIGNATURES.items():
        if beginning.startswith(signature):
            return name
    start = beginning[:PEEK].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return "SVG" if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in start) else None


def is_image_name(name: str) -> bool:
    """Whether a file of that name counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_read_name(name: str) -> bool:
    """Whether the extension is that of a format that is read."""
    return name.lower().endswith(READ_SUFFIXES)


def refused_by_name(name: str) -> str | None:
    """The reason to refuse an image by its extension alone, without opening it; None where there is none."""
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in RAW_SUFFIXES:
        return f"a camera's raw file ({suffix}), which is not read; develop it to JPEG or PNG"
    return None


def refused_by_content(beginning: bytes) -> str | None:
    """The reason to refuse a file that is an image by its first bytes but not by its extension; None for others."""
    if (kind := kind_of(beginning)) is None:
        return None
    return f"begins as an image ({kind}), but its name is not one's; rename it, e.g. to .jpg, or remove it"


def may_be_image(name: str) -> bool:
    """Whether a file without an image's extension is opened to detect an image by its first bytes."""
    return posixpath.splitext(name)[1].lower() not in NEVER_IMAGES


@cache
def readable() -> tuple[str, ...]:
    """The formats of training images by Pillow's names, without those that the installed Pillow lacks."""
    optional = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
    Image.init()
    names = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
    return tuple(
        name for name in names if name in Image.OPEN and (name not in optional or features.check(optional[name]))
    )
