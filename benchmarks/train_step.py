"""Benchmark of the train step against diffusers' UNet under torch.compile, on the same device in one run.

    python benchmarks/train_step.py                                    # a small SDXL, float32: for CPUs
    python benchmarks/train_step.py --size full --batch 4 --side 1024 --dtype bfloat16      # for GPUs

Both sides do the same work from cached latents and text states: noise the latents, predict, squared error, gradient,
clip by the global norm, AdamW, without EMA. Batch, initial weights and dtype are the same (bfloat16: activations only;
the parameters stay float32, in torch by autocast). After a warm-up the sides alternate, so that other load on the
machine affects both; the report has the median over the rounds.

MFU: model FLOPs (matrix products and convolutions, forward and backward, counted in our traced program) over the
device's bfloat16 peak, where that is known. --profile DIR writes a trace of our steps for xprof.
"""

import argparse
import dataclasses
import importlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16

from sdxl_jax import sharding
from sdxl_jax.adapters.targets import AdapterConfig
from sdxl_jax.allocator import keep_freed_memory
from sdxl_jax.arrays import Batch, EncodedBatch, MicroConditioning, flatten
from sdxl_jax.config import TrainConfig, TrainingConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.flops import chip_of
from sdxl_jax.model import SDXL_BASE, ModelConfig
from sdxl_jax.models.layers import Compute, Dtype, Remat
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.optim.ema import EmaConfig, EmaKind
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.training import setup
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.weights import names
from sdxl_jax.weights.formats import diffusers_fields
from sdxl_jax.weights.lazy import abstract_leaves
from sdxl_jax.weights.names import Dialect, Naming

SMALL = UNetConfig(
    block_channels=(128, 256, 512), transformer_depth=(0, 1, 4), middle_depth=4, heads=(2, 4, 8), context_dim=2048
)
"""The same kinds of operations as the base, with a hundredth of the FLOPs."""
TEXT = tuple(
    dataclasses.replace(tower, clip=dataclasses.replace(tower.clip, layers=1, mlp_width=64)) for tower in SDXL_BASE.text
)
"""Text encoders, of which only the widths are used: the batch has their outputs."""
RATE, EPSILON, DECAY, CLIP = 1e-4, 1e-8, 1e-2, 1.0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "full"], default="small", help="of the UNet")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--side", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--remat", choices=[each.value for each in Remat], default="none", help="of our step only")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps per side")
    parser.add_argument("--eager", action="store_true", help="torch without torch.compile")
    parser.add_argument("--profile", help="folder for a trace of our steps")
    return parser.parse_args(given)


def batch(options: argparse.Namespace) -> Batch:
    rng = np.random.default_rng(0)
    count, side = options.batch, options.side // 8

    def normal(*shape: int) -> BFloat16[jax.Array, "batch ..."]:
        return jnp.asarray(rng.standard_normal((count, *shape)), jnp.bfloat16)

    size = np.full((count, 2), options.side, np.int32)
    latent = (side, side, 4)
    encoded = EncodedBatch(normal(*latent), normal(*latent) - 20, normal(77, 2048), normal(1280))
    tokens: Any = {tower.name: np.zeros((count, 77), np.int32) for tower in SDXL_BASE.text}
    micro = MicroConditioning(size, np.zeros_like(size), size)
    return Batch(None, tokens, micro, np.arange(count, dtype=np.int32), np.zeros(count, bool), encoded)


def ours(
    options: argparse.Namespace, unet: UNetConfig, params: Any, adapter: AdapterConfig | None = None
) -> tuple[Callable[[], float], float]:
    """(a function that runs one step and returns the loss; its model FLOPs). params: donated. adapter: trained in their
    place; None: they are."""
    model = ModelConfig(unet=unet, text=TEXT)
    config = TrainConfig(
        data=DataConfig("unused", batch_size=options.batch),
        model=model,
        compute=Compute(dtype=Dtype(options.dtype), remat=Remat(options.remat)),
        optimiser=OptimiserConfig(learning_rate=RATE, warmup_steps=0, weight_decay=DECAY, clip_norm=CLIP),
        ema=EmaConfig(kind=EmaKind.NONE),
        training=TrainingConfig(caption_dropout=0.0),
        adapter=adapter,
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    objective = Denoising(config)
    abstract, _ = objective.abstract_state(mesh)
    with jax.set_mesh(mesh):
        inputs = sharding.put_batch(mesh, batch(options))
        step = setup.jitted(objective, mesh, abstract)
        given = flatten({"unet": params})
        absent = {path: leaf for path, leaf in abstract_leaves(model).items() if path not in given}
        zeros = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in absent.items()}  # not read
        state, frozen = objective.fresh_state(mesh, abstract, given | zeros, progress=False)
        program = step.lower(abstract, frozen, inputs).compile()

    def run() -> float:
        nonlocal state
        state, metrics = program(state, frozen, inputs)
        return float(metrics["loss"])

    return run, objective.model_flops((abstract, frozen, inputs))


def theirs(options: argparse.Namespace, unet: UNetConfig) -> tuple[Callable[[], float], Any]:
    """(a function that runs one step and returns the loss; the same initial weights as our parameters)."""
    model = their_model(unet)
    tensors = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    params = names.from_tensors(names.table(unet, Naming(Dialect.DIFFUSERS)), tensors)
    return their_step(options, model), jax.tree.map(jnp.array, params)  # copies: torch updates its own in place


def their_model(unet: UNetConfig) -> Any:
    """diffusers' UNet with the weights that torch initialises, on the GPU if torch has one."""
    import torch

    diffusers: Any = importlib.import_module("diffusers")  # its classes are lazy attributes, which pyright refuses
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return diffusers.UNet2DConditionModel.from_config(diffusers_fields.unet_fields(unet))


def their_step(options: argparse.Namespace, model: Any) -> Callable[[], float]:
    """A function that runs one step of diffusers' UNet and returns the loss."""
    import torch

    diffusers: Any = importlib.import_module("diffusers")
    device = model.device.type
    model = model.train()
    if device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    network = model if options.eager else torch.compile(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, RATE, eps=EPSILON, weight_decay=DECAY, fused=True)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal((options.batch, *shape), np.float32)).to(device)

    side = options.side // 8
    latent, context = normal(4, side, side), normal(77, model.config.cross_attention_dim)
    pooled = normal(1280)
    sizes = torch.full((options.batch, 6), float(options.side), device=device)
    alpha_bar = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16")

    def run() -> float:
        timestep = torch.randint(0, 1000, (options.batch,), device=device)
        noise = torch.randn_like(latent)
        level = alpha_bar[timestep].reshape(-1, 1, 1, 1)
        noised = level.sqrt() * latent + (1 - level).sqrt() * noise
        with autocast:
            conditions = {"text_embeds": pooled, "time_ids": sizes}
            out = network(noised, timestep, context, added_cond_kwargs=conditions, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(out.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return loss.item()  # synchronises with the device

    return run


def main() -> None:
    options = arguments()
    keep_freed_memory()  # as `train` does; torch, in the same process, has it too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of the GPU
    unet = SMALL if options.size == "small" else SDXL_BASE.unet
    their_step, params = theirs(options, unet)
    our_step, step_flops = ours(options, unet, params)
    sides = {"diffusers, torch.compile" if not options.eager else "diffusers, eager": their_step, "sdxl_jax": our_step}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name, step in sides.items():
        began = time.monotonic()
        losses = [step(), step()]
        print(f"{name}: ready after {time.monotonic() - began:.0f} s, losses {losses[0]:.4f}, {losses[1]:.4f}")
    if options.profile:
        with jax.profiler.trace(options.profile):
            our_step()
    for _ in range(options.rounds):
        for name, step in sides.items():
            began = time.monotonic()
            step()
            seconds[name].append(time.monotonic() - began)
    device = jax.devices()[0]
    chip = chip_of(device.device_kind)
    print(f"\n{device.device_kind}, {options.size}, batch {options.batch}, {options.side}², {options.dtype}")
    print(f"| | seconds per step | images/s | TFLOP/s{' | MFU ' if chip else ''} |")
    print(f"|---|---|---|---{'|---' if chip else ''}|")
    for name, each in seconds.items():
        median = statistics.median(each)
        mfu = f" | {step_flops / median / chip.flops_per_second:.1%}" if chip else ""
        print(f"| {name} | {median:.3f} | {options.batch / median:.3f} | {step_flops / median / 1e12:.3f}{mfu} |")
    first, second = (statistics.median(each) for each in seconds.values())
    print(f"\nratio: {first / second:.2f} times diffusers' images per second")


if __name__ == "__main__":
    main()
