"""The images of `sdxl-jax sample`: noise, init image and mask are read, the prompts sampled, images, latents, sweep and
contact sheet written. What needs numpy and jax is here, and imported once the arguments are read.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from sdxl_jax.commands.preview import Previews
from sdxl_jax.commands.sample import Sample, Task, file_and_strength
from sdxl_jax.conditioning.classes import caption
from sdxl_jax.errors import InputError, fault
from sdxl_jax.files.text import printable
from sdxl_jax.model import Model
from sdxl_jax.models.layers import Compute, Dtype
from sdxl_jax.sampling import generate as sampling
from sdxl_jax.sampling import init_images
from sdxl_jax.sampling.contact_sheet import contact_sheet, labelled_grid, save_png
from sdxl_jax.sampling.generate import Generated
from sdxl_jax.sampling.image_prompts import ImagePrompt, encode_images
from sdxl_jax.weights.clip_vision import open_tower


def read_noise(sample: Sample) -> Float[np.ndarray, "*shape"] | None:
    """The initial noise; its shape is checked with the images' size, in `generate`."""
    if sample.init_noise is None:
        return None
    try:
        noise = np.load(sample.init_noise)
    except (OSError, ValueError, EOFError) as error:
        raise fault(error)(
            f"--init-noise {sample.init_noise} cannot be read as NPY ({error}). Give a file that numpy.save wrote"
        ) from error
    if not isinstance(noise, np.ndarray):
        raise InputError(f"--init-noise {sample.init_noise} is an NPZ archive. Give an NPY file of float32")
    if not np.issubdtype(noise.dtype, np.floating):
        raise InputError(f"--init-noise {sample.init_noise} has the dtype {noise.dtype}. Give an NPY file of float32")
    if sample.from_png is not None:
        row = sample.options.first_index
        noise = noise[row : row + 1]
    return noise


def read_init(
    sample: Sample,
) -> tuple[UInt8[np.ndarray, "height width 3"] | None, Bool[np.ndarray, "height width"] | None]:
    """(init image, mask)."""
    background = init_images.parse_background(sample.background)
    if sample.init_image is None:
        return None, None
    image = init_images.read(sample.init_image, background)
    if sample.outpaint is not None:
        return init_images.outpaint(image, *sample.outpaint)
    return image, None if sample.mask is None else init_images.read_mask(sample.mask, image.shape[:2])


class ImagePrompts:
    """The image prompts of the options: images and their encoder, opened and read, and encoded when it is time."""

    def __init__(self, sample: Sample):
        """Raises InputError for images and encoders that cannot be read."""
        given = [file_and_strength(value) for value in sample.image_prompt]
        self._images = [init_images.read(path) for path, _ in given]
        self._strengths = [strength for _, strength in given]
        self._tower = None if sample.image_encoder is None else open_tower(sample.image_encoder)
        self._dtype = Dtype(sample.dtype)

    @property
    def width(self) -> int | None:
        """Of an embedding; None: there are no image prompts."""
        return None if self._tower is None else self._tower.config.projection_dim

    def encode(self) -> list[ImagePrompt]:
        if self._tower is None:
            return []
        params, compute = self._tower.load(jnp.dtype(self._dtype.value)), Compute(dtype=self._dtype)
        embeddings = encode_images(self._tower.config, params, self._images, compute)
        return [ImagePrompt(*each) for each in zip(embeddings, self._strengths, strict=True)]


def generate(
    sample: Sample,
    models: tuple[Model, Model | None],
    tasks: list[Task],
    noise: Float[np.ndarray, "..."] | None,
    init_image: UInt8[np.ndarray, "height width 3"] | None,
    mask: Bool[np.ndarray, "mask_height mask_width"] | None,
    image_prompts: Sequence[ImagePrompt] = (),
) -> list[Generated]:
    """The images of all tasks. Consecutive tasks with the same options are sampled together."""
    generated = []
    total = max(task.index + task.options.num_images for task in tasks)
    callback = None
    if sample.preview is not None:
        previews = Previews(models[0].config, sample.preview_autoencoder)
        callback = functools.partial(previews.write, sample.preview)
    for (options, _), group in itertools.groupby(tasks, key=lambda task: (task.options, task.label)):
        members = list(group)
        first, count = members[0].index, sum(task.options.num_images for task in members)
        rows = noise if noise is None or len(noise) != total else noise[first : first + count]
        generated.append(
            sampling.generate(
                models[0],
                [task.prompt for task in members],
                negative_prompts=[task.negative for task in members],
                classes=[task.class_ for task in members],
                image_prompts=image_prompts,
                refiner=models[1],
                init_image=init_image,
                mask=mask,
                init_noise=rows,
                compute=Compute(dtype=Dtype(sample.dtype)),
                one_program=sample.one_program,
                progress=True,
                callback=callback,
                options=dataclasses.replace(options, first_index=options.first_index + first),
            )
        )
    return generated


def write(sample: Sample, tasks: list[Task], texts: list[dict[str, str]], generated: list[Generated]) -> None:
    images = [image for each in generated for image in each.images]
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        save_png(Image.fromarray(image), sample.out / f"{number:06d}.png", text)
    if sample.save_latents:
        if len({each.latents.shape[1:] for each in generated}) > 1:
            raise InputError("--save-latents: the images have different sizes. Sample the images of one size at a time")
        np.save(sample.out / "latents.npy", np.concatenate([each.latents for each in generated]))
    captions = [caption(task.prompt, task.class_) for task in tasks for _ in range(task.options.num_images)]
    if sample.contact_sheet:
        columns = min(8, max(1, round(len(images) ** 0.5)))
        save_png(contact_sheet(images, captions, columns), sample.out / "contact_sheet.png")
    if sample.sweep:
        _write_sweep(sample, tasks, images)
    print(f"{len(images)} images in {printable(sample.out)}")


def _write_sweep(sample: Sample, tasks: list[Task], images: list[UInt8[np.ndarray, "_height _width 3"]]) -> None:
    """The grid of a sweep: a row per image (and value of a second sweep), a column per value of the first."""
    labels = [task.label for task in tasks for _ in range(task.options.num_images)]
    firsts = list(dict.fromkeys(label[0] for label in labels))
    columns = [[image for image, label in zip(images, labels, strict=True) if label[0] == first] for first in firsts]
    prompts = [
        "\n".join([*label[1:], caption(task.prompt, task.class_)])
        for task, label in ((task, task.label) for task in tasks for _ in range(task.options.num_images))
        if label[0] == firsts[0]
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    save_png(labelled_grid(rows, firsts, prompts), sample.out / "sweep.png")
