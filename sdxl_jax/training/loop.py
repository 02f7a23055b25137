"""The training program: prepare, then for each step: batch, step, log, save, evaluate. It knows no objective.

Nothing but logging waits for the device, and logging lags one step after, so that the device always has work. A run is
repeated exactly by its configuration; interrupted, it goes on from its last checkpoint as if nothing had happened.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch
from sdxl_jax.config import OnFailedSave, RunConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model
from sdxl_jax.training import run_directory
from sdxl_jax.training.checkpoint import Checkpoints
from sdxl_jax.training.observe import clock as clocks
from sdxl_jax.training.observe import profiling, validation
from sdxl_jax.training.observe.clock import Clock, TimeLog, TimePart
from sdxl_jax.training.observe.metrics import MetricsWriter, NonFinite, WandbBoard
from sdxl_jax.training.processes import Interrupted, Processes
from sdxl_jax.training.run_directory import check_run
from sdxl_jax.training.setup import Run, StartOptions, prepare
from sdxl_jax.training.state import TrainState

__all__ = ["check_run", "train"]


def train(
    config: RunConfig,
    run_dir: str | Path = "runs/train",
    progress: bool = True,
    *,
    from_step: int | None = None,
    allow_changes: Collection[str] = (),
    profile: tuple[int, int] | None = None,
    began: float | None = None,
) -> Model:
    """Trains until `config.training.steps`, from the last checkpoint in `run_dir` if there is one; returns the model,
    with its averaged weights. The configuration's type says what is learnt (sdxl_jax/training/objectives/).

    from_step: the checkpoint to go on from instead of the last; those after it are moved to RUN/set_aside.
    allow_changes: fields of the configuration, or groups of them, that may differ from the run's although they alter
    what is learnt; it is noted in config.json.
    profile: the first and the last step of a trace in RUN/profile. began: when the program started, by
    `time.monotonic()`, for the table of where the time went; None: now.

    Raises InputError before anything is written: for data, batch or mesh that do not fit, a run directory of another
    configuration, or in use, a checkpoint that cannot be read, processes that differ. SIGTERM or SIGINT end it with
    `Interrupted`, a SystemExit, once what was done is saved.
    """
    options, clock = StartOptions(from_step, allow_changes, profile, progress), Clock(began)
    with (
        Processes(config.processes.join_timeout_seconds) as processes,
        prepare(config, Path(run_dir), processes, options) as run,
    ):
        with _tools(run, clock) as tools:
            state = _loop(run, tools)
        if run.progress:
            tqdm.write(f"where the time went\n{clocks.table(clocks.read(run.run_dir))}")
    return run.objective.model(state, run.frozen)


def _loop(run: Run, tools: "Tools") -> TrainState:
    """Batch, step, log, save, evaluate, until all steps are made. Returns the last state."""
    state, step = run.state, run.first
    try:
        tools.evaluation.catch_up(step, state)
        while step < run.stop:
            with tools.saving.before_failing(step, state):
                rows = tools.batches.next(step)
            program, batch = tools.batches.placed(step, rows)
            with tools.step(step):
                state, metrics = program(state, run.frozen, batch)
                step += 1
                tools.log(step, metrics)
            tools.note(step)
            tools.saving.if_due(step, state)
            tools.evaluation.if_due(step, state)
    except Interrupted as stopped:
        tools.saving.before_leaving(step, state, stopped)
        raise
    return state


@dataclasses.dataclass
class Tools:
    """What the loop works with: each owns its part of the time."""

    run: Run
    clock: Clock
    times: TimeLog
    writer: MetricsWriter
    profiler: profiling.Profile
    batches: "Batches"
    saving: "Saving"
    evaluation: "Evaluation"

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the step after `step`."""
        part = TimePart.RECOMPUTED if step < self.writer.made_before else TimePart.STEP
        with self.clock.during(part), self.profiler.step(step + 1, self.writer.settle):
            yield

    def log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that has been started."""
        self.saving.add(metrics)
        dataset = self.run.dataset
        self.writer.log(step, dataset.bucket_of(step - 1), dataset.batch_size_of(step - 1), metrics)

    def note(self, step: int) -> None:
        """A step was made."""
        self.times.note(step, step <= self.writer.made_before)


@contextlib.contextmanager
def _tools(run: Run, clock: Clock) -> Iterator[Tools]:
    """Everything that is to be closed in the end, in the order that its closing needs."""
    processes, run_dir, progress = run.processes, run.run_dir, run.steps.progress
    board = _wandb(run.config, run_dir) if processes.is_first else None
    with (
        jax.set_mesh(run.mesh),
        TimeLog(run_dir, clock, writes=processes.is_first) as times,
        clock.during(TimePart.SAVE),  # leaving Checkpoints finishes what is being written
        _checkpoints(run) as checkpoints,
        clock.during(TimePart.OTHER),
        MetricsWriter(
            run_dir, run.first, run.stop, run.progress, clock, run.mfu_meter, board, processes.is_first, progress
        ) as writer,
        profiling.Profile(run_dir / "profile", run.profile) as profiler,
        _closing(run.dataset.iterate(run.first)) as rows,
        _naming_what_is_not_finite(run),
    ):
        batches, evaluation = Batches(run, clock, writer, rows), Evaluation(run, clock, writer)
        saving = Saving(run, clock, writer, checkpoints)
        yield Tools(run, clock, times, writer, profiler, batches, saving, evaluation)


class Batches:
    """The batches in order, each with the program of its bucket."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter, rows: Iterator[Batch]):
        self._run, self._clock, self._writer, self._rows = run, clock, writer, rows
        self._met = set[Bucket]()

    def next(self, step: int) -> Batch:
        """This process's rows of the step after `step`, whose program is there."""
        bucket = self._run.dataset.bucket_of(step)
        if bucket not in self._met:
            self._meet(bucket)
        with self._clock.during(TimePart.DATA):
            return self._run.processes.wait(lambda: next(self._rows))

    def placed(self, step: int, rows: Batch) -> tuple[Callable[..., Any], Batch]:
        """(program, batch on the devices). All processes pass here together, or stop here together."""
        run = self._run
        with self._clock.during(TimePart.DATA):
            batch = sharding.put_batch(run.mesh, rows)
        run.processes.point()
        return run.steps.of(run.dataset.bucket_of(step)), batch

    def _meet(self, bucket: Bucket) -> None:
        """Waits for a bucket's program, where it is needed for the first time."""
        processes, writer = self._run.processes, self._writer
        with self._clock.during(TimePart.COMPILE):
            writer.settle()
            processes.wait(lambda: self._run.steps.of(bucket, writer.compiling))
            # No process begins the step while another may yet be stopped compiling it.
            processes.gather("compiled")
            writer.compiled()
        self._met.add(bucket)


class Saving:
    """When checkpoints are written."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter, checkpoints: Checkpoints):
        self._run, self._clock, self._writer, self._checkpoints = run, clock, writer, checkpoints
        self._saved = run.first
        self._since = _Mean(run.config.checkpoint.keep_best)

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step, one of which may decide which checkpoint is the best."""
        self._since.add(metrics)

    def if_due(self, step: int, state: TrainState) -> None:
        if _due(step, self._run.config.checkpoint.every_steps, self._run.stop):
            self._save(step, state)

    @contextlib.contextmanager
    def before_failing(self, step: int, state: TrainState) -> Iterator[None]:
        """Saves where what is done inside fails: no program, or no batch. What was learnt stays."""
        try:
            yield
        except Exception as error:
            # Of several processes, the others do not know.
            if self._run.processes.count == 1 and step > self._saved and not isinstance(error, NonFinite):
                self._save(step, state)
            raise

    def before_leaving(self, step: int, state: TrainState, stopped: Interrupted) -> None:
        """Saves what a stopped run has learnt, and says so."""
        if step > self._saved:
            self._save(step, state)
        self._checkpoints.finish(last=True)
        if self._run.processes.is_first:
            done = "saved; run the same command to go on" if step else "before anything was to be saved"
            tqdm.write(f"stopped by {stopped.signal_name} after step {step}, {done}")

    def _save(self, step: int, state: TrainState) -> None:
        """Begins to write; after a failure, the run may go on."""
        with self._clock.during(TimePart.SAVE):
            self._writer.flush()
            if self._checkpoints.save(step, state, run_directory.described(self._run.objective), self._since.take()):
                self._saved = step


class Evaluation:
    """When validation images are made."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter):
        self._run, self._clock, self._writer = run, clock, writer

    def if_due(self, step: int, state: TrainState) -> None:
        if _due(step, self._run.objective.validates_every, self._run.stop):
            self._look(step, state)

    def catch_up(self, step: int, state: TrainState) -> None:
        """The images that are missing where a run was stopped between a checkpoint and its images."""
        run = self._run
        if step and _due(step, run.objective.validates_every, run.stop):
            # What the first process sees counts: what the others see may be older.
            there = int(validation.grid_path(run.run_dir, step).exists())
            if not int(run.processes.gather(str(there))[0]):
                self._look(step, state)

    def _look(self, step: int, state: TrainState) -> None:
        run = self._run
        with self._clock.during(TimePart.EVALUATION):
            self._writer.flush()
            model = run.objective.model(state, run.frozen)
            validation.look(run.objective, run.dataset, run.processes, run.run_dir, step, model, run.mesh)


def _checkpoints(run: Run) -> Checkpoints:
    options = run.config.checkpoint
    return Checkpoints(
        run.run_dir / "checkpoints",
        options.keep,
        keep_every_hours=options.keep_every_hours,
        keep_best=options.keep_best,
        go_on=options.on_failed_save is OnFailedSave.GO_ON,
        agree=functools.partial(
            run.processes.gather, stops=False
        ),  # a checkpoint is written by all processes, or by none
    )


class _Mean:
    """Of one metric over the steps since it was last taken, read when it is taken."""

    def __init__(self, name: str | None):
        self._name, self._values = name, list[jax.Array]()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        if self._name is not None:
            self._values.append(metrics[self._name])

    def take(self) -> dict[str, float] | None:
        if self._name is None:
            return None
        values = np.asarray(jax.device_get(self._values))
        self._values = []
        values = values[np.isfinite(values)]  # those of skipped steps are not
        return {self._name: float(np.mean(values)) if len(values) else math.inf}


@contextlib.contextmanager
def _closing(batches: Any) -> Iterator[Any]:
    """Ends the workers, unless the thread that waits for a batch was left there: it ends with the process."""
    try:
        yield batches
    finally:
        with contextlib.suppress(ValueError):  # generator already executing
            batches.close()


@contextlib.contextmanager
def _naming_what_is_not_finite(run: Run) -> Iterator[None]:
    try:
        yield
    except NonFinite as error:
        path = run.run_dir / f"nonfinite_step_{error.step:08d}.json"
        # Each process that comes here: the first may hear of it from another, and not come.
        validation.describe_nonfinite(run.config, path, error.step, run.dataset, run.processes.index)
        raise InputError(f"{error}. Its images, captions and key are in {path}") from error


def _due(step: int, every: int | None, stop: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is to be done after this step."""
    return every is not None and (step % every == 0 or step == stop)


def _wandb(config: RunConfig, run_dir: Path) -> WandbBoard | None:
    project = config.logging.wandb_project
    return None if project is None else WandbBoard(project, run_dir, to_json(config))
