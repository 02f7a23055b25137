"""Checks and measures one accelerator: one script, one table. Written for one H200; any GPU or TPU, or a CPU, does.

    python benchmarks/accelerator.py                             # at most eight minutes
    python benchmarks/accelerator.py --minutes 30 --json FILE    # also diffusers at every size, where torch has CUDA
    python benchmarks/accelerator.py --only attention bits       # some of its pieces
    python benchmarks/accelerator.py --quick                     # tiny shapes: that everything in it runs

Checks: networks against the CPU's, and images against diffusers' on the same device, in float32; the attention kernel
against XLA's attention; training twice, with and without XLA's deterministic operations. Measures: the train step of
the SDXL base at 1024², 512² and 256², and sampling at 1024², 20 Euler steps with guidance, batch 1 and 8, in bfloat16,
with random weights; the same in diffusers under torch.compile.

Needs jax for the accelerator. diffusers is measured where it is installed, with a torch that has the device; no piece
needs it. Every piece is a process of its own, so that each has the whole memory, and a failure or a hang costs that
piece alone. A piece that no longer fits into --minutes is named, and left out.

MFU: as in train_step.py and sample.py. Memory: the peak of the allocator. Costs: the kernels of one step that take
longest together, by name, from a profiler trace, with their share of the traced time.
"""

import argparse
import collections
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the two benchmarks whose sides are measured here

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
Row = dict[str, Any]
"""One line of the report: `what`, `result` (passed, FAILED, measured, left out), `note`, and figures."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="of the whole run; higher: more pieces fit")
    parser.add_argument("--only", nargs="+", choices=PIECES, metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny models and shapes")
    parser.add_argument("--piece", choices=[*PIECES, "bits-run"], help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


# The pieces, each in its own process. They import what they need: the parent process must not hold the accelerator.


class Out:
    """Rows for the parent. Rows of the same name are one: the later adds to the earlier."""

    def __init__(self, path: Path):
        self._path = path

    def row(self, what: str, result: str, note: str = "", **figures: Any) -> None:
        import jax

        figures["device"] = jax.devices()[0].device_kind
        with self._path.open("a") as file:
            file.write(json.dumps({"what": what, "result": result, "note": note, **figures}) + "\n")

    def check(self, what: str, passed: bool, note: str, **figures: Any) -> None:
        self.row(what, "passed" if passed else "FAILED", note, **figures)


def noise(tree: Any, dtype: Any) -> Any:
    """Arrays in the shapes of a tree, with normal values of deviation 0.02; they repeat, which costs less time."""
    import jax
    import numpy as np

    values = (0.02 * np.random.default_rng(0).standard_normal(1_000_003, np.float32)).astype(dtype)
    return jax.tree.map(lambda leaf: jax.device_put(np.resize(values, leaf.shape)), tree)


def parity(out: Out, quick: bool) -> None:
    """The networks of a tiny model here and on the CPU."""
    import jax
    import numpy as np
    import sample

    from sdxl_jax import model
    from sdxl_jax.models import unet, vae

    jax.config.update("jax_default_matmul_precision", "highest")
    config = sample.model_config("tiny")
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    params = jax.tree.map(lambda leaf: 0.2 * normal(*leaf.shape), model.abstract(config))
    given = (
        normal(2, 8, 8, 4),
        np.array([3.0, 900.0], np.float32),
        normal(2, 77, 64),
        normal(2, config.unet.vector_dim or 0),
    )
    networks: dict[str, Callable[[], Any]] = {
        "UNet": lambda: jax.jit(lambda *all: unet.apply(config.unet, *all))(params["unet"], *given),
        "decoder": lambda: jax.jit(lambda *all: vae.decode(config.vae, *all))(params["vae"], given[0]),
    }
    for name, network in networks.items():
        here = np.asarray(network())
        with jax.default_device(jax.devices("cpu")[0]):
            there = np.asarray(network())
        error = float(np.abs(here - there).max() / np.abs(there).max())
        # Sums in another order, and cuDNN's fast convolutions; a wrong padding or layout costs more than 0.1.
        out.check(f"{name} against the CPU's", error < 1e-3, f"relative error {error:.1e}, tolerance 1e-3")


def parity_diffusers(out: Out, quick: bool) -> None:
    """The images of a tiny model, here and in diffusers."""
    import numpy as np
    import sample

    options = sample.arguments(["--size", "tiny", "--eager", "--steps", "3", "--rounds", "1"])
    with tempfile.TemporaryDirectory() as folder:
        sample.Process("initialising the weights", sample.write_weights, Path(folder), options).end()
        rows, _ = sample.measure(options, Path(folder))
    own, other = rows.values()
    difference = np.abs(own.images.astype(int) - other.images.astype(int))
    share = float(np.mean(difference > 0))
    # Rounding to bytes: on a CPU one level in 0.02 % of them. Another prompt or schedule changes most of them.
    passed = int(difference.max()) <= 2 and share < 0.05
    out.check("images against diffusers'", passed, f"at most {difference.max()} levels apart, in {share:.2%} of bytes")


def attention(out: Out, quick: bool) -> None:
    """The kernel for this platform against XLA's attention, both against float32: result and gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sdxl_jax.models.attention import dot_product_attention
    from sdxl_jax.models.layers import Attention

    kernel = {"gpu": Attention.CUDNN, "tpu": Attention.SPLASH}.get(jax.default_backend(), Attention.XLA)
    shapes = [(1, 64, 2, 64)] if quick else [(4, 4096, 10, 64), (4, 1024, 20, 64), (4, 3952, 10, 64)]
    for shape in shapes:
        arrays = [np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in range(4)]

        def run(implementation: Attention, dtype: Any, arrays: Any = arrays) -> tuple[Any, float]:
            *inputs, weights = (jnp.asarray(each, jnp.bfloat16).astype(dtype) for each in arrays)

            def loss(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
                result = dot_product_attention(query, key, value, implementation)
                return jnp.sum((result * weights).astype(jnp.float32)), result

            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            (_, result), gradients = jax.block_until_ready(step(*inputs))
            seconds = timed(lambda: jax.block_until_ready(step(*inputs)), 3 if quick else 10)
            return [np.asarray(each, np.float32) for each in (result, *gradients)], seconds

        with jax.default_matmul_precision("highest"):
            exact, _ = run(Attention.XLA, jnp.float32)
        (own, seconds), (plain, plain_seconds) = run(kernel, jnp.bfloat16), run(Attention.XLA, jnp.bfloat16)
        errors, plain_errors = (
            [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(each, exact, strict=True)]
            for each in (own, plain)
        )
        # bfloat16 has 8 bits, a relative rounding of 2e-3; a kernel may round elsewhere, but no worse than twice.
        passed = all(error < 2 * plain + 1e-3 for error, plain in zip(errors, plain_errors, strict=True))
        note = f"error {max(errors):.1e}, XLA's {max(plain_errors):.1e}; XLA takes {1e3 * plain_seconds:.2f} ms"
        size = "×".join(map(str, shape))
        out.check(f"{kernel.value} attention {size}, with gradients", passed, note, seconds=seconds)


def bits(out: Out, quick: bool) -> None:
    """Four processes train at once, two of them with deterministic operations."""
    command = [sys.executable, __file__, "--piece", "bits-run", *["--quick"] * quick]
    given = os.environ.get("XLA_FLAGS", "")
    shared = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**shared, "XLA_FLAGS": flags})
        for flags in (given, given, f"{given} {DETERMINISTIC}".strip(), f"{given} {DETERMINISTIC}".strip())
    ]
    losses = [process.communicate()[0].split() for process in running]
    assert all(losses), f"exit codes {[process.returncode for process in running]}"
    same = [losses[0] == losses[1], losses[2] == losses[3]]
    words = [f"{len(losses[0])} losses are {'equal' if each else 'not equal'} in all digits" for each in same]
    out.row("two trainings", "measured", words[0])
    out.check(f"two trainings, {DETERMINISTIC.strip('-')}", same[1], words[1])


def bits_run(quick: bool) -> None:
    options = train_options(64 if quick else 512, 2, quick)
    step, _ = our_training(options, quick or None)
    print(*(step().hex() for _ in range(3 if quick else 8)))


def train_options(side: int, batch: int, quick: bool) -> argparse.Namespace:
    import train_step

    size = ["--size", "small"] if quick else ["--size", "full"]
    return train_step.arguments([*size, "--side", str(side), "--batch", str(batch), "--dtype", "bfloat16"])


def unet_config(quick: bool | None) -> Any:
    """Of the base; for `bits` (None) a tenth of its parameters; a tiny one."""
    import train_step

    from sdxl_jax.model import SDXL_BASE
    from sdxl_jax.models.unet import UNetConfig

    if quick:
        return UNetConfig((32, 64), 1, (0, 1), 1, (1, 2), context_dim=2048)
    return train_step.SMALL if quick is None else SDXL_BASE.unet


def our_training(options: argparse.Namespace, quick: bool | None) -> tuple[Callable[[], float], float]:
    import numpy as np
    import train_step

    from sdxl_jax.models import unet

    config = unet_config(quick)
    return train_step.ours(options, config, noise(unet.abstract(config), np.float32))


def timed(step: Callable[[], Any], rounds: int) -> float:
    """Median of the seconds of a call."""
    seconds = []
    for _ in range(rounds):
        began = time.monotonic()
        step()
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def train(side: int, batch: int) -> "Measure":
    def measure(out: Out, quick: bool) -> None:
        import jax

        from sdxl_jax.flops import chip_of
        from sdxl_jax.training.observe import profiling

        images = 1 if quick else batch
        what = f"train step {side}², batch {batch}"
        step, flops = our_training(train_options(64 if quick else side, images, quick), quick)
        began = time.monotonic()
        step()
        first = time.monotonic() - began
        seconds = timed(step, 2 if quick else 7)
        device = jax.devices()[0]
        chip = chip_of(device.device_kind)
        mfu = None if chip is None else flops / seconds / chip.flops_per_second
        figures = {"seconds": seconds, "images_per_second": images / seconds, "mfu": mfu, "first_seconds": first}
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        out.row(what, "measured", memory_gib=None if peak is None else peak / 2**30, **figures)
        if profiling.crashes():
            return
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                step()
            costs = largest_costs(next(Path(folder).rglob("*.xplane.pb")))
        out.row(what, "measured", ", ".join(f"{name} {share:.0%}" for name, share in costs), costs=costs)

    return measure


def largest_costs(trace: Path, count: int = 3) -> list[tuple[str, float]]:
    """(name, share of the traced time) of the kinds of kernels that take longest. An empty list if there are none."""
    import jax

    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    totals = collections.Counter[str]()
    for plane in devices or planes:
        lines = list(plane.lines)
        operations = [line for line in lines if line.name == "XLA Ops"]
        for line in operations or [line for line in lines if line.name.startswith("Stream")] or lines:
            for event in line.events:
                # A GPU's kernels have an operation unless a CUDA graph runs them; on a CPU what has none is Python.
                name = dict(event.stats).get("hlo_op") or (event.name if devices else None)
                if name and not str(name).startswith(("while", "call", "conditional")):
                    totals[re.sub(r"([._]\d+)+$", "", str(name))[:40]] += int(event.duration_ns)
    total = sum(totals.values())
    return [(name, nanoseconds / total) for name, nanoseconds in totals.most_common(count)] if total else []


def train_diffusers(side: int, batch: int) -> "Measure":
    def measure(out: Out, quick: bool) -> None:
        import torch
        import train_step

        if not torch_has_device(out, what := f"train step {side}², batch {batch}, diffusers"):
            return
        images = 1 if quick else batch
        options = train_options(64 if quick else side, images, quick)
        options.eager = quick
        step = train_step.their_step(options, train_step.their_model(unet_config(quick)))
        step()
        seconds = timed(step, 2 if quick else 7)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        out.row(what, "measured", seconds=seconds, images_per_second=images / seconds, memory_gib=peak)

    return measure


def torch_has_device(out: Out, what: str) -> bool:
    """Whether torch has the accelerator that jax has; a row says so if not."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # jax is asked for the device's name only
    import jax
    import torch

    found = {"gpu": torch.cuda.is_available(), "cpu": True}.get(jax.default_backend(), False)
    if not found:
        out.row(what, "left out", f"torch {torch.__version__} does not have this device")
    return found


def sample_options(batch: int, quick: bool) -> argparse.Namespace:
    import sample

    full = ["--size", "full", "--side", "1024", "--guidance", "8", "--dtype", "bfloat16", "--batch", str(batch)]
    return sample.arguments(["--size", "tiny", "--steps", "2", "--eager"] if quick else full)


def sample_side(out: Out, what: str, side: Any, options: argparse.Namespace, quick: bool) -> None:
    began = time.monotonic()
    side.sample()
    first = time.monotonic() - began
    seconds = timed(side.sample, 1 if quick else 3) / options.batch
    tflops, peak = side.tflop() / seconds, side.flops_per_second
    figures = {"seconds": seconds, "images_per_second": 1 / seconds, "first_seconds": first}
    memory = None if side.on_cpu else side.peak_bytes() / 2**30
    out.row(what, "measured", memory_gib=memory, mfu=None if peak is None else 1e12 * tflops / peak, **figures)


def sampling(batch: int) -> "Measure":
    def measure(out: Out, quick: bool) -> None:
        import jax.numpy as jnp
        import sample

        from sdxl_jax import model

        options = sample_options(batch, quick)
        config = sample.model_config(options.size)
        made = model.Model(config, noise(model.abstract(config), jnp.dtype(options.dtype)))
        sample_side(out, f"image 1024², batch {batch}", sample.our_side(made, options), options, quick)

    return measure


def sampling_diffusers(batch: int) -> "Measure":
    def measure(out: Out, quick: bool) -> None:
        import sample
        import torch

        if not torch_has_device(out, what := f"image 1024², batch {batch}, diffusers"):
            return
        options = sample_options(batch, quick)
        with tempfile.TemporaryDirectory() as folder:
            with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                sample.write_weights(Path(folder), options)
            torch.set_default_dtype(torch.float32)
            sample_side(out, what, sample.theirs(Path(folder), options), options, quick)

    return measure


Measure = Callable[[Out, bool], None]


class Piece(NamedTuple):
    run: Measure
    least: float
    """Seconds that must be left for it to start: without luck it does not end in less."""
    limit: float
    """Seconds after which it is ended."""
    needs: tuple[str, ...] = ()
    """Packages without which it is left out."""
    environment: dict[str, str] = {}  # noqa: RUF012 (not changed)


_TORCH = ("torch", "diffusers")
_FLOAT32 = {"NVIDIA_TF32_OVERRIDE": "0", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
PIECES = {
    "parity": Piece(parity, 15, 90, environment=_FLOAT32),
    "attention": Piece(attention, 15, 90),
    "bits": Piece(bits, 30, 150),
    "train-1024": Piece(train(1024, 4), 45, 240),
    "sample-1": Piece(sampling(1), 30, 150),
    "parity-diffusers": Piece(parity_diffusers, 30, 120, _TORCH, _FLOAT32),
    "train-1024-diffusers": Piece(train_diffusers(1024, 4), 60, 300, _TORCH),
    "sample-1-diffusers": Piece(sampling_diffusers(1), 60, 240, _TORCH),
    "sample-8": Piece(sampling(8), 45, 180),
    "train-512": Piece(train(512, 16), 45, 240),
    "train-256": Piece(train(256, 64), 45, 240),
    "sample-8-diffusers": Piece(sampling_diffusers(8), 90, 300, _TORCH),
    "train-512-diffusers": Piece(train_diffusers(512, 16), 60, 300, _TORCH),
    "train-256-diffusers": Piece(train_diffusers(256, 64), 60, 300, _TORCH),
}
"""By name, in the order of importance: what no longer fits comes last."""


# The parent


def run(name: str, piece: Piece, left: float, quick: bool) -> Iterator[Row]:
    """The rows of one piece."""
    missing = [package for package in piece.needs if find_spec(package) is None]
    if missing or left < piece.least:
        why = f"{missing[0]} is not installed" if missing else f"{left:.0f} s left; raise --minutes"
        yield {"what": name, "result": "left out", "note": why}
        return
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder, "rows"), Path(folder, "errors")
        command = [sys.executable, __file__, "--piece", name, "--out", str(out), *["--quick"] * quick]
        began, why = time.monotonic(), ""
        with errors.open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **piece.environment}, start_new_session=True
            )
        try:
            if code := process.wait(left if quick else min(left, piece.limit)):
                lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
                why = f"exit code {code}: {lines[-1][:160] if lines else 'no message'}"
                print("\n".join(lines[-15:]), file=sys.stderr)
        except subprocess.TimeoutExpired:
            why = f"ended after {time.monotonic() - began:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows: dict[str, Row] = {}
        for line in out.read_text().splitlines() if out.exists() else []:
            row = json.loads(line)
            rows[row["what"]] = rows.get(row["what"], {}) | row
        yield from rows.values()
        if why:
            yield {"what": name, "result": "FAILED", "note": why}


def compare(rows: list[Row]) -> None:
    """Adds to our rows how many times diffusers' images per second they reach."""
    speeds = {row["what"]: row["images_per_second"] for row in rows if "images_per_second" in row}
    for row in rows:
        if (theirs := speeds.get(f"{row['what']}, diffusers")) is not None:
            row["ratio"] = row["images_per_second"] / theirs


def table(rows: list[Row]) -> Iterator[str]:
    columns = {
        "s": ("seconds", "{:.4f}"),
        "images/s": ("images_per_second", "{:.3f}"),
        "MFU": ("mfu", "{:.1%}"),
        "GiB": ("memory_gib", "{:.1f}"),
        "× diffusers": ("ratio", "{:.2f}"),
    }
    yield f"| | result | {' | '.join(columns)} | |"
    yield "|---" * (len(columns) + 3) + "|"
    for row in rows:
        figures = ["" if row.get(key) is None else text.format(row[key]) for key, text in columns.values()]
        yield f"| {row['what']} | {row['result']} | {' | '.join(figures)} | {row['note']} |"


def main() -> None:
    options = arguments()
    if options.piece == "bits-run":
        return bits_run(options.quick)
    if options.piece:
        return PIECES[options.piece].run(Out(options.out), options.quick)
    end = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    for name, piece in PIECES.items():
        if options.only and name not in options.only:
            continue
        began = time.monotonic()
        rows += run(name, piece, end - began, options.quick)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        compare(rows)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    devices = sorted({row["device"] for row in rows if "device" in row})
    print(f"\n{', '.join(devices) or 'no device'}{', tiny shapes (--quick)' if options.quick else ''}\n")
    print("\n".join(table(rows)))
    raise SystemExit(any(row["result"] == "FAILED" for row in rows))


if __name__ == "__main__":
    main()
