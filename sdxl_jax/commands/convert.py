"""`sdxl-jax convert`: a model in another layout, with LoRAs merged and in another dtype."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.commands.parsing import OpenFlags
from sdxl_jax.files.paths import AnyPath

if TYPE_CHECKING:
    from sdxl_jax.weights.lazy import Weights


@dataclass(frozen=True)
class Convert(OpenFlags):
    """Convert a model to another layout: Orbax, diffusers, or a single file for ComfyUI and similar programs."""

    source: tyro.conf.Positional[AnyPath]
    """A run directory, an Orbax checkpoint, a diffusers directory, a .safetensors file, or one network alone; local or gs://…."""
    destination: tyro.conf.Positional[AnyPath]
    """New directory, or new .safetensors file for --to single-file; local or gs://…."""
    to: Literal["orbax", "diffusers", "single-file"]
    """Layout: an Orbax checkpoint, a diffusers directory, or one .safetensors file in Stability's original layout."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights. Default: that of the source."""


def run(arguments: list[str]) -> None:
    options = parsing.parse(Convert, arguments, "convert")
    from sdxl_jax.weights.convert import Layout, convert

    written = convert(_opened(options), options.destination, Layout(options.to))
    if written.left_out:
        print(
            f"note: {len(written.left_out)} tensors of the source have no name in this layout and were left out: "
            f"{', '.join(written.left_out[:8])}{' …' if len(written.left_out) > 8 else ''}",
            file=sys.stderr,
        )
    print(
        f"{', '.join(written.parts)}: {written.tensors} tensors, {written.size / 1e9:.2f} GB, in {options.destination}"
    )


def _opened(options: Convert) -> "Weights":
    """The source with its LoRAs merged and cast to the dtype; tensors are not read yet."""
    import numpy as np

    from sdxl_jax.weights import lora
    from sdxl_jax.weights.lazy import DTYPES, cast
    from sdxl_jax.weights.load import say
    from sdxl_jax.weights.open import open_model

    loras = [(lora.read(path), scale) for path, scale in map(lora.parse_option, options.lora)]
    weights = open_model(options.source, options.open_options(), options.parts_from)
    say(weights.notes)
    for read, scale in loras:
        weights = lora.merge(weights, read, scale)
        print(f"merging {read.name} × {scale:g}: {lora.describe(read)}", file=sys.stderr)
        say(lora.notes(read))
    return weights if options.dtype is None else cast(weights, np.dtype(DTYPES[options.dtype]))
