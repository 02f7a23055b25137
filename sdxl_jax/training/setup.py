"""Start-up: `prepare` checks everything, compares it between processes, and initialises or restores the state.

    configuration ── mesh ── data ── lock ── programs ── state or checkpoint ── config.json

Nothing is written, and nothing takes long, before everything that can be refused has been checked.
"""

import contextlib
import dataclasses
import functools
import json
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh

from sdxl_jax import sharding
from sdxl_jax.arrays import Params, flatten
from sdxl_jax.compilation import compilation_cache, traces
from sdxl_jax.compilation.traces import Traces
from sdxl_jax.config import FILES, RunConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.jsontree import to_json
from sdxl_jax.progress import tqdm
from sdxl_jax.training import checkpoint, compilation, run_directory
from sdxl_jax.training.checkpoint import restore, restore_frozen, save_frozen
from sdxl_jax.training.compilation import CompiledSteps
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.base import Objective
from sdxl_jax.training.observe import metrics, profiling, validation
from sdxl_jax.training.observe.mfu import MfuMeter
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.programs import Programs, folder
from sdxl_jax.training.run_directory import RunDirectory
from sdxl_jax.training.state import TrainState
from sdxl_jax.training.step import Step

_T = TypeVar("_T")
_NOT_IN_PROGRAMS = ("checkpoint", "logging", "processes", "validation")
"""Sections of the configuration on which the step does not depend."""


class StartOptions(NamedTuple):
    """The options of one start that are not part of the configuration; `loop.train` documents them."""

    from_step: int | None = None
    allow_changes: Collection[str] = ()
    profile: tuple[int, int] | None = None
    progress: bool = True


@dataclasses.dataclass
class Run:
    """A prepared run: everything that its loop needs."""

    objective: Objective[Any]
    directory: RunDirectory
    processes: Processes
    mesh: Mesh
    dataset: BucketedDataset
    steps: CompiledSteps[Step]
    mfu_meter: MfuMeter | None
    state: TrainState
    """Before the first step of this start."""
    frozen: Params
    first: int
    """Steps done before this start."""
    profile: tuple[int, int] | None
    progress: bool

    check_lock: Callable[[], None]
    """Raises MachineError if another process has taken over the run directory."""

    @property
    def run_dir(self) -> Path:
        """The local folder of the run's small files."""
        return self.directory.files

    @property
    def config(self) -> RunConfig:
        return self.objective.config

    @property
    def stop(self) -> int:
        """Steps after which the run is finished."""
        return self.config.training.steps


@contextlib.contextmanager
def prepare(config: RunConfig, run_dir: str | PurePath, processes: Processes, options: StartOptions) -> Iterator[Run]:
    """The run. Its directory is locked, and its programs are being compiled, until the context is left.

    Raises InputError and MachineError before anything is written, as `loop.train` documents.
    """
    options = options._replace(progress=options.progress and processes.is_first)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(run_directory.opened(run_dir, config.checkpoint.directory))
        objective = _checked(config, directory, options)
        mesh = sharding.make_mesh(config.mesh)
        objective.check_mesh(mesh)
        dataset = _dataset(objective, processes, mesh)
        objective.check_data(dataset)
        changed = run_directory.check(config, directory, dataset, options.allow_changes)
        abstract, abstract_frozen = objective.abstract_state(mesh)
        check_lock: Callable[[], None] = _nothing
        if processes.is_first:
            check_lock = stack.enter_context(run_directory.locked(directory, processes.wait))
            stack.enter_context(directory.pushed_at_end())
        last = checkpoint.step_to_start_from(directory.checkpoints, options.from_step)
        profile = profiling.check(options.profile, last or 0, config.training.steps)
        processes.gather("the directory is locked")
        processes.compare(_facts(config, directory, dataset, last))
        steps, mfu_meter = _programs(objective, processes, mesh, dataset, last or 0, abstract, abstract_frozen)
        stack.enter_context(steps)
        state, frozen, random = _state(
            objective, directory.arrays, processes, mesh, last, abstract, abstract_frozen, options
        )
        dataset = objective.batches(dataset, frozen)
        first = int(state.step)
        if processes.is_first:
            if options.from_step is not None:
                _set_aside(directory.arrays, options.from_step)
            run_directory.write_config(objective, directory, dataset, first, changed)
            directory.push()
        processes.gather("the directory is ready")
        if last is None:
            on_mesh(processes, mesh, lambda: save_frozen(directory.arrays, frozen))
        if options.progress:
            validation.announce(dataset, objective.tokenizer, directory.path, first, changed)
            if random:
                tqdm.write(f"  frozen at random weights, at least in part: {', '.join(random)}")
        yield Run(
            objective=objective,
            directory=directory,
            processes=processes,
            mesh=mesh,
            dataset=dataset,
            steps=steps,
            mfu_meter=mfu_meter,
            state=state,
            frozen=frozen,
            first=first,
            profile=profile,
            progress=options.progress,
            check_lock=check_lock,
        )


def _nothing() -> None:
    """The lock of processes that hold none."""


def _checked(config: RunConfig, directory: RunDirectory, options: StartOptions) -> Objective[Any]:
    """The objective of a configuration, once checked that it can be trained in this directory. No data is read."""
    objective = objective_of(config)
    objective.check()
    metrics.check(config.logging.wandb_project)
    compilation_cache.use(config.training.compilation_cache)
    run_directory.check(config, directory, allow_changes=options.allow_changes)
    if checkpoint.latest_step(directory.checkpoints) is None:
        objective.check_start()
    return objective


def _dataset(objective: Objective[Any], processes: Processes, mesh: Mesh) -> BucketedDataset:
    part, parts = sharding.process_part(mesh)
    return processes.wait(
        lambda: BucketedDataset(objective.config.data, objective.tokenizer, process_index=part, process_count=parts)
    )


def _programs(
    objective: Objective[Any],
    processes: Processes,
    mesh: Mesh,
    dataset: BucketedDataset,
    first: int,
    abstract: TrainState,
    abstract_frozen: Params,
) -> tuple[CompiledSteps[Step], MfuMeter | None]:
    """(the steps of the buckets that the run still needs, compiled in the order of need; the MFU meter, if the chip's
    peak is known)."""
    training = objective.config.training
    needed = compilation.order_of_need(dataset, first, training.steps)
    arguments = {
        bucket: (abstract, abstract_frozen, objective.abstract_batch(mesh, bucket, batch_size))
        for bucket, batch_size in needed.items()
    }
    mfu_meter = MfuMeter.of(lambda bucket: objective.model_flops(arguments[bucket]), jax.devices())
    found, share = _traces(objective, processes, mesh)
    steps: CompiledSteps[Step] = CompiledSteps(
        jitted(objective, mesh, abstract),
        arguments,
        mesh,
        training.compile_ahead,
        training.compile_threads,
        programs(objective.config, mesh),
        None if mfu_meter is None else mfu_meter.count,
        found,
        share,
    )
    return steps, mfu_meter


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _traces(objective: Objective[Any], processes: Processes, mesh: Mesh) -> tuple[Traces | None, tuple[int, int]]:
    """(the traces of earlier starts and of the other processes, if there are any; (this process, processes) that share
    the programs out: those that see the same cache.)"""
    alone = 0, 1
    cache, known, devices = compilation_cache.current(), None, list(mesh.devices.flat)
    if cache is not None and _package(type(objective)) == _package(Objective):
        values = {name: value for name, value in to_json(objective.config).items() if name not in _NOT_IN_PROGRAMS}
        del values["training"]["compilation_cache"]
        values |= {"objective": type(objective).__name__, "files": sorted(FILES)}
        known = traces.fingerprint(values, devices)
    # A mark of the first process shows who sees its cache; its fingerprint is everybody's: files may differ in time.
    mark = f"{uuid.uuid4().hex}-mark"
    if known is not None and cache is not None and processes.is_first and processes.count > 1:
        cache.put(mark, b"")
    first = json.loads(processes.gather(json.dumps([known, mark]))[0])
    sees = cache is not None and known is not None and (processes.count == 1 or cache.has(first[1]))
    all_see = set(processes.gather(json.dumps(sees))) == {"true"}
    if cache is None or known is None:
        return None, alone
    if processes.is_first:
        cache.remove(mark)
    if not all_see:
        return Traces(cache, known, devices), alone
    # On GPUs XLA shares its timing of kernels between the processes, and waits for all of them to compile the same.
    shared = devices[0].platform != "gpu"
    return Traces(cache, first[0], devices), (processes.index, processes.count) if shared else alone


def jitted(objective: Objective[Any], mesh: Mesh, abstract: TrainState) -> Any:
    """The jitted step. Its results keep the state's shardings: if XLA chooses, it moves small arrays, so that the next
    call compiles again and a resumed run no longer repeats the last digits."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        objective.step(),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
        compiler_options=_options(objective.config, mesh) or None,
    )


def programs(config: RunConfig, mesh: Mesh) -> Programs | None:
    """The AOT-compiled programs in `training.compilation_cache`; None without a folder given by name."""
    cache = config.training.compilation_cache
    return None if cache in (None, compilation_cache.USER) else Programs(folder(cache), mesh, _options(config, mesh))


def _options(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    return config.compute.options(mesh.devices.flat[0].platform)


def _state(
    objective: Objective[Any],
    arrays: AnyPath,
    processes: Processes,
    mesh: Mesh,
    last: int | None,
    abstract: TrainState,
    abstract_frozen: Params,
    options: StartOptions,
) -> tuple[TrainState, Params, list[str]]:
    """(the first state, the frozen parameters, the names of their parts that have random weights)."""
    on_this_mesh = functools.partial(on_mesh, processes, mesh)
    if last is not None:
        state = on_this_mesh(lambda: restore(arrays / "checkpoints", last, abstract))
        return state, on_this_mesh(lambda: restore_frozen(arrays, abstract_frozen)), []
    initial = on_this_mesh(lambda: objective.initial_weights(mesh, options.progress))
    state, frozen = on_this_mesh(lambda: objective.fresh_state(mesh, abstract, initial, options.progress))
    loaded = {path.split("/")[0] for path in initial}
    return state, frozen, sorted(set(frozen) & set(objective.parts) - loaded)


def on_mesh(processes: Processes, mesh: Mesh, work: Callable[[], _T]) -> _T:
    """The work's result, computed in another thread so that signals are handled meanwhile. A stop point comes first.
    The mesh has to be set there: it is a thread-local setting."""

    def run() -> _T:
        with jax.set_mesh(mesh):
            return jax.block_until_ready(work())

    processes.stop_point()
    return processes.wait(run)


def _facts(config: RunConfig, directory: RunDirectory, dataset: BucketedDataset, last: int | None) -> dict[str, Any]:
    """What must be equal on all processes."""
    values = to_json(config)
    return {
        "configuration": {path.replace("/", "."): value for path, value in flatten(values).items()},
        "versions of the libraries": run_directory.versions(),
        "data": dataset.fingerprint,
        "order of the data": dataset.assignment,
        "lock of the run directory": directory.lock_owner(),
        "checkpoint to start from": last,
    }


def _set_aside(arrays: AnyPath, step: int) -> None:
    for path in checkpoint.set_aside_after(arrays, step):
        tqdm.write(f"  a checkpoint after step {step} was moved to {path}")
