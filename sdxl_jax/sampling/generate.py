"""From prompts to images: the functions that users call.

    text_to_image     prompts → images
    image_to_image    an init image is noised to a strength, and that part of the denoising schedule is run
    inpaint           the same where a mask is white; elsewhere the image stays
    refine            image to image with a refiner

All are `generate` with other arguments, which also returns latents, takes a refiner, and has a callback for each step.
What happens on the devices is `program`; the options are `options.Options`, and `plan` works out the steps from them.

Programs are keyed on configurations and shapes: a second call with the same shapes compiles nothing, whatever the
prompts, seeds, micro-conditioning and strengths.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int32, Key, Shaped, UInt8

from sdxl_jax import sharding
from sdxl_jax.arrays import MicroConditioning, type_of_array
from sdxl_jax.conditioning import image as image_conditioning
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.classes import NO_CLASS
from sdxl_jax.conditioning.image import ImageConditioning
from sdxl_jax.conditioning.micro import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE
from sdxl_jax.conditioning.prompts import check_text
from sdxl_jax.conditioning.text import TextConditioning, Tokenizer
from sdxl_jax.errors import InputError, out_of_memory
from sdxl_jax.model import Model, ModelConfig, UnconditionalKind
from sdxl_jax.models.layers import Compute
from sdxl_jax.progress import tqdm
from sdxl_jax.samplers.loop import State
from sdxl_jax.samplers.steps import find, initial_scale
from sdxl_jax.sampling import init_images, nonfinite, program
from sdxl_jax.sampling.image_prompts import ImagePrompt, ImagePrompts, of_each_prompt
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import SegmentStart, check_prompts, levels_of, prepare
from sdxl_jax.sampling.program import InitInputs, Inputs, Recipe, RowCallback, SampledBatch, Strengths
from sdxl_jax.sizes import Position, Size

Images = UInt8[np.ndarray, "images height width 3"]


class Generated(NamedTuple):
    """Images and their latents."""

    images: Images
    latents: Float[np.ndarray, "images latent_height latent_width channels"]
    """Scaled, as the UNet sees them."""


class StepState(NamedTuple):
    """What the callback receives after each step: progress of the batch, and a preview of its latents."""

    step: int
    """Steps that are done, of this batch."""
    steps: int
    """Steps of this batch."""
    images: int
    """Number of images in this batch."""
    first: int
    """Number of its first image."""
    x0: Float[jax.Array, "images latent_height latent_width channels"]
    """The network's last prediction of the finished latents, scaled."""


StepCallback = Callable[[StepState], None]


def encode_prompt(model: Model, prompts: Sequence[str], compute: Compute = Compute()) -> TextConditioning:
    """Text states of prompts: context [prompts, 77, features], and pooled [prompts, projection] if the model has it."""
    _check_parts(model, *(tower.name for tower in model.config.text))
    tokens = Tokenizer.of(model.config.text)(list(prompts))
    return text.encode(model.config.text, model.params, tokens, compute)


def generate(
    model: Model,
    prompts: Sequence[str | None],
    *,
    negative_prompts: Sequence[str | None] | None = None,
    classes: Sequence[int | None] | None = None,
    image_prompts: ImagePrompts = (),
    refiner: Model | None = None,
    init_image: UInt8[np.ndarray, "init_height init_width 3"] | None = None,
    mask: Bool[np.ndarray, "mask_height mask_width"] | None = None,
    init_noise: Float[np.ndarray, "images latent_height latent_width channels"] | None = None,
    compute: Compute = Compute(),
    one_program: bool = False,
    progress: bool = False,
    callback: StepCallback | None = None,
    **options: Any,
) -> Generated:
    """Images and their latents, in order of prompts, then images.

    Args:
        prompts: with image prompts, None is the images alone, which is not the same as "". Of a model without text
            encoders all are None or "".
        negative_prompts: one per prompt; None, or a None in the list: no negative prompt, which is not the same as "".
        classes: of a model with classes, one per prompt: the number of the class, from 0; None: no class, as in the
            unconditional half of guidance.
        image_prompts: images that every prompt is conditioned on besides its text, in the place of the pooled text; or
            one list per prompt. The refiner is not conditioned on them.
        refiner: runs the last steps (`handoff`), or refines the finished latent (`refine_strength`). It may lack its
            own text encoder, if the model has the same.
        init_image: 0..255; the image that sampling starts from. It is resized to cover height × width and cropped at
            the centre.
        mask: with an init image, of its size: True is repainted. Outside of it the image keeps its own pixels.
        init_noise: standard normal, in place of the seeded noise.
        one_program: compile text encoders, loop and decoder as one program instead of one each.
        progress: show a progress bar, step by step unless `one_program`.
        callback: called after each step; has no effect with `one_program`.
        options: the fields of `options.Options`, or `options=Options(…)`.

    Raises InputError for invalid arguments, before anything is compiled; where the devices' memory does not suffice;
    and, as `nonfinite.NonFiniteError`, where the model's weights lead to a non-finite image: then no image is returned.
    """
    given = options.pop("options", None)
    given = given or Options(**options)
    generation = _Generation(
        model, refiner, prompts, negative_prompts, classes, image_prompts, init_image, mask, init_noise, given
    )
    return generation.run(compute, one_program, progress, callback)


def text_to_image(model: Model, prompts: Sequence[str | None], **options: Any) -> Images:
    """Images of prompts, uint8 0..255. The options are those of `generate`, which also gives the latents."""
    return generate(model, prompts, **options).images


def image_to_image(
    model: Model, prompts: Sequence[str | None], image: UInt8[np.ndarray, "init_height init_width 3"], **options: Any
) -> Images:
    """Image to image, SDEdit: Meng et al. 2021, arXiv:2108.01073. The image is noised, and `strength` (0.3) of the
    denoising schedule is run from there. The options are those of `generate`."""
    return generate(model, prompts, init_image=image, **options).images


def inpaint(
    model: Model,
    prompts: Sequence[str | None],
    image: UInt8[np.ndarray, "init_height init_width 3"],
    mask: Bool[np.ndarray, "mask_height mask_width"],
    **options: Any,
) -> Images:
    """Inpainting: the image is repainted where the mask is True. A UNet of 9 channels sees the rest of the image; with
    any other the rest is put back after every step. The options are those of `generate`."""
    return generate(model, prompts, init_image=image, mask=mask, **options).images


def refine(
    model: Model, prompts: Sequence[str | None], image: UInt8[np.ndarray, "init_height init_width 3"], **options: Any
) -> Images:
    """Image to image with a refiner as the model: Podell et al. (arXiv:2307.01952), section 2.5."""
    return image_to_image(model, prompts, image, **options)


class _Generation:
    """One call of `generate`: its checked arguments, as rows from which batches are taken."""

    def __init__(
        self,
        model: Model,
        refiner: Model | None,
        prompts: Sequence[str | None],
        negatives: Sequence[str | None] | None,
        classes: Sequence[int | None] | None,
        image_prompts: ImagePrompts,
        init_image: UInt8[np.ndarray, "init_height init_width 3"] | None,
        mask: Bool[np.ndarray, "mask_height mask_width"] | None,
        init_noise: Float[np.ndarray, "images latent_height latent_width channels"] | None,
        options: Options,
    ):
        model = model._replace(config=options.network_of(model.config))
        config = model.config
        if isinstance(prompts, str):
            raise InputError(f"prompts is one text, {prompts[:40]!r}. Give a list of texts")
        if not prompts:
            raise InputError("There are no prompts. Give at least one")
        negatives = [None] * len(prompts) if negatives is None else negatives
        classes = [None] * len(prompts) if classes is None else classes
        images = of_each_prompt(image_prompts, len(prompts))
        for name, rows in (("negative prompts", negatives), ("classes", classes), ("lists of image prompts", images)):
            if len(rows) != len(prompts):
                raise InputError(f"{len(rows)} {name} for {len(prompts)} prompts. Give one per prompt, or none")
        check_prompts(config, [*prompts, *negatives], classes)
        for number, (prompt, negative, own) in enumerate(zip(prompts, negatives, images, strict=True), 1):
            if prompt is None and config.text and not own:
                raise InputError(f"Prompt {number} is None, and there is no image prompt. Give a text, or images")
            check_text(prompt or "", f"Prompt {number}")
            check_text(negative or "", f"Negative prompt {number}")
        _check_parts(model, *config.parts)
        self.shares_text = False if refiner is None else _shares_text(model, refiner)
        width = _width(images)
        prepared = prepare(config, None if refiner is None else refiner.config, options, init_image, mask, width)
        self.size, self.init_image, self.mask, self.segments, self.segment_arrays = prepared
        self.model, self.refiner, self.options = model, refiner, options
        self.count = len(prompts) * options.num_images
        per_prompt = zip(prompts, negatives, classes, images, strict=True)
        self.rows = self._make_rows([row for row in per_prompt for _ in range(options.num_images)], init_noise)

    @property
    def _models(self) -> tuple[Model, ...]:
        return (self.model,) if self.refiner is None else (self.model, self.refiner)

    @property
    def steps(self) -> int:
        """Rows of all segments: the network evaluations of a batch, guidance aside."""
        return sum(len(each.plan.timestep) for each in self.segment_arrays)

    def _make_rows(
        self,
        rows: list[tuple[str | None, str | None, int | None, Sequence[ImagePrompt]]],
        init_noise: Float[np.ndarray, "_images _latent_height _latent_width _channels"] | None,
    ) -> dict[str, Any]:
        """The fields of `Inputs` that differ from image to image, one row per image. rows: prompt, negative prompt,
        class and image prompts of each."""
        prompts, negatives, classes, image_prompts = map(list, zip(*rows, strict=True))
        config, options, count = self.model.config, self.options, len(rows)
        factor = config.vae.downsampling
        latent = (self.size.height // factor, self.size.width // factor, config.vae.latent_channels)
        numbers = options.first_index + np.arange(count)
        if init_noise is not None and init_noise.shape != (count, *latent):
            given, expected = (" × ".join(map(str, shape)) for shape in (init_noise.shape, (count, *latent)))
            raise InputError(
                f"The initial noise has the shape {given}, expected {expected} (images × latent height × latent width "
                "× channels). Give noise of that shape, or leave it out"
            )
        if init_noise is not None and not np.isfinite(init_noise).all():
            raise InputError("The initial noise has non-finite values (NaN or inf). Give standard normal noise")
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(options.seed)))(numbers)

        def normal(purpose: int) -> Float[jax.Array, "images latent_height latent_width channels"]:
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, purpose), latent))(keys)

        renoised = any(segment.start is SegmentStart.RENOISE and segment.model for segment in self.segments)
        tokenizer = Tokenizer.of(config.text)
        tokenise = functools.partial(tokenizer.prompts, long=options.long_prompts, weighted=options.prompt_weights)
        texts, negative_texts = ([each or "" for each in rows] for rows in (prompts, negatives))
        tokens, negative = tokenise(texts), tokenise(negative_texts)
        chunks = max(tokens.chunks, negative.chunks)
        if tokens.chunks != negative.chunks:
            tokens, negative = tokenise(texts, chunks=chunks), tokenise(negative_texts, chunks=chunks)
        return {
            "tokens": tokens,
            "negative_tokens": negative,
            "has_negative": np.array([each is not None for each in negatives], np.float32),
            "micro": tuple(micro_rows(each.config, options, count, self.size) for each in self._models),
            "noise": normal(0) if init_noise is None else jnp.asarray(init_noise, jnp.float32),
            "refiner_noise": normal(2) if renoised else None,
            "keys": jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys),
            "init_inputs": self._init_rows(),
            "image_prompt": self._image_rows(prompts, image_prompts, keys),
            "label": self._label_rows(classes),
        }

    def _label_rows(self, classes: Sequence[int | None]) -> Int32[np.ndarray, " images"] | None:
        if all(model.config.unet.classes is None for model in self._models):
            return None
        return np.array([NO_CLASS if each is None else each for each in classes], np.int32)

    def _image_rows(
        self, prompts: list[str | None], image_prompts: list[Sequence[ImagePrompt]], keys: Key[jax.Array, " images"]
    ) -> ImageConditioning | None:
        if not image_prompts[0]:
            return None
        most, width = max(map(len, image_prompts)), len(image_prompts[0][0].embedding)
        embeddings = np.zeros((len(prompts), most, width), np.float32)
        strengths = np.zeros((len(prompts), most), np.float32)
        for row, images in enumerate(image_prompts):
            for number, image in enumerate(images):
                embeddings[row, number], strengths[row, number] = image
        embedding = image_conditioning.summed(
            embeddings,
            strengths,
            self.options.noise_augmentation or 0.0,
            jax.vmap(lambda key: jax.random.fold_in(key, 3))(keys),
        )
        return ImageConditioning(embedding, np.array([each is not None for each in prompts], np.float32))

    def _init_rows(self) -> InitInputs | None:
        if self.init_image is None:
            return None
        config, count = self.model.config, self.count

        def repeat(
            one: Shaped[np.ndarray, "height width channels"],
        ) -> Shaped[np.ndarray, "images height width channels"]:
            return np.broadcast_to(one, (count, *one.shape))

        if self.mask is None:
            return InitInputs(repeat(self.init_image), None, None)
        latent_mask = init_images.latent_mask(self.mask, config.vae.downsampling)
        hidden = repeat(self.mask[..., None]) if config.sees_mask else None
        return InitInputs(repeat(self.init_image), repeat(latent_mask), hidden)

    def run(self, compute: Compute, one_program: bool, progress: bool, callback: StepCallback | None) -> Generated:
        options, models = self.options, self._models
        recipe = Recipe(
            tuple(each.config for each in models),
            self.shares_text,
            self.segments,
            compute,
            options.decode_tile,
        )
        resolved = options.resolved(self.model.config)
        levels = levels_of(self.model.config, resolved, self.model.config.sampling)
        strengths = (resolved.guidance or 0.0, options.pag, options.guidance_rescale)
        shared: dict[str, Any] = {
            "params": tuple(each.params for each in models),
            "segment_arrays": self.segment_arrays,
            "strengths": Strengths(*map(np.float32, strengths)),
            "scale": np.float32(initial_scale(find(resolved.sampler or ""), levels, resolved.timestep_spacing)),
        }
        images, latents = [], []
        mesh = _mesh_of(self.model)
        parts = 1 if mesh is None else sharding.batch_parts(mesh)
        batch_size = -(-min(options.batch_size, self.count) // parts) * parts
        starts = range(0, self.count, batch_size)
        total = self.count if one_program else len(starts) * self.steps
        with _within(mesh), _explained_out_of_memory(options), _Bar(total, not one_program, progress) as bar:
            for start in starts:
                # The last batch is padded with its last row, so that it needs no compilation of its own.
                index = np.minimum(np.arange(start, start + batch_size), self.count - 1)
                rows = jax.tree.map(lambda row: row[index], self.rows)  # noqa: B023 (used within the iteration)
                inputs = Inputs(**shared, **_place(mesh, rows))
                size = min(batch_size, self.count - start)
                if one_program:
                    batch = program.whole(inputs, recipe)
                else:
                    after_row = self._row_callback(bar, callback, start, size)
                    batch = program.staged(inputs, recipe, after_row if progress or callback else None)
                batch = SampledBatch(*(_on_host(each)[:size] for each in batch))
                nonfinite.check(batch, inputs, recipe, options.first_index + start)
                latents.append(batch.latents)
                images.append(self._composited(batch.images))
                bar.batch(size)
        return Generated(np.concatenate(images), np.concatenate(latents))

    def _row_callback(self, bar: "_Bar", callback: StepCallback | None, first: int, size: int) -> RowCallback:
        def after_row(row: int, state: State) -> None:
            bar.row(state)
            if callback is not None:
                callback(StepState(row + 1, self.steps, size, self.options.first_index + first, state.x0[:size]))

        return after_row

    def _composited(self, images: Images) -> Images:
        """With the init image's own pixels outside of the mask, if there is one."""
        if self.mask is None or self.init_image is None:
            return images
        return np.stack([init_images.composite(self.init_image, image, self.mask) for image in images])


def micro_rows(
    config: ModelConfig, options: Options, count: int, size: Size
) -> tuple[MicroConditioning, MicroConditioning]:
    """Micro-conditioning (sizes, crop, aesthetic score) of prompts and of negative prompts, one row per image.

    A model whose unconditional embedding is all zeros has those of `negative_…` options alone in its negative prompts.
    """

    def rows(original: Size | None, crop: Position | None, target: Size | None, score: float) -> MicroConditioning:
        def repeat(pair: tuple[int, int]) -> Int32[np.ndarray, "images 2"]:
            return np.tile(np.array(pair, np.int32), (count, 1))

        scores = np.full(count, score, np.float32)
        return MicroConditioning(repeat(original or size), repeat(crop or (0, 0)), repeat(target or size), scores)

    def either(value: Any, other: Any) -> Any:
        return other if value is None else value

    positive = rows(
        options.original_size, options.crop, options.target_size, either(options.aesthetic_score, AESTHETIC_SCORE)
    )
    negative = rows(
        either(options.negative_original_size, options.original_size),
        either(options.negative_crop, options.crop),
        either(options.negative_target_size, options.target_size),
        either(options.negative_aesthetic_score, NEGATIVE_AESTHETIC_SCORE),
    )
    if config.micro is not None and config.unconditional is UnconditionalKind.ALL_ZEROS:
        last = options.negative_target_size
        if config.is_refiner:
            last = options.negative_aesthetic_score
        given = (options.negative_original_size, options.negative_crop, last)[: len(config.micro.numbers.widths)]
        kept = np.array([each is not None for each in given], np.float32)
        negative = negative._replace(kept=np.tile(kept, (count, 1)))
    return positive, negative


def _width(image_prompts: Sequence[Sequence[ImagePrompt]]) -> int | None:
    """Of the embeddings of all prompts. Raises InputError for several widths, for strengths and embeddings that are
    not finite, and where some prompts have images and some have none."""
    if any(image_prompts) and not all(image_prompts):
        number = next(number for number, images in enumerate(image_prompts, 1) if not images)
        raise InputError(f"Prompt {number} has no image prompt, and others have. Sample it on its own")
    every = [image for images in image_prompts for image in images]
    if len(widths := {len(each.embedding) for each in every}) > 1:
        raise InputError(
            f"The image prompts have embeddings of widths {', '.join(map(str, sorted(widths)))}. Encode all of them "
            "with one image encoder"
        )
    if wrong := [each.strength for each in every if not np.isfinite(each.strength)]:
        raise InputError(f"An image prompt has the strength {wrong[0]}. Give a finite number, e.g. 1")
    if not all(np.isfinite(each.embedding).all() for each in every):
        raise InputError(
            "An image prompt's embedding has non-finite values (NaN or inf). Give that of a valid image by a valid "
            "image encoder"
        )
    return next(iter(widths), None)


def _shares_text(model: Model, refiner: Model) -> bool:
    """Whether the refiner lacks its own text encoder, which must then be the model's last."""
    _check_parts(refiner, "unet")
    towers = refiner.config.text
    if all(tower.name in refiner.params for tower in towers):
        return False
    if len(towers) != 1 or towers[0].clip != model.config.text[-1].clip:
        _check_parts(refiner, *(tower.name for tower in towers))
    return True


def _check_parts(model: Model, *needed: str) -> None:
    if missing := [part for part in needed if part not in model.params]:
        raise InputError(
            f"The model has no {', '.join(missing)}, only {', '.join(model.params)}. Give a complete model, or the "
            "missing parts with --parts-from"
        )


def _mesh_of(model: Model) -> Mesh | None:
    """The mesh that the parameters are placed on, if it is one of `sharding`'s."""
    place = jax.tree.leaves(model.params["unet"])[0].sharding
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and set(mesh.axis_names) == set(sharding.AXES) else None


def _within(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Sets the mesh as jax's current one, unless there is one."""
    if mesh is None or mesh.size == 1 or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def _place(mesh: Mesh | None, batch: Any) -> Any:
    """A batch placed with the parameters, split over the mesh: whatever is computed from it then has the same sharding,
    and no program is compiled twice. With several processes, placing is left to jax."""
    if mesh is None or jax.process_count() > 1:
        return batch
    return jax.device_put(batch, sharding.batch_sharding(mesh) if mesh.size > 1 else sharding.replicated(mesh))


@contextlib.contextmanager
def _explained_out_of_memory(options: Options) -> Iterator[None]:
    """Raises InputError with the options to change where the devices' memory does not suffice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if (reason := out_of_memory(error)) is None:
            raise
        remedies = [
            f"batch_size below {options.batch_size}" if options.batch_size > 1 else "",
            "dtype bfloat16",
            "" if options.sequential else "sequential, which evaluates prompt and negative prompt one after the other",
            "decode_tile 512, for the autoencoder" if options.decode_tile is None else "",
            "mesh.fsdp, to shard the weights over devices",
        ]
        raise InputError(
            f"The devices are out of memory ({reason[:200]}). Try, in this order: {'; '.join(filter(None, remedies))}"
        ) from error


def _on_host(array: Shaped[type_of_array, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """The whole array as numpy, in every process, also where it is sharded over several."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class _Bar:
    """Progress bar, in steps of batches; or in images, where all steps are one program."""

    def __init__(self, total: int, stepwise: bool, show: bool):
        self._stepwise, self._show = stepwise, show
        self._bar = tqdm(total=total, desc="sampling", unit="step" if stepwise else "image", disable=not show)
        self._images, self._start = 0, time.monotonic()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def row(self, state: State) -> None:
        if self._show:
            jax.block_until_ready(state.x0)  # or the bar would run ahead of the devices
            self._bar.update()

    def batch(self, images: int) -> None:
        self._images += images
        if not self._stepwise:
            self._bar.update(images)
        self._bar.set_postfix_str(f"{self._images / (time.monotonic() - self._start):.3g} images/s")
