"""The command line, and the only place that parses arguments.

Exit code 0 when done; 2 when the input is at fault, with one message on stderr and no traceback unless --debug.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from sdxl_jax.errors import InputError, nearest_first

if TYPE_CHECKING:
    from sdxl_jax.config import TrainConfig
    from sdxl_jax.opening import Opening
    from sdxl_jax.pipeline import Geometry

_BEGAN = time.monotonic()
_T = TypeVar("_T")
_CONF = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff)


def _parse(kind: type[_T], arguments: list[str], command: str, **options: Any) -> _T:
    return tyro.cli(kind, args=arguments, prog=f"sdxl-jax {command}", config=_CONF, **options)


@dataclass(frozen=True)
class Quickstart:
    """Train a small SDXL on pictures that come along, sample it, measure it: about ten minutes on two cores."""

    run_dir: Path = Path("runs/quickstart")
    """Where everything is written. Run again with the same folder, it goes on where it was."""
    train_autoencoder: bool = False
    """Train the small autoencoder too (about an hour) instead of taking the one that comes along."""
    seed: int = 0
    """Initial weights, order, noise."""


def _quickstart(arguments: list[str]) -> None:
    options = _parse(Quickstart, arguments, "quickstart")
    from sdxl_jax.quickstart.story import quickstart

    quickstart(options.run_dir, options.train_autoencoder, options.seed)


_TRAIN_USAGE = """usage: sdxl-jax train CONFIG.py [--run-dir DIR] [--section.field VALUE ...]

Train what a configuration file describes. Run again with the same run directory, it goes on from the last checkpoint.
SIGTERM, or Ctrl-C, stops it once what was done is saved. On several machines, give each the same command.
`sdxl-jax train CONFIG.py --help` lists every field with its default in that file; configs/ holds examples.
"""


def _configured(
    kind: type[_T], arguments: list[str], command: str, usage: str, extra: Callable[[Path], dict[str, Any]]
) -> tuple[_T, "TrainConfig"]:
    """The configuration file that comes first, with the overrides that follow. `kind` has all fields of TrainConfig and
    more of its own, whose defaults `extra` gives for the file."""
    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] in (["-h"], ["--help"]):
            print(usage)
            sys.exit(0)
        raise InputError(f"The first argument of {command} is a configuration file.\n{usage}")
    from sdxl_jax import config as configuration

    path = Path(arguments[0])
    names = [entry.name for entry in dataclasses.fields(configuration.TrainConfig)]
    loaded = configuration.load(path)
    default = kind(**extra(path), **{name: getattr(loaded, name) for name in names})
    options = _parse(kind, arguments[1:], f"{command} {path}", default=default)
    return options, configuration.TrainConfig(**{name: getattr(options, name) for name in names})


def _train(arguments: list[str]) -> None:
    if threading.current_thread() is threading.main_thread():
        # Until the loop takes it over: there is nothing to save yet.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    from sdxl_jax import config as configuration

    @dataclass(frozen=True)
    class Train(configuration.TrainConfig):
        """Train what a configuration file describes. Run again with the same run directory, it goes on."""

        run_dir: Path = Path("runs")
        """Where checkpoints, metrics and pictures are written."""
        profile: Annotated[str | None, tyro.conf.arg(metavar="FIRST:LAST")] = None
        """Trace these steps, both included, into RUN/profile, for xprof. Not a part of the run's configuration."""
        from_step: int | None = None
        """Go on from this checkpoint instead of the last one; those after it are moved to RUN/set_aside. For once: the
        next start goes on from the last one again only if this is left out."""
        allow_changes: str | None = None
        """FIELD,FIELD: what may differ from the run's configuration although it alters what is learnt."""

    options, config = _configured(
        Train, arguments, "train", _TRAIN_USAGE, lambda path: {"run_dir": Path("runs") / path.stem}
    )
    from sdxl_jax.training import loop

    print(json.dumps(configuration.to_json(config), indent=1))
    allowed = options.allow_changes.split(",") if options.allow_changes else ()
    loop.train(
        config,
        options.run_dir,
        from_step=options.from_step,
        allow_changes=allowed,
        profile=_steps("--profile", options.profile),
        began=_BEGAN,
    )


_COMPILE_USAGE = """usage: sdxl-jax compile CONFIG.py --topology NAME [--slices N] [--section.field VALUE ...]

Compile what a configuration would run, for TPU slices that are not here: memory, operations, time, communication.
`sdxl-jax compile CONFIG.py --help` lists every field with its default in that file. Needs libtpu, and no TPU.
"""


def _compile(arguments: list[str]) -> None:
    # Compiling needs no accelerator, and one that is here would only be kept from others.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sdxl_jax import config as configuration

    @dataclass(frozen=True)
    class Compile(configuration.TrainConfig):
        """Compile the train step, or the sampler, for TPU slices that are not here."""

        topology: str | None = None
        """The slice: chip and arrangement, e.g. v5e:4x4, v5p:2x2x2, v6e:8x8. A wrong one lists the known."""
        slices: int | None = None
        """How many such slices, joined by the data-centre network. Default: mesh.slices."""
        program: Literal["train", "sample"] = "train"
        """The train step; or the sampler, with validation's sizes, steps and guidance."""
        bucket: str | None = None
        """HxW of the bucket that the train step is compiled for. Default: the one with the most pixels."""
        all_buckets: bool = False
        """Compile the train step for every bucket of the configuration."""
        parallel: int = 1
        """Programs compiled at once. Higher: faster with more cores; each takes about 10 GiB for the 2.6B model."""
        json: bool = False
        """Print JSON instead of a table."""

    options, config = _configured(Compile, arguments, "compile", _COMPILE_USAGE, lambda path: {})
    if options.topology is None:
        raise InputError("Give --topology, e.g. --topology v5p:2x2x2")
    if options.bucket is not None and options.all_buckets:
        raise InputError("--bucket and --all-buckets are both given. Give one of them")
    if options.program == "sample" and (options.bucket is not None or options.all_buckets or options.parallel != 1):
        raise InputError(
            "--bucket, --all-buckets and --parallel are about the train step. The sampler's sizes are validation.sizes"
        )
    if options.parallel < 1:
        raise InputError(f"--parallel {options.parallel}: expected 1 or more")
    from sdxl_jax.ahead import compile as ahead
    from sdxl_jax.data.buckets import Bucket

    buckets = None
    if options.all_buckets:
        buckets = [Bucket(*bucket) for bucket in config.data.buckets]
    elif options.bucket is not None:
        buckets = [Bucket(*_pair("--bucket", options.bucket, "x", "HxW in pixels, e.g. 1024x1024"))]
    if options.program == "sample":
        made = ahead.compile_sampler(config, options.topology, slices=options.slices)
    else:
        made = ahead.compile_step(
            config, options.topology, slices=options.slices, buckets=buckets, parallel=options.parallel
        )
    if options.json:
        print(json.dumps([each.as_json() for each in made], indent=1))
        return
    for each in made:
        print(f"{each}\n{ahead.verdict(each, config)}\n")
    if options.program == "train":
        from sdxl_jax.training import programs

        cache = config.training.compilation_cache
        print(
            "Not kept: training.compilation_cache names no folder."
            if cache is None
            else f"Kept in {programs.folder(cache)}: training with this configuration and training.compilation_cache "
            "reads them."
        )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """What can be said of any model that is opened."""

    parts_from: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Another model, or one network alone, whose parts take the place of this one's, e.g. another autoencoder."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:SCALE; a LoRA that is merged into the weights. May be given several times."""
    variant: str | None = None
    """Which weights of a diffusers directory: fp16 for *.fp16.safetensors. Default: those without a variant."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet outputs, for files that do not tell."""
    allow_partial: bool = False
    """Take what fits of a model whose tensors do not all fit; the rest has its initial values, and is listed."""

    def opening(self, mixed: bool = False) -> "Opening":
        from sdxl_jax.diffusion.parameterisation import Prediction
        from sdxl_jax.opening import Opening

        prediction = None if self.prediction is None else Prediction(self.prediction)
        return Opening(self.variant, prediction, self.allow_partial, mixed)


@dataclass(frozen=True)
class Sample(_Opened):
    """Draw pictures of prompts with a model."""

    model: tyro.conf.Positional[Path]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file."""
    out: Path
    """Folder for 000000.png and so on, in order of prompts, then images."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw. May be given several times."""
    prompts_file: Path | None = None
    """Text file with one prompt a line, drawn after those of --prompt."""
    negative_prompt: str | None = None
    """What guidance leads away from. Absent is not the same as empty."""
    embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:TOKEN; a textual inversion. TOKEN is what prompts call it, default: the file's own or its name."""
    height: int | None = None
    """Pixels, a multiple of 8. Default: the model's own."""
    width: int | None = None
    """Pixels, a multiple of 8. Default: the model's own."""
    steps: int = 30
    """Steps of the sampler. Higher: slower, finer."""
    sampler: Literal["ddpm", "ddim", "euler"] = "euler"
    """How a step is made."""
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    """Which timesteps are visited: leading as diffusers (981 … 1), trailing as sgm (999 … 19)."""
    guidance: float = 5.0
    """Strength of classifier-free guidance; 1 is none and costs half."""
    seed: int = 0
    """Picture k depends on the seed and k, not on how many are drawn."""
    num_images: int = 1
    """Pictures a prompt."""
    batch_size: int = 4
    """Pictures at a time. Higher: faster until memory ends."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations."""
    original_size: str | None = None
    """HxW that the model is told the picture had before any resize. Default: the picture's size."""
    crop: str = "0,0"
    """TOP,LEFT that the model is told the picture was cropped at."""
    target_size: str | None = None
    """HxW that the model is told it draws. Default: the picture's size."""
    negative_original_size: str | None = None
    """The same for the negative prompt. Default: as for the prompt."""
    negative_crop: str | None = None
    """The same for the negative prompt. Default: as for the prompt."""
    negative_target_size: str | None = None
    """The same for the negative prompt. Default: as for the prompt."""
    aesthetic_score: float | None = None
    """Rating that a refiner is told, about 1 to 10. Default 6."""
    negative_aesthetic_score: float | None = None
    """Rating that a refiner is told for the negative prompt. Default 2.5."""
    init_noise: Path | None = None
    """NPY file, standard normal float32 [images, height/8, width/8, 4], in place of the seeded noise."""
    save_latents: bool = False
    """Also write latents.npy, float32 [images, height/8, width/8, 4], scaled as the UNet sees them."""


def _sample(arguments: list[str]) -> None:
    options = _parse(Sample, arguments, "sample")
    import numpy as np
    from PIL import Image

    from sdxl_jax.conditioning.text import Tokenizer
    from sdxl_jax.interop import inversion, lora
    from sdxl_jax.loading import load_weights
    from sdxl_jax.models.layers import Compute, Dtype
    from sdxl_jax.opening import open_model
    from sdxl_jax.pictures import save_png
    from sdxl_jax.pipeline import Geometry, generate
    from sdxl_jax.samplers.steps import Spacing

    prompts = list(options.prompt)
    if options.prompts_file is not None:
        lines = [line for line in _read_text(options.prompts_file).splitlines() if line.strip()]
        if any(line.startswith("{") for line in lines):
            raise InputError(f"{options.prompts_file} has lines of JSON. Give one prompt a line, and options by flags")
        prompts += lines
    if not prompts:
        raise InputError("There is nothing to draw. Give --prompt TEXT, once or several times, or --prompts-file FILE")
    geometry = Geometry(
        _size("--original-size", options.original_size),
        _position("--crop", options.crop),
        _size("--target-size", options.target_size),
        options.aesthetic_score,
    )
    noise = None
    if options.init_noise is not None:
        try:
            noise = np.load(options.init_noise)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"--init-noise {options.init_noise} is no readable NPY file ({error}). Give one that numpy.save wrote"
            ) from error
        if not isinstance(noise, np.ndarray) or not np.issubdtype(noise.dtype, np.floating):
            kind = f"of {noise.dtype}" if isinstance(noise, np.ndarray) else "an NPZ archive"
            raise InputError(f"--init-noise {options.init_noise} is {kind}. Give an NPY file of float32")
    if options.out.exists() and not options.out.is_dir():
        raise InputError(f"--out {options.out} is a file. Give a folder, new or old")

    loras = [(lora.read(path), scale) for path, scale in map(lora.parse_option, options.lora)]
    model = load_weights(open_model(options.model, options.opening(), options.parts_from))
    for read, scale in loras:
        model = lora.add(model, read, scale)
    for line in lora.listing(model):
        print(f"merged {line}", file=sys.stderr)
    for embedding in options.embedding:
        model = inversion.add(model, *_file_and_token(embedding))
    tokenizer = Tokenizer.of(model.config.text)
    for number, beyond in enumerate(tokenizer.truncated([*prompts, options.negative_prompt or ""])):
        if beyond:
            what = f"prompt {number + 1}" if number < len(prompts) else "the negative prompt"
            print(f"warning: {beyond} tokens of {what} are beyond the 75 that are read", file=sys.stderr)
    made = generate(
        model,
        prompts,
        negative_prompts=[options.negative_prompt] * len(prompts),
        height=options.height,
        width=options.width,
        steps=options.steps,
        sampler=options.sampler,
        timestep_spacing=Spacing(options.timestep_spacing),
        guidance=options.guidance,
        seed=options.seed,
        num_images=options.num_images,
        geometry=geometry,
        negative_geometry=_negative_geometry(options, geometry),
        init_noise=noise,
        batch_size=options.batch_size,
        compute=Compute(dtype=Dtype(options.dtype)),
        progress=True,
    )
    settings = dataclasses.asdict(options) | {"prompt": None, "prompts_file": None, "out": None}
    for number, image in enumerate(made.images):
        prompt = prompts[number // options.num_images]
        text = {"prompt": prompt, "index": str(number)} | {
            name: str(value) for name, value in settings.items() if value is not None and value != ()
        }
        save_png(Image.fromarray(image), options.out / f"{number:06d}.png", text)
    if options.save_latents:
        np.save(options.out / "latents.npy", made.latents)
    print(f"{len(made.images)} pictures in {options.out}")


def _negative_geometry(options: Sample, geometry: "Geometry") -> "Geometry":
    changed = {
        "original_size": _size("--negative-original-size", options.negative_original_size),
        "crop_top_left": _position("--negative-crop", options.negative_crop) if options.negative_crop else None,
        "target_size": _size("--negative-target-size", options.negative_target_size),
    }
    given = {name: value for name, value in changed.items() if value is not None}
    return geometry._replace(aesthetic_score=options.negative_aesthetic_score, **given)


def _size(option: str, value: str | None) -> tuple[int, int] | None:
    return None if value is None else _pair(option, value, "x", "HxW in pixels, e.g. 1024x768")


def _steps(option: str, value: str | None) -> tuple[int, int] | None:
    return None if value is None else _pair(option, value, ":", "FIRST:LAST, numbers of steps, e.g. 10:14")


def _position(option: str, value: str) -> tuple[int, int]:
    return _pair(option, value, ",", "TOP,LEFT in pixels, e.g. 0,64")


def _file_and_token(value: str) -> tuple[Path, str | None]:
    """FILE or FILE:TOKEN. A file that is there is a file, whatever colons are in its name."""
    file, found, token = value.rpartition(":")
    return (Path(value), None) if not found or Path(value).exists() else (Path(file), token)


def _pair(option: str, value: str, separator: str, expected: str) -> tuple[int, int]:
    first, found, second = value.partition(separator)
    if not (found and first.isdecimal() and second.isdecimal() and max(len(first), len(second)) <= 6):
        raise InputError(f"{option} {value!r}: expected {expected}")
    return int(first), int(second)


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}). Give a text file") from error


@dataclass(frozen=True)
class Convert(_Opened):
    """Write a model in another layout: for diffusers, for ComfyUI and the like, for Orbax."""

    source: tyro.conf.Positional[Path]
    """A run directory, an Orbax checkpoint, a diffusers directory, a .safetensors file, or one network alone."""
    destination: tyro.conf.Positional[Path]
    """A new directory; for a single file, a new .safetensors file."""
    to: Literal["orbax", "diffusers", "single-file"]
    """The layout: an Orbax checkpoint, a diffusers directory, or Stability's original layout in one file."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights. Default: as they are."""


def _convert(arguments: list[str]) -> None:
    options = _parse(Convert, arguments, "convert")
    import numpy as np

    from sdxl_jax.converting import Layout, convert
    from sdxl_jax.interop import lora
    from sdxl_jax.interop.weights import DTYPES, cast
    from sdxl_jax.loading import say
    from sdxl_jax.opening import open_model

    loras = [(lora.read(path), scale) for path, scale in map(lora.parse_option, options.lora)]
    weights = open_model(options.source, options.opening(mixed=options.dtype is not None), options.parts_from)
    say(weights.notes)
    for read, scale in loras:
        weights = lora.merge(weights, read, scale)
        print(f"merging {read.name} × {scale:g}: {lora.describe(read)}", file=sys.stderr)
    if options.dtype is not None:
        weights = cast(weights, np.dtype(DTYPES[options.dtype]))
    written = convert(weights, options.destination, Layout(options.to))
    if written.left_out:
        print(
            f"note: {len(written.left_out)} tensors of the source have no place in this layout and were left out: "
            f"{', '.join(written.left_out[:8])}{' …' if len(written.left_out) > 8 else ''}",
            file=sys.stderr,
        )
    print(
        f"{', '.join(written.parts)}: {written.tensors} tensors, {written.size / 1e9:.2f} GB, in {options.destination}"
    )


@dataclass(frozen=True)
class Inspect:
    """Show what training will really see: images, buckets, refusals."""

    source: tyro.conf.Positional[Path]
    """A folder of captioned images, a shard set, or a configuration file."""
    json: bool = False
    """Print JSON instead of a table."""
    dump: Annotated[tuple[int, Path] | None, tyro.conf.arg(metavar="N DIR")] = None
    """Write the first N training examples to DIR: the picture as the model sees it, and what it is told."""
    plot: Path | None = None
    """Draw sizes, buckets and some batches into FILE.png, or .pdf or .svg (needs matplotlib)."""


@dataclass(frozen=True)
class Build:
    """Pack captioned pictures into shards for training: in parallel, and resumable; what is refused is listed."""

    source: tyro.conf.Positional[str]
    """A folder of pictures, tars (WebDataset), Parquet files, or tfds:NAME."""
    destination: tyro.conf.Positional[Path]
    """A new folder; or one in which the same build was interrupted, which then goes on."""
    workers: int | None = None
    """Processes that read. Default: one a core."""
    drop_duplicates: bool = False
    """Leave out pictures whose files are, byte for byte, those of an earlier one. Otherwise they are only counted."""


def _build(arguments: list[str]) -> None:
    options = _parse(Build, arguments, "data build")
    from sdxl_jax.data.build import build

    built = build(options.source, options.destination, workers=options.workers, drop_duplicates=options.drop_duplicates)
    done = "was finished already" if built.was_finished else "finished"
    print(
        f"{options.destination} {done}: {built.images} pictures, {built.captions} captions, {built.refused} refused "
        f"(refused.jsonl), {built.duplicates} exact duplicates {'left out' if options.drop_duplicates else 'counted'}"
    )


_ENCODE_USAGE = """usage: sdxl-jax data encode CONFIG.py [--data.cache DIR] [--share I N] [--section.field VALUE ...]

Encode every crop and caption of a training configuration once, into its data.cache, which training then reads instead
of the pictures. Run again, it goes on with what is missing. data.crops_per_image says how many crops a picture has.
`sdxl-jax data encode CONFIG.py --help` lists every field with its default in that file.
"""


def _encode(arguments: list[str]) -> None:
    from sdxl_jax import config as configuration

    @dataclass(frozen=True)
    class Encode(configuration.TrainConfig):
        """Encode every crop and caption of a training configuration once, into its data.cache."""

        batch_size: int = 8
        """Pictures, or captions, encoded at once. Higher: faster until memory ends."""
        share: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="I N")] = None
        """Take the I-th of every N pieces, I from 0, for N processes that share the work. Default: by jax's
        processes."""

    options, config = _configured(Encode, arguments, "data encode", _ENCODE_USAGE, lambda _: {})
    from sdxl_jax.training.encoding import encode

    plan, refused = encode(config, batch_size=options.batch_size, share=options.share)
    missing = len(plan.missing())
    state = f"{missing} of {plan.pieces} pieces are missing, of other shares" if missing else "complete"
    bad = f"; {refused} could not be encoded, training replaces them" if refused else ""
    print(f"{plan.folder}: {plan.images} pictures, {plan.crops} crops of each; {state}{bad}")


_DATA_USAGE = """usage: sdxl-jax data build SRC DST     pack captioned pictures into shards
       sdxl-jax data inspect SRC-or-CONFIG     show what training will really see
       sdxl-jax data encode CONFIG.py     latents and text states, computed once for all epochs

`sdxl-jax data build --help` and so on tell the options."""


def _data(arguments: list[str]) -> None:
    commands = {"build": _build, "inspect": _inspect, "encode": _encode}
    if not arguments or arguments[0] in ("-h", "--help"):
        if arguments:
            print(_DATA_USAGE)
            return
        raise InputError(f"sdxl-jax data knows {', '.join(commands)}; given: nothing.\n{_DATA_USAGE}")
    if arguments[0] not in commands:
        near = ", ".join(nearest_first(arguments[0], commands))
        raise InputError(f"There is no command data {arguments[0]!r}. Known, nearest first: {near}")
    commands[arguments[0]](arguments[1:])


def _inspect(arguments: list[str]) -> None:
    options = _parse(Inspect, arguments, "data inspect")
    from sdxl_jax import config as configuration
    from sdxl_jax.data import inspection, plots
    from sdxl_jax.data.settings import DataConfig

    is_config = options.source.suffix == ".py"
    config = configuration.load(options.source).data if is_config else DataConfig(folder=str(options.source))
    if options.plot is not None:
        plots.check(options.plot)
    dataset = inspection.open_dataset(config)
    if options.plot is not None:
        plots.plot(dataset, options.plot)
    seen = inspection.inspect(dataset)
    if options.dump is not None:
        inspection.dump(dataset, *options.dump)
    print(json.dumps(seen, indent=1) if options.json else _inspection_table(seen))


def _inspection_table(seen: dict[str, Any]) -> str:
    lines = [f"{seen['images_found']} images found, {seen['images_usable']} usable, {len(seen['refused'])} refused"]
    lines += [f"  refused {entry['file']}: {entry['reason']}" for entry in seen["refused"]]
    if seen["too_small"]:
        lines.append(f"{seen['too_small']} images below data.min_size left out")
    if len(seen["sources"]) > 1:
        lines += [
            f"{each['folder']}: weight {each['weight']:g}, {each['images']} images, {each['share']:.1%} of an epoch"
            for each in seen["sources"]
        ]
    if seen["numbers"]:
        lines.append(f"numbers of every source: {', '.join(seen['numbers'])}")
    lines.append(f"{seen['epoch_steps']:.6g} steps an epoch")
    lines.append("  height  width  images  batches  of images  left out  repeated")
    for b in seen["buckets"]:
        if b["images"]:
            counts = f"{b['images']:6}  {b['batches']:7.4g}  {b['batch_size']:9}  {b['remainder']:8}  {b['repeated']:8}"
            lines.append(f"  {b['height']:6}  {b['width']:5}  {counts}")
        elif b["merged_into"]:
            lines.append(f"  {b['height']:6}  {b['width']:5}  merged into {b['merged_into'][0]}×{b['merged_into'][1]}")
    return "\n".join(lines)


_COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "quickstart": (_quickstart, "train a small SDXL on pictures that come along, and look at what it draws"),
    "train": (_train, "train what a configuration file describes, or go on with it"),
    "compile": (_compile, "compile it for TPU slices that are not here: does it fit, how fast will it go"),
    "sample": (_sample, "draw pictures of prompts with a trained model"),
    "convert": (_convert, "write a model in another layout: diffusers, a single file, Orbax"),
    "data": (_data, "build: shards from folders, tars, tables; inspect: what training will see; encode: caches"),
}


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in _COMMANDS.items())
    return (
        f"usage: sdxl-jax COMMAND ...\n\nSDXL, trained and sampled in JAX.\n\n{commands}\n\n"
        "`sdxl-jax COMMAND --help` tells the options. --debug with any command shows the traceback of an error."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    try:
        if given[0] not in _COMMANDS:
            near = ", ".join(nearest_first(given[0], _COMMANDS))
            raise InputError(f"There is no command {given[0]!r}. Known, nearest first: {near}")
        _COMMANDS[given[0]][0](given[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who reads our output has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except InputError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if debug:
            raise
        print(f"error: {error}. Check that the place exists, may be written to, and has room", file=sys.stderr)
        return 2
    return 0


def program() -> None:
    """`main` as a process of its own, which ends even while a step is being compiled beside training."""
    try:
        code = main()
    except SystemExit as stopped:  # by SIGTERM or Ctrl-C, once all is saved; --help; what argparse refuses
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1  # of a process that SIGINT ends
    if "sdxl_jax.training.compilation" in sys.modules:
        from sdxl_jax.training.compilation import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
