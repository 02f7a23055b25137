"""Benchmark of the training step of a LoRA: against PEFT on diffusers' UNet, and against full fine-tuning here.

    pip install peft
    python benchmarks/finetune.py                          # a small SDXL, float32: for CPUs
    python benchmarks/finetune.py --remat block
    python benchmarks/finetune.py --size full --batch 1 --side 1024 --dtype bfloat16      # for GPUs

All sides do the work of `train_step.py` with the same UNet and batch: from cached latents and text states, noise, UNet,
squared error, gradient, clip, AdamW. The LoRA is of rank 16 on queries, keys, values and outputs of attention; the base
is frozen in float32 (bfloat16: activations only). PEFT runs with and without torch.compile; where that fails, its
reason is printed, and it is left out.

After a warm-up each round runs one step of every side, every second round in reverse order, so that other load on the
machine affects all; ratios are medians of those within a round. Only figures of a quiet machine mean anything.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import train_step

from sdxl_jax.adapters.targets import AdapterConfig
from sdxl_jax.allocator import keep_freed_memory
from sdxl_jax.model import SDXL_BASE
from sdxl_jax.models.layers import Remat

RANK = 16
LORA, FULL = "sdxl_jax, LoRA", "sdxl_jax, all of the UNet"
EAGER, COMPILED = "PEFT on diffusers, eager", "PEFT on diffusers, torch.compile"
Step = Callable[[], float]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "full"], default="small", help="of the UNet")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--side", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--remat", choices=[each.value for each in Remat], default="none", help="of our steps only")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps per side")
    parser.add_argument("--eager", action="store_true", help="PEFT without torch.compile only")
    parser.add_argument("--without-torch", action="store_true", help="our two sides alone")
    return parser.parse_args(given)


def with_lora(model: Any) -> Any:
    """diffusers' UNet, frozen, with a LoRA of PEFT's on its attention."""
    try:
        import peft  # pyright: ignore[reportMissingImports] (not in the extra `test`)
    except ImportError as error:
        raise SystemExit("This benchmark needs PEFT: pip install peft, or give --without-torch") from error
    model.requires_grad_(False)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=attention, init_lora_weights="gaussian"))
    return model


def sides(options: argparse.Namespace) -> dict[str, Step]:
    """One step of each side by name. All begin with the same base."""
    unet = train_step.SMALL if options.size == "small" else SDXL_BASE.unet
    found: dict[str, Step] = {}
    by_name = {name: argparse.Namespace(**{**vars(options), "eager": name == EAGER}) for name in (EAGER, COMPILED)}
    _, params = train_step.theirs(by_name[EAGER], unet)
    if not options.without_torch:
        model = with_lora(train_step.their_model(unet))
        for name in (EAGER,) if options.eager else (EAGER, COMPILED):
            found[name] = train_step.their_step(by_name[name], model)
    copy = jax.tree.map(jnp.array, params)  # each side donates its own
    found[LORA] = train_step.ours(options, unet, copy, AdapterConfig(rank=RANK, alpha=float(RANK)))[0]
    found[FULL] = train_step.ours(options, unet, params)[0]
    return found


def warmed_up(steps: Mapping[str, Step]) -> dict[str, Step]:
    """The sides that run."""
    ready: dict[str, Step] = {}
    for name, step in steps.items():
        began = time.monotonic()
        try:
            losses = [step(), step()]
        except Exception as error:
            if name != COMPILED:
                raise
            print(f"{name}: left out, {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
            continue
        print(f"{name}: ready after {time.monotonic() - began:.0f} s, losses {losses[0]:.4f}, {losses[1]:.4f}")
        ready[name] = step
    return ready


def measured(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side's step in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in list(steps.items())[:: -1 if number % 2 else 1]:
            began = time.monotonic()
            step()
            seconds[name].append(time.monotonic() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> float:
    """How many times as long a step of one side takes as one of the other."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))


def main() -> None:
    options = arguments()
    keep_freed_memory()  # as `train` does; torch, in the same process, has it too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of the GPU
    seconds = measured(warmed_up(sides(options)), options.rounds)
    kind = jax.devices()[0].device_kind
    print(f"\n{kind}, {options.size}, batch {options.batch}, {options.side}², {options.dtype}, remat {options.remat}")
    print("| | seconds per step | images/s |\n|---|---|---|")
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"| {name} | {median:.3f} | {options.batch / median:.3f} |")
    print(f"\n{LORA}: {ratio(seconds, LORA, FULL):.2f} of the time of {FULL}")
    for name in (EAGER, COMPILED):
        if name in seconds:
            print(f"{LORA}: {ratio(seconds, name, LORA):.2f} times the images per second of {name}")


if __name__ == "__main__":
    main()
