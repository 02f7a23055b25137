"""Benchmark of weight conversion: seconds and memory of `sdxl-jax convert` for a full-size SDXL base, by layout.

    python benchmarks/convert.py --dtype float16 --work-dir /tmp/convert

It writes one .safetensors file in the original layout, 3.47 billion random numbers, and converts it: to Orbax, from
there to diffusers, from there to a single file again, which must equal the first, bit for bit. Last, `load_model` reads
it.

Each step runs in its own process. Its memory is the peak resident memory, as `/usr/bin/time -v` reports it; the
kernel's page cache does not count, and the input of a step is not cached when it begins. For comparison the report has
the time of a plain copy of the same files, synced to the disk, which shows the speed of the disk at that time. A
conversion is within its limits if it stays below 8 GiB and takes no more than 5 minutes longer than the copy.

Needs three times the model's size on the disk: 21 GB for float16, 42 GB for float32.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_GIB, EXTRA_SECONDS = 8, 300
"""Limits of a conversion: memory; time in excess of a plain copy."""


def make(path: Path, dtype: str) -> None:
    """An SDXL base in the layout of its published file, with random weights; one tensor in memory at a time."""
    import numpy as np

    from sdxl_jax.model import SDXL_BASE
    from sdxl_jax.weights import names
    from sdxl_jax.weights.formats import safetensors
    from sdxl_jax.weights.lazy import DTYPES, part_configs
    from sdxl_jax.weights.names import Dialect, Naming

    namings = {
        "unet": Naming(Dialect.ORIGINAL, "model.diffusion_model."),
        "vae": Naming(Dialect.ORIGINAL, "first_stage_model.", conv_attention=True),
        "text_encoder": Naming(Dialect.TRANSFORMERS, "conditioner.embedders.0.transformer."),
        "text_encoder_2": Naming(Dialect.OPENCLIP, "conditioner.embedders.1.model."),
    }
    tables = [names.table(config, namings[part]) for part, config in part_configs(SDXL_BASE).items()]
    shapes = {entry.name: entry.shape for table in tables for entry in table.entries}
    number = np.dtype(DTYPES[dtype])
    rng = np.random.default_rng(0)
    with safetensors.Writer(path, {name: (shape, number) for name, shape in shapes.items()}, {}) as writer:
        for name, shape in shapes.items():
            writer.put(name, (0.02 * rng.standard_normal(shape, np.float32)).astype(number))


def difference(first: Path, second: Path) -> str | None:
    """The name of the first tensor that is not bit for bit the same in two files; None if there is none."""
    import numpy as np

    from sdxl_jax.weights.formats import safetensors

    (ours, _), (theirs, _) = safetensors.open_file(first), safetensors.open_file(second)
    if unshared := sorted(ours.keys() ^ theirs.keys()):
        return unshared[0]
    for name, tensor in ours.items():
        one, other = tensor.read(), theirs[name].read()
        same = one.dtype == other.dtype and one.shape == other.shape
        if not same or not np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8)):
            return name
    return None


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a new process. The peak memory of a child process includes that of its parent at the fork,
    so the memory of this process must stay small."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


class Cost(NamedTuple):
    """Time and peak resident memory of a command."""

    seconds: float
    peak_gib: float


def run(command: list[str]) -> Cost:
    """Raises SystemExit if the command fails."""
    with tempfile.TemporaryFile() as output:  # progress bars would be printed between the table's rows
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{output.read().decode()}\n{' '.join(command)} failed")
    return Cost(seconds, usage.ru_maxrss / 2**20)


def files(path: Path) -> Iterator[Path]:
    yield from [path] if path.is_file() else (file for file in sorted(path.rglob("*")) if file.is_file())


def drop_from_cache(path: Path) -> None:
    """Writes the files to the disk and drops them from the kernel's page cache."""
    for file in files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, scratch: Path) -> float:
    """Seconds of a plain copy, synced to the disk; the copy is removed."""
    drop_from_cache(source)
    start = time.perf_counter()
    scratch.mkdir()
    for number, file in enumerate(files(source)):
        copied = Path(shutil.copyfile(file, scratch / str(number)))
        with copied.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(scratch)
    return seconds


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the weights")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("convert-benchmark"), help="a new directory, removed at the end"
    )
    options = parser.parse_args()
    work: Path = options.work_dir
    work.mkdir(parents=True)
    try:
        measure(work, options.dtype)
    finally:
        shutil.rmtree(work)


def measure(work: Path, dtype: str) -> None:
    first, last = work / "first.safetensors", work / "last.safetensors"
    print("writing a model …", file=sys.stderr)
    in_process(make, first, dtype)
    size = first.stat().st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"SDXL base, {dtype}, {size / 1e9:.2f} GB. Machine: {os.cpu_count()} CPU cores, {memory / 2**30:.0f} GiB\n")
    print("| step | seconds | seconds of a plain copy | peak memory | within |\n|---|---|---|---|---|", flush=True)
    steps = [(first, work / "orbax", "orbax"), (work / "orbax", work / "diffusers", "diffusers")]
    steps += [(work / "diffusers", last, "single-file")]
    all_within = True
    for source, destination, layout in steps:
        copied = copy_seconds(source, work / "copy")
        drop_from_cache(source)
        cost = run([sys.executable, "-m", "sdxl_jax", "convert", str(source), str(destination), "--to", layout])
        within = cost.peak_gib < MEMORY_GIB and cost.seconds < EXTRA_SECONDS + copied
        all_within = all_within and within
        step = f"{source.stem if source != first else 'single-file'} → {layout}"
        print(
            f"| {step} | {cost.seconds:.0f} | {copied:.0f} | {cost.peak_gib:.2f} GiB | {'yes' if within else 'NO'} |",
            flush=True,
        )
        if source != first:
            remove(source)
    if (name := in_process(difference, first, last)) is not None:
        sys.exit(f"The last file differs from the first: {name}")
    remove(first)
    drop_from_cache(last)
    cost = run([sys.executable, "-c", "import sdxl_jax, sys; sdxl_jax.load_model(sys.argv[1])", str(last)])
    print(f"| load_model, {size / 2**30:.2f} GiB | {cost.seconds:.0f} | | {cost.peak_gib:.2f} GiB | |\n")
    print("The last file equals the first, bit for bit.")
    if not all_within:
        sys.exit(f"A conversion took more than {MEMORY_GIB} GiB, or more than {EXTRA_SECONDS} s longer than a copy")


if __name__ == "__main__":
    main()
