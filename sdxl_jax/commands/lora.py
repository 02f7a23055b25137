"""`sdxl-jax lora`: adapter files, listed, extracted from two models, merged, resized, converted."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_jax.adapters.changes import Lora, Resolved
    from sdxl_jax.model import ModelConfig
    from sdxl_jax.weights.adapter_files.arithmetic import Limit, Result

USAGE = """usage: sdxl-jax lora list FILE ...               kinds, ranks, alphas, layers, metadata
       sdxl-jax lora extract BASE TRAINED --out OUT  the LoRA between two models
       sdxl-jax lora merge FILE:SCALE ... --out OUT  several files as one
       sdxl-jax lora resize FILE --out OUT           another rank
       sdxl-jax lora convert FILE --out OUT          another spelling or dtype

FILE is a LoRA, LoHa, LoKr or DoRA of kohya, diffusers, PEFT, OneTrainer, ComfyUI or LyCORIS.
`sdxl-jax lora merge --help` and so on list the options."""


def run(arguments: list[str]) -> None:
    commands = {"list": _list, "extract": _extract, "merge": _merge, "resize": _resize, "convert": _convert}
    if parsing.has_subcommand("lora", USAGE, arguments, commands):
        commands[arguments[0]](arguments[1:])


# list


@dataclass(frozen=True)
class List:
    """List what adapter files hold: kinds, ranks, alphas, matched layers, embeddings, metadata."""

    files: tyro.conf.Positional[tuple[AnyPath, ...]]
    """Adapter files, or folders of PEFT or diffusers; local or gs://…."""
    model: AnyPath | None = None
    """The model that they are for. Default: the published one that they fit."""
    json: bool = False
    """Print JSON instead of text."""


def _list(arguments: list[str]) -> None:
    options = parsing.parse(List, arguments, "lora list")
    if not options.files:
        raise InputError("sdxl-jax lora list needs a file. Give one or more")
    from sdxl_jax.weights import lora
    from sdxl_jax.weights.adapter_files.listing import listing, text

    found = [listing(lora.read(file), _config(options.model)) for file in options.files]
    print(json.dumps(found, indent=1) if options.json else "\n\n".join(map(text, found)))


# those that write a file


@dataclass(frozen=True, kw_only=True)
class Output:
    """Options of every command that writes an adapter file."""

    out: Path
    """The new .safetensors file."""
    to: Literal["kohya", "peft"] = "kohya"
    """Spelling: kohya, which ComfyUI, A1111, Forge, sd-scripts and diffusers read; or peft, diffusers' own."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the tensors. Default: that of the files; of an extracted LoRA float16."""
    overwrite: bool = False
    """Replace a file that exists."""


@dataclass(frozen=True, kw_only=True)
class OfAdapters(Output):
    """Options of every command that reads adapter files to write another."""

    model: AnyPath | None = None
    """The model that they are for. Default: the published one that they fit."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of the change is kept."""

    rank: int | None = None
    """Largest rank of a layer."""
    energy: float | None = None
    """Share of each layer's sum of squares that is kept, e.g. 0.95, if the rank allows."""

    def limit(self) -> "Limit":
        from sdxl_jax.weights.adapter_files.arithmetic import Limit

        return Limit(self.rank, self.energy)


@dataclass(frozen=True)
class Extract(Output, Limits):
    """Extract a LoRA: the difference of two models, by singular values, one layer at a time."""

    base: tyro.conf.Positional[AnyPath]
    """The model that was trained from, in any layout."""
    trained: tyro.conf.Positional[AnyPath]
    """The trained model, in any layout."""
    biases: bool = False
    """Biases and norms too, as differences. diffusers does not read them."""


def _extract(arguments: list[str]) -> None:
    options = parsing.parse(Extract, arguments, "lora extract")
    _check_output(options)
    options.limit().check()
    from sdxl_jax.weights.adapter_files.arithmetic import extracted
    from sdxl_jax.weights.open import open_model

    base, trained = open_model(options.base), open_model(options.trained)
    result = extracted(base, trained, options.limit(), differences_too=options.biases)
    if result.left_out:
        _note(f"{result.left_out} biases and norms differ as well and are left out; --biases adds them")
    _finish(options, result, base.config, {}, "float16")


@dataclass(frozen=True)
class Merge(OfAdapters, Limits):
    """Merge several adapter files into one, each with its strength.

    Without --rank and --energy it is exact: the ranks of a layer add up.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """FILE or FILE:SCALE, e.g. style.safetensors:0.8."""


def _merge(arguments: list[str]) -> None:
    options = parsing.parse(Merge, arguments, "lora merge")
    if not options.files:
        raise InputError("sdxl-jax lora merge needs files. Give one or more, each FILE or FILE:SCALE")
    from sdxl_jax.weights import lora

    given = [lora.parse_option(text) for text in options.files]
    limit = None if options.rank is None and options.energy is None else options.limit()
    _combine(options, [(lora.read(path), scale) for path, scale in given], limit)


@dataclass(frozen=True)
class Resize(OfAdapters, Limits):
    """Resize an adapter: the nearest LoRA of another rank, of each layer. LoHa and LoKr become LoRA."""

    file: tyro.conf.Positional[AnyPath]
    """The adapter file."""


def _resize(arguments: list[str]) -> None:
    options = parsing.parse(Resize, arguments, "lora resize")
    options.limit().check()
    from sdxl_jax.weights import lora

    _check_output(options)
    _combine(options, [(lora.read(options.file), 1.0)], options.limit())


def _combine(options: OfAdapters, files: "Sequence[tuple[Lora, float]]", limit: "Limit | None") -> None:
    _check_output(options)
    from sdxl_jax.weights.adapter_files.arithmetic import combined

    first = files[0][0]
    config, resolved = _resolved([file for file, _ in files], options.model)
    strengths = [scale for _, scale in files]
    result = combined(list(zip(resolved, strengths, strict=True)), limit)
    metadata = dict(first.metadata) if len(files) == 1 else {}
    if len(files) > 1:
        metadata["modelspec.merged_from"] = ", ".join(f"{file.name} × {scale:g}" for file, scale in files)
    metadata.pop("ss_network_args", None)
    _finish(options, result, config, metadata, _common_dtype(resolved), [file for file, _ in files])


@dataclass(frozen=True)
class Convert(OfAdapters):
    """Convert an adapter file to another spelling or dtype. Kinds, ranks and numbers stay."""

    file: tyro.conf.Positional[AnyPath]
    """The adapter file."""


def _convert(arguments: list[str]) -> None:
    options = parsing.parse(Convert, arguments, "lora convert")
    _check_output(options)
    from sdxl_jax.weights import lora
    from sdxl_jax.weights.adapter_files.arithmetic import Result

    file = lora.read(options.file)
    config, (resolved,) = _resolved([file], options.model)
    _finish(options, Result(resolved, {}), config, dict(file.metadata), None, [file])


# common


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _check_output(options: Output) -> None:
    """Before any work: raises InputError for a file that exists, or has another suffix."""
    if options.out.suffix != ".safetensors":
        raise InputError(f"--out {options.out} is not a .safetensors file. Use {options.out}.safetensors")
    if options.out.is_dir() or (options.out.exists() and not options.overwrite):
        raise InputError(f"--out {options.out} exists already. Give another file, or --overwrite")


def _config(model: AnyPath | None) -> "ModelConfig | None":
    if model is None:
        return None
    from sdxl_jax.weights.open import open_model

    return open_model(model).config


def _resolved(files: "Sequence[Lora]", model: AnyPath | None) -> "tuple[ModelConfig, list[Resolved]]":
    """(the model that all of them are for, the changes of each)."""
    from sdxl_jax.weights.adapter_files.reading import config_of, resolve

    config = _config(model) or config_of(files[0])
    return config, [resolve(file, config) for file in files]


def _common_dtype(resolved: "Sequence[Resolved]") -> str:
    """The dtype of all factors, float32 where they have several."""
    found = {
        str(value.dtype)
        for each in resolved
        for rows in each.values()
        for _, factors in rows
        for name, value in factors.items()
        if name != "alpha"
    }
    return found.pop() if len(found) == 1 else "float32"


def _finish(
    options: Output,
    result: "Result",
    config: "ModelConfig",
    metadata: dict[str, str],
    dtype: str | None,
    files: "Sequence[Lora]" = (),
) -> None:
    """Writes the file, and says what it is. dtype: where none is asked for; None: as the tensors are."""
    import numpy as np

    from sdxl_jax.weights.adapter_files import readers
    from sdxl_jax.weights.adapter_files.export import write
    from sdxl_jax.weights.adapter_files.names import Spelling
    from sdxl_jax.weights.lazy import DTYPES

    spelling, wanted = Spelling(options.to), options.dtype or dtype
    bundled: dict[str, Any] = {}
    for file in files:
        if twice := bundled.keys() & file.bundled.keys():
            raise InputError(f"{file.name} and another file both hold the embedding {min(twice)}. Merge them apart")
        bundled |= file.bundled
    if bundled and spelling is Spelling.PEFT:
        _note("the embeddings in the file are left out: diffusers refuses a LoRA with tensors that it does not know")
        bundled = {}
    number = None if wanted is None else np.dtype(DTYPES.get(wanted, wanted))
    count = write(options.out, result.resolved, config, spelling, number, metadata, bundled)
    layers = sum(len(rows) for rows in result.resolved.values())
    print(f"{options.out}: {count} tensors of {layers} layers, {options.out.stat().st_size / 1e6:.1f} MB")
    if kept := result.energy.values():
        least = min(result.energy, key=lambda key: result.energy[key])
        place = least[0] if least[1] is None else f"{least[0]}, layer {least[1]}"
        print(f"energy kept: {sum(kept) / len(kept):.4f} on average, at least {result.energy[least]:.4f} ({place})")
    alphas = {float(factors["alpha"]) for rows in result.resolved.values() for _, factors in rows if "alpha" in factors}
    if len(alphas) > 1 and spelling is Spelling.KOHYA:
        _note(
            f"{len(alphas)} different alphas: diffusers takes the most frequent for attention and text layers. For "
            "diffusers use --to peft, or sdxl-jax lora resize, which writes one alpha"
        )
    for note in readers.notes({path: rows[0][1] for path, rows in result.resolved.items()}, spelling):
        _note(note)
    if result.narrower:
        _note(f"{result.narrower} layers are narrower than the rank and are exact")
