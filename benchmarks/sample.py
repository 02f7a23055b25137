"""Benchmark of text-to-image throughput against diffusers' `StableDiffusionXLPipeline`, on the same device in one run.

    python benchmarks/sample.py                                              # a small SDXL, 256², float32: for CPUs
    python benchmarks/sample.py --size tiny --eager                          # a quick test that it runs
    python benchmarks/sample.py --size full --side 256 --steps 4             # the base's 2.6 billion, on a CPU
    python benchmarks/sample.py --size full --side 1024 --batch 8 --guidance 8 --dtype bfloat16          # for GPUs

Both sides load the same folder of random weights, initialised by torch, and sample the same prompts from the same
noise: text encoders, Euler with guidance, autoencoder, images as bytes on the host. Steps and dtype, also of the
weights, are the same. Torch's UNet is compiled with torch.compile, unless --eager. The report compares the images, to
check that both sides did the same work: in float32 they differ by at most about one level.

Each side runs in its own process, so that memory is measured separately: on a GPU the peak of the allocator, else the
peak resident memory of the process, loading included. After the first images, which include compilation, the sides
alternate, so that other load on the machine affects both; the report has the median over the rounds. Where memory does
not hold both (--apart, and always at full size on a CPU) one side runs all its rounds before the other is loaded: other
load may then affect one side only.

CPU figures are meaningful only on an otherwise idle machine; the report has the load average, which includes the
benchmark's own threads. Torch's threads busy-wait for each other, and slow down much more than ours where others use
the same processors: `taskset -c 0` before the command gives each side one thread. CPU seconds are those of all threads
of a process.

The first images are measured in two processes per side, one after the other: seconds of the call itself, and from the
start of the process, with imports and reading the weights. Our compilation cache is empty for the first process.
torch.compile has caches of its own, which an earlier run may have filled.

MFU: FLOPs of matrix products and convolutions (2·steps evaluations of the UNet, the text encoders for both prompts, one
decode), counted in our traced functions, over the device's bfloat16 peak, where that is known. Each evaluation counts
the keys and values of the text, which we compute once for all steps.
"""

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:  # each process imports only what its side needs, or its peak memory would include the other's
    from sdxl_jax.model import Model, ModelConfig

PROMPTS = ("a photograph of a lighthouse above a stormy sea", "a red bicycle before a yellow wall, oil painting")
MLPERF = "TensorRT on H200: 2.40 images/s (MLPerf Inference 5.1, 8-bit, not measured here)"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="small", help="of the model")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--side", type=int, help="side of the images in pixels; default 256, of a tiny model 64")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps per image")
    parser.add_argument("--guidance", type=float, default=5.0, help="guidance scale, more than 1")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and activations"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured calls per side")
    parser.add_argument("--eager", action="store_true", help="torch without torch.compile")
    parser.add_argument("--one-program", action="store_true", help="our sampler as one program, not one per part")
    parser.add_argument("--apart", action="store_true", help="one side after the other, to halve the memory")
    options = parser.parse_args(given)
    options.side = options.side or (64 if options.size == "tiny" else 256)
    return options


def model_config(size: str) -> "ModelConfig":
    """tiny: all kinds of layers, runs in seconds. small: the base's kinds of operations, a hundredth of the FLOPs."""
    from sdxl_jax.conditioning.micro import MicroConfig
    from sdxl_jax.model import SDXL_BASE, ModelConfig
    from sdxl_jax.models.unet import UNetConfig
    from sdxl_jax.models.vae import VaeConfig

    if size == "full":
        return SDXL_BASE

    def towers(**changed: Any) -> Any:
        return tuple(
            dataclasses.replace(
                tower,
                clip=dataclasses.replace(
                    tower.clip,
                    **changed,
                    projection_dim=tower.clip.projection_dim and changed.get("width", tower.clip.projection_dim),
                ),
            )
            for tower in SDXL_BASE.text
        )

    if size == "small":
        unet = UNetConfig((128, 256, 512), transformer_depth=(0, 1, 4), middle_depth=4, heads=(2, 4, 8))
        return ModelConfig(unet, VaeConfig((32, 64, 128, 128)), towers(layers=3))
    unet = UNetConfig((32, 64), 1, (0, 2), 2, (1, 2), context_dim=64, vector_dim=32 + 6 * 16)
    text = towers(width=32, layers=2, heads=2, mlp_width=64)
    return ModelConfig(unet, VaeConfig((32, 32, 32, 32), 1), text, MicroConfig(embedding_dim=16))


# The two sides, each in its own process


class Side(NamedTuple):
    """One implementation under test."""

    sample: Callable[[], UInt8[np.ndarray, "images height width 3"]]
    """One call: images, on the host."""
    peak_bytes: Callable[[], int]
    """Peak memory so far."""
    device: str
    on_cpu: bool
    tflop: Callable[[], float]
    """TFLOP per image."""
    flops_per_second: float | None
    """Peak of the device, where it is known."""


def prompts(options: argparse.Namespace) -> list[str]:
    return [PROMPTS[number % len(PROMPTS)] for number in range(options.batch)]


def noise(options: argparse.Namespace) -> Float[np.ndarray, "images height width 4"]:
    side = options.side // 8
    return np.random.default_rng(0).standard_normal((options.batch, side, side, 4), np.float32)


def peak_resident_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quiet() -> None:
    """Switches off the progress bars and warnings of diffusers and transformers."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", ".*torch_dtype.* is deprecated", FutureWarning)


def write_weights(folder: Path, options: argparse.Namespace) -> None:
    """A folder in diffusers' layout, with all weights as torch initialises them."""
    import torch
    import transformers

    from sdxl_jax.weights.formats import diffusers_fields
    from sdxl_jax.weights.formats.diffusers import write_folder

    diffusers: Any = importlib.import_module("diffusers")  # its classes are lazy attributes, which pyright refuses
    config = model_config(options.size)
    write_folder(config, folder)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    quiet()
    network = diffusers.UNet2DConditionModel.from_config(diffusers_fields.unet_fields(config.unet, config.micro))
    network.save_pretrained(folder / "unet", max_shard_size="100GB")
    del network
    autoencoder = diffusers.AutoencoderKL.from_config(diffusers_fields.vae_fields(config.vae))
    autoencoder.save_pretrained(folder / "vae")
    for tower in config.text:
        fields = diffusers_fields.clip_fields(tower.clip)
        encoder = getattr(transformers, fields["architectures"][0])(transformers.CLIPTextConfig(**fields))
        encoder.save_pretrained(folder / tower.name)


def ours(folder: Path, options: argparse.Namespace) -> Side:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other side needs its share of the GPU
    from sdxl_jax.allocator import keep_freed_memory
    from sdxl_jax.compilation import compilation_cache
    from sdxl_jax.weights.load import load_model

    keep_freed_memory()  # as the command does
    compilation_cache.use(folder / "programs")
    return our_side(load_model(folder, progress=False), options)


def our_side(model: "Model", options: argparse.Namespace) -> Side:
    import jax

    from sdxl_jax.flops import chip_of
    from sdxl_jax.models.layers import Compute, Dtype
    from sdxl_jax.sampling.generate import text_to_image

    compute = Compute(dtype=Dtype(options.dtype))
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)

    def sample() -> UInt8[np.ndarray, "images height width 3"]:
        return text_to_image(
            model,
            prompts(options),
            height=options.side,
            width=options.side,
            steps=options.steps,
            guidance=options.guidance,
            batch_size=options.batch,
            init_noise=noise(options),
            compute=compute,
            one_program=options.one_program,
        )

    def peak_bytes() -> int:
        statistics = device.memory_stats() or {}
        return statistics.get("peak_bytes_in_use") or peak_resident_bytes()

    def tflop() -> float:
        return image_flops(model.config, options) / 1e12

    peak = None if chip is None else chip.flops_per_second
    return Side(sample, peak_bytes, device.device_kind, device.platform == "cpu", tflop, peak)


def image_flops(config: "ModelConfig", options: argparse.Namespace) -> float:
    """FLOPs per image."""
    import jax
    import jax.numpy as jnp

    from sdxl_jax import flops, model
    from sdxl_jax.conditioning import text
    from sdxl_jax.conditioning.text import Tokenizer
    from sdxl_jax.models import unet, vae
    from sdxl_jax.models.layers import Attention, Compute

    compute = Compute(attention=Attention.XLA)  # the same FLOPs, and those of a kernel may be unknown
    params = model.abstract(config)
    both, side = 2, options.side // 8

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    tokens = Tokenizer.of(config.text)([""] * both)
    encoded = flops.count(lambda params, tokens: text.encode(config.text, params, tokens, compute), params, tokens)
    conditioning = array(both, text.TOKENS, config.unet.context_dim or 0), array(both, config.unet.vector_dim or 0)
    evaluated = flops.count(
        lambda params, *rest: unet.apply(config.unet, params, *rest, compute=compute),
        params["unet"],
        array(both, side, side, config.unet.in_channels),
        array(both),
        *conditioning,
    )
    latent = array(1, side, side, config.vae.latent_channels)
    decoded = flops.count(lambda params, latent: vae.decode(config.vae, params, latent), params["vae"], latent)
    return encoded.total + options.steps * evaluated.total + decoded.total


def theirs(folder: Path, options: argparse.Namespace) -> Side:
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on GPUs, as in XLA by default
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=getattr(torch, options.dtype), add_watermarker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    if device == "cuda":
        for part in (pipeline.unet, pipeline.vae):
            part.to(memory_format=torch.channels_last)
    if not options.eager:
        pipeline.unet.compile()
    latents = torch.from_numpy(noise(options).transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, options.dtype))

    def sample() -> UInt8[np.ndarray, "images height width 3"]:
        output = pipeline(
            prompts(options),
            height=options.side,
            width=options.side,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            latents=latents,
        )
        return np.stack([np.asarray(image) for image in output.images])

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes()

    return Side(sample, peak_bytes, device, device == "cpu", lambda: 0.0, None)


# Remote calls to them


class Answer(NamedTuple):
    """The result of one call in the process of a side."""

    result: Any
    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""


def serve(connection: Connection, make_side: Callable[..., Any], *given: Any) -> None:
    """The loop of a side's process: evaluates the fields of `Side` that it receives, until it receives None."""
    side = make_side(*given)
    connection.send(None)
    while (field := connection.recv()) is not None:
        began, work = time.monotonic(), time.process_time()
        result = getattr(side, field)
        result = result() if callable(result) else result
        connection.send(Answer(result, time.monotonic() - began, time.process_time() - work))


class Process:
    """A `Side` in its own process."""

    def __init__(self, name: str, make_side: Callable[..., Any], *given: Any):
        self.name, self.began = name, time.monotonic()
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, make_side, *given))
        self._process.start()
        other.close()
        self._receive()

    def call(self, field: str) -> Answer:
        """A field of `Side`, called if it is a function."""
        self._connection.send(field)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise SystemExit(
                f"{self.name} ended with exit code {self._process.exitcode} (-9: killed, mostly for lack of memory; "
                "then choose a smaller --size or --batch, --dtype bfloat16, or --apart)"
            ) from None

    def end(self) -> None:
        self._connection.send(None)
        self._process.join()


@dataclasses.dataclass
class Row:
    """Measurements of one side."""

    first_seconds: list[float]
    """The first call of each process."""
    start_seconds: list[float]
    """From the start of each process to its first images."""
    images: UInt8[np.ndarray, "images height width 3"]
    rounds: list[Answer] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0

    def seconds(self) -> float:
        """Per image."""
        return statistics.median(each.seconds for each in self.rounds) / len(self.images)

    def cpu_seconds(self) -> float:
        """Per image."""
        return statistics.median(each.cpu_seconds for each in self.rounds) / len(self.images)


class Machine(NamedTuple):
    """The device, and the FLOPs of the work, as our side reports them."""

    device: str
    on_cpu: bool
    tflop: float
    flops_per_second: float | None


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Row], Machine]:
    sides = {
        f"sdxl_jax, {'one program' if options.one_program else 'three programs'}": ours,
        f"diffusers, {'eager' if options.eager else 'torch.compile'}": theirs,
    }
    rows: dict[str, Row] = {}
    running: list[Process] = []
    machine = None
    for name, make_side in sides.items():
        row, process = first_images(name, make_side, folder, options)
        process.end()
        again, process = first_images(name, make_side, folder, options)
        rows[name] = Row(row.first_seconds + again.first_seconds, row.start_seconds + again.start_seconds, again.images)
        machine = machine or Machine(*(process.call(field).result for field in Machine._fields))
        running.append(process)
        if options.apart or (options.size == "full" and machine.on_cpu):
            alternate(running, rows, options.rounds)
            running = []
    alternate(running, rows, options.rounds)
    assert machine is not None
    return rows, machine


def first_images(name: str, make_side: Callable[..., Any], *given: Any) -> tuple[Row, Process]:
    """The first call of a new process."""
    process = Process(name, make_side, *given)
    first = process.call("sample")
    since_start = time.monotonic() - process.began
    print(f"{name}: first images after {first.seconds:.1f} s, {since_start:.1f} s from the start", flush=True)
    return Row([first.seconds], [since_start], first.result), process


def alternate(running: list[Process], rows: dict[str, Row], rounds: int) -> None:
    """Runs all rounds, the processes in turn, and ends the processes."""
    for _ in range(rounds):
        for process in running:
            rows[process.name].rounds.append(process.call("sample"))
    for process in running:
        rows[process.name].peak_bytes = process.call("peak_bytes").result
        process.end()


# The report


def report(options: argparse.Namespace, rows: dict[str, Row], machine: Machine) -> Iterator[str]:
    yield (
        f"{machine.device}, {options.size}, batch {options.batch}, {options.side}², {options.steps} steps, guidance "
        f"{options.guidance:g}, {options.dtype}; {machine.tflop:.3f} TFLOP per image; load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} processors"
    )
    peak = machine.flops_per_second
    first = ("first images s, 1st / 2nd process", "from its start s")
    figures = (*first, "s per image", "CPU s per image", "images/s", "TFLOP/s", "memory GiB")
    columns = ["", *figures, *(["MFU"] if peak else [])]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for name, row in rows.items():
        seconds, tflops = row.seconds(), machine.tflop / row.seconds()
        cells = [" / ".join(f"{each:.1f}" for each in times) for times in (row.first_seconds, row.start_seconds)]
        cells += [f"{seconds:.3f}", f"{row.cpu_seconds():.3f}", f"{1 / seconds:.3f}"]
        cells += [f"{tflops:.3f}", f"{row.peak_bytes / 2**30:.2f}", *([f"{1e12 * tflops / peak:.1%}"] if peak else [])]
        yield f"| {name} | {' | '.join(cells)} |"
    own, other = rows.values()
    yield f"ratio: {other.seconds() / own.seconds():.2f} times diffusers' images per second"
    difference = np.abs(own.images.astype(int) - other.images.astype(int))
    yield f"images: at most {difference.max()} of 255 levels apart, {np.mean(difference > 0):.2%} of the bytes differ"
    if not machine.on_cpu and comparable(options):
        yield f"published: {MLPERF}"


def comparable(options: argparse.Namespace) -> bool:
    """Whether the settings are those of MLPerf's text-to-image benchmark."""
    return options.size == "full" and options.side == 1024 and options.steps == 20 and options.guidance > 1


def main() -> None:
    options = arguments()
    if options.guidance <= 1:
        raise SystemExit(f"--guidance {options.guidance:g}: give more than 1, since sampling with guidance is measured")
    with tempfile.TemporaryDirectory() as folder:
        Process("initialising the weights", write_weights, Path(folder), options).end()
        rows, machine = measure(options, Path(folder))
    print("\n" + "\n".join(report(options, rows, machine)))


if __name__ == "__main__":
    main()
