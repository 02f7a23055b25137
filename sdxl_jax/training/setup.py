"""What stands before the first step: `prepare` checks everything, agrees with the other processes, and makes the state.

    configuration ── mesh ── data ── lock ── programs ── state or checkpoint ── config.json

Nothing is written, and nothing takes long, before all that can be refused has been checked.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax import sharding
from sdxl_jax.arrays import Params, flatten
from sdxl_jax.config import RunConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.jsontree import to_json
from sdxl_jax.training import checkpoint, compilation, run_directory
from sdxl_jax.training.checkpoint import restore, restore_frozen, save_frozen
from sdxl_jax.training.compilation import CompiledSteps
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.base import Objective
from sdxl_jax.training.observe import metrics, profiling, validation
from sdxl_jax.training.observe.metrics import Speed
from sdxl_jax.training.processes import Hosts
from sdxl_jax.training.programs import Programs, folder
from sdxl_jax.training.run_directory import check_run
from sdxl_jax.training.state import TrainState

_T = TypeVar("_T")


class Asked(NamedTuple):
    """What one start is asked for besides the configuration; `loop.train` says what each is."""

    from_step: int | None = None
    allow_changes: Collection[str] = ()
    profile: tuple[int, int] | None = None
    progress: bool = True


@dataclasses.dataclass
class Run:
    """A run that can begin: everything that its loop needs."""

    objective: Objective[Any]
    run_dir: Path
    hosts: Hosts
    mesh: Mesh
    dataset: BucketedDataset
    steps: CompiledSteps
    speed: Speed | None
    state: TrainState
    """Before the first step of this start."""
    frozen: Params
    first: int
    """Steps made before this start."""
    profile: tuple[int, int] | None
    progress: bool

    @property
    def config(self) -> RunConfig:
        return self.objective.config

    @property
    def stop(self) -> int:
        """Steps after which the run is finished."""
        return self.config.training.steps


@contextlib.contextmanager
def prepare(config: RunConfig, run_dir: Path, hosts: Hosts, asked: Asked) -> Iterator[Run]:
    """The run, while its directory is locked and its programs are compiled.

    Raises InputError before anything is written, as `loop.train` says.
    """
    asked = asked._replace(progress=asked.progress and hosts.is_first)
    objective = _checked(config, run_dir, asked)
    mesh = sharding.make_mesh(config.mesh)
    objective.check_mesh(mesh)
    dataset = _dataset(objective, hosts, mesh)
    changed = check_run(config, run_dir, dataset, asked.allow_changes)
    abstract, abstract_frozen = objective.abstract_state(mesh)
    with contextlib.ExitStack() as leaving:
        if hosts.is_first:
            leaving.enter_context(run_directory.locked(run_dir))
        last = checkpoint.step_to_start_from(run_dir / "checkpoints", asked.from_step)
        profile = profiling.check(asked.profile, last or 0, config.training.steps)
        hosts.gather("the directory is locked")
        hosts.compare(_facts(config, run_dir, dataset, last))
        steps, speed = _programs(objective, mesh, dataset, last or 0, abstract, abstract_frozen)
        leaving.enter_context(steps)
        state, frozen, random = _state(objective, run_dir, hosts, mesh, last, abstract, abstract_frozen, asked)
        dataset = objective.batches(dataset, frozen)
        first = int(state.step)
        if hosts.is_first:
            if asked.from_step is not None:
                _set_aside(run_dir, asked.from_step)
            run_directory.write_config(objective, run_dir, dataset, first, changed)
        hosts.gather("the directory is ready")
        if last is None:
            on_mesh(hosts, mesh, lambda: save_frozen(run_dir, frozen))
        if asked.progress:
            validation.announce(dataset, objective.tokenizer, run_dir, first, changed)
            if random:
                tqdm.write(f"  frozen, wholly or in part, at random weights: {', '.join(random)}")
        yield Run(
            objective=objective,
            run_dir=run_dir,
            hosts=hosts,
            mesh=mesh,
            dataset=dataset,
            steps=steps,
            speed=speed,
            state=state,
            frozen=frozen,
            first=first,
            profile=profile,
            progress=asked.progress,
        )


def _checked(config: RunConfig, run_dir: Path, asked: Asked) -> Objective[Any]:
    """The objective of a configuration that may be trained in this directory. No data is read."""
    objective = objective_of(config)
    objective.check()
    metrics.check(config.logging.wandb_project)
    if config.training.compilation_cache is not None:
        compilation.use_cache(config.training.compilation_cache)
    check_run(config, run_dir, allow_changes=asked.allow_changes)
    if checkpoint.latest_step(run_dir / "checkpoints") is None:
        objective.check_start()
    return objective


def _dataset(objective: Objective[Any], hosts: Hosts, mesh: Mesh) -> BucketedDataset:
    part, parts = sharding.host_part(mesh)
    return hosts.wait(
        lambda: BucketedDataset(objective.config.data, objective.tokenizer, host_index=part, host_count=parts)
    )


def _programs(
    objective: Objective[Any],
    mesh: Mesh,
    dataset: BucketedDataset,
    first: int,
    abstract: TrainState,
    abstract_frozen: Params,
) -> tuple[CompiledSteps, Speed | None]:
    """The steps of the buckets that the run still needs, compiled in the order of need."""
    training = objective.config.training
    needed = compilation.order_of_need(dataset, first, training.steps)
    given = {
        bucket: (abstract, abstract_frozen, objective.abstract_batch(mesh, bucket, batch_size))
        for bucket, batch_size in needed.items()
    }
    speed = Speed.of(lambda bucket: objective.model_flops(given[bucket]), jax.devices())
    steps = CompiledSteps(
        jitted(objective, mesh, abstract),
        given,
        mesh,
        training.compile_ahead,
        training.compile_threads,
        programs(objective.config, mesh),
        None if speed is None else speed.count,
    )
    return steps, speed


def jitted(objective: Objective[Any], mesh: Mesh, abstract: TrainState) -> Any:
    """The step, to be compiled. Its results stay where the state was: left to choose, XLA moves small arrays, so that
    the next call compiles again, and a resumed run no longer repeats the last digits."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        objective.step(),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
        compiler_options=_options(objective.config, mesh) or None,
    )


def programs(config: RunConfig, mesh: Mesh) -> Programs | None:
    """Where steps compiled ahead, on another machine, are kept; None without a folder for them."""
    cache = config.training.compilation_cache
    return None if cache is None else Programs(folder(cache), mesh, _options(config, mesh))


def _options(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    return config.compute.options(mesh.devices.flat[0].platform)


def _state(
    objective: Objective[Any],
    run_dir: Path,
    hosts: Hosts,
    mesh: Mesh,
    last: int | None,
    abstract: TrainState,
    abstract_frozen: Params,
    asked: Asked,
) -> tuple[TrainState, Params, list[str]]:
    """The state to begin with, what is frozen, and the parts of it that have random weights."""
    here = functools.partial(on_mesh, hosts, mesh)
    if last is not None:
        state = here(lambda: restore(run_dir / "checkpoints", last, abstract))
        return state, here(lambda: restore_frozen(run_dir, abstract_frozen)), []
    initial = here(lambda: objective.initial_weights(mesh, asked.progress))
    state, frozen = here(lambda: objective.fresh_state(abstract, abstract_frozen, initial))
    return state, frozen, sorted(set(frozen) - {path.split("/")[0] for path in initial})


def on_mesh(hosts: Hosts, mesh: Mesh, work: Callable[[], _T]) -> _T:
    """The work's result, for which a signal need not wait. The mesh is one of a thread's own settings."""

    def run() -> _T:
        with jax.set_mesh(mesh):
            return jax.block_until_ready(work())

    hosts.point()
    return hosts.wait(run)


def _facts(config: RunConfig, run_dir: Path, dataset: BucketedDataset, last: int | None) -> dict[str, Any]:
    """What all processes must have in common."""
    values = to_json(config)
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
