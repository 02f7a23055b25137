"""The images of a folder that a fine-tuning can use, with their captions: their own, or given by the user.

Captions that the user gives are not written beside the images: the run directory has a folder of links to them, with
the captions in metadata.jsonl (`Survey.write`), and that is trained on.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from sdxl_jax.data.folders import FolderSource
from sdxl_jax.data.inspection import open_dataset
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.sources import OnRefused, Refused
from sdxl_jax.errors import InputError
from sdxl_jax.files import atomic
from sdxl_jax.finetuning import choices
from sdxl_jax.finetuning.choices import Images
from sdxl_jax.finetuning.options import Options
from sdxl_jax.model import ModelConfig

LINKS = "captioned_images"
"""Folder of links in the run directory."""
_METADATA = "metadata.jsonl"


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a folder has."""

    path: str
    images: Images
    names: list[str]
    """Of the images, from the folder."""
    own_captions: int
    """Images that have captions of their own."""
    found: int
    """Images, usable or not."""
    refused: list[Refused]
    is_linked: bool
    """Whether captions are given by the user."""

    def folder(self, run_dir: Path) -> str:
        """What is trained on."""
        return str(run_dir / LINKS) if self.is_linked else self.path

    def write(self, run_dir: Path) -> None:
        """The folder of links, if there are given captions. Raises InputError where a run was started with others."""
        if not self.is_linked:
            return
        folder, source = run_dir / LINKS, Path(self.path).resolve()
        pairs = zip(self.names, self.images.captions, strict=True)
        text = "".join(json.dumps({"file_name": name, "text": texts}) + "\n" for name, texts in pairs)
        metadata = folder / _METADATA
        if (run_dir / "config.json").exists() and (not metadata.exists() or metadata.read_text() != text):
            raise InputError(
                f"{run_dir} was started with other images or captions. Give the same --prompt and --trigger and the "
                "same images, or choose another --run-dir"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for link in folder.rglob("*"):
            if link.is_symlink():
                link.unlink()
        for name in self.names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(source / name)
        atomic.write_text(metadata, text)


def survey(folder: str, model: ModelConfig, options: Options) -> Survey:
    """Opens every image. Raises InputError for a folder without usable images, or without captions where none are
    given, and for a --prompt that no image needs."""
    known = choices.known_buckets(model, options.size)
    config = DataConfig(folder=folder, buckets=known, on_refused=OnRefused.SKIP)
    every = open_dataset(config, captioned=False)
    captioned, is_linked = _captioned(config, options), options.prompt is not None or options.trigger is not None
    source, own = every.source.sources[0], dict[str, tuple[str, ...]]()
    if captioned is not None:
        own = {captioned.source.name(n): captioned.source.captions(n) for n in range(len(captioned.source))}
    if is_linked and not isinstance(source, FolderSource):
        raise InputError(
            f"--prompt and --trigger are for folders of images, and {folder} is a shard set. Leave them out"
        )
    used = np.unique(every.order.numbers).tolist()
    texts = {number: _with_given(own.get(every.source.name(number), ()), options) for number in used}
    kept = [number for number in used if texts[number]]
    refused = {each.file: each for each in every.refused()}
    if captioned is not None:
        usable = {every.source.name(number) for number in kept}
        refused = {each.file: each for each in captioned.refused() if each.file not in usable} | refused
    own_captions = sum(every.source.name(number) in own for number in kept)
    if options.prompt is not None and own_captions == len(kept):
        raise InputError(
            "--prompt is for images without captions, and all of these have their own. Leave it out; --trigger adds a "
            "word to them"
        )
    return Survey(
        folder,
        Images(every.source.sizes[kept], [texts[number] for number in kept]),
        [source.paths[n].relative_to(source.path).as_posix() if isinstance(source, FolderSource) else "" for n in kept],
        own_captions,
        every.source.found,
        list(refused.values()),
        is_linked,
    )


def _captioned(config: DataConfig, options: Options) -> BucketedDataset | None:
    """The images with captions of their own; None if there are none, which given captions make up for."""
    try:
        return open_dataset(dataclasses.replace(config, verify_images=False))  # that was done
    except InputError as error:
        if options.prompt is None and options.trigger is None:
            raise InputError(
                f'{error}\nTo give all images one caption: --prompt "a photo of sks dog", or --trigger sks, with a '
                "word of your own"
            ) from error
        return None


def _with_given(own: tuple[str, ...], options: Options) -> tuple[str, ...]:
    """An image's captions. own: none, or those that it has."""
    given = [text.strip() for text in (options.prompt, options.trigger) if text is not None]
    texts = own or tuple(given[:1])
    if options.trigger is None:
        return texts
    word = options.trigger.strip()
    has_it = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    return tuple(text if has_it.search(text) else f"{word}, {text}" for text in texts)
