"""Masks: how much each pixel of an image counts in the loss, from its alpha channel or from an image beside it.

    alpha     the image's own alpha channel; its colours are then those that are stored beneath, not those over white
    FOLDER    FOLDER/a/b.png for the image a/b.jpg: the same path with any extension, the same size; the red channel

White (255, opaque) counts wholly, black (0, transparent) not at all: the two conventions of sd-scripts' masked loss. An
image without an alpha channel counts wholly; one without its mask in FOLDER is refused.

Not here: crop and flip (transforms), the weights of latent positions (diffusion/loss).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from sdxl_jax.data import formats
from sdxl_jax.data.images import decode_alpha, has_alpha, measure, read_image, why_unreadable
from sdxl_jax.data.sources import Unusable
from sdxl_jax.errors import InputError

ALPHA = "alpha"
"""The setting for alpha channels; any other one is a folder."""


@dataclasses.dataclass(frozen=True)
class Masks:
    """The masks of a folder of images. Made by `list_masks`."""

    setting: str
    files: Mapping[str, Path]
    """Those of a folder, by relative path without extension."""

    def file_of(self, image: Path, name: str, size: tuple[int, int], *, verify: bool) -> Path | None:
        """The file that holds an image's mask: itself with ALPHA; None where all of the image counts.

        name: relative to its folder; size: (height, width); verify: decode the mask. Raises Unusable: no mask, one that
        cannot be read, one of another size; with verify, one that is black.
        """
        stem = PurePosixPath(name).with_suffix("").as_posix()
        file = image if self.setting == ALPHA else self.files.get(stem)
        if file is None:
            raise Unusable(f"image without a mask: no {stem} with an image's extension in data.masks={self.setting}")
        try:
            with file.open("rb") as opened:
                found = measure(opened)
                opened.seek(0)
                if self.setting == ALPHA and not has_alpha(opened):
                    return None
            if found != size:
                raise Unusable(f"it has {found[0]}×{found[1]} pixels (height × width), the image {size[0]}×{size[1]}")
            if verify and not read_mask(file, self.setting).any():
                raise Unusable("it is black or transparent all over, so that nothing of the image counts")
        except Exception as problem:  # decoders raise many types on damaged files
            raise Unusable(f"the mask {file} cannot be used: {problem}") from problem
        return file


def list_masks(setting: str, images: Path) -> Masks:
    """The masks of a folder of images.

    Raises InputError: no such folder of masks; one inside that of the images; two masks of one name.
    """
    if setting == ALPHA:
        return Masks(setting, {})
    folder = Path(setting)
    if not folder.is_dir():
        raise InputError(
            f"data.masks={setting} is not a folder. Give a folder with a mask of the same name for each image of "
            f"{images}, or alpha for the images' own alpha channels. Check the path, seen from {Path.cwd()}"
        )
    if folder.resolve().is_relative_to(images.resolve()):
        raise InputError(
            f"data.masks={setting} is inside {images}, all of whose images are trained on. Move the masks to a folder "
            "beside it"
        )
    files = dict[str, Path]()
    for path in sorted(folder.rglob("*")):
        if formats.is_read_name(path.name):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in files:
                raise InputError(f"{files[stem]} and {path} are masks of the same image. Remove one of them")
            files[stem] = path
    return Masks(setting, files)


def read_mask(file: Path, setting: str) -> UInt8[np.ndarray, "height width"]:
    """The mask in a file of `Masks.file_of`, 0..255, upright. Raises InputError where it cannot be read."""
    if setting != ALPHA:
        return read_image(file)[..., 0]
    try:
        return decode_alpha(file.read_bytes())
    except Exception as problem:  # as above
        raise InputError(f"The image {file} {why_unreadable(problem)}. Replace or remove it") from problem
