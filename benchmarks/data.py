"""Benchmark of the data pipeline: throughput of one core, memory over a long run, and scaling to fifty million images.

    python benchmarks/data.py --photos DIR          # throughput, against torch and bare decoding
    python benchmarks/data.py --memory              # resident memory over 10,000 batches
    python benchmarks/data.py --scale               # an index of 50,000,000 images: opening, resuming, memory

Throughput. From JPEG files in the kernel's page cache to finished batches of eight: float32, −1..1, with token ids.

- sdxl_jax: `BucketedDataset.iterate` (the 40 buckets of SDXL, random crop, flip) and `normalise`, compiled for the CPU.
  Training normalises on the accelerator; here the cost is included. One batch is decoded ahead: with one core more gain
  nothing, and no batch is half done when the clock starts and stops.
- torch: `DataLoader` with the preprocessing of diffusers' `examples/text_to_image/train_text_to_image_sdxl.py` before
  its VAE: Pillow, RGB, Resize of the shorter side to 1024 (Lanczos, its default), flip, random crop, ToTensor,
  Normalize. It has no buckets: all its batches are 1024×1024, with about as many pixels as the buckets have. Its tokens
  come from our tokeniser, so that text costs the same.
- simplejpeg, Pillow: decoding a file to RGB pixels of the full size and nothing else. simplejpeg is the reference of
  the percentages; a pipeline that decodes at a smaller scale can exceed it.

Each runs in its own process, all on the same single core, one after the other in each round; the table has medians over
the rounds, and ratios are taken within a round. CPU time is reported as well: where it is well below 1000 / (images/s),
other programs used the core and the run is worth little.

The images are made from the JPEGs of --photos, enlarged and cropped with Lanczos, or else from coloured 1/f noise.
Sensor noise (σ 3) is added to either, since the cost of decoding grows with the bytes; quality 92, 4:2:0.

Memory. Batches of small images of a shard set, without workers and with two. Resident memory is VmRSS of
/proc/PID/status: pages mapped from files or shared count in each process that has them. Growth is from the second tenth
of the run to the last.

Scale. An index as `sdxl-jax data build` writes it, of that many images with captions, which all point to the records of
one small shard. Each row is of a new process, its seconds from the process's start; first with the index's files
dropped from the page cache, then with them cached. Own memory is not backed by files (RssAnon), so that the kernel
cannot reclaim it.

Needs Linux; for torch's figures torch and the matching torchvision (0.28.0 for 2.13.0), without which they are left
out; for the scale, 7 GB of disk for 50,000,000 images.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

BATCH = 8
SPAWN = multiprocessing.get_context("spawn")
PHOTOGRAPHS, SMALL = ((2048, 3072), (3072, 2048)), ((480, 640), (640, 480))
"""(height, width) of the images of a set, in equal numbers."""
LIBRARIES = ("sdxl_jax", "jax", "grain", "numpy", "simplejpeg", "Pillow", "tokenizers", "torch", "torchvision")
WORDS = ("the", "old", "red", "car", "dog", "house", "near", "two", "trees", "on", "green", "hill", "people", "sky")
"""Words of the captions."""


# Images


def synthetic(size: tuple[int, int], rng: np.random.Generator) -> Float32[np.ndarray, "height width 3"]:
    """1/f noise, the spectrum of photographs, 0..255: strong in brightness, weak in two directions of colour."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    planes = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(size, np.float32)) / frequency, size) for _ in range(3)]
    bright, warm, green = (50 * share * plane / plane.std() for share, plane in zip((1, 0.3, 0.2), planes, strict=True))
    return np.stack([bright + warm, bright + green, bright - warm], -1).astype(np.float32) + 115


def make_image(path: Path, size: tuple[int, int], photo: Path | None, seed: int) -> None:
    """A JPEG with its caption beside it."""
    rng = np.random.default_rng(seed)
    if photo is None:
        pixels = synthetic(size, rng)
    else:
        with Image.open(photo) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.LANCZOS)
        pixels = np.asarray(fitted, np.float32)
    pixels = pixels + 3 * rng.standard_normal(pixels.shape, np.float32)
    Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8)).save(path, quality=92, subsampling="4:2:0")
    path.with_suffix(".txt").write_text("a photo of " + " ".join(rng.choice(WORDS, 9)))


def orientations(photos: Path | None) -> dict[bool, list[Path]]:
    """The photographs, by whether they are portrait; all of them under both keys where one kind is missing."""
    found: dict[bool, list[Path]] = {True: [], False: []}
    for path in sorted(photos.rglob("*")) if photos else []:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            with Image.open(path) as image:
                found[image.height > image.width].append(path)
    every = found[True] + found[False]
    if photos and not every:
        sys.exit(f"--photos {photos} holds no .jpg or .jpeg. Give a folder of photographs, or omit the option")
    return {upright: paths or every for upright, paths in found.items()}


def make_images(folder: Path, sizes: tuple[tuple[int, int], ...], count: int, photos: Path | None) -> list[Path]:
    folder.mkdir()
    sources = orientations(photos)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), SPAWN) as pool:
        futures = []
        for number in range(count):
            height, width = size = sizes[number % len(sizes)]
            choice = sources[height > width]
            photo = choice[number // len(sizes) % len(choice)] if choice else None
            futures.append(pool.submit(make_image, folder / f"{number:06d}.jpg", size, photo, number))
        for future in tqdm(futures, "Making images", leave=False, disable=None):
            future.result()
    return sorted(folder.glob("*.jpg"))


# Throughput

Pass = Callable[[], Iterator[int]]
"""One pass over all files: yields the number of images of each batch; first 0, when the clock may start."""


def check_batch(image: Any) -> None:
    """Asserts a batch as the network takes it: float32, −1..1, channels first or last."""
    assert len(image) == BATCH and str(image.dtype).removeprefix("torch.") == "float32", (image.shape, image.dtype)
    low, high = float(image.min()), float(image.max())
    assert -1 <= low < -0.2 and 0.2 < high < 1 + 1e-6, (low, high)  # 1 + 1.2e-7 where 1 / 127.5 is multiplied by


def ours(folder: Path) -> Pass:
    import jax

    from sdxl_jax.arrays import normalise
    from sdxl_jax.conditioning.text import SDXL_BASE_TEXT, Tokenizer
    from sdxl_jax.data.pipeline import BucketedDataset
    from sdxl_jax.data.settings import DataConfig

    config = DataConfig(str(folder), batch_size=BATCH, flip_probability=0.5, verify_images=False, read_ahead=1)
    data = BucketedDataset(config, Tokenizer.of(SDXL_BASE_TEXT))
    finish = jax.jit(normalise)
    epoch = data.order.steps_before(1)

    def one_pass() -> Iterator[int]:
        batches = data.iterate(epoch - 1)  # one batch, so that the threads are running, and then the second epoch
        check_batch(finish(next(batches).image))
        yield 0
        for _ in range(epoch):
            batch = next(batches)
            yield len(finish(batch.image).block_until_ready())
        batches.close()

    return one_pass


def torchvision_transforms() -> Any:
    """torchvision's transforms, also where its compiled operators do not load: for images of Pillow none is used.

    PyPI's torchvision is built for CUDA, and does not match a torch built for the CPU alone: importing it fails, since
    two operators are missing. They are declared here.
    """
    try:
        from torchvision import transforms  # pyright: ignore[reportMissingImports] (it may be missing)
    except RuntimeError:
        import torch

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import transforms  # pyright: ignore[reportMissingImports] (as above)

        transforms.declared = declared  # keeps the declarations alive
    return transforms


def of_torch(folder: Path) -> Pass:
    transforms = torchvision_transforms()
    import torch
    from torch.utils.data import DataLoader, Dataset

    from sdxl_jax.conditioning.text import SDXL_BASE_TEXT, Tokenizer

    torch.set_num_threads(1)
    resolution = 1024
    resize = transforms.Resize(resolution, interpolation=transforms.InterpolationMode.LANCZOS)
    random_crop, mirror = transforms.RandomCrop(resolution), transforms.RandomHorizontalFlip(p=1.0)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])
    tokenize = Tokenizer.of(SDXL_BASE_TEXT)

    class ImageSource(Dataset):
        """As `preprocess_train` of the script: resize, flip with probability 0.5, crop, to a tensor."""

        def __init__(self) -> None:
            self.paths = sorted(folder.glob("*.jpg"))
            self.captions = [path.with_suffix(".txt").read_text() for path in self.paths]

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> dict[str, Any]:
            with Image.open(self.paths[index]) as opened:
                image = opened.convert("RGB")
            original_size = (image.height, image.width)
            image = resize(image)
            if random.random() < 0.5:
                image = mirror(image)
            top, left, height, width = random_crop.get_params(image, (resolution, resolution))
            image = to_tensor(transforms.functional.crop(image, top, left, height, width))
            sizes = {"original_size": original_size, "crop_top_left": (top, left)}
            return {"pixels": image, "caption": self.captions[index]} | sizes

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([example["pixels"] for example in examples])
        tokens = tokenize([example["caption"] for example in examples])
        sizes = {
            key: torch.tensor([example[key] for example in examples]) for key in ("original_size", "crop_top_left")
        }
        pixels = pixels.to(memory_format=torch.contiguous_format).float()
        return {"pixels": pixels} | {name: torch.from_numpy(rows) for name, rows in tokens.items()} | sizes

    loader = DataLoader(ImageSource(), BATCH, shuffle=True, num_workers=0, collate_fn=collate, drop_last=True)
    check_batch(next(iter(loader))["pixels"])

    def one_pass() -> Iterator[int]:
        yield 0
        for batch in loader:
            yield len(batch["pixels"])

    return one_pass


def _each(folder: Path, read: Callable[[Path], Any]) -> Pass:
    files = sorted(folder.glob("*.jpg"))

    def one_pass() -> Iterator[int]:
        yield 0
        for path in files:
            read(path)
            yield 1

    return one_pass


def of_simplejpeg(folder: Path) -> Pass:
    import simplejpeg

    return _each(folder, lambda path: simplejpeg.decode_jpeg(path.read_bytes()))


def of_pillow(folder: Path) -> Pass:
    return _each(folder, lambda path: Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


SYSTEMS: dict[str, Callable[[Path], Pass]] = {
    "sdxl_jax": ours,
    "torch": of_torch,
    "simplejpeg": of_simplejpeg,
    "Pillow": of_pillow,
}


class Round(NamedTuple):
    """One measured pass."""

    images: int
    seconds: float
    cpu_seconds: float


_passes: dict[str, Pass] = {}  # in a measuring process


def prepare(system: str, folder: Path) -> None:
    """Opens the files and runs a first pass, so that compilation and caches are not measured."""
    _passes[folder.name] = SYSTEMS[system](folder)
    measure(folder.name)


def measure(name: str) -> Round:
    counts = _passes[name]()
    next(counts)
    start, cpu = time.perf_counter(), time.process_time()
    images = sum(counts)
    measured = Round(images, time.perf_counter() - start, time.process_time() - cpu)
    before = -1.0
    while time.process_time() - before > 0.002:  # threads still decode ahead: the next process would wait for them
        before = time.process_time()
        time.sleep(0.05)
    return measured


def measure_set(folder: Path, rounds: int, systems: list[str]) -> dict[str, list[Round]]:
    with ExitStack() as open_until_done:
        pools = {name: open_until_done.enter_context(ProcessPoolExecutor(1, SPAWN)) for name in systems}
        measured: dict[str, list[Round]] = {name: [] for name in systems}
        bar = open_until_done.enter_context(
            tqdm(desc=folder.name, total=len(systems) * (rounds + 1), leave=False, disable=None)
        )
        for name, pool in pools.items():
            pool.submit(prepare, name, folder).result()
            bar.update()
        for _ in range(rounds):
            for name, pool in pools.items():
                measured[name].append(pool.submit(measure, folder.name).result())
                bar.update()
    return measured


def throughput(work: Path, images: int, rounds: int, photos: Path | None) -> dict[str, Any]:
    systems = list(SYSTEMS)
    if not all(map(importlib.util.find_spec, ("torch", "torchvision"))):
        print("torch or torchvision is not installed: no row for torch.\n")
        systems.remove("torch")
    sets = {"photographs": (PHOTOGRAPHS, images), "small": (SMALL, 4 * images)}
    files = {name: make_images(work / name, sizes, count, photos) for name, (sizes, count) in sets.items()}
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(everywhere)})  # which the measuring processes inherit
    results = {}
    for name, (sizes, count) in sets.items():
        size = statistics.mean(file.stat().st_size for file in files[name])
        shapes = " and ".join(f"{height}×{width}" for height, width in sizes)
        kind = "photographs, resized" if photos else "SYNTHETIC images: 1/f noise"
        print(f"{count} {kind}, {shapes} (height × width), {size / 1e6:.2f} MB each; {rounds} rounds\n")
        measured = measure_set(work / name, rounds, systems)
        print("| | images/s per core | of torch | of bare decoding | CPU ms per image |\n|---|---|---|---|---|")
        rates = {system: [each.images / each.seconds for each in of] for system, of in measured.items()}
        rows = {}
        for system in systems:
            row = {
                "images_per_second": statistics.median(rates[system]),
                "of_torch": _ratio(rates[system], rates["torch"]) if "torch" in rates else None,
                "of_bare_decoding": _ratio(rates[system], rates["simplejpeg"]),
                "cpu_ms_per_image": statistics.median(
                    1000 * each.cpu_seconds / each.images for each in measured[system]
                ),
            }
            rows[system] = row | {"rounds": [each._asdict() for each in measured[system]]}
            of_torch = "" if row["of_torch"] is None else f"{row['of_torch']:.2f}×"
            print(
                f"| {system} | {row['images_per_second']:.1f} | {of_torch} | {row['of_bare_decoding']:.0%} | "
                f"{row['cpu_ms_per_image']:.1f} |"
            )
        print(flush=True)
        results[name] = {
            "sizes": sizes,
            "images": count,
            "mean_bytes": size,
            "photos": photos is not None,
            "rows": rows,
        }
    os.sched_setaffinity(0, everywhere)
    return results


def _ratio(rates: list[float], others: list[float]) -> float:
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


# Memory


def status(process: int | str = "self") -> dict[str, float]:
    """Resident memory of a process in MiB: VmHWM (its peak), VmRSS, RssAnon, RssFile, RssShmem."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmHWM", "VmRSS", "Rss"))
    }


def workers_of(parent: int) -> list[int]:
    """The descendants of a process, without Python's own resource tracker."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended
            continue
    children, found = [parent], []
    while children:
        children = [process for process, parent in parents.items() if parent in children]
        found += children
    return [process for process in found if b"resource_tracker" not in Path(f"/proc/{process}/cmdline").read_bytes()]


def run_long(folder: Path, batches: int, workers: int) -> list[dict[str, float]]:
    """100 samples: the batch, and resident MiB of this process and of all workers together."""
    from sdxl_jax.conditioning.text import SDXL_BASE_TEXT, Tokenizer
    from sdxl_jax.data.buckets import generate_buckets
    from sdxl_jax.data.pipeline import BucketedDataset
    from sdxl_jax.data.settings import DataConfig

    config = DataConfig(
        str(folder),
        buckets=generate_buckets(256 * 256),
        batch_size=BATCH,
        flip_probability=0.5,
        workers=workers,
        verify_images=False,
    )
    stream = BucketedDataset(config, Tokenizer.of(SDXL_BASE_TEXT)).iterate()
    every, samples = max(1, batches // 100), []
    for batch in tqdm(range(1, batches + 1), f"Batches, {workers} workers", leave=False, disable=None):
        next(stream)
        if batch % every == 0:
            resident = sum(status(process)["VmRSS"] for process in workers_of(os.getpid()))
            now = status()
            samples.append({"batch": batch, "main": now["VmRSS"], "main_own": now["RssAnon"], "workers": resident})
    stream.close()
    return samples


def memory(work: Path, batches: int, photos: Path | None) -> dict[str, Any]:
    from sdxl_jax.data.build.build import build

    make_images(work / "images", ((256, 256), (224, 288), (288, 224)), 768, photos)
    build(str(work / "images"), work / "shards", workers=0, progress=False)
    results = {}
    for workers in (0, 2):
        samples = in_process(run_long, work / "shards", batches, workers)
        total = [sample["main"] + sample["workers"] for sample in samples]
        tenth = max(1, len(total) // 10)
        second, last = statistics.mean(total[tenth : 2 * tenth] or total), statistics.mean(total[-tenth:])
        print(f"{batches} batches of {BATCH} images of about 256×256, {workers} workers\n")
        print("| batch | main process, MiB | workers, MiB |\n|---|---|---|")
        for sample in samples[tenth - 1 :: tenth]:
            print(f"| {sample['batch']:.0f} | {sample['main']:.0f} | {sample['workers']:.0f} |")
        print(f"\nGrowth from the second tenth ({second:.0f} MiB) to the last: {last - second:+.1f} MiB\n", flush=True)
        results[f"workers_{workers}"] = {"samples": samples, "growth_mib": last - second}
    return results


def plot_memory(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        samples = result["samples"]
        total = [sample["main"] + sample["workers"] for sample in samples]
        axes.plot([sample["batch"] for sample in samples], total, label=name.replace("_", " "))
    axes.set(xlabel="batches", ylabel="resident, MiB, all processes", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


# Scale


def write_index(folder: Path, shards: Path, images: int) -> None:
    """An index of `images` images, whose sizes and records are drawn at random from a small shard set."""
    from sdxl_jax.data.build.shard_writing import Columns, IndexWriter
    from sdxl_jax.data.shards import DESCRIPTION, FORMAT, open_shards, shard_name

    small, rng = open_shards(shards), np.random.default_rng(0)
    real = folder / shard_name(0)
    real.parent.mkdir(parents=True)
    real.write_bytes((shards / shard_name(0)).read_bytes())
    with IndexWriter(folder, []) as index:
        for first in tqdm(range(0, images, 1_000_000), "Writing the index", unit="M images", leave=False, disable=None):
            block = min(1_000_000, images - first)
            numbers = np.arange(first, first + block)[:, None]
            digits = (numbers // 10 ** np.arange(9, -1, -1) % 10 + ord("0")).astype(np.uint8)

            name = numbered(b"", digits, b".jpg")
            caption = numbered(b"a photo of an old red car near the house, number ", digits, b"")
            record = rng.integers(0, len(small), block).astype(np.uint32)
            columns = Columns(
                size=small.sizes[record],
                hash=rng.integers(0, 256, (block, 16), np.uint8),
                name_lengths=np.full(block, name.shape[1]),
                name_bytes=name.reshape(-1),
                caption_counts=np.ones(block, np.int64),
                caption_lengths=np.full(block, caption.shape[1]),
                caption_bytes=caption.reshape(-1),
                numbers={},
            )
            index.append(columns, np.zeros(block, np.uint32), record)
        index.append_shard(len(small), real.stat().st_size)
        description = index.finish() | {"format": FORMAT, "source": "synthetic", "refused": 0, "duplicates": 0}
    (folder / DESCRIPTION).write_text(json.dumps(description))


def numbered(
    before: bytes, digits: UInt8[np.ndarray, "images digits"], after: bytes
) -> UInt8[np.ndarray, "images characters"]:
    """A string per image, in ASCII: before, its digits, after."""
    parts = [np.frombuffer(part, np.uint8)[None].repeat(len(digits), 0) for part in (before, after)]
    return np.concatenate([parts[0], digits, parts[1]], axis=1)


def resume(folder: Path, whole_batch: bool, workers: int, start: float) -> dict[str, Any]:
    """Seconds from `start`, when the process began, until the order of a random step, or its batch, is there."""
    from sdxl_jax.conditioning.text import SDXL_BASE_TEXT, Tokenizer
    from sdxl_jax.data.pipeline import BucketedDataset
    from sdxl_jax.data.settings import DataConfig

    def since() -> float:
        return time.time() - start  # not time.monotonic(), whose zero another process may not share

    tokenize = Tokenizer.of(SDXL_BASE_TEXT)
    tokenize(["once"])
    measured: dict[str, Any] = {"imported": since()}
    config = DataConfig(str(folder), batch_size=BATCH, workers=workers, verify_images=False)
    data = BucketedDataset(config, tokenize)
    measured |= {"opened": since(), "peak_opened": status()["VmHWM"]}
    step = int(np.random.default_rng(workers).integers(1, int(data.epoch_steps)))
    if not whole_batch:
        bucket, first = data.bucket_of(step), next(data.examples(step))
        measured |= {"first": since(), "step": step, "bucket": bucket, "image": first.image}
    else:
        stream = data.iterate(step)
        measured |= {"images": next(stream).example.tolist(), "first": since(), "step": step}
        measured["workers"] = [status(process) for process in workers_of(os.getpid())]
        stream.close()
    return measured | {"main": status()}


def scale(work: Path, images: int, photos: Path | None) -> dict[str, Any]:
    from sdxl_jax.data.build.build import build

    aspects = np.exp(np.random.default_rng(0).normal(0, 0.3, 32).clip(-0.6, 0.6))
    sizes = tuple((round(1024 * math.sqrt(aspect)), round(1024 / math.sqrt(aspect))) for aspect in aspects)
    make_images(work / "images", sizes, 256, photos)
    build(str(work / "images"), work / "shards", workers=0, progress=False)
    folder = work / "large"
    start = time.perf_counter()
    in_process(write_index, folder, work / "shards", images)
    files = [file for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(
        f"{images} images, {size / 1e9:.2f} GB of index and captions, written in {time.perf_counter() - start:.0f} s\n"
    )
    print("| until | files | imports, s | opened, s | done, s | peak when opened, MiB | main, MiB (own) | workers |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = {}
    tasks = {"the order": (False, 0), "a batch, 0 workers": (True, 0), "a batch, 2 workers": (True, 2)}
    for task, (whole_batch, workers) in tasks.items():
        for state in ("forgotten", "cached"):
            if state == "forgotten":
                drop_from_cache(files)
            measured = in_process(resume, folder, whole_batch, workers, time.time())
            results[f"{task}, {state}"] = measured
            resident = [
                f"{each['VmRSS']:.0f} ({each['RssAnon']:.0f})"
                for each in (measured["main"], *measured.get("workers", []))
            ]
            print(
                f"| {task} | {state} | {measured['imported']:.1f} | {measured['opened']:.1f} | "
                f"{measured['first']:.1f} | {measured['peak_opened']:.0f} | {resident[0]} | "
                f"{', '.join(resident[1:])} |",
                flush=True,
            )
    return {"images": images, "bytes": size, "rows": results}


def drop_from_cache(files: list[Path]) -> None:
    """Drops the files from the kernel's page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Command


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a new process."""
    with ProcessPoolExecutor(1, SPAWN) as process:
        return process.submit(function, *arguments).result()


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu, "cores": os.cpu_count(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--memory", type=int, nargs="?", const=10_000, metavar="BATCHES", help="memory over a long run")
    modes.add_argument("--scale", type=int, nargs="?", const=50_000_000, metavar="IMAGES", help="a large index")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of JPEGs from which the images are made")
    parser.add_argument(
        "--images",
        type=int,
        default=64,
        help="large images for throughput, a multiple of 16; four times as many small ones",
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured passes per system for throughput")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="file for a plot of the memory, with --memory")
    parser.add_argument("--work-dir", type=Path, help="parent of the temporary folder")
    options = parser.parse_args()
    if options.images < 16 or options.images % 16:
        parser.error(f"--images={options.images} does not fill batches of {BATCH} of both sizes: use a multiple of 16")
    os.environ["JAX_PLATFORMS"] = "cpu"
    info = machine()
    print(f"{info['cpu']}, {info['cores']} cores; {', '.join(f'{k} {v}' for k, v in info['versions'].items())}\n")
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        if options.memory:
            results = {"memory": memory(Path(folder), options.memory, options.photos)}
            if options.plot:
                plot_memory(results["memory"], options.plot)
        elif options.scale:
            results = {"scale": scale(Path(folder), options.scale, options.photos)}
        else:
            results = {"speed": throughput(Path(folder), options.images, options.rounds, options.photos)}
    if options.json:
        options.json.write_text(json.dumps(info | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
