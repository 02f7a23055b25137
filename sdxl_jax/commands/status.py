"""`sdxl-jax status`: what a run directory says of its run. No jax; also while the run goes on."""

import dataclasses
import json
import signal
import sys
from dataclasses import dataclass

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.training.observe.clock import read_starts, time_table
from sdxl_jax.training.status import State, Status, holder, status

_UNFINISHED = 128 + signal.SIGTERM
"""What a run with work left ends with too."""


@dataclass(frozen=True)
class Options:
    """Steps done and to do, last checkpoint, whether the run is running, and where the time went over all starts."""

    run: tyro.conf.Positional[AnyPath]
    """The run directory; may be in a bucket, which says where the run stood at its last checkpoint."""
    json: bool = False
    """Print JSON instead of a table."""
    quiet: bool = False
    """Print nothing. The exit code is 0 if the run is finished, 143 if it is not, 2 if there is no run or if its last
    start was refused: running the same command again would not help."""


def run(arguments: list[str]) -> None:
    options = parsing.parse(Options, arguments, "status")
    if options.quiet:
        sys.exit(_code(options.run))
    found = status(options.run)
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "state": found.state.value}, indent=1))
    else:
        print(_text(options.run, found))


def _code(run_dir: AnyPath) -> int:
    """The exit code of --quiet."""
    try:
        found = status(run_dir)
    except InputError as error:
        return error.code
    if found.state is State.FINISHED:
        return 0
    refused = found.state is State.FAILED and found.exit_code == InputError.code
    return InputError.code if refused else _UNFINISHED


def _text(run_dir: AnyPath, found: Status) -> str:
    lines = [f"{run_dir}: {found.state.value}{_reason(run_dir, found)}"]
    done = found.step / found.steps if found.steps else 1.0
    lines.append(f"  steps       {found.step} of {found.steps}, {done:.1%}")
    checkpoint = "none" if found.last_checkpoint is None else f"step {found.last_checkpoint}"
    lines.append(f"  checkpoint  {checkpoint}")
    if found.loss is not None:
        lines.append(f"  loss        {found.loss:.4f}")
    if found.images_per_second is not None:
        lines.append(f"  throughput  {found.images_per_second:.1f} images/s")
    if found.goodput is not None:
        starts = f"{found.starts} start{'s' * (found.starts != 1)}"
        lines.append(f"  goodput     {found.goodput:.1%} of the time in new steps, {starts}")
        lines += ["where the time went", time_table(read_starts(run_dir))]
    return "\n".join(lines)


def _reason(run_dir: AnyPath, found: Status) -> str:
    owner = holder(run_dir)
    if found.state is State.RUNNING:
        return f" ({owner or 'just started'})"
    if found.state is State.UNKNOWN:
        return f" (its lock was taken by {owner or 'another machine'}, which cannot be seen from here)"
    if found.state is State.FAILED:
        return f" with exit code {found.exit_code}: {found.error}"
    if found.state is State.STOPPED and found.starts:
        return f" by {found.error}" if found.error else " (killed)"
    return ""
