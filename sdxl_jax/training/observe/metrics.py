"""Metrics logging: RUN/metrics.jsonl with all digits, RUN/tensorboard, optionally Weights & Biases, and the progress
bar, or lines, with loss, throughput and MFU."""

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Num

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError
from sdxl_jax.files import atomic
from sdxl_jax.progress import tqdm
from sdxl_jax.training.observe.clock import Clock, TimePart
from sdxl_jax.training.observe.mfu import MfuMeter

if TYPE_CHECKING:
    from sdxl_jax.training.observe.tensorboard import TensorBoard

TIMES = ("step_seconds", "images_per_second", "data_seconds", "compile_seconds", "mfu")
"""Fields of a line that a resumed run does not reproduce: they measure time."""
_SCALARS = ("loss", "grad_norm", "learning_rate", "skipped", *TIMES)
_SHOWN = ("loss", "images_per_second", "mfu")
"""Fields of a line that progress in JSON has too."""
_PAUSES = (TimePart.COMPILE, TimePart.SAVE, TimePart.EVALUATION)
"""Parts that `step_seconds` leaves out."""


class NonFinite(InputError):
    """The loss or gradient norm of a step is NaN or inf. Raised when its metrics are read; the lines of earlier steps
    are written."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(
            f"The loss of step {step} is {loss}, its gradient norm {grad_norm}, expected finite numbers as in step "
            f"{step - 1}. The run stops before this is saved. Resume from the last checkpoint with a lower learning "
            "rate (--allow-changes optimiser.learning_rate --optimiser.learning-rate RATE), or skip such steps "
            "(--allow-changes training.on_nonfinite --training.on-nonfinite skip)"
        )
        self.step = step


_Pending = tuple[int, Bucket, int, dict[str, Num[jax.Array, ""]], Mapping[str, float], dict[str, float]]
"""(step, bucket, batch size, metrics, scores, times) of a step that may not be done."""


class MetricsWriter:
    """Writes one line per step. A context manager: leaving it writes the last lines.

    A step's metrics are read once the next step has been dispatched (`log` keeps them until then), so that the device
    is never idle because of logging. `step_seconds` counts from the previous step, without compilation, saving and
    validation; `data_seconds` is the time spent waiting for the batch.
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
        """Removes the lines of steps after `start`, which are about to be recomputed. writes: False on all processes
        but the first; the others still read the metrics, and raise the same NonFinite. programs: (compiled programs,
        programs that the run needs)."""
        self._path = run_dir / "metrics.jsonl" if writes else Path(os.devnull)
        exists = writes and self._path.exists()
        self._images_seen, self.recomputed_until = _truncate(self._path, start) if exists else (0, start)
        """`recomputed_until`: the last step that an earlier start had done."""
        self._file = self._path.open("ab", buffering=0)  # unbuffered: a kill loses the last line or two
        self._lines, self._full = list[str](), False
        self._writes, self._start, self._board_folder = writes, start, run_dir / "tensorboard"
        self._board: TensorBoard | None = None
        self._wandb, self._mfu_meter, self._clock, self._programs = board, mfu_meter, clock or Clock(), programs
        self._bar = tqdm(total=stop, initial=start, desc="training", unit="step", disable=not progress, smoothing=0.05)
        self._pending: _Pending | None = None
        self._seconds_at_log = self._seconds_at_write = self._clock.seconds()
        self._skipped, self._bar_updated = 0, -math.inf

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

    def log(
        self,
        step: int,
        bucket: Bucket,
        batch_size: int,
        metrics: dict[str, Num[jax.Array, ""]],
        scores: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Takes the metrics of a step that has been dispatched, and writes those of the previous one. scores: of the
        model after it."""
        self._write()
        seconds = self._clock.seconds()
        waited = {part: seconds[part] - self._seconds_at_log[part] for part in (TimePart.DATA, TimePart.COMPILE)}
        self._seconds_at_log = seconds
        times = {f"{part.value}_seconds": value for part, value in waited.items() if value}
        self._pending = step, bucket, batch_size, metrics, scores, times
        if all(value.is_ready() for value in metrics.values()):  # pyright: ignore[reportAttributeAccessIssue]
            self._write()  # synchronous devices (CPUs) have finished: their time would go to the wrong line

    def settle(self) -> None:
        """Waits for the last step and writes its line. Call it before anything that `step_seconds` leaves out."""
        with self._clock.during(TimePart.STEP):
            self._write()

    def flush(self) -> None:
        """Waits for the last step and writes all lines to disk."""
        self.settle()
        self._write_lines()
        if self._writes:
            os.fsync(self._file.fileno())

    def new_event_file(self) -> None:
        """For a run in a bucket, where the files so far have just been copied: each is copied once."""
        if self._board is not None:
            self._board.close()

    def _write_lines(self) -> None:
        """Writes the lines to disk. If that fails they stay in memory: a full disk does not end the run."""
        rest = memoryview("".join(self._lines).encode())
        end = self._file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(end)
            if not self._full:
                tqdm.write(f"  {self._path} cannot be written ({error.strerror}); its lines are kept until it can")
            self._full = True
        else:
            self._lines, self._full = [], False

    def compiling(self) -> None:
        """Shows in the bar that the next step waits for compilation; at most one update per second."""
        if (now := time.monotonic()) >= self._bar_updated + 1:
            self._bar_updated = now
            self._bar.set_postfix_str("compiling {}/{}".format(*self._programs()))

    def compiled(self) -> None:
        """Ends the wait for compilation, which is left out of the bar's estimate of the time left."""
        if not self._bar.disable:
            waited = self._clock.seconds()[TimePart.COMPILE] - self._seconds_at_log[TimePart.COMPILE]
            self._bar.start_t += waited
            self._bar.last_print_t += waited

    def _write(self) -> None:
        if self._pending is None:
            return
        step, bucket, batch_size, metrics, scores, times = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        now, previous = self._clock.seconds(), self._seconds_at_write
        self._seconds_at_write = now
        seconds = sum(now[part] - previous[part] for part in now if part not in _PAUSES)
        self._images_seen += batch_size
        line: dict[str, Any] = {
            "step": step,
            **values,
            **scores,
            "bucket": list(bucket),
            "images_seen": self._images_seen,
            "step_seconds": seconds,
            "images_per_second": batch_size / seconds,
            **times,
        }
        mfu = None if self._mfu_meter is None else self._mfu_meter.mfu(bucket, seconds)
        if mfu is not None:
            line["mfu"] = mfu
        norms = sum(value for name, value in values.items() if name.endswith("grad_norm"))
        if not math.isfinite(values["loss"] + norms) and not values.get("skipped"):
            raise NonFinite(step, values["loss"], norms)
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._lines.append(json.dumps(finite, allow_nan=False) + "\n")
        self._write_lines()
        if self._writes:
            self._add_to_board({name: line[name] for name in (*_SCALARS, *scores) if name in line}, step)
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
        self._bar.fields = {"step": step, **{name: line[name] for name in _SHOWN if name in line}}
        self._bar.update()

    def _add_to_board(self, scalars: Mapping[str, float], step: int) -> None:
        if self._board is None:
            # After the first step: tensorboardX imports torch, where there is one, which takes a second or more.
            from sdxl_jax.training.observe.tensorboard import TensorBoard

            self._board = TensorBoard(self._board_folder, self._start + 1)
            self._seconds_at_write = self._clock.seconds()
        self._board.add(scalars, step)


class WandbBoard:
    """A run of Weights & Biases, which is resumed with the training run: its id is kept in RUN/wandb_id."""

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
        # Recomputed steps are sent again: W&B's own step counter must not go back, and it would drop them.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, line: Mapping[str, Any]) -> None:
        """Sends a line of metrics.jsonl."""
        self._run.log({name: value for name, value in line.items() if name != "bucket"} | _sides(line["bucket"]))

    def finish(self, failed: bool) -> None:
        """Sends the rest, and ends the run with exit code 0 or 1."""
        self._run.finish(exit_code=int(failed))


def _sides(bucket: list[int]) -> dict[str, int]:
    return {"bucket_height": bucket[0], "bucket_width": bucket[1]}


def check(wandb_project: str | None) -> None:
    """Raises InputError if a project is configured and the package wandb is not installed."""
    if wandb_project is not None:
        _wandb()


def _wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise InputError(
            "logging.wandb_project is given, but the package wandb is not installed. Install it with "
            "pip install 'sdxl_jax[wandb]', or leave out logging.wandb_project"
        ) from error
    return wandb


def _truncate(path: Path, step: int) -> tuple[int, int]:
    """Removes the lines after a step. Returns (images seen until that step, the last step of the removed lines)."""
    lines, images_seen, last = [], 0, step
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # a line that a crash cut off; its step is recomputed
        last = max(last, line["step"])
        if line["step"] <= step:
            lines.append(text + "\n")
            images_seen = line["images_seen"]
    atomic.write_text(path, "".join(lines))
    return images_seen, last
