"""What a run directory says of its run, without jax and without disturbing it: `sdxl-jax status`.

It reads config.json (how many steps there are), metrics.jsonl (the last ones), time.jsonl (where the time went, and how
each start ended), checkpoints/ (what a resume starts from), lock (whether a process trains in it).
"""

import dataclasses
import enum
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from sdxl_jax.errors import InputError
from sdxl_jax.files import buckets
from sdxl_jax.files.paths import AnyPath, in_bucket
from sdxl_jax.training.observe.clock import TimePart, read_starts, totals
from sdxl_jax.weights.formats.checkpoints import arrays, latest_step

LOCK = "lock"
"""Of the run directory: a locked file, or an object (files.buckets.Lock)."""
_TAIL_BYTES = 1 << 16
"""Of metrics.jsonl; the file of a long run has hundreds of MB."""
_MEAN_STEPS = 50
"""Steps over which throughput is the mean."""
_STOPPED_CODES = (0, 130, 143)


class State(enum.Enum):
    """Of a run, as its directory shows it."""

    RUNNING = "running"
    """A process holds the lock."""
    STOPPED = "stopped"
    """Steps are left: it was stopped or killed, or has not begun."""
    FINISHED = "finished"
    """The last step is in a checkpoint."""
    FAILED = "failed"
    """The last start ended with an error."""
    UNKNOWN = "unknown"
    """Whether it runs cannot be found out from this machine: the file system has no locks, or the lock is another
    machine's."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What `status` reports; the fields of `sdxl-jax status --json`."""

    state: State
    step: int
    """The last step that was done. Those after `last_checkpoint` are done again by a resume."""
    steps: int
    """At which the run is finished."""
    last_checkpoint: int | None
    loss: float | None
    """Of the last step; None: no step, or it was skipped."""
    images_per_second: float | None
    """Over the last 50 steps."""
    goodput: float | None
    """Share of the time in steps that were new, over all starts, 0 to 1."""
    seconds: Mapping[str, float]
    """By part, over all starts: `clock.totals`."""
    starts: int
    """How many times it has been started."""
    exit_code: int | None
    """Of the last start; None: it runs, or was killed."""
    error: str | None
    """The error, or the signal, that ended the last start."""


def status(run_dir: AnyPath) -> Status:
    """The state of a run; of one in a bucket, as it was at the last checkpoint.

    Raises InputError for a directory that is not a run, or whose config.json cannot be read, MachineError for a bucket
    that does not answer.
    """
    if in_bucket(run_dir):
        buckets.check(run_dir, "the run directory")
    steps = _steps(run_dir)
    running = is_running(run_dir)  # before the rest: a run that ends meanwhile is not taken for a killed one
    starts, lines, checkpoint = (
        read_starts(run_dir),
        _last_metrics(run_dir),
        latest_step(arrays(run_dir) / "checkpoints"),
    )
    last = starts[-1] if starts and not running else None
    exit_code = None if last is None else last.exit_code
    if running:
        state = State.RUNNING
    elif (checkpoint or 0) >= steps:
        state = State.FINISHED
    elif running is None:
        state = State.UNKNOWN
    else:
        state = State.STOPPED if exit_code is None or exit_code in _STOPPED_CODES else State.FAILED
    seconds = totals(starts)
    total = sum(seconds.values())
    return Status(
        state=state,
        step=max(lines[-1]["step"] if lines else 0, checkpoint or 0),
        steps=steps,
        last_checkpoint=checkpoint,
        loss=lines[-1]["loss"] if lines else None,
        images_per_second=_throughput(lines),
        goodput=seconds[TimePart.STEP.value] / total if total else None,
        seconds=seconds,
        starts=len(starts),
        exit_code=exit_code,
        error=None if last is None else last.error,
    )


def is_running(run_dir: AnyPath) -> bool | None:
    """Whether a process trains in this directory; None: it cannot be found out from this machine. Nothing is
    written."""
    path = run_dir / LOCK
    if in_bucket(path):
        return buckets.is_held(path, "the run directory")
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        owner = os.read(descriptor, 4096).decode(errors="replace")
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    # A killed process leaves its file. On some network file systems, locks of other machines are not seen.
    return False if not owner or f" on {socket.gethostname()} since " in owner else None


def holder(run_dir: AnyPath) -> str | None:
    """How the process that holds the lock, or was killed with it, describes itself."""
    path = run_dir / LOCK
    if in_bucket(path):
        held = buckets.read_lock(path, "the run directory")
        return None if held is None else held[0]["description"]
    return path.read_text().strip() or None if path.exists() else None


def _steps(run_dir: AnyPath) -> int:
    path = run_dir / "config.json"
    if not path.exists():
        raise InputError(
            f"{run_dir} is not a run directory: it has no config.json. Give the directory that --run-dir named"
        )
    try:
        return int(json.loads(path.read_text())["config"]["training"]["steps"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read: training.steps was expected in its configuration. Restore the file from a backup"
        ) from error


def _last_metrics(run_dir: AnyPath) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read(_TAIL_BYTES).decode(errors="replace")
    lines = []
    for text in tail.splitlines()[-_MEAN_STEPS - 1 :]:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue  # cut off at the start of the tail, or by a crash
    return lines[-_MEAN_STEPS:]


def _throughput(lines: list[dict[str, Any]]) -> float | None:
    seconds = sum(line["step_seconds"] for line in lines)
    images = sum(line["images_per_second"] * line["step_seconds"] for line in lines)
    return images / seconds if seconds else None
