"""`sdxl-jax compile`: AOT (ahead-of-time) compilation of a configuration's programs, and the printed reports."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sdxl_jax.commands import parsing
from sdxl_jax.errors import InputError

if TYPE_CHECKING:
    from sdxl_jax.aot.report import Report, TooLarge
    from sdxl_jax.config import RunConfig
    from sdxl_jax.data.buckets import Bucket

USAGE = """usage: sdxl-jax compile CONFIG.py --topology NAME [--slices N] [--section.field VALUE ...]

Ahead-of-time (AOT) compilation of a configuration's programs for TPU slices and GPUs, on a machine without them: memory
per chip, operations, time (an estimate for TPUs, a bound for GPUs), collectives. Needs libtpu, or jax's CUDA plugin.
`sdxl-jax compile CONFIG.py --help` lists every field with its default in that file.
"""


@dataclass(frozen=True)
class Compile:
    """Compile the train step or the sampler ahead of time (AOT), for TPUs or GPUs that need not be attached."""

    topology: str | None = None
    """TPU slice: chip and arrangement, e.g. v5e:4x4, v5p:2x2x2, v6e:8x8. GPUs: their number per node, e.g. h200:8,
    a100-80gb:4, rtx-4090:1. An unknown one lists the known ones."""
    slices: int | None = None
    """Number of slices, connected by the data-centre network; of GPUs, nodes. Default: mesh.slices."""
    program: Literal["train", "sample"] = "train"
    """The train step; or the sampler, with the sizes, steps and guidance of validation."""
    images: int = 1
    """With --program sample: images sampled at once, for each part of the mesh that the batch is split over."""
    bucket: str | None = None
    """HxW of the bucket that the train step is compiled for. Default: the one with the most pixels."""
    all_buckets: bool = False
    """Compile the train step for every bucket of the configuration."""
    smallest: bool = False
    """Find the smallest slice on which the train step fits, its state split over all chips, each with one image at a
    time. --topology is then the chip alone, e.g. v5e."""
    parallel: int = 1
    """Programs compiled at once. Higher: faster with more cores; each takes about 10 GiB for the 2.6B model."""
    json: bool = False
    """Print JSON instead of a table."""


def run(arguments: list[str]) -> None:
    # Compiling needs no accelerator, and jax would reserve an attached one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    path = parsing.config_path(arguments, "compile", USAGE)
    from sdxl_jax.config import TrainConfig, load

    options, config = parsing.parse_with_config(Compile(), load(path), arguments[1:], f"compile {path}")
    topology = _checked_topology(options)
    if options.smallest:
        return _smallest(config, topology)
    from sdxl_jax.aot.compile import compile_sampler, compile_step

    if options.program == "train":
        buckets = _buckets(options, config)
        reports = compile_step(config, topology, slices=options.slices, buckets=buckets, parallel=options.parallel)
    elif isinstance(config, TrainConfig):
        reports = compile_sampler(config, topology, slices=options.slices, images=options.images)
    else:
        raise InputError(
            f"--program sample compiles the sampler of a TrainConfig, and {path} gives {type(config).__name__}. Leave "
            "it out to compile the train step"
        )
    if options.json:
        print(json.dumps([each.as_json() for each in reports], indent=1))
    else:
        _print(options, config, reports)
    if too_large := [each.program for each in reports if not each.fits]:
        raise InputError(
            f"{len(too_large)} of {len(reports)} programs do not fit into the chips' memory: "
            f"{', '.join(too_large[:3])}. Change what the reports advise, or choose a larger topology"
        )


def _smallest(config: "RunConfig", chip: str) -> None:
    from sdxl_jax.aot.smallest import attempts

    fits = False
    for attempt in attempts(config, chip):
        print(f"{attempt}\n", flush=True)
        fits = attempt.result is not None and attempt.result.fits
    if not fits:
        raise InputError(f"The step fits on no {chip} slice. Change what the last report advises")


def _checked_topology(options: Compile) -> str:
    """The topology. Raises InputError for options that exclude each other."""
    if options.topology is None:
        raise InputError("--topology is missing. Give one, e.g. --topology v5p:2x2x2")
    if options.bucket is not None and options.all_buckets:
        raise InputError("--bucket and --all-buckets are both given. Give one of them")
    if options.program == "sample" and (options.bucket is not None or options.all_buckets or options.parallel != 1):
        raise InputError(
            "--bucket, --all-buckets and --parallel have no effect with --program sample, whose sizes are "
            "validation.sizes. Leave them out"
        )
    if options.images != 1 and options.program == "train":
        raise InputError(
            f"--images {options.images} has no effect without --program sample: the train step has data.batch-size. "
            "Leave it out"
        )
    if options.images < 1:
        raise InputError(f"--images {options.images} is out of range. Give 1 or more")
    others = (options.slices, options.bucket, options.all_buckets, options.json, options.parallel, options.program)
    if options.smallest and others != (None, None, False, False, 1, "train"):
        raise InputError("--smallest has no effect with other options than --topology. Leave them out")
    if options.parallel < 1:
        raise InputError(f"--parallel {options.parallel} is out of range. Give 1 or more")
    return options.topology


def _buckets(options: Compile, config: "RunConfig") -> "list[Bucket] | None":
    """The buckets to compile the train step for; None: the one with the most pixels."""
    from sdxl_jax.data.buckets import Bucket

    if options.all_buckets:
        return [Bucket(*bucket) for bucket in config.data.buckets]
    if options.bucket is None:
        return None
    return [Bucket(*parsing.pair("--bucket", options.bucket, "x", "HxW in pixels, e.g. 1024x1024"))]


def _print(options: Compile, config: "RunConfig", reports: "Sequence[Report | TooLarge]") -> None:
    from sdxl_jax.aot import gpus
    from sdxl_jax.aot.compile import verdict
    from sdxl_jax.training.programs import folder

    for each in reports:
        print(f"{each}\n{verdict(each, config)}\n")
    if options.program == "sample":
        return
    if gpus.known(options.topology or ""):
        print("Not saved: training on GPUs compiles its programs itself, and chooses kernels by timing them.")
        return
    cache = config.training.compilation_cache
    if cache in (None, "user"):
        print("Not saved: training.compilation_cache names no folder.")
        return
    print(
        f"{sum(each.saved for each in reports)} of {len(reports)} saved in {folder(cache)}: training with this "
        "configuration and training.compilation_cache loads them."
    )
