"""Benchmark of FID's features and statistics against torch-fidelity, on the same files in one run.

    python benchmarks/evaluate.py                               # 64 synthetic images of 512×512
    python benchmarks/evaluate.py --folder DIR --images 200     # squares of photographs

From files to the mean and covariance of 2,048 features, with `tf1` as resize on both sides:

- whole: `sdxl_jax.evaluation.features.statistics_of`; torch-fidelity's `get_featuresdict_from_dataset` with its
  DataLoader (workers by its own rule, which includes starting them) and `fid_features_to_statistics`.
- decode: files to uint8 pixels, one thread.
- resize: pixels to 299×299 and their normalisation, one image at a time, one thread.
- network: batches of 299×299 to features, all cores.

Each side is a process of its own. After one round that compiles and fills caches, the sides alternate, so that other
load on the machine affects both; the report has the median over the rounds. CPU figures mean something only on an
otherwise idle machine; the report has the load average, which includes the benchmark's own threads.

Weights are random on both sides: the time does not depend on them, and torch-fidelity downloads its own. That features
are equal for equal weights is tested elsewhere. torch-fidelity is not installed with this project: pip install
torch-fidelity.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PARTS = ("whole", "decode", "resize", "network")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="photographs; default: synthetic images")
    parser.add_argument("--images", type=int, default=64, help="number of images, the first ones by name")
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds per side")
    parser.add_argument("--ours", action="store_true", help="without torch-fidelity")
    return parser.parse_args(given)


def make_images(folder: Path, count: int, side: int, photographs: Path | None) -> None:
    """JPEGs of one size, which torch-fidelity needs: squares of photographs, or smooth images with noise."""
    from sdxl_jax.evaluation.image_sets import open_images
    from sdxl_jax.evaluation.resize import centred_square

    opened = None if photographs is None else open_images(photographs, "--folder")
    rng = np.random.default_rng(0)
    for number in range(count if opened is None else min(count, len(opened.names))):
        if opened is None:
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
            pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        else:
            pixels = centred_square(opened.pixels(number), side)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)


# The two sides, each in its own process: a function per part, which returns what it made, to be checked


def ours(paths: list[Path], batch: int) -> dict[str, Callable[[], Any]]:
    import jax

    from sdxl_jax.arrays import flatten, unflatten
    from sdxl_jax.evaluation import features, image_sets, resize
    from sdxl_jax.evaluation.settings import ResizeMode
    from sdxl_jax.models import inception, initialisers

    flat = flatten(inception.abstract())
    params = unflatten({path: initialisers.sample(leaf, 0, path) for path, leaf in flat.items()})
    network = features.inception(params, ResizeMode.TF1, spatial=False)
    opened = image_sets.open_images(paths[0].parent, "the images")
    assert isinstance(opened, image_sets.FolderImages)
    images = opened._replace(names=opened.names[: len(paths)], sizes=opened.sizes[: len(paths)])
    decoded = [images.pixels(number) for number in range(len(paths))]
    prepared = np.stack([network.prepare(image) for image in decoded[:batch]])
    on_device = jax.device_put(network.params)
    return {
        "whole": lambda: features.statistics_of(network, images, ResizeMode.TF1, batch_size=batch).pool.mean,
        "decode": lambda: [images.pixels(number) for number in range(len(paths))][-1],
        "resize": lambda: [resize.prepare(image, ResizeMode.TF1) for image in decoded][-1],
        "network": lambda: [np.asarray(network.apply(on_device, prepared)[0]) for _ in range(-(-len(paths) // batch))][
            -1
        ],
    }


def theirs(paths: list[Path], batch: int) -> dict[str, Callable[[], Any]]:
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as module  # pyright: ignore[reportMissingImports]
    from torch_fidelity import interpolate_compat_tensorflow as tensorflow_1  # pyright: ignore[reportMissingImports]
    from torch_fidelity.datasets import ImagesPathDataset  # pyright: ignore[reportMissingImports]
    from torch_fidelity.metric_fid import fid_features_to_statistics  # pyright: ignore[reportMissingImports]
    from torch_fidelity.utils import get_featuresdict_from_dataset  # pyright: ignore[reportMissingImports]

    class RandomWeights(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return None

    module.load_state_dict_from_url = lambda *_, **__: {}
    network = RandomWeights("inception-v3-compat", ["2048"])
    network.requires_grad_(False).eval()
    dataset = ImagesPathDataset([str(path) for path in paths])
    decoded = [dataset[number][None].float() for number in range(len(paths))]

    def resized(image: Any) -> Any:
        resize = tensorflow_1.interpolate_bilinear_2d_like_tensorflow1x
        return (resize(image, size=(299, 299), align_corners=False) - 128) / 128

    prepared = torch.cat([resized(image) * 128 + 128 for image in decoded[:batch]]).to(torch.uint8)

    def whole() -> Any:
        found = get_featuresdict_from_dataset(dataset, network, batch, False, False, False)
        return fid_features_to_statistics(found["2048"])["mu"]

    def single(work: Callable[[], Any]) -> Callable[[], Any]:
        """With one thread."""

        def run() -> Any:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return work()
            finally:
                torch.set_num_threads(threads)

        return run

    def features() -> Any:
        with torch.no_grad():
            return [network(prepared)[0].numpy() for _ in range(-(-len(paths) // batch))][-1]

    return {
        "whole": whole,
        "decode": single(lambda: [dataset[number] for number in range(len(paths))][-1].numpy()),
        "resize": single(lambda: [resized(image) for image in decoded][-1].numpy()),
        "network": features,
    }


def serve(side: Callable[..., dict[str, Callable[[], Any]]], paths: list[Path], batch: int, pipe: Connection) -> None:
    """Runs the parts that the other end asks for; answers with seconds."""
    parts = side(paths, batch)
    pipe.send("ready")
    while True:
        name = pipe.recv()
        start = time.perf_counter()
        result = np.asarray(parts[name]())
        seconds = time.perf_counter() - start
        assert np.isfinite(result).all()
        pipe.send(seconds)


def measure(options: argparse.Namespace, paths: list[Path]) -> dict[str, dict[str, float]]:
    """Images per second by part and side, median over the rounds."""
    context = multiprocessing.get_context("spawn")
    sides = {"sdxl_jax": ours} if options.ours else {"sdxl_jax": ours, "torch-fidelity": theirs}
    pipes, processes = dict[str, Connection](), []
    try:
        for name, side in sides.items():
            pipes[name], child = context.Pipe()
            processes.append(context.Process(target=serve, args=(side, paths, options.batch, child)))
            processes[-1].start()
            child.close()
            pipes[name].recv()
        seconds = {part: {name: list[float]() for name in sides} for part in PARTS}
        for measured in range(options.rounds + 1):
            for part in PARTS:
                for name, pipe in pipes.items():
                    pipe.send(part)
                    value = pipe.recv()
                    if measured:
                        seconds[part][name].append(value)
    finally:
        for process in processes:
            process.terminate()  # one that waits would keep this process
    batches = -(-len(paths) // options.batch) * options.batch
    counts = {part: batches if part == "network" else len(paths) for part in PARTS}
    return {
        part: {name: counts[part] / statistics.median(values) for name, values in of_part.items()}
        for part, of_part in seconds.items()
    }


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        make_images(Path(temporary), options.images, options.side, options.folder)
        names = sorted(Path(temporary).iterdir())
        rates = measure(options, names)
    print(f"{len(names)} images of {options.side}², batches of {options.batch}, median of {options.rounds} rounds")
    print(f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors\n")
    sides = list(rates["whole"])
    print("| images/s | " + " | ".join(sides) + (" | ratio |" if len(sides) == 2 else " |"))
    print("|---|" + "---|" * (len(sides) + (len(sides) == 2)))
    for part, of_part in rates.items():
        cells = [f"{of_part[name]:.1f}" for name in sides]
        cells += [f"{of_part[sides[0]] / of_part[sides[1]]:.2f}"] if len(sides) == 2 else []
        print(f"| {part} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
