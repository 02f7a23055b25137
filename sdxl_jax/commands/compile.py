"""`sdxl-jax compile`: which programs of a configuration, for which chips, and how the reports are shown."""

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

Compile what a configuration would run, for TPU slices that are not here: memory, operations, time, communication.
`sdxl-jax compile CONFIG.py --help` lists every field with its default in that file. Needs libtpu, and no TPU.
"""


@dataclass(frozen=True)
class Compile:
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


def run(arguments: list[str]) -> None:
    # Compiling needs no accelerator, and one that is here would only be kept from others.
    os.environ["JAX_PLATFORMS"] = "cpu"
    path = parsing.config_path(arguments, "compile", USAGE)
    from sdxl_jax import config as configuration

    options, config = parsing.parse_with_config(Compile(), configuration.load(path), arguments[1:], f"compile {path}")
    topology = _checked(options)
    from sdxl_jax.aot import compile as ahead

    if options.program == "train":
        buckets = _buckets(options, config)
        made = ahead.compile_step(config, topology, slices=options.slices, buckets=buckets, parallel=options.parallel)
    elif isinstance(config, configuration.TrainConfig):
        made = ahead.compile_sampler(config, topology, slices=options.slices)
    else:
        raise InputError(
            f"--program sample compiles the sampler of a TrainConfig, and {path} gives {type(config).__name__}. Leave "
            "it out to compile the train step"
        )
    if options.json:
        print(json.dumps([each.as_json() for each in made], indent=1))
    else:
        _show(options, config, made)
    if wrong := [each.program for each in made if not each.fits]:
        raise InputError(f"{len(wrong)} of {len(made)} programs do not fit: {', '.join(wrong[:3])}")


def _checked(options: Compile) -> str:
    """The topology. Raises InputError for options that do not go together."""
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
    return options.topology


def _buckets(options: Compile, config: "RunConfig") -> "list[Bucket] | None":
    """Those of the train step; None: the one with the most pixels."""
    from sdxl_jax.data.buckets import Bucket

    if options.all_buckets:
        return [Bucket(*bucket) for bucket in config.data.buckets]
    if options.bucket is None:
        return None
    return [Bucket(*parsing.pair("--bucket", options.bucket, "x", "HxW in pixels, e.g. 1024x1024"))]


def _show(options: Compile, config: "RunConfig", made: "Sequence[Report | TooLarge]") -> None:
    from sdxl_jax.aot import compile as ahead
    from sdxl_jax.training import programs

    for each in made:
        print(f"{each}\n{ahead.verdict(each, config)}\n")
    if options.program == "sample":
        return
    cache = config.training.compilation_cache
    if cache is None:
        print("Not kept: training.compilation_cache names no folder.")
        return
    print(
        f"{sum(each.kept for each in made)} of {len(made)} kept in {programs.folder(cache)}: training with this "
        "configuration and training.compilation_cache reads them."
    )
