"""The training program: configuration, mesh, data, model, state, restore; then batch, step, log, save, look.

Nothing but logging waits for the device, and logging lags one step behind, so that the device always has work. A run is
repeated exactly by its configuration; interrupted, it goes on from its last checkpoint as if nothing had happened.
"""

import contextlib
import functools
import json
import platform
import warnings
from importlib import metadata as packages
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax import config as configuration
from sdxl_jax import model as models
from sdxl_jax import pipeline, sharding
from sdxl_jax.arrays import Batch, Params, flatten, unflatten
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.pictures import contact_sheet, save_png
from sdxl_jax.training import clock as clocks
from sdxl_jax.training import compilation, profiling
from sdxl_jax.training import metrics as logging
from sdxl_jax.training import optimiser as optimisers
from sdxl_jax.training.checkpoint import Checkpoints, latest_step, restore, restore_frozen, save_frozen
from sdxl_jax.training.clock import Clock, Part, TimeLog
from sdxl_jax.training.compilation import CompiledSteps
from sdxl_jax.training.encoding import check_frozen, from_cache
from sdxl_jax.training.initial import check_initial, initial_weights
from sdxl_jax.training.metrics import MetricsWriter, WandbBoard
from sdxl_jax.training.state import TrainState, create, merge, partition
from sdxl_jax.training.step import Step, make_step

_CAPTIONS_LOOKED_AT = 10_000
"""Pictures whose captions are counted for truncation at the start; all, where there are no more than twice as many."""
_GRID_SEED = 0
_LIBRARIES = ("sdxl_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def train(
    config: TrainConfig,
    run_dir: str | Path = "runs/train",
    progress: bool = True,
    *,
    profile: tuple[int, int] | None = None,
    began: float | None = None,
) -> Model:
    """Trains until `config.training.steps`, from the last checkpoint in `run_dir` if there is one; returns the model,
    with its averaged weights.

    profile: the first and the last step of a trace in RUN/profile. began: when the program started, by
    `time.monotonic()`, for the table of where the time went; None: now.

    Raises InputError before anything is written: for data, batch or mesh that do not fit, a run directory of another
    configuration, a checkpoint that cannot be read.
    """
    run_dir, clock = Path(run_dir), Clock(began)
    config.check()
    logging.check(config.logging.wandb_project)
    if config.training.compilation_cache is not None:
        compilation.use_cache(config.training.compilation_cache)
    check_run(config, run_dir)
    check_frozen(config)
    if latest_step(run_dir / "checkpoints") is None:
        check_initial(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.data.batch_size, config.optimiser.accumulate)
    tokenizer = Tokenizer.of(config.model.text)
    dataset = BucketedDataset(config.data, tokenizer, host_index=jax.process_index(), host_count=jax.process_count())
    check_run(config, run_dir, dataset)
    optimiser = optimisers.make(config.optimiser, config.training.steps)

    with jax.set_mesh(mesh), contextlib.ExitStack() as leaving:
        abstract, abstract_frozen = abstract_state(config, mesh, optimiser)
        last = latest_step(run_dir / "checkpoints")
        profiling.check(profile, last or 0, config.training.steps)
        step_function = compiled(make_step(config, optimiser, tokenizer([""])), mesh, abstract)
        arguments = _arguments(config, mesh, dataset, last or 0, abstract, abstract_frozen)
        ahead, threads = config.training.compile_ahead, config.training.compile_threads
        steps = leaving.enter_context(CompiledSteps(step_function, arguments, mesh, ahead, threads))
        initial = {}
        if last is None:
            initial = initial_weights(config, mesh, progress=progress)
            state, frozen = _fresh(config, optimiser, abstract, abstract_frozen, initial)
        else:
            state, frozen = restore(run_dir / "checkpoints", last, abstract), restore_frozen(run_dir, abstract_frozen)
        first, stop = int(state.step), config.training.steps
        dataset = from_cache(config, dataset, frozen)

        run_dir.mkdir(parents=True, exist_ok=True)
        _write_config(config, run_dir, dataset)
        if last is None:
            save_frozen(run_dir, frozen)
        if progress:
            _announce(dataset, tokenizer, run_dir, first)
            random = sorted(set(frozen) - {path.split("/")[0] for path in initial})
            if last is None and random:
                tqdm.write(f"  frozen, wholly or in part, at random weights: {', '.join(random)}")
        wandb = _wandb(config, run_dir)
        with (
            TimeLog(run_dir, clock) as times,
            clock.during(Part.SAVE),  # leaving Checkpoints finishes what is being written
            Checkpoints(run_dir / "checkpoints", config.checkpoint.keep) as checkpoints,
            clock.during(Part.OTHER),
            MetricsWriter(run_dir, first, stop, progress, clock, board=wandb) as writer,
            profiling.Profile(run_dir / "profile", profile) as profiler,
            contextlib.closing(dataset.iterate(first)) as batches,
        ):
            for step in range(first + 1, stop + 1):
                bucket, again = dataset.bucket_of(step - 1), step <= writer.made_before
                if not steps.ready(bucket):
                    writer.settle()
                    with clock.during(Part.COMPILE):
                        steps.of(bucket, waiting=lambda: writer.compiling(steps.finished, steps.total))
                    writer.compiled()
                with clock.during(Part.DATA):
                    batch = sharding.put_batch(mesh, next(batches))
                with clock.during(Part.AGAIN if again else Part.STEP), profiler.step(step, writer.settle):
                    state, metrics = steps.of(bucket)(state, frozen, batch)
                    writer.log(step, bucket, dataset.batch_size_of(step - 1), metrics)
                times.note(step, again)
                if _due(step, config.checkpoint.every_steps, stop):
                    with clock.during(Part.SAVE):
                        writer.flush()
                        metadata = {"config": configuration.to_json(config), "versions": _versions()}
                        checkpoints.save(step, state, metadata)
                if config.validation.prompts and _due(step, config.validation.every_steps, stop):
                    with clock.during(Part.EVALUATION):
                        writer.flush()
                        _look(config, run_dir, step, Model(config.model, merge(state.sampled, frozen)))
    if progress:
        tqdm.write(f"where the time went\n{clocks.table(clocks.read(run_dir))}")
    return Model(config.model, merge(state.sampled, frozen))


def _due(step: int, every: int | None, stop: int) -> bool:
    """Whether something that is done every so many steps, and at the end, is to be done after this step."""
    return every is not None and (step % every == 0 or step == stop)


def compiled(step: Step, mesh: Mesh, abstract: TrainState) -> Step:
    """The step, compiled when first called. Its results stay where the state was: left to choose, XLA moves small
    arrays, so that the next call compiles again, and a resumed run no longer repeats the last digits."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, sharding.replicated(mesh)))


def _arguments(
    config: TrainConfig,
    mesh: Mesh,
    dataset: BucketedDataset,
    first: int,
    abstract: TrainState,
    abstract_frozen: Params,
) -> dict[Bucket, tuple[TrainState, Params, Batch]]:
    """What the step of each bucket that the run still needs is compiled for, in the order of need."""
    cached, scored = config.data.cache is not None, config.data.aesthetic is not None
    return {
        bucket: (
            abstract,
            abstract_frozen,
            compilation.abstract_batch(mesh, config.model, bucket, batch_size, cached=cached, scored=scored),
        )
        for bucket, batch_size in compilation.order_of_need(dataset, first, config.training.steps).items()
    }


def _wandb(config: TrainConfig, run_dir: Path) -> WandbBoard | None:
    project = config.logging.wandb_project
    return None if project is None else WandbBoard(project, run_dir, configuration.to_json(config))


def abstract_state(
    config: TrainConfig, mesh: Mesh, optimiser: optax.GradientTransformation
) -> tuple[TrainState, Params]:
    """Shapes, dtypes and places of the state and of the frozen parameters, without making any."""
    params = jax.eval_shape(functools.partial(models.init, config=config.model), jax.random.key(0))
    trained, frozen = partition(params, config.training.trains)
    state = jax.eval_shape(functools.partial(create, optimiser=optimiser, config=config.ema), trained)
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
        return create(trained, optimiser, config.ema), frozen

    places = jax.tree.map(lambda leaf: leaf.sharding, (abstract, abstract_frozen))
    with warnings.catch_warnings():
        # Of what trains, the average is a second copy: one of the two cannot be the array that was given.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        start = jax.jit(make, out_shardings=places, donate_argnums=1)
        return start(jax.random.key(config.training.seed), initial)


def check_run(config: TrainConfig, run_dir: Path, dataset: BucketedDataset | None = None) -> None:
    """Raises InputError if the directory holds another run, or something else; with `dataset`, also if that is no
    longer the data that the run was started with."""
    path = run_dir / "config.json"
    if not path.exists():
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.glob("checkpoints/[0-9]*"))):
            raise InputError(f"{run_dir} is no run directory: it has no config.json. Choose another --run-dir")
        return
    saved = configuration.read_saved(path)
    if changed := configuration.blocking_differences(saved["config"], configuration.to_json(config)):
        shown = "\n  ".join(changed[:8])
        raise InputError(
            f"{run_dir} belongs to a run with another configuration ({len(changed)} differences, old -> new):\n  "
            f"{shown}\nUse the run's own configuration to go on with it, or another --run-dir"
        )
    if (saved["config"]["data"].get("cache") is None) != (config.data.cache is None):
        raise InputError(
            f"{run_dir} was started {'without' if config.data.cache else 'with'} a cache (data.cache), whose rounding "
            "to bfloat16 is part of what is learnt. Go on in the same way, or choose another --run-dir"
        )
    if dataset is not None and saved.get("data_fingerprint") != dataset.fingerprint:
        raise InputError(
            f"{run_dir} was trained on other data: names, captions or sizes of the pictures in {dataset.where} have "
            "changed since, or the weights of data.sources. Bring them back, or choose another --run-dir"
        )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: packages.version(name) for name in _LIBRARIES}}


def _write_config(config: TrainConfig, run_dir: Path, dataset: BucketedDataset) -> None:
    path = run_dir / "config.json"
    partial = path.with_name("config.json.partial")
    content = {
        "config": configuration.to_json(config),
        "data_fingerprint": dataset.fingerprint,
        "versions": _versions(),
        "commit": _commit(),
    }
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def _commit() -> str | None:
    """The commit of the source tree, None for an installed package."""
    head = Path(__file__).parents[2] / ".git" / "HEAD"
    if not head.is_file():
        return None
    content = head.read_text().strip()
    if not content.startswith("ref: "):
        return content
    name = content.removeprefix("ref: ")
    loose, packed = head.parent / name, head.parent / "packed-refs"
    if loose.is_file():
        return loose.read_text().strip()
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def _announce(dataset: BucketedDataset, tokenizer: Tokenizer, run_dir: Path, first: int) -> None:
    tqdm.write(f"{run_dir}: {'starting' if not first else f'going on after step {first}'}")
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


def _look(config: TrainConfig, run_dir: Path, step: int, model: Model) -> None:
    """Writes the validation grid: the averaged weights' pictures, from the same noise each time. It says so in its PNG
    text."""
    validation = config.validation
    pictures, captions = [], []
    for height, width in validation.sizes:
        pictures += list(
            pipeline.text_to_image(
                model,
                validation.prompts,
                height=height,
                width=width,
                steps=validation.steps,
                guidance=validation.guidance,
                seed=_GRID_SEED,
                compute=config.compute,
            )
        )
        captions += list(validation.prompts)
    sheet = contact_sheet(pictures, captions, columns=len(validation.prompts))
    origin = {
        "step": step,
        "weights": "ema",
        "seed": _GRID_SEED,
        "steps": validation.steps,
        "guidance": validation.guidance,
    }
    text = {name: str(value) for name, value in origin.items()}
    save_png(sheet, run_dir / "samples" / f"step_{step:08d}.png", text)
