"""Image prompts in small: figure 7 of the paper, with two towers trained here.

    python experiments/image_prompt.py                          # images of the quickstart, for two processors
    python experiments/image_prompt.py --images FOLDER --seeds 3

The paper (section 2.6) replaces SDXL's pooled text by the embedding of an image and tunes the one layer that reads it,
for 1000 steps; it shows images and gives no number. Published CLIPs and SDXL are needed for that. Here: 64×64 images,
by default the quickstart's 60 captions with one image each (it has 36 of the images in two sizes); a small CLIP, whose
towers learn from the images and captions by contrast; a small SDXL whose second text encoder is the text tower,
frozen; then, of the same model,

    zero-shot   the embedding of an image in the place of the pooled text
    tuned       the same after `add_embedding` alone was trained on half of the images, the tuning set

What is measured is the share of samples whose nearest image is the prompted one: with the image alone, of images in and
not in the tuning set; with the text of another image besides (does image or text win?); and with text alone, before and
after, because the same layer serves both. The CLIP and the model have seen all images, the tuning half of them.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes.
"""

import argparse
import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from jaxtyping import Float, UInt8

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import CheckpointConfig, ImagePromptConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.transforms import centred_crop
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.files import atomic
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import clip, clip_vision, initialisers
from sdxl_jax.models.clip import Activation
from sdxl_jax.models.clip_vision import ClipVisionConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.progress import tqdm
from sdxl_jax.quickstart import autoencoder, recipe, run
from sdxl_jax.sampling.clip_images import preprocess
from sdxl_jax.sampling.generate import text_to_image
from sdxl_jax.sampling.image_prompts import ImagePrompt, encode_images
from sdxl_jax.training.encoding import encode
from sdxl_jax.training.loop import train
from sdxl_jax.weights import clip_vision as towers
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.lazy import InMemory
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.names import Dialect, Naming

PAPER = [{"model": "SDXL, add_embedding tuned for 1000 steps", "accuracy": "not given; figure 7 shows images"}]
SIDE = 64
VISION = ClipVisionConfig(64, 2, 1, 256, Activation.GELU, 64, SIDE, 8)
"""Its embeddings have the width of the second text encoder's."""


class Images(NamedTuple):
    pixels: UInt8[np.ndarray, "images height width 3"]
    captions: list[str]
    files: list[Path]


def unpack(folder: Path) -> None:
    """The quickstart's images, without the smaller ones of those that it has in two sizes: one in the tuning set and
    one not would be no test."""
    with zipfile.ZipFile(run.IMAGES_ZIP) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "-small" not in name])
    metadata = folder / "metadata.jsonl"
    lines = [line for line in metadata.read_text().splitlines() if (folder / json.loads(line)["file_name"]).exists()]
    atomic.write_text(metadata, "\n".join(lines) + "\n")


def read_images(folder: Path) -> Images:
    source = open_folder(folder)
    numbers = range(len(source.sizes))
    pixels = np.stack([centred_crop(source.pixels(number), Bucket(SIDE, SIDE)) for number in numbers])
    return Images(
        pixels, [source.captions(number)[0] for number in numbers], [folder / source.name(n) for n in numbers]
    )


# The two towers


def train_towers(images: Images, model: ModelConfig, steps: int, seed: int) -> tuple[Params, Params, float]:
    """(text tower, image tower, share of images whose nearest caption is theirs). CLIP's loss, over all pairs at once;
    Radford et al., arXiv:2103.00020, figure 3."""
    tower = model.text[-1]
    abstract = {"text": clip.abstract(tower.clip), "image": clip_vision.abstract(VISION)}
    params = {path: jnp.asarray(initialisers.sample(leaf, seed, path)) for path, leaf in flatten(abstract).items()}
    state = {"towers": unflatten(params), "log_scale": jnp.log(1 / 0.07)}
    optimiser = optax.adamw(optax.cosine_decay_schedule(1e-3, max(1, steps)), weight_decay=0.01)
    tokens = jnp.asarray(Tokenizer.of((tower,))(images.captions)[tower.name])
    pixels = jnp.stack([jnp.asarray(preprocess(image, SIDE)) for image in images.pixels])

    def logits(state: Any, pixels: Float[jax.Array, "images side side 3"]) -> Float[jax.Array, "images captions"]:
        states = text.encode((tower,), {tower.name: state["towers"]["text"]}, {tower.name: tokens})
        embedded = clip_vision.encode(VISION, state["towers"]["image"], pixels).embedding, states.pooled
        one, other = (each / jnp.linalg.norm(each, axis=-1, keepdims=True) for each in embedded)
        return jnp.exp(state["log_scale"]) * one @ other.T

    def loss(state: Any, key: Any) -> Float[jax.Array, ""]:
        found = logits(state, pixels + 0.1 * jax.random.normal(key, pixels.shape))
        own = jnp.arange(len(found))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return (cross_entropy(found, own).mean() + cross_entropy(found.T, own).mean()) / 2

    @jax.jit
    def step(state: Any, moments: Any, key: Any) -> tuple[Any, Any]:
        updates, moments = optimiser.update(jax.grad(loss)(state, key), moments, state)
        return optax.apply_updates(state, updates), moments

    moments = optimiser.init(state)
    for key in tqdm(jax.random.split(jax.random.key(seed), steps), "training the towers"):
        state, moments = step(state, moments, key)
    nearest = np.asarray(jax.jit(logits)(state, pixels).argmax(1))
    right = float(np.mean([images.captions[each] == own for each, own in zip(nearest, images.captions, strict=True)]))
    return state["towers"]["text"], state["towers"]["image"], right


def write_towers(images: Images, model: ModelConfig, folder: Path, steps: int, seed: int) -> float:
    """Trains both, and writes them where the trainings read them, unless they are there. Returns the accuracy of
    `train_towers`."""
    if (folder / "accuracy.json").exists():
        return json.loads((folder / "accuracy.json").read_text())
    texts, vision, right = train_towers(images, model, steps, seed)
    folder.mkdir(parents=True, exist_ok=True)
    image_tower(folder).unlink(missing_ok=True)
    leaves = {path: InMemory(np.asarray(leaf)) for path, leaf in flatten(vision).items()}
    written = towers.ImageTower(VISION, leaves, Naming(Dialect.OPENCLIP, "visual."))
    towers.write(written, image_tower(folder), Dialect.OPENCLIP)
    convert(Model(model, {model.text[-1].name: texts}), folder / "text", "orbax", progress=False)
    atomic.write_text(folder / "accuracy.json", json.dumps(right))
    return right


def image_tower(folder: Path) -> Path:
    return folder / "image.safetensors"


# The models


def base_config(images: Path, folder: Path, steps: int, seed: int) -> TrainConfig:
    """The small SDXL, with the text tower as its second text encoder."""
    base = recipe.get_config(str(images), seed=seed)
    return dataclasses.replace(
        base,
        data=DataConfig(
            folder=str(images), buckets=((SIDE, SIDE),), max_aspect_distance=10.0, batch_size=16, seed=seed
        ),
        model=dataclasses.replace(base.model, default_size=(SIDE, SIDE)),
        training=TrainingConfig(
            steps=steps, seed=seed, init_from=(str(autoencoder.WEIGHTS), str(folder / "towers" / "text"))
        ),
        checkpoint=CheckpointConfig(every_steps=500, keep=1),
        validation=ValidationConfig(every_steps=None),
    )


def tuned_config(base: TrainConfig, images: Path, folder: Path, steps: int) -> TrainConfig:
    """`add_embedding` alone, with the image's embedding in the place of the pooled text."""
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, folder=str(images), crops_per_image=1, cache=str(folder / "cache")),
        optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=20, weight_decay=0.0),
        ema=EmaConfig(decay=0.99),
        training=dataclasses.replace(
            base.training, steps=steps, trainable=("^unet/add_embedding/",), init_from=(str(folder / "base"),)
        ),
        image_prompt=ImagePromptConfig(encoder=str(image_tower(folder / "towers"))),
    )


def split(images: Images, folder: Path) -> Path:
    """A folder with every second image: the tuning set."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (file, caption) in list(enumerate(zip(images.files, images.captions, strict=True)))[::2]:
        name = f"{number:05d}{file.suffix}"
        (folder / name).write_bytes(file.read_bytes())
        lines.append(json.dumps({"file_name": name, "text": caption}))
    atomic.write_text(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return folder


# What is measured


def measure(
    model: Model, images: Images, embeddings: Float[np.ndarray, "images projection"], seed: int
) -> dict[str, float]:
    """Accuracies, 0 to 1."""
    count = len(images.captions)
    others = [images.captions[(number + count // 2) % count] for number in range(count)]

    def sample(prompts: Sequence[str | None], with_images: bool) -> UInt8[np.ndarray, "images height width 3"]:
        given = {"image_prompts": [[ImagePrompt(each)] for each in embeddings]} if with_images else {}
        size = {"height": SIDE, "width": SIDE}
        settings = {"steps": run.STEPS, "guidance": run.GUIDANCE, "seed": seed, "batch_size": 16, **size}
        return text_to_image(model, prompts, progress=True, **given, **settings)

    def right(
        samples: UInt8[np.ndarray, "images height width 3"], wanted: Sequence[str]
    ) -> Float[np.ndarray, " images"]:
        return np.array(hits(samples, wanted, images.pixels, images.captions), float)

    alone, mixed = sample([None] * count, True), sample(others, True)
    found = right(alone, images.captions)
    return {
        "image alone, tuning set": found[::2].mean(),
        "image alone, others": found[1::2].mean(),
        "image with another's text: the image": right(mixed, images.captions).mean(),
        "image with another's text: the text": right(mixed, others).mean(),
        "text alone": right(sample(images.captions, False), images.captions).mean(),
    }


def main() -> None:
    options = arguments()
    began = results.begin(options, ("seeds",))
    check_plots()
    folder = options.images or options.out / "images"
    if options.images is None:
        unpack(folder)
    images, rows, notes = read_images(folder), list[dict[str, Any]](), list[str]()
    for seed in range(options.seeds):
        out = options.out / f"seed{seed}"
        base = base_config(folder, out, options.steps, seed)
        right = write_towers(images, base.model, out / "towers", options.tower_steps, seed)
        notes.append(f"Seed {seed}: {right:.0%} of the images are nearest to their own caption, by the towers")
        train(base, out / "base")
        tuned = tuned_config(base, split(images, options.out / "tuning_set"), out, options.tuning_steps)
        encode(tuned)
        train(tuned, out / "tuned")
        tower = towers.open_tower(image_tower(out / "towers"))
        embeddings = encode_images(tower.config, tower.load(), list(images.pixels))
        for name in ("base", "tuned"):
            found = measure(load_model(out / name), images, embeddings, seed)
            rows.append(
                {"model": "zero-shot" if name == "base" else name, "seed": seed, **found, "N": len(images.captions)}
            )
    print(results.write(options.out, "Image prompts, in small", PAPER, results.over_seeds(rows), notes, began))
    plot(rows, options.out / "figure.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A group of bars for each accuracy: means over seeds, and their deviations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4))
    axes: Any = figure.add_subplot()
    names = [name for name in rows[0] if name not in ("model", "seed", "N")]
    for number, model in enumerate(("zero-shot", "tuned")):
        values = np.array([[row[name] for name in names] for row in rows if row["model"] == model])
        errors = values.std(axis=0, ddof=1) if len(values) > 1 else None
        axes.bar(np.arange(len(names)) + 0.4 * number, values.mean(axis=0), 0.38, yerr=errors, label=model)
    axes.set_xticks(
        np.arange(len(names)) + 0.2,
        [name.replace(", ", ",\n").replace(": ", ":\n").replace(" with", "\nwith") for name in names],
    )
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of captioned images; default: those of the quickstart")
    parser.add_argument("--tower-steps", type=int, default=400, help="steps of the two towers; default 400")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the small SDXL; default 2000")
    parser.add_argument("--tuning-steps", type=int, default=1000, help="steps of add_embedding; default 1000")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs; default 1")
    parser.add_argument("--out", type=Path, default=Path("runs/image_prompt"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
