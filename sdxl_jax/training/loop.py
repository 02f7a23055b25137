"""The training program: configuration, mesh, data, model, state, restore; then batch, step, log, save, look.

Nothing but logging waits for the device, and logging lags one step behind, so that the device always has work. A run is
repeated exactly by its configuration; interrupted, it goes on from its last checkpoint as if nothing had happened.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax import config as configuration
from sdxl_jax import sharding
from sdxl_jax.arrays import flatten
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import OnFailedSave, TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.optim import optimiser as optimisers
from sdxl_jax.training import checkpoint, compilation, run_directory, setup
from sdxl_jax.training.checkpoint import Checkpoints, restore, restore_frozen, save_frozen
from sdxl_jax.training.compilation import CompiledSteps
from sdxl_jax.training.encoding import check_frozen, from_cache
from sdxl_jax.training.initial import check_initial, initial_weights
from sdxl_jax.training.observe import clock as clocks
from sdxl_jax.training.observe import metrics as logging
from sdxl_jax.training.observe import profiling, validation
from sdxl_jax.training.observe.clock import Clock, Part, TimeLog
from sdxl_jax.training.observe.metrics import MetricsWriter, NonFinite, Speed, WandbBoard
from sdxl_jax.training.processes import Hosts, Interrupted
from sdxl_jax.training.run_directory import check_run
from sdxl_jax.training.state import merge
from sdxl_jax.training.step import make_step

_T = TypeVar("_T")


def train(
    config: TrainConfig,
    run_dir: str | Path = "runs/train",
    progress: bool = True,
    *,
    from_step: int | None = None,
    allow_changes: Collection[str] = (),
    profile: tuple[int, int] | None = None,
    began: float | None = None,
) -> Model:
    """Trains until `config.training.steps`, from the last checkpoint in `run_dir` if there is one; returns the model,
    with its averaged weights.

    from_step: the checkpoint to go on from instead of the last; those after it are moved to RUN/set_aside.
    allow_changes: fields of the configuration, or groups of them, that may differ from the run's although they alter
    what is learnt; it is noted in config.json.
    profile: the first and the last step of a trace in RUN/profile. began: when the program started, by
    `time.monotonic()`, for the table of where the time went; None: now.

    Raises InputError before anything is written: for data, batch or mesh that do not fit, a run directory of another
    configuration, or in use, a checkpoint that cannot be read, hosts that differ. SIGTERM or SIGINT end it with
    SystemExit(0), once what was done is saved.
    """
    run_dir, clock = Path(run_dir), Clock(began)
    with Hosts(config.hosts.join_timeout_seconds) as hosts, contextlib.ExitStack() as leaving:
        progress = progress and hosts.is_first
        config.check()
        logging.check(config.logging.wandb_project)
        if config.training.compilation_cache is not None:
            compilation.use_cache(config.training.compilation_cache)
        check_run(config, run_dir, allow_changes=allow_changes)
        check_frozen(config)
        if checkpoint.latest_step(run_dir / "checkpoints") is None:
            check_initial(config)
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(mesh, config.data.batch_size, config.optimiser.accumulate)
        sharding.check_heads(mesh, config.model.unet.attention_heads)
        tokenizer = Tokenizer.of(config.model.text)
        part, parts = sharding.host_part(mesh)
        dataset = hosts.wait(lambda: BucketedDataset(config.data, tokenizer, host_index=part, host_count=parts))
        changed = check_run(config, run_dir, dataset, allow_changes)
        optimiser, empty = optimisers.make(config.optimiser, config.training.steps), tokenizer([""])
        abstract, abstract_frozen = setup.abstract_state(config, mesh, optimiser)

        if hosts.is_first:
            leaving.enter_context(run_directory.locked(run_dir))
        on_mesh = functools.partial(_on_mesh, hosts, mesh)
        last = checkpoint.step_to_start_from(run_dir / "checkpoints", from_step)
        profile = profiling.check(profile, last or 0, config.training.steps)
        hosts.gather("the directory is locked")
        hosts.compare(_facts(config, run_dir, dataset, last))
        given = setup.arguments(config, mesh, dataset, last or 0, abstract, abstract_frozen)
        function = setup.jitted(make_step(config, optimiser, empty), config, mesh, abstract)
        ahead, threads = config.training.compile_ahead, config.training.compile_threads
        made_ahead = setup.programs(config, mesh)
        speed = Speed.of(lambda bucket: setup.model_flops(config, optimiser, empty, given[bucket]), jax.devices())
        count = None if speed is None else speed.count
        steps = leaving.enter_context(CompiledSteps(function, given, mesh, ahead, threads, made_ahead, count))
        initial = {}
        if last is None:
            initial = on_mesh(lambda: initial_weights(config, mesh, progress=progress))
            state, frozen = on_mesh(lambda: setup.fresh_state(config, optimiser, abstract, abstract_frozen, initial))
        else:
            state = on_mesh(lambda: restore(run_dir / "checkpoints", last, abstract))
            frozen = on_mesh(lambda: restore_frozen(run_dir, abstract_frozen))
        first, stop = int(state.step), config.training.steps
        dataset = from_cache(config, dataset, frozen)

        if hosts.is_first:
            if from_step is not None:
                _set_aside(run_dir, from_step)
            run_directory.write_config(config, run_dir, dataset, first, changed)
        hosts.gather("the directory is ready")
        if last is None:
            on_mesh(lambda: save_frozen(run_dir, frozen))
        if progress:
            validation.announce(dataset, tokenizer, run_dir, first, changed)
            random = sorted(set(frozen) - {path.split("/")[0] for path in initial})
            if last is None and random:
                tqdm.write(f"  frozen, wholly or in part, at random weights: {', '.join(random)}")

        board = _wandb(config, run_dir) if hosts.is_first else None
        with (
            jax.set_mesh(mesh),
            TimeLog(run_dir, clock, writes=hosts.is_first) as times,
            clock.during(Part.SAVE),  # leaving Checkpoints finishes what is being written
            _checkpoints(config, run_dir, hosts) as checkpoints,
            clock.during(Part.OTHER),
            MetricsWriter(
                run_dir, first, stop, progress, clock, speed, board, hosts.is_first, steps.progress
            ) as writer,
            profiling.Profile(run_dir / "profile", profile) as profiler,
            _closing(dataset.iterate(first)) as batches,
            _naming_what_is_not_finite(config, run_dir, hosts, dataset),
        ):
            step = saved = first
            met = set[Bucket]()
            since = _Mean(config.checkpoint.keep_best)

            def save() -> bool:
                """Whether it has begun: after a failure, the run may go on."""
                with clock.during(Part.SAVE):
                    writer.flush()
                    metadata = {"config": configuration.to_json(config), "versions": run_directory.versions()}
                    return checkpoints.save(step, state, metadata, since.take())

            def look() -> None:
                with clock.during(Part.EVALUATION):
                    writer.flush()
                    model = Model(config.model, merge(state.sampled, frozen))
                    validation.look(config, hosts, run_dir, step, model, mesh)

            def meet(bucket: Bucket) -> None:
                """Waits for a bucket's program, where it is needed for the first time."""
                with clock.during(Part.COMPILE):
                    writer.settle()
                    hosts.wait(lambda: steps.of(bucket, writer.compiling))
                    # No host begins the step while another may yet be stopped compiling it.
                    hosts.gather("compiled")
                    writer.compiled()
                met.add(bucket)

            try:
                if first and _look_due(config, first) and not _is_there(run_dir, first, hosts):
                    look()  # the run was stopped between the checkpoint and its pictures
                while step < stop:
                    bucket, again = dataset.bucket_of(step), step < writer.made_before
                    try:
                        if bucket not in met:
                            meet(bucket)
                        with clock.during(Part.DATA):
                            rows = hosts.wait(lambda: next(batches))
                    except Exception as error:
                        # No program, or no batch: what was learnt stays. Of several hosts, the others do not know.
                        if hosts.count == 1 and step > saved and not isinstance(error, NonFinite):
                            save()
                        raise
                    with clock.during(Part.DATA):
                        batch = sharding.put_batch(mesh, rows)
                    hosts.point()
                    with clock.during(Part.AGAIN if again else Part.STEP), profiler.step(step + 1, writer.settle):
                        state, metrics = steps.of(bucket)(state, frozen, batch)
                        step += 1
                        since.add(metrics)
                        writer.log(step, bucket, dataset.batch_size_of(step - 1), metrics)
                    times.note(step, again)
                    if _due(step, config.checkpoint.every_steps, stop) and save():
                        saved = step
                    if _look_due(config, step):
                        look()
            except Interrupted as stopped:
                if step > saved:
                    save()
                checkpoints.finish(last=True)
                if hosts.is_first:
                    done = "saved; run the same command to go on" if step else "before anything was to be saved"
                    tqdm.write(f"stopped by {stopped.signal_name} after step {step}, {done}")
                raise
        if progress:
            tqdm.write(f"where the time went\n{clocks.table(clocks.read(run_dir))}")
    return Model(config.model, merge(state.sampled, frozen))


def _on_mesh(hosts: Hosts, mesh: Mesh, work: Callable[[], _T]) -> _T:
    """The work's result, for which a signal need not wait. The mesh is one of a thread's own settings."""

    def run() -> _T:
        with jax.set_mesh(mesh):
            return jax.block_until_ready(work())

    hosts.point()
    return hosts.wait(run)


def _facts(config: TrainConfig, run_dir: Path, dataset: BucketedDataset, last: int | None) -> dict[str, Any]:
    """What all hosts must have in common."""
    values = configuration.to_json(config)
    return {
        "configuration": {path.replace("/", "."): value for path, value in flatten(values).items()},
        "versions of the libraries": run_directory.versions(),
        "data": dataset.fingerprint,
        "order of the data": dataset.assignment,
        "run directory in sight": (run_dir / "lock").read_text() if (run_dir / "lock").exists() else None,
        "checkpoint to start from": last,
    }


def _set_aside(run_dir: Path, step: int) -> None:
    for place in checkpoint.set_aside_after(run_dir, step):
        tqdm.write(f"  a checkpoint after step {step} is now in {place}")


def _checkpoints(config: TrainConfig, run_dir: Path, hosts: Hosts) -> Checkpoints:
    options = config.checkpoint
    return Checkpoints(
        run_dir / "checkpoints",
        options.keep,
        keep_every_hours=options.keep_every_hours,
        keep_best=options.keep_best,
        go_on=options.on_failed_save is OnFailedSave.GO_ON,
        agree=functools.partial(hosts.gather, stops=False),  # a checkpoint is written by all hosts, or by none
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
def _naming_what_is_not_finite(
    config: TrainConfig, run_dir: Path, hosts: Hosts, dataset: BucketedDataset
) -> Iterator[None]:
    try:
        yield
    except NonFinite as error:
        path = run_dir / f"nonfinite_step_{error.step:08d}.json"
        # Each host that comes here: the first may hear of it from another, and not come.
        validation.describe_nonfinite(config, path, error.step, dataset, hosts.index)
        raise InputError(f"{error}. Its pictures, captions and key are in {path}") from error


def _due(step: int, every: int | None, stop: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is to be done after this step."""
    return every is not None and (step % every == 0 or step == stop)


def _look_due(config: TrainConfig, step: int) -> bool:
    return bool(config.validation.prompts) and _due(step, config.validation.every_steps, config.training.steps)


def _is_there(run_dir: Path, step: int, hosts: Hosts) -> bool:
    """Whether a step's pictures are, for the first host: what the others see may be older."""
    return hosts.gather(str(validation.grid_path(run_dir, step).exists()))[0] == "True"


def _wandb(config: TrainConfig, run_dir: Path) -> WandbBoard | None:
    project = config.logging.wandb_project
    return None if project is None else WandbBoard(project, run_dir, configuration.to_json(config))
