"""Images of a class, sampled from a model before it is fine-tuned: the prior of DreamBooth (Ruiz et al. 2022,
arXiv:2208.12242, section 3.2), as a folder of captioned images to train on.

    000000.png, 000001.png, …    as in `samples`: resumed by a second call
    metadata.jsonl               the prompt as the caption of each, written first: a folder that is not complete is
                                 refused by training, with the images that it lacks

Image k depends on the seed and on k alone, so that a larger number later keeps the images that are there.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from sdxl_jax import sharding
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation import samples
from sdxl_jax.files import atomic
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.files.text import printable
from sdxl_jax.models.layers import Compute, Dtype
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import check_prompts, prepare
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.weights import lora
from sdxl_jax.weights.lazy import cast
from sdxl_jax.weights.load import load_weights
from sdxl_jax.weights.open import OpenOptions, open_model

METADATA = "metadata.jsonl"
COUNT = 100
"""As diffusers' script has it."""
_OF_THE_FOLDER = ("num_images", "first_index", "batch_size")
"""Options that no image depends on."""


def sample_class_images(
    model: str | AnyPath,
    folder: Path,
    prompt: str,
    options: Options = Options(num_images=COUNT),
    *,
    negative_prompt: str | None = None,
    dtype: Dtype = Dtype.FLOAT32,
    opening: OpenOptions = OpenOptions(),
    parts_from: Sequence[str | AnyPath] = (),
    loras: Sequence[str] = (),
) -> int:
    """Samples the images that the folder lacks, with a progress bar, and returns their number; 0: it was complete, and
    no weights were read.

    prompt: of the class, "a photo of a dog", the caption of every image. options: `num_images` is the number of images
    in the folder. opening, parts_from: as of `open_model`. loras: adapters to merge, each FILE or FILE:SCALE.

    Raises InputError: no prompt; options that the model does not take; a folder with images of another model, prompt or
    settings, with more of them, or with captions of other images; and as `open_model` and `lora.merge`.
    """
    if not prompt.strip():
        raise InputError('The prompt of the class is empty. Give the class, e.g. "a photo of a dog"')
    if options.first_index:
        raise InputError(f"first_index={options.first_index} has no effect on class images. Leave it out")
    weights = open_model(model, opening, parts_from)
    for path, scale in map(lora.parse_option, loras):
        weights = lora.merge(weights, lora.read(path), scale)
    prepare(weights.config, None, options)
    check_prompts(weights.config, [prompt, negative_prompt], [])
    resolved = {name: value for name, value in vars(options.resolved(weights.config)).items() if value is not None}
    settings = {name: str(getattr(value, "value", value)) for name, value in resolved.items()}
    settings |= {"model": printable(model), "prompt": prompt, "dtype": dtype.value}
    settings |= {} if negative_prompt is None else {"negative_prompt": negative_prompt}
    settings |= {"parts_from": json.dumps([str(each) for each in parts_from])} if parts_from else {}
    settings |= {"lora": json.dumps(list(loras))} if loras else {}
    given = {name: value for name, value in vars(opening).items() if value != getattr(OpenOptions(), name)}
    settings |= {name: str(value) for name, value in given.items()}
    settings = {name: value for name, value in settings.items() if name not in _OF_THE_FOLDER}
    requests = [
        samples.Request(
            prompt,
            negative_prompt,
            dataclasses.replace(options, num_images=1, first_index=number),
            {**settings, "index": str(number)},
        )
        for number in range(options.num_images)
    ]
    missing = samples.missing(folder, [request.text for request in requests])
    _describe(folder, prompt, options.num_images)
    if missing:
        mesh = sharding.make_mesh(MeshConfig(), jax.local_devices())
        loaded = load_weights(cast(weights, np.dtype(dtype.value)), mesh)
        samples.sample(loaded, requests, folder, Compute(dtype=dtype))
    return len(missing)


def _describe(folder: Path, prompt: str, count: int) -> None:
    """Writes the captions. Raises InputError for a folder with those of other images."""
    lines = [
        json.dumps({"file_name": samples.path_of(folder, number).name, "text": prompt}, ensure_ascii=False)
        for number in range(count)
    ]
    file = folder / METADATA
    if file.exists() and not set(file.read_text(encoding="utf-8").splitlines()) <= set(lines):
        raise InputError(f"{file} has captions of other images. Give a new folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, "\n".join(lines) + "\n")
