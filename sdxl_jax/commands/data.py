"""`sdxl-jax data`: build shards, inspect a dataset as training sees it, encode it once for all epochs."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sdxl_jax.commands import parsing, signals
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath, local
from sdxl_jax.sampling.options import Options

USAGE = """usage: sdxl-jax data build SRC DST             pack captioned images into shards
       sdxl-jax data build SRC DST --runner beam -- PIPELINE OPTIONS
       sdxl-jax data inspect SRC-or-CONFIG     images, buckets and refusals, as training sees them
       sdxl-jax data encode CONFIG.py          latents and text states, computed once for all epochs
       sdxl-jax data class-images MODEL DIR    images of a class for prior preservation, sampled from a model

`sdxl-jax data build --help` and so on list the options."""


def run(arguments: list[str]) -> None:
    commands = {"build": _build, "inspect": _inspect, "encode": _encode, "class-images": _class_images}
    if parsing.has_subcommand("data", USAGE, arguments, commands, listed="build, inspect, encode or class-images"):
        commands[arguments[0]](arguments[1:])


# build


@dataclass(frozen=True)
class Build:
    """Pack captioned images into shards for training. Runs in parallel, resumes, and lists what it refuses.

    With --runner beam everything after -- is an option of the Apache Beam pipeline, e.g. -- --runner DataflowRunner.
    """

    source: tyro.conf.Positional[str]
    """A folder of images, tars (WebDataset), Parquet files, local or in a bucket (gs://...), or tfds:NAME."""
    destination: tyro.conf.Positional[AnyPath]
    """A new folder, local or in a bucket, or that of an interrupted build of the same source, which is resumed."""
    workers: int | None = None
    """Worker processes. Default: one per core."""
    runner: Literal["local", "beam"] = "local"
    """Who reads the source: local, processes of this machine; or beam, the workers of an Apache Beam pipeline."""
    drop_duplicates: bool = False
    """Leave out images whose files equal an earlier one's byte for byte. Default: count them only."""
    caption_lines: Literal["lines", "whole"] = "lines"
    """Captions of a .txt file: lines, one caption per line; or whole, one caption, e.g. in paragraphs."""
    captions: bool = True
    """Images without a caption are refused. --no-captions: captions are not read, for models of classes and
    autoencoders."""
    class_folders: bool = False
    """Number the subfolders of a folder of images, in alphabetical order, as classes: numeric field "folder"."""


def _build(arguments: list[str]) -> None:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, pipeline = parsing.parse(Build, arguments[:end], "data build"), arguments[end + 1 :]
    if options.runner == "local" and pipeline:
        raise InputError(f"Pipeline options are given ({' '.join(pipeline)}) without --runner beam. Add it")
    if options.runner == "beam" and options.workers is not None:
        raise InputError(
            f"--workers {options.workers} has no effect with --runner beam. Give the pipeline's option instead, e.g. "
            "-- --direct_num_workers 8"
        )
    with signals.stop():
        _run_build(options, pipeline if options.runner == "beam" else None)


def _run_build(options: Build, pipeline: list[str] | None) -> None:
    from sdxl_jax.data.build.build import build
    from sdxl_jax.data.captions import CaptionLines

    built = build(
        options.source,
        options.destination,
        workers=options.workers,
        drop_duplicates=options.drop_duplicates,
        caption_lines=CaptionLines(options.caption_lines),
        captions=options.captions,
        class_folders=options.class_folders,
        pipeline=pipeline,
    )
    done = "was finished already" if built.was_finished else "finished"
    captions = f"{built.captions} captions, " if options.captions else ""
    print(
        f"{options.destination} {done}: {built.images} images, {captions}{built.refused} refused "
        f"(refused.jsonl), {built.duplicates} exact duplicates {'left out' if options.drop_duplicates else 'counted'}"
    )


# inspect


@dataclass(frozen=True)
class Inspect:
    """Inspect a dataset as training sees it: images, buckets, refusals."""

    source: tyro.conf.Positional[AnyPath]
    """A folder of captioned images, a shard set, which may be in a bucket, or a configuration file."""
    json: bool = False
    """Print JSON instead of a table."""
    dump: Annotated[tuple[int, Path] | None, tyro.conf.arg(metavar="N DIR")] = None
    """Write the first N training examples to DIR: the image as the model sees it, with caption and conditioning."""
    plot: Path | None = None
    """Plot sizes, buckets and some batches to a PNG, PDF or SVG file (needs matplotlib)."""


def _inspect(arguments: list[str]) -> None:
    options = parsing.parse(Inspect, arguments, "data inspect")
    from sdxl_jax.config import load
    from sdxl_jax.data import inspection, plots
    from sdxl_jax.data.settings import DataConfig

    is_config = options.source.suffix == ".py"
    run = load(local(options.source, "the configuration")) if is_config else None
    config = DataConfig(folder=str(options.source)) if run is None else run.data
    if options.plot is not None:
        plots.check(options.plot)
    dataset = inspection.open_dataset(config, captioned=run is None or run.wants_captions)
    if options.plot is not None:
        plots.plot(dataset, options.plot)
    report = inspection.inspect(dataset)
    if options.dump is not None:
        inspection.dump(dataset, *options.dump)
    print(json.dumps(report, indent=1) if options.json else _table(report))


def _table(report: dict[str, Any]) -> str:
    found, usable, refused = report["images_found"], report["images_usable"], report["refused"]
    lines = [f"{found} images found, {usable} usable, {len(refused)} refused"]
    lines += [f"  refused {entry['file']}: {entry['reason']}" for entry in refused]
    lines += [f"note: {note}" for note in report["notes"]]
    if report["too_small"]:
        lines.append(f"{report['too_small']} images below data.min_size left out")
    if len(report["sources"]) > 1:
        lines += [
            f"{each['folder']}: weight {each['weight']:g}, {each['images']} images, {each['share']:.1%} of an epoch"
            for each in report["sources"]
        ]
    if report["numbers"]:
        lines.append(f"numbers of every source: {', '.join(report['numbers'])}")
    if classes := report.get("classes"):
        lines.append(f"{classes['found']} classes, of {classes['fewest']} to {classes['most']} images")
    lines.append(f"{report['epoch_steps']:.6g} steps per epoch")
    lines.append("  height  width  images  batches  batch size  left out  repeated")
    for b in report["buckets"]:
        if b["images"]:
            counts = (
                f"{b['images']:6}  {b['batches']:7.4g}  {b['batch_size']:10}  {b['remainder']:8}  {b['repeated']:8}"
            )
            lines.append(f"  {b['height']:6}  {b['width']:5}  {counts}")
        elif b["merged_into"]:
            lines.append(f"  {b['height']:6}  {b['width']:5}  merged into {b['merged_into'][0]}×{b['merged_into'][1]}")
    return "\n".join(lines)


# encode


ENCODE_USAGE = """usage: sdxl-jax data encode CONFIG.py [--data.cache DIR] [--share I N] [--section.field VALUE ...]

Encode every crop and caption of a training configuration once, into its data.cache, which training then reads instead
of the images. The same command resumes an interrupted one. data.crops_per_image is the number of crops per image.
`sdxl-jax data encode CONFIG.py --help` lists every field with its default in that file.
"""


@dataclass(frozen=True)
class Encode:
    """Encode every crop and caption of a training configuration once, into its data.cache."""

    batch_size: int = 8
    """Images, or captions, per batch. Higher: faster, until memory runs out."""
    share: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="I N")] = None
    """Encode every N-th piece, starting with piece I (from 0), for N processes that share the work. Default: jax's
    processes share it."""


def _encode(arguments: list[str]) -> None:
    path = parsing.config_path(arguments, "data encode", ENCODE_USAGE)
    with signals.stop():
        _run_encode(path, arguments[1:])


def _run_encode(path: Path, arguments: list[str]) -> None:
    from sdxl_jax.config import load

    options, config = parsing.parse_with_config(Encode(), load(path), arguments, f"data encode {path}")
    from sdxl_jax.progress import log_format
    from sdxl_jax.training.encoding import encode

    with log_format(config.logging.format):
        plan, refused = encode(config, batch_size=options.batch_size, share=options.share)
    missing = len(plan.missing())
    state = f"{missing} of {plan.pieces} pieces are missing, of other shares" if missing else "complete"
    bad = f"; {refused} could not be encoded, training replaces them" if refused else ""
    print(f"{plan.folder}: {plan.images} images, {plan.crops} crops of each; {state}{bad}")


# class-images


@dataclass(frozen=True, kw_only=True)
class ClassImages(parsing.OpenFlags):
    """Sample images of a class from a model, as a folder to train on beside those of a subject. Resumes."""

    model: tyro.conf.Positional[AnyPath]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file; local or gs://…."""
    folder: tyro.conf.Positional[Path]
    """Folder for the images and their captions. Images that are there are kept."""
    prompt: str
    """Prompt and caption of every image, the class: "a photo of a dog"."""
    negative_prompt: str | None = None
    """Negative prompt of every image."""
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=lambda: Options(num_images=100))
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations."""


def _class_images(arguments: list[str]) -> None:
    options = parsing.parse(ClassImages, arguments, "data class-images")
    with signals.stop():
        _run_class_images(options)


def _run_class_images(options: ClassImages) -> None:
    from sdxl_jax.compilation import compilation_cache
    from sdxl_jax.evaluation.class_images import sample_class_images
    from sdxl_jax.models.layers import Dtype

    compilation_cache.use("user")
    sampled = sample_class_images(
        options.model,
        options.folder,
        options.prompt,
        options.options,
        negative_prompt=options.negative_prompt,
        dtype=Dtype(options.dtype),
        opening=options.open_options(),
        parts_from=options.parts_from,
        loras=options.lora,
    )
    print(f"{options.folder}: {options.options.num_images} images of {options.prompt!r}, {sampled} of them sampled now")
