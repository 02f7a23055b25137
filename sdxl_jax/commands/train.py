"""`sdxl-jax train`: a configuration file, its overrides on the command line, and the options of this start of the
run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.files.paths import AnyPath

USAGE = """usage: sdxl-jax train CONFIG.py [--run-dir DIR] [--section.field VALUE ...]

Train a model from a configuration file. The same command with the same run directory resumes from the last checkpoint.
SIGTERM and Ctrl-C save a checkpoint, then stop. On several machines, run the same command on each.
`sdxl-jax train CONFIG.py --help` lists every field with its default in that file; configs/ has examples.
"""


@dataclass(frozen=True)
class Train:
    """Train a model from a configuration file. The same command with the same run directory resumes."""

    run_dir: AnyPath
    """Run directory for checkpoints, metrics and validation images; may be in a bucket, gs://BUCKET/RUN."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="FIRST:LAST")] = None
    """Trace these steps, both included, into RUN/profile, for xprof. Not part of the run's configuration."""
    from_step: int | None = None
    """Resume from this checkpoint instead of the last; later ones are moved to RUN/set_aside. Leave it out on the next
    start, which then resumes from the last checkpoint again."""
    allow_changes: str | None = None
    """FIELD,FIELD: configuration fields that may differ from the run's although they alter what is learnt."""


def run(arguments: list[str], began: float) -> None:
    """began: the program's start, by `time.monotonic()`."""
    path = parsing.config_path(arguments, "train", USAGE)
    from sdxl_jax.config import load
    from sdxl_jax.jsontree import to_json
    from sdxl_jax.progress import log_format, tqdm

    default = Train(run_dir=Path("runs") / path.stem)
    options, config = parsing.parse_with_config(default, load(path), arguments[1:], f"train {path}")
    from sdxl_jax.training import loop

    with log_format(config.logging.format):
        tqdm.write(json.dumps(to_json(config), indent=1))
    loop.train(
        config,
        options.run_dir,
        from_step=options.from_step,
        allow_changes=options.allow_changes.split(",") if options.allow_changes else (),
        profile=_steps("--profile", options.profile),
        began=began,
    )


def _steps(option: str, value: str | None) -> tuple[int, int] | None:
    return None if value is None else parsing.pair(option, value, ":", "FIRST:LAST, two steps, e.g. 10:14")
