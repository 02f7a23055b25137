"""`sdxl-jax train`: a configuration file, what the command line changes of it, and how this start of the run differs
from others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sdxl_jax.commands import parsing

USAGE = """usage: sdxl-jax train CONFIG.py [--run-dir DIR] [--section.field VALUE ...]

Train what a configuration file describes. Run again with the same run directory, it goes on from the last checkpoint.
SIGTERM, or Ctrl-C, stops it once what was done is saved. On several machines, give each the same command.
`sdxl-jax train CONFIG.py --help` lists every field with its default in that file; configs/ holds examples.
"""


@dataclass(frozen=True)
class Train:
    """Train what a configuration file describes. Run again with the same run directory, it goes on."""

    run_dir: Path
    """Where checkpoints, metrics and images are written."""
    profile: Annotated[str | None, tyro.conf.arg(metavar="FIRST:LAST")] = None
    """Trace these steps, both included, into RUN/profile, for xprof. Not a part of the run's configuration."""
    from_step: int | None = None
    """Go on from this checkpoint instead of the last one; those after it are moved to RUN/set_aside. For once: the
    next start goes on from the last one again only if this is left out."""
    allow_changes: str | None = None
    """FIELD,FIELD: what may differ from the run's configuration although it alters what is learnt."""


def run(arguments: list[str], began: float) -> None:
    """began: when the program started, by `time.monotonic()`."""
    path = parsing.config_path(arguments, "train", USAGE)
    from sdxl_jax import config as configuration
    from sdxl_jax.jsontree import to_json

    default = Train(run_dir=Path("runs") / path.stem)
    options, config = parsing.parse_with_config(default, configuration.load(path), arguments[1:], f"train {path}")
    from sdxl_jax.training import loop

    print(json.dumps(to_json(config), indent=1))
    loop.train(
        config,
        options.run_dir,
        from_step=options.from_step,
        allow_changes=options.allow_changes.split(",") if options.allow_changes else (),
        profile=_steps("--profile", options.profile),
        began=began,
    )


def _steps(option: str, value: str | None) -> tuple[int, int] | None:
    return None if value is None else parsing.pair(option, value, ":", "FIRST:LAST, numbers of steps, e.g. 10:14")
