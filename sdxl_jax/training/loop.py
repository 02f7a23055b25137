"""The training program: configuration, mesh, data, model, state, restore; then batch, step, log, save, look.

Nothing but logging waits for the device, and logging lags one step behind, so that the device always has work. A run is
repeated exactly by its configuration; interrupted, it goes on from its last checkpoint as if nothing had happened.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax import config as configuration
from sdxl_jax import model as models
from sdxl_jax import pipeline, sharding
from sdxl_jax.arrays import Batch, Params, flatten, unflatten
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import OnFailedSave, TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.model import Model
from sdxl_jax.pictures import contact_sheet, save_png
from sdxl_jax.training import checkpoint, run_directory
from sdxl_jax.training import optimiser as optimisers
from sdxl_jax.training.checkpoint import Checkpoints, restore, restore_frozen, save_frozen
from sdxl_jax.training.encoding import check_frozen, from_cache
from sdxl_jax.training.hosts import Hosts, Interrupted
from sdxl_jax.training.initial import initial_weights
from sdxl_jax.training.metrics import MetricsWriter, NonFiniteLoss
from sdxl_jax.training.run_directory import check_run
from sdxl_jax.training.state import TrainState, create, merge, partition
from sdxl_jax.training.step import Step, make_step

_T = TypeVar("_T")
_CAPTIONS_LOOKED_AT = 10_000
"""Pictures whose captions are counted for truncation at the start; all, where there are no more than twice as many."""


def train(
    config: TrainConfig,
    run_dir: str | Path = "runs/train",
    progress: bool = True,
    *,
    from_step: int | None = None,
    allow_changes: Collection[str] = (),
) -> Model:
    """Trains until `config.training.steps`, from the last checkpoint in `run_dir` if there is one; returns the model,
    with its averaged weights.

    from_step: the checkpoint to go on from instead of the last; those after it are moved to RUN/set_aside.
    allow_changes: fields of the configuration, or groups of them, that may differ from the run's although they alter
    what is learnt; it is noted in config.json.

    Raises InputError before anything is written: for data, batch or mesh that do not fit, a run directory of another
    configuration, or in use, a checkpoint that cannot be read, hosts that differ. SIGTERM or SIGINT end it with
    SystemExit(0), once what was done is saved.
    """
    run_dir = Path(run_dir)
    with Hosts(config.hosts.join_timeout_seconds) as hosts:
        progress = progress and hosts.is_first
        config.check()
        check_run(config, run_dir, allow_changes=allow_changes)
        check_frozen(config)
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(mesh, config.data.batch_size, config.optimiser.accumulate)
        tokenizer = Tokenizer.of(config.model.text)
        dataset = hosts.wait(
            lambda: BucketedDataset(config.data, tokenizer, host_index=hosts.index, host_count=hosts.count)
        )
        changed = check_run(config, run_dir, dataset, allow_changes)
        optimiser = optimisers.make(config.optimiser, config.training.steps)
        abstract, abstract_frozen = _abstract(config, mesh, optimiser)
        step_function = _compiled(make_step(config, optimiser, tokenizer([""])), mesh, abstract)
        programs = _Programs(step_function, mesh, abstract, abstract_frozen)

        with run_directory.locked(run_dir) if hosts.is_first else contextlib.nullcontext():
            on_mesh = functools.partial(_on_mesh, hosts, mesh)
            last = checkpoint.step_to_start_from(run_dir / "checkpoints", from_step)
            hosts.gather("the directory is locked")
            hosts.compare(_facts(config, run_dir, dataset, last))
            initial = {}
            if last is None:
                initial = on_mesh(lambda: initial_weights(config, mesh, progress=progress))
                state, frozen = on_mesh(lambda: _fresh(config, optimiser, abstract, abstract_frozen, initial))
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
                _announce(dataset, tokenizer, run_dir, first, changed)
                random = sorted(set(frozen) - {path.split("/")[0] for path in initial})
                if last is None and random:
                    tqdm.write(f"  frozen, wholly or in part, at random weights: {', '.join(random)}")

            with (
                jax.set_mesh(mesh),
                _checkpoints(config, run_dir, hosts) as checkpoints,
                MetricsWriter(run_dir, first, stop, progress, writes=hosts.is_first) as writer,
                _closing(dataset.iterate(first)) as batches,
                _naming_what_is_not_finite(config, run_dir, hosts, dataset),
            ):
                step = saved = first
                met = set[Bucket]()
                since = _Mean(config.checkpoint.keep_best)

                def save() -> None:
                    writer.flush()
                    metadata = {"config": configuration.to_json(config), "versions": run_directory.versions()}
                    checkpoints.save(step, state, metadata, since.take())

                def look() -> None:
                    path = run_dir / "samples" / f"step_{step:08d}.png"
                    _look(config, hosts, path, Model(config.model, merge(state.ema, frozen)), mesh)

                try:
                    if first and _look_due(config, first) and not _is_there(run_dir, first, hosts):
                        look()  # the run was stopped between the checkpoint and its pictures
                    while step < stop:
                        batch = sharding.put_batch(mesh, hosts.wait(lambda: next(batches)))
                        bucket, batch_size = dataset.bucket_of(step), dataset.batch_size_of(step)
                        run_step = hosts.wait(functools.partial(programs, bucket, batch))
                        if bucket not in met:
                            met.add(bucket)
                            # No host begins the step while another may yet be stopped compiling it.
                            hosts.gather("compiled")
                        hosts.point()
                        state, metrics = run_step(state, frozen, batch)
                        step += 1
                        since.add(metrics)
                        writer.log(step, bucket, batch_size, metrics)
                        if _due(step, config.checkpoint.every_steps, stop):
                            save()
                            saved = step
                            writer.restart_clock()
                        if _look_due(config, step):
                            writer.flush()
                            look()
                            writer.restart_clock()
                except Interrupted as stopped:
                    if step > saved:
                        save()
                    checkpoints.finish(last=True)
                    if hosts.is_first:
                        done = "saved; run the same command to go on" if step else "before anything was to be saved"
                        tqdm.write(f"stopped by {stopped.signal_name} after step {step}, {done}")
                    raise
    return Model(config.model, merge(state.ema, frozen))


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
        "configuration": {line.split(":")[0]: line.split(": ")[1] for line in configuration.differences({}, values)},
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
        if self._name is None:
            return
        if self._name not in metrics:
            known = ", ".join(nearest_first(self._name, metrics))
            raise InputError(f"checkpoint.keep_best={self._name} is no metric. Known, nearest first: {known}")
        self._values.append(metrics[self._name])

    def take(self) -> dict[str, float] | None:
        if self._name is None:
            return None
        values, self._values = self._values, []
        return {self._name: float(np.mean(jax.device_get(values)))}


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
    except NonFiniteLoss as error:
        path = run_dir / f"nonfinite_step_{error.step:08d}.json"
        if hosts.is_first:
            _describe_nonfinite(config, path, error.step, dataset)
        raise InputError(f"{error}. Its pictures, captions and key are in {path}") from error


def _due(step: int, every: int | None, stop: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is to be done after this step."""
    return every is not None and (step % every == 0 or step == stop)


def _look_due(config: TrainConfig, step: int) -> bool:
    return bool(config.validation.prompts) and _due(step, config.validation.every_steps, config.training.steps)


def _is_there(run_dir: Path, step: int, hosts: Hosts) -> bool:
    """Whether a step's pictures are, for the first host: what the others see may be older."""
    return hosts.gather(str((run_dir / "samples" / f"step_{step:08d}.png").exists()))[0] == "True"


def _compiled(step: Step, mesh: Mesh, abstract: TrainState) -> Any:
    """The step, to be compiled. Its results stay where the state was: left to choose, XLA moves small arrays, so that
    the next call compiles again, and a resumed run no longer repeats the last digits."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


class _Programs:
    """The step of each bucket, compiled when it is first met."""

    def __init__(self, step: Any, mesh: Mesh, abstract: TrainState, abstract_frozen: Params):
        self._step, self._mesh, self._given = step, mesh, (abstract, abstract_frozen)
        self._programs: dict[Bucket, Step] = {}

    def __call__(self, bucket: Bucket, batch: Batch) -> Step:
        if bucket not in self._programs:
            with jax.set_mesh(self._mesh):
                self._programs[bucket] = self._step.lower(*self._given, batch).compile()
        return self._programs[bucket]


def _abstract(config: TrainConfig, mesh: Mesh, optimiser: optax.GradientTransformation) -> tuple[TrainState, Params]:
    """Shapes, dtypes and places of the state and of the frozen parameters, without making any."""
    params = jax.eval_shape(functools.partial(models.init, config=config.model), jax.random.key(0))
    trained, frozen = partition(params, config.training.trains)
    state = jax.eval_shape(functools.partial(create, optimiser=optimiser), trained)
    return sharding.placed(mesh, state), sharding.placed(mesh, frozen)


def _fresh(
    config: TrainConfig,
    optimiser: optax.GradientTransformation,
    abstract: TrainState,
    abstract_frozen: Params,
    initial: dict[str, jax.Array],
) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen parameters; each array is made where it belongs, or is the one
    that `initial` has by its path."""

    def make(key: jax.Array, initial: dict[str, jax.Array]) -> tuple[TrainState, Params]:
        params = unflatten(flatten(models.init(key, config.model)) | initial)
        trained, frozen = partition(params, config.training.trains)
        return create(trained, optimiser), frozen

    places = jax.tree.map(lambda leaf: leaf.sharding, (abstract, abstract_frozen))
    with warnings.catch_warnings():
        # Of what trains, the average is a second copy: one of the two cannot be the array that was given.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        start = jax.jit(make, out_shardings=places, donate_argnums=1)
        return start(jax.random.key(config.training.seed), initial)


def _announce(dataset: BucketedDataset, tokenizer: Tokenizer, run_dir: Path, first: int, changed: list[str]) -> None:
    tqdm.write(f"{run_dir}: {'starting' if not first else f'going on after step {first}'}")
    for line in changed:
        same = configuration.is_within(line, configuration.SAME_WITHIN_ROUNDING)
        tqdm.write(f"  changed: {line}{', the same within rounding' if same else ''}")
    for bucket in dataset.report():
        if bucket.images:
            notes = f", {bucket.remainder} left out of each epoch" if bucket.remainder else ""
            notes += ", which hold the same images several times" if bucket.repeated else ""
            batches = f"{bucket.batches:.4g} batches of {bucket.batch_size} an epoch"
            tqdm.write(f"  bucket {bucket.height}×{bucket.width}: {bucket.images} images, {batches}{notes}")
        if bucket.merged_into is not None:
            height, width = bucket.merged_into
            tqdm.write(f"  bucket {bucket.height}×{bucket.width}: too few images, merged into {height}×{width}")
    if dataset.config.cache is not None:
        tqdm.write(f"  latents and text states are read from {dataset.config.cache}")
    if len(shares := dataset.shares()) > 1:
        for share in shares:
            tqdm.write(f"  source {share.folder}: {share.images} images, {share.share:.1%} of an epoch")
    if small := dataset.too_small_count():
        tqdm.write(f"  {small} images below data.min_size={dataset.config.min_size} left out")
    if count := dataset.refused_count():
        tqdm.write(f"  {count} files refused, the first: {next(dataset.refused()).file}")
    images = len(dataset.source)
    looked_at = range(0, images, max(1, images // _CAPTIONS_LOOKED_AT))
    captions = [caption for image in looked_at for caption in dataset.source.captions(image)]
    if cut := sum(count > 0 for count in tokenizer.truncated(captions)):
        of = f" of {len(captions)} looked at" if len(looked_at) < images else ""
        tqdm.write(f"  {cut} captions{of} are longer than 75 tokens and lose their end")


def _look(config: TrainConfig, hosts: Hosts, path: Path, model: Model, mesh: Mesh) -> None:
    """Writes the validation grid. All hosts draw; a stop is heard between two sizes, and on one host at any time."""
    validation = config.validation
    pictures, captions = [], []

    def draw(height: int, width: int) -> list[Any]:
        with jax.set_mesh(mesh):
            return list(
                pipeline.text_to_image(
                    model,
                    validation.prompts,
                    height=height,
                    width=width,
                    steps=validation.steps,
                    guidance=validation.guidance,
                    compute=config.compute,
                )
            )

    for height, width in validation.sizes:
        hosts.point()
        draw_size = functools.partial(draw, height, width)
        # Other hosts would wait inside for what one abandons, and the checkpoint behind it.
        pictures += hosts.wait(draw_size) if hosts.count == 1 else draw_size()
        captions += list(validation.prompts)
    if hosts.is_first:
        save_png(contact_sheet(pictures, captions, columns=len(validation.prompts)), path)


def _describe_nonfinite(config: TrainConfig, path: Path, step: int, dataset: BucketedDataset) -> None:
    """Writes what a step was given whose loss is no number: pictures, captions, and the key of its random numbers."""
    order = dataset.order
    images = [int(order.numbers[order.position(step - 1, row)]) for row in range(dataset.batch_size_of(step - 1))]
    key = jax.random.fold_in(jax.random.key(config.training.seed), step - 1)
    content = {
        "step": step,
        "bucket": list(dataset.bucket_of(step - 1)),
        "training_seed": config.training.seed,
        "key": jax.random.key_data(key).tolist(),
        "rows": [
            {"image": image, "source": dataset.source.name(image), "captions": list(dataset.source.captions(image))}
            for image in images
        ],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False))
