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

from sdxl_jax.commands.parsing import Opened, pair
from sdxl_jax.commands.parsing import parse as _parse
from sdxl_jax.errors import InputError, nearest_first

if TYPE_CHECKING:
    from sdxl_jax.config import TrainConfig

_BEGAN = time.monotonic()
_T = TypeVar("_T")


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
    from sdxl_jax.aot import compile as ahead
    from sdxl_jax.data.buckets import Bucket

    buckets = None
    if options.all_buckets:
        buckets = [Bucket(*bucket) for bucket in config.data.buckets]
    elif options.bucket is not None:
        buckets = [Bucket(*pair("--bucket", options.bucket, "x", "HxW in pixels, e.g. 1024x1024"))]
    if options.program == "sample":
        made = ahead.compile_sampler(config, options.topology, slices=options.slices)
    else:
        made = ahead.compile_step(
            config, options.topology, slices=options.slices, buckets=buckets, parallel=options.parallel
        )
    if options.json:
        print(json.dumps([each.as_json() for each in made], indent=1))
    else:
        for each in made:
            print(f"{each}\n{ahead.verdict(each, config)}\n")
        if options.program == "train":
            from sdxl_jax.training import programs

            cache = config.training.compilation_cache
            print(
                "Not kept: training.compilation_cache names no folder."
                if cache is None
                else f"{sum(each.kept for each in made)} of {len(made)} kept in {programs.folder(cache)}: training "
                "with this configuration and training.compilation_cache reads them."
            )
    if wrong := [each.program for each in made if not each.fits]:
        raise InputError(f"{len(wrong)} of {len(made)} programs do not fit: {', '.join(wrong[:3])}")


def _sample(arguments: list[str]) -> None:
    from sdxl_jax.commands import sample

    sample.run(arguments)


def _serve(arguments: list[str]) -> None:
    from sdxl_jax.commands import serve

    serve.run(arguments)


def _steps(option: str, value: str | None) -> tuple[int, int] | None:
    return None if value is None else pair(option, value, ":", "FIRST:LAST, numbers of steps, e.g. 10:14")


@dataclass(frozen=True)
class Convert(Opened):
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

    from sdxl_jax.weights import lora
    from sdxl_jax.weights.convert import Layout, convert
    from sdxl_jax.weights.lazy import DTYPES, cast
    from sdxl_jax.weights.load import say
    from sdxl_jax.weights.open import open_model

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
    from sdxl_jax.data.build.build import build

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
    "serve": (_serve, "draw pictures on a web page"),
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
