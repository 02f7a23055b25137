"""`sdxl-jax finetune`: inspect the images, choose a configuration, train, show what was learnt.

    images ── survey ──┐
                       ├── choices ── table ── training/loop ── RUN/samples ── RUN/contact_sheet.png
    base ── config ────┘

All of it calls the same code as `sdxl-jax train`; this module has the order of the steps, and what is printed.
"""

import shlex
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_jax.arrays import BaseDtype
from sdxl_jax.compilation import compilation_cache
from sdxl_jax.config import ProcessesConfig, TrainConfig
from sdxl_jax.data.buckets import assign
from sdxl_jax.data.sources import summary
from sdxl_jax.errors import InputError, out_of_memory
from sdxl_jax.evaluation.class_images import sample_class_images
from sdxl_jax.files import atomic
from sdxl_jax.finetuning import choices, config_file
from sdxl_jax.finetuning.choices import Machine
from sdxl_jax.finetuning.options import Kind, Options
from sdxl_jax.finetuning.survey import Survey, survey
from sdxl_jax.model import ModelConfig
from sdxl_jax.progress import tqdm
from sdxl_jax.sampling import options as sampling_options
from sdxl_jax.sampling.contact_sheet import first_row, labelled_grid, save_png
from sdxl_jax.training.loop import check_run, train
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.processes import Processes
from sdxl_jax.weights.load import say
from sdxl_jax.weights.open import open_model

SHEET, CLASS_FOLDER = "contact_sheet.png", "class_images"
_TILE = 320
"""Width below twice of which an image stands on the contact sheet as it is, in pixels; wider ones are reduced to it."""


def finetune(
    folder: str,
    base: str,
    kind: Kind,
    run_dir: Path,
    options: Options,
    write_config: Path | None = None,
    began: float | None = None,
) -> None:
    """Trains `kind` of the base on the images in a folder, resuming an interrupted call with the same arguments.

    write_config: write the chosen configuration there instead. began: as in `loop.train`.

    Raises InputError before anything is written: for a base that cannot be trained, no images or captions, a run
    directory of another configuration.
    """
    options.check(kind)
    model = _opened(base)
    found = survey(folder, model, options)
    folders = found.folder(run_dir), str(run_dir / CLASS_FOLDER)
    config = choices.choose(kind, *folders, found.images, base, model, _machine(), options)
    objective_of(config).check()
    check_run(config, run_dir)
    if write_config is not None and write_config.exists():
        raise InputError(f"--write-config {write_config} exists already. Give a new file")
    tqdm.write(table(config, found, run_dir, options))
    found.write(run_dir)
    if write_config is not None:
        about = f"Fine-tuning of {base} on {folder}: what `sdxl-jax finetune --kind {kind.value}` chose."
        atomic.write_text(write_config, config_file.source(config, about))
        tqdm.write(_how_to_train(config, write_config, run_dir, base, options))
        return
    if options.class_prompt is not None:
        tqdm.write(f"Images of the class, in {folders[1]}")
        compilation_cache.use(config.training.compilation_cache)
        settings = _class_settings(config, options)
        sample_class_images(base, Path(folders[1]), options.class_prompt, settings, dtype=config.compute.dtype)
    try:
        train(config, run_dir, began=began)
    except InputError as error:
        if error.__cause__ is None or out_of_memory(error.__cause__) is None:
            raise
        raise InputError(f"{error}. {_smaller(config)}") from error.__cause__
    save_png(contact_sheet(config, run_dir), run_dir / SHEET)
    tqdm.write(_results(config, run_dir, base))


def _opened(base: str) -> ModelConfig:
    """The base's configuration. Raises InputError for what is no whole model of captions."""
    weights = open_model(base)
    say(weights.notes)
    model = weights.config
    if missing := [part for part in model.parts if part not in weights.parts]:
        raise InputError(
            f"--base {base} has no {', '.join(missing)}. Give a whole model, with its autoencoder and text encoders"
        )
    reason = None
    if not model.text:
        reason = "is a model of classes, without text encoders"
    elif model.is_refiner:
        reason = "is a refiner, which is conditioned on aesthetic scores"
    elif model.sees_mask:
        reason = "is a model for inpainting"
    if reason is not None:
        raise InputError(
            f"--base {base} {reason}: this command does not train it. Give another base, or write a configuration for "
            "`sdxl-jax train`"
        )
    return model


def _class_count(options: Options) -> int:
    return options.class_images or choices.CLASS_IMAGES


def _class_settings(config: TrainConfig, options: Options) -> sampling_options.Options:
    """Of DreamBooth's images of the class: in the size of most of the subject's."""
    height, width = config.validation.sizes[0]
    count = _class_count(options)
    return sampling_options.Options(num_images=count, height=height, width=width, seed=options.seed)


def _machine() -> Machine:
    with Processes(ProcessesConfig().join_timeout_seconds) as processes:  # before a device is touched
        if processes.count > 1:
            raise InputError(
                f"finetune is for one process, and the environment describes {processes.count}. Write a configuration "
                "with --write-config in one, and train it with `sdxl-jax train` in all of them"
            )
        return Machine(jax.default_backend(), jax.device_count())


# What is printed


def table(config: TrainConfig, found: Survey, run_dir: Path, options: Options) -> str:
    """What was chosen, line by line, each with the option that overrides it."""
    images, data = found.images, config.data
    count, pixels = len(images.sizes), images.sizes.prod(axis=1)
    least, most = (images.sizes[index] for index in (pixels.argmin(), pixels.argmax()))
    members = np.bincount(assign(images.sizes, data.buckets).bucket, minlength=len(data.buckets))
    sizes = ", ".join(f"{h}×{w} ({n})" for (h, w), n in zip(data.buckets, members, strict=True))
    captions = [f"{found.own_captions} images have their own"] if found.own_captions else []
    captions += [f"{count - found.own_captions} get the given one"] if count > found.own_captions else []
    validation, compute = config.validation, config.compute
    (height, width), every = validation.sizes[0], validation.every_steps
    epochs = config.training.steps * data.batch_size / count / (2 if data.sources else 1)
    of_class = f"{_class_count(options)} images of {options.class_prompt!r}, from the base, as every second example"
    rows = [
        ("images", f"{count} of {found.found}, {least[0]}×{least[1]} to {most[0]}×{most[1]} pixels", ""),
        ("captions", ", ".join(captions), "--prompt --trigger"),
        *([("class", of_class, "--class-prompt --class-images")] if data.sources else []),
        ("trained at", f"{sizes}: height × width (images)", "--size"),
        ("trained", *_trained(config)),
        ("batch", f"{data.batch_size} image{'s' * (data.batch_size > 1)} a step", "--batch-size"),
        ("steps", f"{config.training.steps}, {epochs:.3g} epochs", "--steps"),
        ("learning rate", f"{config.optimiser.learning_rate:g}", "--learning-rate"),
        ("precision", f"{compute.dtype.value}, recomputed backwards: {compute.remat.value}", "--write-config"),
        (
            "validation",
            f"{height}×{width}, before and every {every} steps: {'; '.join(validation.prompts)}",
            "--validation-prompt",
        ),
        ("run directory", str(run_dir), "--run-dir"),
    ]
    names, flags = max(len(row[0]) for row in rows), max(len(row[2]) for row in rows)
    lines = [f"  {name:<{names}}  {flag:<{flags}}  {value}" for name, value, flag in rows]
    return "\n".join([*_notes(config, found), "Chosen, and how to choose otherwise:", *lines])


def _trained(config: TrainConfig) -> tuple[str, str]:
    """(what is trained, the options that change it)."""
    adapter, token = config.adapter, config.textual_inversion
    if adapter is not None:
        beside = f"beside the base in {adapter.base_dtype.value}"
        return f"LoRA of the UNet's attention, rank {adapter.rank}, {beside}", "--kind --rank --quantize"
    if token is not None:
        begin = "random" if token.initial is None else f"at first {token.initial!r}"
        what = f"{token.vectors} vectors of the new token {token.token} in each text encoder, {begin}"
        return f"{what}, beside the base in {token.base_dtype.value}", "--kind --vectors --initial --quantize"
    return "the whole UNet", "--kind"


def _notes(config: TrainConfig, found: Survey) -> list[str]:
    notes, count = [], len(found.images.sizes)
    if found.refused:
        notes.append(f"{len(found.refused)} files are left out:\n{summary(found.refused, len(found.refused))}")
    if count < choices.FEW:
        images = "1 image is" if count == 1 else f"{count} images are"
        notes.append(
            f"note: {images} few, and will be learnt by heart: background, pose and light too. 5 to 20 are usual"
        )
    area = min(height * width for height, width in config.data.buckets)
    if small := int((found.images.sizes.prod(axis=1) < area).sum()):
        notes.append(f"note: {small} images have fewer pixels than they are trained at, and are enlarged")
    return notes


def _smaller(config: TrainConfig) -> str:
    """What of this command needs less memory."""
    height, width = config.validation.sizes[0]
    adapter, token = config.adapter, config.textual_inversion
    beside = adapter or token
    options = [
        f"--batch-size below {config.data.batch_size}" if config.data.batch_size > 1 else "",
        "--kind lora" if beside is None else "--quantize int8" if beside.base_dtype is not BaseDtype.INT8 else "",
        f"--rank below {adapter.rank}" if adapter is not None and adapter.rank > 1 else "",
        f"--size below {round((height * width) ** 0.5)}",
    ]
    return f"Of finetune: {', '.join(filter(None, options))}; --write-config FILE.py for the fields"


def _line(*words: object) -> str:
    return shlex.join(["sdxl-jax", *map(str, words)])


def _how_to_train(config: TrainConfig, written: Path, run_dir: Path, base: str, options: Options) -> str:
    """The commands for a configuration that was written."""
    lines = [_line("train", written, "--run-dir", run_dir)]
    if options.class_prompt is not None:
        settings, given = _class_settings(config, options), ["--prompt", options.class_prompt]
        for name in ("num_images", "height", "width", "seed"):
            given += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
        given += ["--dtype", config.compute.dtype.value]
        lines.insert(0, _line("data", "class-images", base, run_dir / CLASS_FOLDER, *given))
    return "\n  ".join(["Written. Train with", *lines])


def _results(config: TrainConfig, run_dir: Path, base: str) -> str:
    """The paths, and the command that samples."""
    file, more = run_dir / f"{run_dir.name}.safetensors", ""
    if config.adapter is not None:
        what, path, model = "adapter", file, [base, "--lora", file]
    elif config.textual_inversion is not None:
        what, path, model = "embedding", file, [base, "--embedding", f"{file}:{config.textual_inversion.token}"]
    else:
        what, path, model = "model", run_dir, [run_dir]
        single = _line("convert", run_dir, f"{run_dir}.safetensors", "--to", "single-file")
        more = f"\nAs one file for other programs:\n  {single}"
    rows = [("contact sheet", run_dir / SHEET), ("images", run_dir / "samples"), (what, path)]
    lines = "\n".join(f"  {name:<13}  {path}" for name, path in rows)
    sample = _line("sample", *model, "--prompt", config.validation.prompts[0], "--out", "images")
    return f"\n{lines}\nSample with\n  {sample}{more}"


def contact_sheet(config: TrainConfig, run_dir: Path) -> Image.Image:
    """The validation images over time: one row per step, the first before training, and one column per prompt. Those of
    other prompts or sizes, with which the run was started, are left out."""
    prompts, (height, width) = config.validation.prompts, config.validation.sizes[0]
    rows, labels, scale = list[list[UInt8[np.ndarray, "_height _width 3"]]](), list[str](), max(1, width // _TILE)
    for path in sorted((run_dir / "samples").glob("step_*.png")):
        with Image.open(path) as grid:
            images = first_row(grid, len(prompts), height, width)
        if images is not None:
            rows.append([np.asarray(Image.fromarray(image).reduce(scale)) for image in images])
            step = int(path.stem.removeprefix("step_"))
            labels.append(f"step {step}" if step else "before")
    return labelled_grid(rows, prompts, labels)
