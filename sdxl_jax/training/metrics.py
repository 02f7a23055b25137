"""Where a run's numbers go: RUN/metrics.jsonl with all digits, RUN/tensorboard, and the progress bar."""

import json
import math
import os
import time
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError

_SCALARS = ("loss", "grad_norm", "learning_rate", "images_per_second")


class NonFiniteLoss(InputError):
    """Raised when the numbers of that step are read; those of the steps before are written."""

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"The loss of step {step} is {loss}. The run stops before this is saved. Lower "
            "optimiser.learning_rate, or go on from the last checkpoint with another training.seed in a new run"
        )
        self.step = step


class MetricsWriter:
    """One line a step. A context manager: leaving it writes everything out.

    A step's numbers are read when the next step has been started (`log` keeps them until then), so that the device is
    never idle for their sake.
    """

    def __init__(self, run_dir: Path, start: int, stop: int, progress: bool, writes: bool = True):
        """Removes the lines of steps after `start`, which are about to be made again. writes: one process of several
        does; the others read the numbers all the same, and raise where it raises."""
        self._path = run_dir / "metrics.jsonl" if writes else Path(os.devnull)
        self._images_seen = _cut_after(self._path, start) if writes and self._path.exists() else 0
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1) if writes else None
        self._bar = tqdm(total=stop, initial=start, desc="training", unit="step", disable=not progress, smoothing=0.05)
        self._pending: tuple[int, Bucket, int, dict[str, jax.Array]] | None = None
        self._last = time.monotonic()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()
        self._bar.close()

    def log(self, step: int, bucket: Bucket, batch_size: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the numbers of a step that has been started, and writes those of the one before."""
        self._write()
        self._pending = step, bucket, batch_size, metrics
        if all(value.is_ready() for value in metrics.values()):  # pyright: ignore[reportAttributeAccessIssue]
            self._write()  # a device that has it already, as CPUs do, would find its time in the line before

    def flush(self) -> None:
        """Waits for the last step and brings all lines to the disk."""
        self._write()
        self._file.flush()
        if self._board is not None:
            os.fsync(self._file.fileno())
            self._board.flush()

    def restart_clock(self) -> None:
        """What was done since the last step does not count as the next one's time."""
        self._last = time.monotonic()

    def _write(self) -> None:
        if self._pending is None:
            return
        step, bucket, batch_size, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in metrics.items()}  # waits for the device
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._images_seen += batch_size
        line = {
            "step": step,
            **values,
            "bucket": list(bucket),
            "images_seen": self._images_seen,
            "step_seconds": seconds,
            "images_per_second": batch_size / seconds,
        }
        if not math.isfinite(values["loss"]) and not values.get("skipped"):
            raise NonFiniteLoss(step, values["loss"])
        self._file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name in _SCALARS:
                self._board.add_scalar(name, line[name], step)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {line['images_per_second']:.1f} images/s", refresh=False)
        self._bar.update()


def _cut_after(path: Path, step: int) -> int:
    """Removes the lines after that step; the images that it had seen."""
    kept, images_seen = [], 0
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # the line that a crash cut off; whatever it was, it is made again
        if line["step"] <= step:
            kept.append(text + "\n")
            images_seen = line["images_seen"]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
    return images_seen
