"""Where a run's numbers go: RUN/metrics.jsonl with all digits, RUN/tensorboard, Weights & Biases if asked for, and the
progress bar."""

import functools
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sdxl_jax import hardware
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError
from sdxl_jax.training.clock import Clock, Part

TIMES = ("step_seconds", "images_per_second", "data_seconds", "compile_seconds", "peak_share")
"""Fields of a line that a resumed run does not repeat: they are about time."""
_SCALARS = ("loss", "grad_norm", "learning_rate", "skipped", *TIMES)
_PAUSES = (Part.COMPILE, Part.SAVE, Part.EVALUATION)
"""What is no step's time."""


class Speed:
    """What a share of peak is computed from: model FLOPs of a step of each bucket, counted when first asked for."""

    def __init__(self, flops: Callable[[Bucket], float], peak: float):
        """flops: over all devices. peak: FLOP/s of all devices together."""
        self.flops, self.peak = functools.cache(flops), peak

    @classmethod
    def of(cls, flops: Callable[[Bucket], float], devices: Sequence[Any]) -> "Speed | None":
        """devices: jax's, all of one kind. None where they have no known peak, as CPUs."""
        chip = hardware.chip_of(devices[0].device_kind)
        return None if chip is None else cls(flops, chip.flops_per_second * len(devices))


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
        speed: Speed | None = None,
        board: "WandbBoard | None" = None,
        writes: bool = True,
    ):
        """Removes the lines of steps after `start`, which are about to be made again. writes: one process of several
        does; the others read the numbers all the same, and raise where it raises."""
        self._path = run_dir / "metrics.jsonl" if writes else Path(os.devnull)
        there = writes and self._path.exists()
        self._images_seen, self.made_before = _cut_after(self._path, start) if there else (0, start)
        """`made_before`: the last step that an earlier start had made."""
        self._file = self._path.open("a", buffering=1)  # a line at a time: a kill loses the last one or two
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1) if writes else None
        self._wandb, self._speed, self._clock = board, speed, clock or Clock()
        self._bar = tqdm(total=stop, initial=start, desc="training", unit="step", disable=not progress, smoothing=0.05)
        self._pending: tuple[int, Bucket, int, dict[str, jax.Array], dict[str, float]] | None = None
        self._noted = self._read = self._clock.seconds()
        self._skipped = 0

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._bar.close()
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None and not issubclass(kind, SystemExit))

    def log(self, step: int, bucket: Bucket, batch_size: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the numbers of a step that has been started, and writes those of the one before."""
        self._write()
        seconds = self._clock.seconds()
        waited = {part: seconds[part] - self._noted[part] for part in (Part.DATA, Part.COMPILE)}
        self._noted = seconds
        times = {f"{part.value}_seconds": value for part, value in waited.items() if value}
        self._pending = step, bucket, batch_size, metrics, times
        if all(value.is_ready() for value in metrics.values()):  # pyright: ignore[reportAttributeAccessIssue]
            self._write()  # a device that has it already, as CPUs do, would find its time in the line before

    def settle(self) -> None:
        """Waits for the last step and writes its line. Before anything that is no step's time."""
        with self._clock.during(Part.STEP):
            self._write()

    def flush(self) -> None:
        """Waits for the last step and brings all lines to the disk."""
        self.settle()
        self._file.flush()
        if self._board is not None:
            os.fsync(self._file.fileno())
            self._board.flush()

    def compiling(self, finished: int, total: int) -> None:
        """Says in the bar that the next step waits for its program."""
        self._bar.set_postfix_str(f"compiling {finished}/{total}")

    def compiled(self, bucket: Bucket) -> None:
        """The waiting is over: the time left does not follow from it. Counts the operations of that bucket's step."""
        if self._speed is not None:
            self._speed.flops(bucket)
        if not self._bar.disable:
            waited = self._clock.seconds()[Part.COMPILE] - self._noted[Part.COMPILE]
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
        if self._speed is not None:
            line["peak_share"] = self._speed.flops(bucket) / seconds / self._speed.peak
        if not math.isfinite(values["loss"] + values["grad_norm"]) and not values.get("skipped"):
            raise NonFinite(step, values["loss"], values["grad_norm"])
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        if self._board is not None:
            for name in _SCALARS:
                if name in line:
                    self._board.add_scalar(name, line[name], step)
        if self._wandb is not None:
            self._wandb.log(line)
        shown = [f"loss {values['loss']:.4f}", f"{line['images_per_second']:.1f} images/s"]
        if "peak_share" in line:
            shown.append(f"{line['peak_share']:.0%} of peak")
        shown.append(f"{now[Part.DATA]:.0f} s waiting for data")
        self._skipped += int(values.get("skipped", 0))
        if self._skipped:
            shown.append(f"{self._skipped} skipped")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
    return images_seen, last
