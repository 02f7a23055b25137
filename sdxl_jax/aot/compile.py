"""AOT (ahead-of-time) compilation for TPUs and GPUs that are not here: memory, time and communication of a program.

The train step is exactly the one that training compiles. Only the configuration is read: no data, no weights.
"""

import dataclasses
import functools
import resource
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdxl_jax import flops, sharding
from sdxl_jax.aot import gpus, report, topologies
from sdxl_jax.aot.report import ProgramInfo, Report, TooLarge
from sdxl_jax.arrays import Batch, Params
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import RunConfig, TrainConfig
from sdxl_jax.data.buckets import Bucket, check_buckets
from sdxl_jax.data.pipeline import batch_sizes
from sdxl_jax.errors import InputError, out_of_memory
from sdxl_jax.model import ModelConfig, abstract, autoencoder
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.progress import tqdm
from sdxl_jax.samplers import loop
from sdxl_jax.sampling import generate, plan, program
from sdxl_jax.sampling.options import Options
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.sizes import Size
from sdxl_jax.training import setup
from sdxl_jax.training.compilation import REMEDIES, explained
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.training.objectives.base import Objective
from sdxl_jax.training.programs import Programs


class Program(NamedTuple):
    """A jitted function to compile, with abstract arguments."""

    name: str
    function: jax.stages.Wrapped
    """From `jax.jit`."""
    inputs: dict[str, Any]
    """The abstract arguments by use, for the report."""
    arguments: tuple[Any, ...]
    images: int
    """Per execution, over all chips."""
    model_flops: float
    """Per execution, over all chips."""
    programs: Programs | None = None
    """Where it is saved for training; None: nowhere."""


def compile_step(
    config: RunConfig,
    topology: str,
    *,
    slices: int | None = None,
    buckets: Sequence[Bucket] | None = None,
    parallel: int = 1,
    progress: bool = True,
) -> list[Report | TooLarge]:
    """Compiles the train step for each of the buckets, by default the one with the most pixels.

    slices: of the topology; None: `mesh.slices`. parallel: programs compiled at once; each takes about 10 GiB of this
    machine's memory for the 2.6B model. The programs are saved in `training.compilation_cache`, if it is set, where
    training on such a slice finds them.

    Raises InputError for an unknown topology, a mesh that its chips do not fill, a batch that does not divide, a bucket
    that the configuration lacks, an option that the compiler does not know.
    """
    topologies.check(topology)
    objective = objective_of(config)
    objective.check()
    buckets_of_data = check_buckets(config.data.buckets)
    sizes = dict(zip(buckets_of_data, batch_sizes(config.data, buckets_of_data), strict=True))
    chosen = [max(sizes, key=lambda bucket: bucket.height * bucket.width)] if buckets is None else list(buckets)
    if missing := [bucket for bucket in chosen if bucket not in sizes]:
        known = ", ".join(f"{bucket.height}x{bucket.width}" for bucket in sizes)
        raise InputError(
            f"--bucket {missing[0].height}x{missing[0].width} is not one of data.buckets. Give one of: {known}"
        )
    mesh = _mesh(objective, topology, slices)
    for bucket in chosen:
        sharding.check_batch(mesh, sizes[bucket], config.optimiser.accumulate)
    programs = [_step_program(objective, mesh, bucket, sizes[bucket]) for bucket in chosen]
    return _compile(programs, mesh, topology, parallel, progress)


def compile_sampler(
    config: RunConfig, topology: str, *, slices: int | None = None, images: int = 1, progress: bool = True
) -> list[Report | TooLarge]:
    """Compiles text encoders, sampler and decoder with the sizes, steps and guidance of `validation`. images: at once,
    per part of the mesh that the batch is split over. Raises InputError as `compile_step`, and for an objective without
    a sampler."""
    objective = objective_of(config)
    if "sample" not in objective.programs:
        raise InputError(
            f"--program sample: a run of {objective.name} has no sampler. Leave it out to compile the train step"
        )
    objective.check()
    assert isinstance(config, TrainConfig), "an objective with a sampler has a model"
    mesh = _mesh(objective, topology, slices)
    sizes = config.validation.sizes or (config.model.default_size,)
    programs = [program for size in sizes for program in _sampler_programs(config, mesh, Size(*size), images)]
    return _compile(programs, mesh, topology, 1, progress)


def _mesh(objective: Objective[Any], topology: str, slices: int | None) -> Mesh:
    config: MeshConfig = objective.config.mesh
    count = config.slices if slices is None else slices
    mesh = sharding.make_mesh(dataclasses.replace(config, slices=count), topologies.devices(topology, count))
    objective.check_heads(mesh)
    return mesh


def _compile(
    programs: list[Program], mesh: Mesh, topology: str, parallel: int, progress: bool
) -> list[Report | TooLarge]:
    slices = mesh.shape["slice"]
    options: Any = {"compiler_options": gpus.OPTIONS} if gpus.known(topology) else {}

    def one(program: Program) -> Report | TooLarge:
        start = time.monotonic()
        info = ProgramInfo(
            topology=topology if slices == 1 else f"{slices} × {topology}",
            chips=mesh.size,
            program=program.name,
            images=program.images,
            chip=topologies.check(topology),
            bytes_by_use={name: report.shard_bytes(tree) for name, tree in program.inputs.items()},
            model_flops=program.model_flops,
        )
        try:
            with jax.set_mesh(mesh):
                traced = program.function.trace(*program.arguments)
                executed = flops.of_jaxpr(traced.jaxpr.jaxpr)
                lowered = traced.lower()
                compiled = lowered.compile(**options)
        except jax.errors.JaxRuntimeError as error:
            if (reason := out_of_memory(error)) is not None:
                return TooLarge(**vars(info), reason=reason)
            raise explained(program.name, error) from error
        result = report.make(
            compiled,
            info,
            executed=executed,
            compile_seconds=time.monotonic() - start,
            peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        if program.programs is None:
            return result
        try:
            program.programs.write(lowered, compiled)  # after the report, whose peak memory is then the compiler's
        except OSError as error:
            tqdm.write(f"{program.name} is not saved: {error}")
            return result
        return dataclasses.replace(result, saved=True)

    with ThreadPoolExecutor(parallel) as pool:
        return list(tqdm(pool.map(one, programs), "compiling", len(programs), disable=not progress))


def _step_program(objective: Objective[Any], mesh: Mesh, bucket: Bucket, batch_size: int) -> Program:
    """The train step of one bucket."""
    state, frozen = objective.abstract_state(mesh)
    batch = objective.abstract_batch(mesh, bucket, batch_size)
    return Program(
        name=f"train step {bucket.height}×{bucket.width}",
        function=setup.jitted(objective, mesh, state),
        inputs=inputs_by_use(objective, state, frozen, batch),
        arguments=(state, frozen, batch),
        images=batch_size,
        model_flops=objective.model_flops((state, frozen, batch)),
        # Nobody has seen training on a GPU read a program that was compiled without one: it is not kept.
        programs=None if mesh.devices.flat[0].platform == "gpu" else setup.programs(objective.config, mesh),
    )


def inputs_by_use(objective: Objective[Any], state: Any, frozen: Params, batch: Batch) -> dict[str, Any]:
    """The inputs of a train step as rows of the report. Networks that are no parts of the model have rows of their own:
    frozen ones (teacher, image features, lpips), and trained ones with their optimisers (critic, discriminator). state:
    the training state."""
    own = (*objective.parts, *state.params)  # of an adapter, a part is frozen: its alphas
    auxiliary: dict[str, Any] = state.auxiliary or {}
    trained = [name for name, tree in auxiliary.items() if any(leaf.shape for leaf in jax.tree.leaves(tree))]
    return {
        "parameters": state.params,
        "average": state.ema,
        "optimiser": state.optimiser,
        **{name.replace("_", " "): auxiliary[name] for name in trained},
        "auxiliary": {name: tree for name, tree in auxiliary.items() if name not in trained},
        "frozen": {name: params for name, params in frozen.items() if name in own},
        **{name.replace("_", " "): params for name, params in frozen.items() if name not in own},
        "batch": batch,
    }


def _sampler_programs(config: TrainConfig, mesh: Mesh, size: Size, images_per_part: int) -> list[Program]:
    """The three programs of `program.staged`: text to states, noise to latents, latents to images. Weights have the
    dtype of `compute.dtype`, as with `sdxl-jax sample --dtype`."""
    model, images = objective_of(config).model_config, images_per_part * sharding.batch_parts(mesh)
    dtype = jnp.dtype(config.compute.dtype.value)
    params = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), sharding.placed(mesh, abstract(model)))
    options = Options(steps=config.validation.steps, guidance=config.validation.guidance)
    (segment,), (segment_arrays,) = plan.plan_segments(model, None, options)
    towers = {tower.name: params[tower.name] for tower in model.text}

    def states(compute: Compute) -> Any:
        return functools.partial(program.text_states, towers=model.text, guided=segment.terms.guided, compute=compute)

    def sample(compute: Compute) -> Any:
        static: Any = {"config": model, "terms": segment.terms, "stochastic": segment.stochastic, "compute": compute}
        return functools.partial(program.denoise, **static)

    def decode(compute: Compute) -> Any:
        return functools.partial(program.decode, config=model, compute=compute, tile=None)

    plain = Compute(dtype=config.compute.dtype, attention=Attention.XLA)
    tokens = jax.eval_shape(lambda: Tokenizer.of(model.text).prompts([""] * images))
    rows = _rows(mesh, tokens)
    latent = _abstract_latent(config, mesh, size, images, model.vae.latent_channels)
    micro = jax.eval_shape(lambda: generate.micro_rows(model, options, images, size))
    conditioning = functools.partial(_conditioning, states(plain), config=model, compute=config.compute)
    sampled = (
        params["unet"],
        _rows(mesh, jax.eval_shape(conditioning, params["unet"], towers, tokens, micro)),
        _abstract_start(mesh, segment_arrays, latent),
        _rows(mesh, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))),
        _whole(mesh, segment_arrays),
        _whole(mesh, program.Strengths(*(np.float32(1),) * 3)),
        None,  # known image
        _abstract_latent(config, mesh, size, images, model.vae.latent_channels + 1) if model.sees_mask else None,
    )
    return [
        Program(
            name=name,
            function=jax.jit(function(config.compute)),
            inputs={"parameters": given[0], "batch": given[1:]},
            arguments=given,
            images=images,
            model_flops=flops.count(function(plain), *given).total,
        )
        for name, function, given in (
            ("text encoders", states, (towers, rows, rows)),
            (f"sampler {size.height}×{size.width}, {options.steps} steps", sample, sampled),
            ("decoder", decode, (autoencoder(params), latent)),
        )
        if jax.tree.leaves(given[:2])  # without text encoders there is nothing to compile
    ]


def _conditioning(
    states: Any, params: Any, towers: Any, tokens: Any, micro: Any, *, config: ModelConfig, compute: Compute
) -> program.ConditioningPair:
    """The inputs of the UNet's prompt and negative prompt, from the function that encodes tokens."""
    count = len(jax.tree.leaves(micro)[0])
    label = None if config.unet.classes is None else jnp.zeros(count, jnp.int32)
    has_negative = jnp.ones(count)
    return program.conditioning(
        params, states(towers, tokens, tokens), has_negative, micro, label=label, config=config, compute=compute
    )


def _rows(mesh: Mesh, tree: Any) -> Any:
    """Abstract arrays, split over the batch."""
    place = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def _whole(mesh: Mesh, tree: Any) -> Any:
    """Abstract arrays, replicated over the mesh."""
    everywhere = sharding.replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype, sharding=everywhere), tree
    )


def _abstract_latent(config: TrainConfig, mesh: Mesh, size: Size, images: int, channels: int) -> Any:
    sides = (side // config.model.vae.downsampling for side in size)
    place = sharding.batch_sharding(mesh)
    return jax.ShapeDtypeStruct((images, *sides, channels), jnp.float32, sharding=place)


def _abstract_start(mesh: Mesh, segment_arrays: Any, latent: Any) -> Any:
    """The abstract sampler state before the first step."""
    batch = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH))
    state = jax.eval_shape(lambda latent: loop.start(latent, segment_arrays.plan), latent)
    state = state._replace(arrays=jax.ShapeDtypeStruct(state.arrays.shape, jnp.float32, sharding=batch), x0=latent)
    return state._replace(finite_rows=_rows(mesh, state.finite_rows))


def verdict(result: Report | TooLarge, config: RunConfig) -> str:
    """One line on whether the program fits and, if not, what to change."""
    if isinstance(result, TooLarge):
        takes = result.reason
    else:
        takes = f"{result.bytes_total / 2**30:.1f} of {result.chip.memory_bytes / 2**30:.0f} GiB per chip"
    return f"It fits: {takes}." if result.fits else f"It does not fit: {takes}. {advice(result, config)}"


def advice(result: Report | TooLarge, config: RunConfig) -> str:
    """The first change that would help, by the largest use of memory."""
    if isinstance(result, TooLarge) and "ScopedVmem" in result.reason:
        return (
            "A single operation needs more of the memory on the chip than a scope may have: add "
            "xla_tpu_scoped_vmem_limit_kib=65536 to compute.compiler_options."
        )
    state = sum(result.bytes_by_use.values())
    # For a program that the compiler refused, activations are not known: they need more than the rest leaves.
    activations = result.chip.memory_bytes - state if isinstance(result, TooLarge) else result.bytes_activations
    if state > activations and config.mesh.fsdp not in (-1, result.chips):
        return f"Parameters, their average and optimiser state take most of it: raise mesh.fsdp, up to {result.chips}."
    if config.compute.remat is Remat.NONE:
        return "Activations take most of it: set compute.remat to dots, or to block for still less."
    if config.compute.remat is Remat.DOTS:
        return "Activations take most of it: set compute.remat to block."
    per_chip = result.images // result.chips
    if per_chip > config.optimiser.accumulate:
        return f"Activations take most of it: raise optimiser.accumulate to {2 * config.optimiser.accumulate}."
    return REMEDIES + "."
