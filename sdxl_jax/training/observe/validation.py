"""Reports of a run other than metrics: the summary of its data, validation grids, descriptions of non-finite steps."""

import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import SAME_WITHIN_ROUNDING, RunConfig, is_within
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.files import atomic
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.model import Model
from sdxl_jax.progress import tqdm
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png
from sdxl_jax.sampling.nonfinite import NonFiniteError
from sdxl_jax.training.objectives.base import Objective
from sdxl_jax.training.processes import Processes

_CAPTION_SAMPLE = 10_000
"""Images whose captions are checked for truncation at the start; with fewer than twice as many, all are."""


def announce(
    dataset: BucketedDataset, tokenizer: Tokenizer | None, run_dir: AnyPath, first: int, changed: list[str]
) -> None:
    """Prints what the run is about to train on. first: steps done; changed: configuration changes on resume."""
    tqdm.write(f"{run_dir}: {'starting' if not first else f'resuming after step {first}'}")
    for line in changed:
        same = is_within(line, SAME_WITHIN_ROUNDING)
        tqdm.write(f"  changed: {line}{', the same within rounding' if same else ''}")
    for bucket in dataset.report():
        if bucket.images:
            notes = f", {bucket.remainder} left out of each epoch" if bucket.remainder else ""
            notes += ", images repeat within a batch" if bucket.repeated else ""
            batches = f"{bucket.batches:.4g} batches of {bucket.batch_size} per epoch"
            tqdm.write(f"  bucket {bucket.height}×{bucket.width}: {bucket.images} images, {batches}{notes}")
        if bucket.merged_into is not None:
            height, width = bucket.merged_into
            tqdm.write(f"  bucket {bucket.height}×{bucket.width}: too few images, merged into {height}×{width}")
    if dataset.config.cache is not None:
        tqdm.write(f"  latents and text states are read from {dataset.config.cache}")
    if len(shares := dataset.shares()) > 1:
        for share in shares:
            tqdm.write(f"  source {share.folder}: {share.images} images, {share.share:.1%} of each epoch")
    for note in dataset.notes():
        tqdm.write(f"  {note}")
    if small := dataset.too_small_count():
        tqdm.write(f"  {small} images below data.min_size={dataset.config.min_size} left out")
    if count := dataset.refused_count():
        tqdm.write(f"  {count} files refused, the first: {next(dataset.refused()).file}")
    if tokenizer is not None:
        _announce_captions(dataset, tokenizer)


def _announce_captions(dataset: BucketedDataset, tokenizer: Tokenizer) -> None:
    images = len(dataset.source)
    sample = range(0, images, max(1, images // _CAPTION_SAMPLE))
    captions = [caption for image in sample for caption in dataset.source.captions(image)]
    if truncated := sum(count > 0 for count in tokenizer.truncated(captions)):
        of = f" of a sample of {len(captions)}" if len(sample) < images else ""
        tqdm.write(f"  {truncated} captions{of} are longer than 75 tokens and will be truncated")


def grid_name(step: int) -> str:
    """samples/step_XXXXXXXX.png, from the run directory."""
    return f"samples/step_{step:08d}.png"


def write_grid(
    objective: Objective[Any],
    dataset: BucketedDataset,
    processes: Processes,
    run_dir: Path,
    step: int,
    model: Model,
    mesh: Mesh,
) -> None:
    """Writes the validation grid of a step, generated with the averaged weights from the same noise each time. Prints a
    note instead if images are not finite."""
    try:
        grid = objective.validation(model, dataset, mesh, processes)
    except NonFiniteError as error:  # raised on all processes; only a non-finite loss ends the run
        if processes.is_first:
            tqdm.write(f"note: no {grid_name(step)}: {error}")
        return
    if processes.is_first:
        text = {name: str(value) for name, value in ({"step": step} | dict(grid.text)).items()}
        save_png(contact_sheet(grid.images, grid.captions, columns=grid.columns), run_dir / grid_name(step), text)


def describe_nonfinite(config: RunConfig, path: Path, step: int, dataset: BucketedDataset, process: int) -> None:
    """Writes the inputs of a step with a non-finite loss: images, captions, and the key of its random numbers."""
    loader, bad = dataset.loader, list[str]()
    # Loaded once more: damaged images were replaced.
    load = loader.decode_example if loader.cache is None else loader.read_cached
    images = [loader.load_or_replace(step - 1, row, bad, load).image for row in range(dataset.batch_size_of(step - 1))]
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
        "replaced": bad,
    }
    atomic.write_text(path, json.dumps(content, indent=1, ensure_ascii=False), tag=str(process))
