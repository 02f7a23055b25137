"""`sdxl-jax finetune`: its options. What is chosen for the others is in finetuning/choices.py, what it does in
finetuning/run.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files.paths import AnyPath, absolute
from sdxl_jax.finetuning.options import Kind, Options


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a model on a folder of images, without a configuration: it looks at the images, chooses, and says what.

    Captions are a .txt beside each image or one metadata.jsonl; images without any take --prompt or --trigger. The same
    command resumes an interrupted run. It ends with the file, a contact sheet over time, and the line that samples."""

    folder: Annotated[AnyPath, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of images, or a shard set, which may be in a bucket."""
    base: str
    """Model to start from: a run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file."""
    kind: Annotated[str, tyro.conf.arg(metavar="{lora,dreambooth,textual-inversion,full}")]
    """lora: an adapter of the UNet's attention, a small file. dreambooth: the same for one subject, beside images of
    its class (--class-prompt). textual-inversion: vectors of a new token, a tiny file. full: the whole UNet, a model of
    its own."""
    run_dir: Path | None = None
    """Run directory for everything that is written. Default: runs/FOLDER_KIND."""
    write_config: Path | None = None
    """New file for the chosen configuration, for `sdxl-jax train`, in place of training: to change any other field."""
    options: Annotated[Options, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = field(default_factory=Options)


def run(arguments: list[str], began: float) -> None:
    """began: the program's start, by `time.monotonic()`."""
    given = parsing.parse(Finetune, arguments, "finetune")
    kinds = {kind.value: kind for kind in Kind}
    if given.kind not in kinds:
        nearest = ", ".join(nearest_first(given.kind, kinds))
        raise InputError(f"--kind {given.kind} is not known. Known, nearest first: {nearest}")
    kind = kinds[given.kind]
    run_dir = given.run_dir or Path("runs") / f"{absolute(given.folder).name}_{kind.value}"
    from sdxl_jax.finetuning.run import finetune

    finetune(str(given.folder), given.base, kind, run_dir, given.options, given.write_config, began)
