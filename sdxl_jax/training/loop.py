"""The training program: prepare, then for each step: batch, step, log, save, evaluate. It knows no objective.

Nothing but logging waits for the device, and logging lags one step, so that the device always has work: dispatch is
asynchronous. A run is reproduced bit for bit from its configuration; interrupted, it resumes from its last checkpoint
as if nothing had happened.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Collection, Generator, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch
from sdxl_jax.config import OnFailedSave, RunConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.evaluation.settings import HIGHER_IS_BETTER
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import Model
from sdxl_jax.progress import log_format, tqdm
from sdxl_jax.sampling.nonfinite import NonFiniteError
from sdxl_jax.training import cluster, compilation, run_directory
from sdxl_jax.training.checkpoint import Checkpoints
from sdxl_jax.training.observe import profiling, validation
from sdxl_jax.training.observe.clock import Clock, TimeLog, TimePart, read_starts, time_table
from sdxl_jax.training.observe.metrics import MetricsWriter, NonFinite, WandbBoard
from sdxl_jax.training.observe.scores import Scores
from sdxl_jax.training.observe.watchdog import Watchdog
from sdxl_jax.training.processes import Interrupted, Processes
from sdxl_jax.training.run_directory import check_run
from sdxl_jax.training.save_timer import SaveTimer
from sdxl_jax.training.setup import Run, StartOptions, prepare
from sdxl_jax.training.state import TrainState
from sdxl_jax.training.step import Metrics, Step

__all__ = ["check_run", "train"]


def train(
    config: RunConfig,
    run_dir: str | PurePath = "runs/train",
    progress: bool = True,
    *,
    from_step: int | None = None,
    allow_changes: Collection[str] = (),
    profile: tuple[int, int] | None = None,
    began: float | None = None,
) -> Model:
    """Trains until `config.training.steps`, resuming from the last checkpoint in `run_dir` if there is one; returns the
    model with its averaged weights. The configuration's type chooses the objective (sdxl_jax/training/objectives/).

    from_step: the checkpoint to resume from instead of the last; later ones are moved to RUN/set_aside.
    allow_changes: fields of the configuration, or groups of them, that may differ from the run's although they alter
    what is learnt; the changes are recorded in config.json.
    profile: the first and the last step of a trace in RUN/profile. began: when the program started, by
    `time.monotonic()`, for the table of where the time went; None: now.

    Raises InputError before anything is written: for data, a batch size or a mesh that do not fit, a run directory of
    another configuration, a checkpoint that cannot be read, processes that disagree; MachineError for a run directory
    that is in use. SIGTERM or SIGINT end it with `Interrupted`, a SystemExit, once the finished steps are saved.
    """
    options, clock = StartOptions(from_step, allow_changes, profile, progress), Clock(began)
    cluster.check_slices(config.mesh.slices)
    with (
        log_format(config.logging.format),
        Processes(config.processes.join_timeout_seconds) as processes,
        _explained_out_of_memory(),
        prepare(config, run_dir, processes, options) as run,
    ):
        with _tools(run, clock) as tools:
            state = _loop(run, tools)
            model = _measured(run, clock, run.objective.model(state, run.frozen))
        if run.progress:
            tqdm.write(f"where the time went\n{time_table(read_starts(run.run_dir))}")
    return model


def _measured(run: Run, clock: Clock, model: Model) -> Model:
    """The trained model, with what is measured on it when training ends; config.json keeps that."""
    # The first process decides: the others may see an older state of a network file system.
    known = run_directory.measured_model(run.directory, run.stop) if run.processes.is_first else None
    if json.loads(run.processes.gather(json.dumps(known is not None))[0]):
        known = known or run_directory.measured_model(run.directory, run.stop)
        return model if known is None else model._replace(config=known)
    with clock.during(TimePart.EVALUATION):
        measured = run.objective.measure(model, run.dataset, run.mesh, run.processes, run.progress)
    if measured is None:
        return model
    if run.processes.is_first:
        run_directory.write_measured(run.directory, run.stop, measured)
    return model._replace(config=measured.model)


def _loop(run: Run, tools: "Tools") -> TrainState:
    """Batch, step, log, save, validate, until all steps are done. Returns the last state."""
    state, step = run.state, run.first
    try:
        tools.exporter.write_missing(step, state)
        tools.validator.write_missing_grid(step, state)
        while step < run.stop:
            with tools.saver.save_on_error(step, state):
                rows = tools.batches.next(step)
            program, batch = tools.batches.placed(step, rows)
            with tools.step(step):
                state, metrics = program(state, run.frozen, batch)
                step += 1
                tools.log(step, metrics, tools.validator.scores_if_due(step, state))
            tools.count_step(step)
            tools.saver.if_due(step, state)
            tools.exporter.if_due(step, state)
            tools.validator.if_due(step, state)
        tools.exporter.at_the_end(step, state)
    except Interrupted as interrupted:
        tools.saver.save_on_interrupt(step, state, interrupted)
        raise
    return state


@dataclasses.dataclass
class Tools:
    """What the loop uses; each accounts for its own part of the time."""

    run: Run
    clock: Clock
    times: TimeLog
    writer: MetricsWriter
    profiler: profiling.Profile
    batches: "Batches"
    saver: "Saver"
    exporter: "Exporter"
    validator: "Validator"

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Times, and maybe traces, the step after `step`."""
        part = TimePart.RECOMPUTED if step < self.writer.recomputed_until else TimePart.STEP
        with self.clock.during(part), self.profiler.step(step + 1, self.writer.settle):
            yield

    def log(self, step: int, metrics: Metrics, scores: Mapping[str, float]) -> None:
        """Takes the metrics of a step that has been dispatched; they may not be computed yet. scores: of the model
        after it."""
        self.saver.add({**metrics, **scores})
        dataset = self.run.dataset
        self.writer.log(step, dataset.bucket_of(step - 1), dataset.batch_size_of(step - 1), metrics, scores)

    def count_step(self, step: int) -> None:
        """Counts a step in RUN/time.jsonl."""
        self.times.count_step(step, step <= self.writer.recomputed_until)


@contextlib.contextmanager
def _tools(run: Run, clock: Clock) -> Iterator[Tools]:
    """Opens everything that has to be closed at the end, in the order that closing needs."""
    processes, run_dir, progress = run.processes, run.run_dir, run.steps.progress
    board = _wandb(run.config, run_dir) if processes.is_first else None
    with (
        jax.set_mesh(run.mesh),
        TimeLog(run_dir, clock, writes=processes.is_first) as times,
        _naming_the_root_failure(processes),
        Watchdog(clock, run.config.training.watchdog_minutes, functools.partial(_report_hang, run, times)),
        clock.during(TimePart.SAVE),  # leaving Checkpoints waits for the one being written
        _checkpoints(run) as checkpoints,
        clock.during(TimePart.OTHER),
        MetricsWriter(
            run_dir, run.first, run.stop, run.progress, clock, run.mfu_meter, board, processes.is_first, progress
        ) as writer,
        profiling.Profile(run_dir / "profile", run.profile) as profiler,
        _closing(run.dataset.iterate(run.first)) as rows,
        _describing_nonfinite_step(run),
        _explained_out_of_memory(),
    ):
        batches, validator = Batches(run, clock, writer, rows), Validator(run, clock, writer)
        saver = Saver(run, clock, writer, checkpoints)
        yield Tools(run, clock, times, writer, profiler, batches, saver, Exporter(run, clock, writer), validator)


def _report_hang(run: Run, times: TimeLog, error: MachineError) -> None:
    """Leaves the reason to `status` and to the other processes, before the watchdog ends this one."""
    times.end(error)
    run.processes.abandon(error)
    if run.processes.is_first:
        with contextlib.suppress(InputError, MachineError):
            run.directory.push()


@contextlib.contextmanager
def _explained_out_of_memory() -> Iterator[None]:
    """Raises InputError with the fields to change where the devices' memory does not suffice: for the state while it is
    made, or for a step."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        explained = compilation.explained("this run", error)
        if explained is error:
            raise
        raise explained from error


@contextlib.contextmanager
def _naming_the_root_failure(processes: Processes) -> Iterator[None]:
    """Raises another process's failure in place of its consequence here, for RUN/time.jsonl."""
    try:
        yield
    except Exception as error:
        if root_failure := processes.root_failure(error):
            raise root_failure from error
        raise


class Batches:
    """The batches in order, each with the compiled step of its bucket."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter, rows: Iterator[Batch]):
        self._run, self._clock, self._writer, self._rows = run, clock, writer, rows
        self._compiled = set[Bucket]()

    def next(self, step: int) -> Batch:
        """This process's rows for the step after `step`, once its program is compiled."""
        bucket = self._run.dataset.bucket_of(step)
        if bucket not in self._compiled:
            self._wait_for_program(bucket)
        with self._clock.during(TimePart.DATA):
            return self._run.processes.wait(lambda: next(self._rows))

    def placed(self, step: int, rows: Batch) -> tuple[Step, Batch]:
        """(compiled step, batch on the devices). A stop point: all processes continue to the step, or all stop here."""
        run = self._run
        with self._clock.during(TimePart.DATA):
            batch = sharding.put_batch(run.mesh, rows)
        run.processes.stop_point()
        return run.steps.of(run.dataset.bucket_of(step)), batch

    def _wait_for_program(self, bucket: Bucket) -> None:
        """The first time that a bucket's program is needed."""
        processes, writer = self._run.processes, self._writer
        with self._clock.during(TimePart.COMPILE):
            writer.settle()
            processes.wait(lambda: self._run.steps.of(bucket, writer.compiling))
            # No process starts the step while another may still be interrupted compiling it.
            processes.gather("compiled")
            writer.compiled()
        self._compiled.add(bucket)


class Saver:
    """Decides when checkpoints are written."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter, checkpoints: Checkpoints):
        self._run, self._clock, self._writer, self._checkpoints = run, clock, writer, checkpoints
        self._saved, self._timer = run.first, SaveTimer(run.config.checkpoint.every_minutes, run.processes)
        self._mean = _MeanMetric(run.config.checkpoint.keep_best)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step; `checkpoint.keep_best` compares one of them."""
        self._mean.add(metrics)

    def if_due(self, step: int, state: TrainState) -> None:
        if _due(step, self._run.config.checkpoint.every_steps, self._run.stop) or self._timer.is_due(step):
            self._save(step, state)

    @contextlib.contextmanager
    def save_on_error(self, step: int, state: TrainState) -> Iterator[None]:
        """Saves the state if the block raises, because there is no program or no batch: no finished step is lost."""
        try:
            yield
        except Exception as error:
            # With several processes, the others do not take part in saving.
            if self._run.processes.count == 1 and step > self._saved and not isinstance(error, NonFinite):
                self._save(step, state)
            raise

    def save_on_interrupt(self, step: int, state: TrainState, interrupted: Interrupted) -> None:
        """Saves the state of an interrupted run, and reports it."""
        if step > self._saved:
            self._save(step, state)
        self._checkpoints.finish(last=True)
        if self._run.processes.is_first:
            done = "saved; run the same command to resume" if step else "nothing to save yet"
            tqdm.write(f"stopped by {interrupted.signal_name} after step {step}, {done}")

    def _save(self, step: int, state: TrainState) -> None:
        """Starts an asynchronous save; training may continue after a failed one."""
        self._timer.restart()
        with self._clock.during(TimePart.SAVE):
            self._writer.flush()
            if not self._mirrored(step):
                return
            if self._checkpoints.save(step, state, run_directory.metadata_of(self._run.objective), self._mean.take()):
                self._saved = step

    def _mirrored(self, step: int) -> bool:
        """Copies the small files of a run in a bucket there, before a checkpoint that a resume may start from. Whether
        that went well; raises MachineError if not, unless training may continue after failed saves."""
        run = self._run
        if run.directory.mirror is None:
            return True
        run.check_lock()
        failed = run.processes.gather(_push(run, self._writer) if run.processes.is_first else "", stops=False)[0]
        if not failed:
            return True
        message = f"The checkpoint of step {step} was not written, because the small files were not: {failed}"
        if run.config.checkpoint.on_failed_save is not OnFailedSave.GO_ON:
            raise MachineError(message)
        if run.processes.is_first:
            tqdm.write(f"  {message}; training continues (checkpoint.on_failed_save=go_on)")
        return False


class Exporter:
    """Writes what is trained as files of their own, if the objective has such files: an adapter, an embedding."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter):
        self._run, self._clock, self._writer = run, clock, writer

    def if_due(self, step: int, state: TrainState) -> None:
        if self._is_due(step):
            self._write(step, state, self._name(step))

    def write_missing(self, step: int, state: TrainState) -> None:
        """On resume, if the run was stopped between a checkpoint and the files of the same step."""
        run = self._run
        if step and self._is_due(step):
            # The first process decides, as for validation images.
            exists = int((run.directory.path / self._name(step)).exists())
            if not int(run.processes.gather(str(exists))[0]):
                self._write(step, state, self._name(step))

    def _is_due(self, step: int) -> bool:
        """Whether files are written after this step, besides those of the end."""
        every = self._run.config.checkpoint.export_every_steps
        return every is not None and step % every == 0 and step < self._run.stop

    def _name(self, step: int) -> PurePath:
        return PurePath("adapters", f"{self._run.directory.path.name}-{step:08d}.safetensors")

    def at_the_end(self, step: int, state: TrainState) -> None:
        """After the last step, also of a run that had finished before."""
        if self._run.objective.exports:
            name = PurePath(f"{self._run.directory.path.name}.safetensors")
            for what, file in self._write(step, state, name).items():
                if self._run.progress:
                    tqdm.write(f"the {what} is in {self._run.directory.path / file}")
            for note in self._run.objective.export_notes() if self._run.progress else ():
                tqdm.write(f"note: {note}")

    def _write(self, step: int, state: TrainState, name: PurePath) -> dict[str, Path]:
        """The files that were written, in the run directory, by what they are."""
        run = self._run
        with self._clock.during(TimePart.SAVE):
            self._writer.flush()
            path, given = run.run_dir / name, (run.mesh, run.processes, run.dataset)
            written = run.objective.export(state, run.frozen, path, step, *given)
        if run.processes.is_first and (failed := _push(run, self._writer)):
            tqdm.write(f"  {name} is not in the bucket yet: {failed}")
        return {what: path.relative_to(run.run_dir) for what, path in written.items()}


class Validator:
    """Decides when validation images are generated, and when the model is measured."""

    def __init__(self, run: Run, clock: Clock, writer: MetricsWriter):
        self._run, self._clock, self._writer = run, clock, writer
        self._scores = Scores(run.objective, run.dataset, run.mesh, run.processes)

    def scores_if_due(self, step: int, state: TrainState) -> dict[str, float]:
        """The scores of the model after a step, if they are due: before it is saved, which may depend on them."""
        if not _due(step, self._scores.every, self._run.stop):
            return {}
        with self._clock.during(TimePart.EVALUATION):
            try:
                return self._scores.of(self._run.objective.model(state, self._run.frozen))
            except NonFiniteError as error:  # raised on all processes; only a non-finite loss ends the run
                if self._run.processes.is_first:
                    tqdm.write(f"note: no scores of step {step}: {error}")
                return {}

    def if_due(self, step: int, state: TrainState) -> None:
        if _due(step, self._run.objective.validates_every, self._run.stop):
            self._validate(step, state)

    def write_missing_grid(self, step: int, state: TrainState) -> None:
        """Before the first step, if it is wanted there; on resume, if the run was stopped between a checkpoint and the
        grid of the same step."""
        run = self._run
        if (step or run.objective.validates_at_start) and _due(step, run.objective.validates_every, run.stop):
            # The first process decides: the others may see an older state of a network file system.
            exists = int((run.directory.path / validation.grid_name(step)).exists())
            if not int(run.processes.gather(str(exists))[0]):
                self._validate(step, state)

    def _validate(self, step: int, state: TrainState) -> None:
        run = self._run
        with self._clock.during(TimePart.EVALUATION):
            self._writer.flush()
            model = run.objective.model(state, run.frozen)
            validation.write_grid(run.objective, run.dataset, run.processes, run.run_dir, step, model, run.mesh)
        if run.processes.is_first and (failed := _push(run, self._writer)):
            tqdm.write(f"  the validation images of step {step} are not in the bucket yet: {failed}")


def _checkpoints(run: Run) -> Checkpoints:
    options = run.config.checkpoint
    return Checkpoints(
        run.directory.checkpoints,
        options.keep,
        keep_every_hours=options.keep_every_hours,
        keep_best=options.keep_best,
        best_is_highest=(options.keep_best or "").removeprefix("validation_") in HIGHER_IS_BETTER,
        go_on=options.on_failed_save is OnFailedSave.GO_ON,
        # A checkpoint is written by all processes or by none, so no stop comes in between.
        agree=functools.partial(run.processes.gather, stops=False),
    )


class _MeanMetric:
    """The mean of one metric over the steps since it was last taken, if they had it; read from the device when it is
    taken."""

    def __init__(self, name: str | None):
        self._name, self._values = name, list[Any]()

    def add(self, metrics: Mapping[str, Any]) -> None:
        if self._name is not None and self._name in metrics:
            self._values.append(metrics[self._name])

    def take(self) -> dict[str, float] | None:
        values = np.asarray(jax.device_get(self._values))
        self._values = []
        values = values[np.isfinite(values)]  # a skipped step's may be NaN or inf
        return {self._name: float(np.mean(values))} if self._name is not None and len(values) else None


def _push(run: Run, writer: MetricsWriter) -> str:
    """Copies the small files of a run in a bucket there. Returns why that failed, or ""."""
    try:
        run.directory.push()
    except (InputError, MachineError) as error:
        return str(error)
    if run.directory.mirror is not None:
        writer.new_event_file()
    return ""


@contextlib.contextmanager
def _closing(batches: Generator[Batch, None, None]) -> Iterator[Iterator[Batch]]:
    """Ends the loader's workers, unless an abandoned thread still waits for a batch: it ends with the process."""
    try:
        yield batches
    finally:
        with contextlib.suppress(ValueError):  # generator already executing
            batches.close()


@contextlib.contextmanager
def _describing_nonfinite_step(run: Run) -> Iterator[None]:
    """For a step whose loss or gradient is not finite, writes its images, captions and key to a file."""
    try:
        yield
    except NonFinite as error:
        name = f"nonfinite_step_{error.step:08d}.json"
        # On every process that raises it: the first may get another's failure instead.
        validation.describe_nonfinite(run.config, run.run_dir / name, error.step, run.dataset, run.processes.index)
        raise InputError(f"{error}. Its images, captions and key are in {run.directory.path / name}") from error


def _due(step: int, every: int | None, stop: int) -> bool:
    """Whether something done every so many steps, and at the end, is due after this step."""
    return every is not None and (step % every == 0 or step == stop)


def _wandb(config: RunConfig, run_dir: Path) -> WandbBoard | None:
    project = config.logging.wandb_project
    return None if project is None else WandbBoard(project, run_dir, to_json(config))
