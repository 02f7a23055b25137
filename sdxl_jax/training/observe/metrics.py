"""Where a run's numbers go: RUN/metrics.jsonl with all digits, RUN/tensorboard, Weights & Biases if asked for, and the
progress bar."""

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore (generated)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore (generated)
from tqdm import tqdm

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError
from sdxl_jax.files import atomic
from sdxl_jax.training.observe.clock import Clock, TimePart
from sdxl_jax.training.observe.mfu import MfuMeter

TIMES = ("step_seconds", "images_per_second", "data_seconds", "compile_seconds", "mfu")
"""Fields of a line that a resumed run does not repeat: they are about time."""
_SCALARS = ("loss", "grad_norm", "learning_rate", "skipped", *TIMES)
_PAUSES = (TimePart.COMPILE, TimePart.SAVE, TimePart.EVALUATION)
"""What is no step's time."""


class NonFinite(InputError):
    """Raised when the numbers of that step are read; those of the steps before are written."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(
            f"The loss of step {step} is {loss}, its gradient's norm {grad_norm}; step {step - 1} was the last with "
            "finite ones. The run stops before this is saved. Go on from the last checkpoint with a lower rate "
            "(--allow-changes optimiser.learning_rate --optimiser.learning-rate RATE), or skip such steps "
            "(--allow-changes training.on_nonfinite --training.on-nonfinite skip)"
        )
        self.step = step


class MetricsWriter:
    """One line a step. A context manager: leaving it writes everything out.

    A step's numbers are read when the next step has been started (`log` keeps them until then), so that the device is
    never idle for their sake. Its `step_seconds` are those from the step before, without compiling, saving and
    evaluation; `data_seconds` are those in which the program waited for its batch.
    """

    def __init__(
        self,
        run_dir: Path,
        start: int,
        stop: int,
        progress: bool,
        clock: Clock | None = None,
        mfu_meter: MfuMeter | None = None,
        board: "WandbBoard | None" = None,
        writes: bool = True,
        programs: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ):
        """Removes the lines of steps after `start`, which are about to be made again. writes: one process of several
        does; the others read the numbers all the same, and raise where it raises. programs: how many are compiled, of
        how many."""
        self._path = run_dir / "metrics.jsonl" if writes else Path(os.devnull)
        there = writes and self._path.exists()
        self._images_seen, self.made_before = _cut_after(self._path, start) if there else (0, start)
        """`made_before`: the last step that an earlier start had made."""
        self._file = self._path.open("ab", buffering=0)  # a line at a time: a kill loses the last one or two
        self._lines, self._full = list[str](), False
        self._board = TensorBoard(run_dir / "tensorboard", start + 1) if writes else None
        self._wandb, self._mfu_meter, self._clock, self._programs = board, mfu_meter, clock or Clock(), programs
        self._bar = tqdm(total=stop, initial=start, desc="training", unit="step", disable=not progress, smoothing=0.05)
        self._pending: tuple[int, Bucket, int, dict[str, jax.Array], dict[str, float]] | None = None
        self._noted = self._read = self._clock.seconds()
        self._skipped, self._said = 0, -math.inf

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._lines:
            tqdm.write(f"  the last {len(self._lines)} lines of {self._path} are lost")
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None and not issubclass(kind, SystemExit))

    def log(self, step: int, bucket: Bucket, batch_size: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the numbers of a step that has been started, and writes those of the one before."""
        self._write()
        seconds = self._clock.seconds()
        waited = {part: seconds[part] - self._noted[part] for part in (TimePart.DATA, TimePart.COMPILE)}
        self._noted = seconds
        times = {f"{part.value}_seconds": value for part, value in waited.items() if value}
        self._pending = step, bucket, batch_size, metrics, times
        if all(value.is_ready() for value in metrics.values()):  # pyright: ignore[reportAttributeAccessIssue]
            self._write()  # a device that has it already, as CPUs do, would find its time in the line before

    def settle(self) -> None:
        """Waits for the last step and writes its line. Before anything that is no step's time."""
        with self._clock.during(TimePart.STEP):
            self._write()

    def flush(self) -> None:
        """Waits for the last step and brings all lines to the disk."""
        self.settle()
        self._bring()
        if self._board is not None:
            os.fsync(self._file.fileno())

    def _bring(self) -> None:
        """Lines to the disk. Where they cannot go, they stay here: a full disk is no reason to lose a run."""
        rest = memoryview("".join(self._lines).encode())
        there = self._file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(there)
            if not self._full:
                tqdm.write(f"  {self._path} takes no more lines ({error.strerror}); they are kept until it does")
            self._full = True
        else:
            self._lines, self._full = [], False

    def compiling(self) -> None:
        """Says in the bar that the next step waits for its program: once a second, however often it is called."""
        if (now := time.monotonic()) >= self._said + 1:
            self._said = now
            self._bar.set_postfix_str("compiling {}/{}".format(*self._programs()))

    def compiled(self) -> None:
        """The waiting is over: the time left does not follow from it."""
        if not self._bar.disable:
            waited = self._clock.seconds()[TimePart.COMPILE] - self._noted[TimePart.COMPILE]
            self._bar.start_t += waited
            self._bar.last_print_t += waited

    def _write(self) -> None:
        if self._pending is None:
            return
        step, bucket, batch_size, metrics, times = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        now, before = self._clock.seconds(), self._read
        self._read = now
        seconds = sum(now[part] - before[part] for part in now if part not in _PAUSES)
        self._images_seen += batch_size
        line: dict[str, Any] = {
            "step": step,
            **values,
            "bucket": list(bucket),
            "images_seen": self._images_seen,
            "step_seconds": seconds,
            "images_per_second": batch_size / seconds,
            **times,
        }
        mfu = None if self._mfu_meter is None else self._mfu_meter.mfu(bucket, seconds)
        if mfu is not None:
            line["mfu"] = mfu
        if not math.isfinite(values["loss"] + values["grad_norm"]) and not values.get("skipped"):
            raise NonFinite(step, values["loss"], values["grad_norm"])
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._lines.append(json.dumps(finite, allow_nan=False) + "\n")
        self._bring()
        if self._board is not None:
            self._board.add({name: line[name] for name in _SCALARS if name in line}, step)
        if self._wandb is not None:
            self._wandb.log(line)
        shown = [f"loss {values['loss']:.4f}", f"{line['images_per_second']:.1f} images/s"]
        if mfu is not None:
            shown.append(f"MFU {mfu:.0%}")
        shown.append(f"{now[TimePart.DATA]:.0f} s waiting for data")
        self._skipped += int(values.get("skipped", 0))
        if self._skipped:
            shown.append(f"{self._skipped} skipped")
        finished, total = self._programs()
        if finished < total:
            shown.append(f"compiled {finished}/{total}")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()


class TensorBoard:
    """Scalars in an event file. Written by this thread: tensorboardX's own ends at a full disk and tells nobody, and
    who writes on waits for it for ever."""

    def __init__(self, folder: Path, purge_step: int):
        """purge_step: from here on, what an earlier start has written does not count."""
        folder.mkdir(parents=True, exist_ok=True)
        self._events, self._full = EventsWriter(str(folder / "events")), False
        started = SessionLog(status=SessionLog.START)
        self._write(Event(step=purge_step, wall_time=time.time(), session_log=started))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # that an event could not be written was said
            self._events.close()

    def _write(self, event: Event) -> None:
        if self._full:
            return
        try:
            self._events.write_event(event)
            self._events.flush()
        except OSError as error:  # a part of it may stand there, after which nothing could be read
            tqdm.write(f"  TensorBoard gets no more numbers until the next start: {error.strerror}")
            self._full = True


class WandbBoard:
    """A run of Weights & Biases, which goes on when training goes on: its name is kept in RUN/wandb_id."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]):
        """Raises InputError if the package is missing."""
        path = run_dir / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        self._run = _wandb().init(
            project=project,
            id=path.read_text(),
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(config),
            resume="allow",
        )
        # Steps that are made again have been sent before: a step of W&B's own must not go back, and they would be lost.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self._run.log({name: value for name, value in line.items() if name != "bucket"} | _sides(line["bucket"]))

    def finish(self, failed: bool) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=int(failed))


def _sides(bucket: list[int]) -> dict[str, int]:
    return {"bucket_height": bucket[0], "bucket_width": bucket[1]}


def check(wandb_project: str | None) -> None:
    """Raises InputError where what the configuration asks for is not installed."""
    if wandb_project is not None:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise InputError(
            "logging.wandb_project is given, but the package wandb is not installed. Install it with "
            "`pip install 'sdxl_jax[wandb]'`, or remove the project"
        ) from error
    return wandb


def _cut_after(path: Path, step: int) -> tuple[int, int]:
    """Removes the lines after that step; the images that it had seen, and the last step that there was."""
    kept, images_seen, last = [], 0, step
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # the line that a crash cut off; whatever it was, it is made again
        last = max(last, line["step"])
        if line["step"] <= step:
            kept.append(text + "\n")
            images_seen = line["images_seen"]
    atomic.write_text(path, "".join(kept))
    return images_seen, last
