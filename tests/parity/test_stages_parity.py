"""Images in stages, from images, and with other guidance: against diffusers' pipelines, from the same noise.

    handoff   base, then refiner from its latent   StableDiffusionXLPipeline, …Img2ImgPipeline with denoising_start
    refine    base, then refiner from new noise    StableDiffusionXLPipeline, …Img2ImgPipeline with strength
    image     image to image                       StableDiffusionXLImg2ImgPipeline
    inpaint   and "paint 9", a UNet of 9 channels  StableDiffusionXLInpaintPipeline
    text      perturbed attention, rescaling       StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline

Models, prompts, tolerances are those of `pipelines.py`. Images are sampled step by step, as the command does with its
progress bar: so one compiled step serves many cases here. `test_program.py` shows that the other programs sample the
same.

For the comparison diffusers takes the mean of the autoencoder's posterior, as ours does, where it would sample from it,
and our noise where it would draw its own. Known differences, and how the comparison avoids them:

* With several images, base and PAG pipelines give some the others' negative sizes: each is then sampled alone.
* Image to image and inpainting condition a base on the prompt's crop instead of the negative one, which has no effect
  (`test_diffusers_leaves_the_negative_crop_out`): here they are the same.
* A refiner's negative crop is (0, 0) unless another is given; ours is the prompt's. Here it is given.
* An inpainting mask is read at one pixel of each cell of the latent, by ours at all: masks here are of whole cells.
* Outside of a mask it returns the decoded image, ours the image itself: only the inside is compared.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from agreement import Note
from PIL import Image
from pipelines import (
    NEGATIVES,
    PROMPTS,
    STEPS,
    TOLERANCE,
    Sampled,
    Size,
    apart,
    build,
    check_agreement,
    finish,
    scheduler,
    sdxl,
    unet,
)
from reference import diffusers, from_torch, randomise, to_torch

from sdxl_jax.model import SDXL_BASE, Model
from sdxl_jax.sampling.generate import generate
from sdxl_jax.sizes import Position
from sdxl_jax.sizes import Size as Pixels
from sdxl_jax.weights.load import load_model

# Of diffusers' Euler alone: NumPy 2 asks more of torch's tensors than they offer.
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

SEED = 5
"""Of our own random numbers: the noise between the stages."""


# ---- the pipelines ---------------------------------------------------------------------------------------------------


class Sources(NamedTuple):
    """diffusers' pipelines, and the same weights in ours."""

    base: Any
    refiner: Any
    image: Any
    """Image to image with the base."""
    inpaint: Any
    """With the base, of 4 channels."""
    painter: Any
    """Inpainting, 9 channels."""
    pag: Any
    models: dict[str, Model]
    """Ours: base, refiner, painter."""


def _refiner(base: Any) -> Any:
    """With the base's autoencoder and second text encoder."""
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet(
            [False, True],
            transformer_layers_per_block=[1, 1],
            attention_head_dim=[2, 4],
            cross_attention_dim=48,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=40 + 5 * 16,
            use_linear_projection=True,
        ),
        scheduler=scheduler("epsilon"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    randomise(pipeline.unet.eval(), 9)
    # So that scores have an effect: the refiner alone receives them, for a few steps, and they are smaller than sizes.
    pipeline.unet.add_embedding.linear_1.weight.data[:, -16:] *= 10
    for name, parameter in pipeline.unet.named_parameters():
        if "time_emb_proj.weight" in name:
            parameter.data *= 8
    return pipeline


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("stages")
    base = build(SDXL_BASE, sdxl, folder / "base")
    paint = functools.partial(sdxl, kind=diffusers.StableDiffusionXLInpaintPipeline, in_channels=9)
    painter = build(SDXL_BASE, paint, folder / "painter")
    refiner = finish(_refiner(base.pipeline), folder / "refiner")

    def with_base(name: str) -> Any:
        pipeline = getattr(diffusers, name)(**base.pipeline.components, add_watermarker=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return Sources(
        base.pipeline,
        refiner.pipeline,
        with_base("StableDiffusionXLImg2ImgPipeline"),
        with_base("StableDiffusionXLInpaintPipeline"),
        painter.pipeline,
        with_base("StableDiffusionXLPAGPipeline"),
        {
            name: load_model(source.path, progress=False)
            for name, source in (("base", base), ("refiner", refiner), ("painter", painter))
        },
    )


# ---- the images ----------------------------------------------------------------------------------------------------

SIZES = {"original_size": Pixels(1023, 333), "crop": Position(5, 64), "target_size": Pixels(512, 1024)}
NEGATIVE_SIZES = {
    "negative_original_size": Pixels(301, 777),
    "negative_crop": Position(9, 0),
    "negative_target_size": Pixels(96, 48),
}


class Case(NamedTuple):
    stage: str
    batch: int
    negative: str = "absent"
    options: tuple[tuple[str, Any], ...] = ()
    """Of `generate`."""
    size: Size = (72, 40)

    def __str__(self) -> str:
        given = [f"{name} {_said(value)}" for name, value in self.options]
        size = "x".join(map(str, self.size))
        return ", ".join([self.stage, f"batch {self.batch}, {size}, negative {self.negative}", *given])

    @property
    def prompts(self) -> Sequence[str]:
        return PROMPTS[: self.batch]

    def noise(self) -> np.ndarray:
        """Standard normal, in our layout."""
        height, width = self.size
        rng = np.random.default_rng([self.batch, height, width])
        return rng.standard_normal((self.batch, height // 8, width // 8, 4), np.float32)

    def fresh_noise(self) -> np.ndarray:
        """Our noise between the stages, one key per image."""
        height, width = self.size
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), k), 2) for k in range(self.batch)]
        return np.stack([jax.random.normal(key, (height // 8, width // 8, 4)) for key in keys])


def _said(value: Any) -> str:
    return (
        "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
    )


def case(stage: str, batch: int, negative: str = "absent", size: Size = (72, 40), **options: Any) -> Case:
    return Case(stage, batch, negative, tuple(options.items()), size)


def photograph(size: Size, seed: int = 0) -> np.ndarray:
    """Colours that vary, from pixel to pixel and at large."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (3, 3, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC), np.int32)
    return np.clip(smooth + rng.integers(-40, 40, (*size, 3)), 0, 255).astype(np.uint8)


def mask_of(size: Size, seed: int = 0) -> np.ndarray:
    """True in about half of the 8 × 8 cells."""
    cells = np.random.default_rng([3, seed]).random((size[0] // 8, size[1] // 8)) < 0.5
    return cells.repeat(8, axis=0).repeat(8, axis=1)


PAINTING = {"inpaint": "base", "paint 9": "painter"}
"""Stages with a mask, and the model."""


def ours(sources: Sources, case: Case) -> Sampled:
    options: dict[str, Any] = dict(case.options)
    if case.stage in ("image", *PAINTING):
        options["init_image"] = photograph(case.size)
    if case.stage in PAINTING:
        options["mask"] = mask_of(case.size)
    if case.stage in ("handoff", "refine"):
        options["refiner"] = sources.models["refiner"]
    made = generate(
        sources.models[PAINTING.get(case.stage, "base")],
        case.prompts,
        negative_prompts=[NEGATIVES[case.negative]] * case.batch,
        height=case.size[0],
        width=case.size[1],
        steps=STEPS,
        seed=SEED,
        init_noise=case.noise(),
        callback=lambda seen: None,
        **options,
    )
    return Sampled(*made)


# ---- the same of diffusers -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fixed_noise(pipeline: Any, noise: np.ndarray) -> Iterator[None]:
    """The pipeline uses this noise, and the mean of the autoencoder's posterior."""

    def draw(shape: Sequence[int], **_: Any) -> Any:
        tensor = to_torch(noise)
        assert tensor.shape == tuple(shape)
        return tensor

    module = sys.modules[type(pipeline).__module__]
    with pytest.MonkeyPatch.context() as patch:
        if "randn_tensor" in vars(module):
            patch.setattr(module, "randn_tensor", draw)
        if "retrieve_latents" in vars(module):
            patch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
        yield


def run(pipeline: Any, prompts: Sequence[str], negative: str | None, noise: np.ndarray, **options: Any) -> Sampled:
    """Images, and the latents of the last step. Options are diffusers'."""
    last: dict[str, Any] = {}

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return {}

    with fixed_noise(pipeline, noise):
        images = pipeline(
            prompt=list(prompts),
            negative_prompt=None if negative is None else [negative] * len(prompts),
            num_inference_steps=STEPS,
            callback_on_step_end=keep,
            **options,
        ).images
    return Sampled(np.stack([np.asarray(image) for image in images]), from_torch(last["latents"]))


def theirs(
    sources: Sources,
    case: Case,
    *,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    fresh: np.ndarray | None = None,
) -> Sampled:
    """diffusers' images of a case. Image, mask and noise are the case's unless given."""
    options: dict[str, Any] = dict(case.options)
    noise = case.noise() if noise is None else noise
    fresh = case.fresh_noise() if fresh is None else fresh
    if "negative_original_size" in options and case.stage in ("handoff", "refine", "text") and case.batch > 1:
        # With several images, negative sizes and sizes alternate, but all negative prompts come before all prompts.
        alone = [
            _theirs(sources, case, [case.prompts[k]], options, image, mask, noise[k : k + 1], fresh[k : k + 1])
            for k in range(case.batch)
        ]
        return Sampled(*(np.concatenate(arrays) for arrays in zip(*alone, strict=True)))
    return _theirs(sources, case, case.prompts, options, image, mask, noise, fresh)


def _theirs(
    sources: Sources,
    case: Case,
    prompts: Sequence[str],
    options: dict[str, Any],
    image: np.ndarray | None,
    mask: np.ndarray | None,
    noise: np.ndarray,
    fresh: np.ndarray,
) -> Sampled:
    height, width = case.size
    common: dict[str, Any] = {"guidance_scale": options.get("guidance", 5.0)}
    names = {"crop": "crops_coords_top_left", "negative_crop": "negative_crops_coords_top_left"}
    sizes = {names.get(name, name): options[name] for name in (*SIZES, *NEGATIVE_SIZES) if name in options}
    common |= sizes
    scores = {name: value for name, value in options.items() if "aesthetic" in name}
    go = functools.partial(run, prompts=prompts, negative=NEGATIVES[case.negative])
    starts = Image.fromarray(photograph(case.size) if image is None else image)
    if case.stage in PAINTING:
        pipeline = sources.painter if case.stage == "paint 9" else sources.inpaint
        white = Image.fromarray(np.where(mask_of(case.size) if mask is None else mask, np.uint8(255), np.uint8(0)))
        common |= {"image": starts, "mask_image": white, "height": height, "width": width}
        return go(pipeline, noise=noise, strength=options.get("strength", 1.0), **common)
    if case.stage == "image":
        return go(sources.image, noise=noise, strength=options.get("strength", 0.3), image=starts, **common)
    if case.stage == "text":
        common |= {"guidance_rescale": options.get("guidance_rescale", 0.0), "height": height, "width": width}
        if "pag" in options:
            return go(sources.pag, noise=noise, pag_scale=options["pag"], **common)
        return go(sources.base, noise=noise, **common)

    last: dict[str, Any] = {}
    if case.stage == "handoff":
        share = options.get("handoff", 0.8)
        last, then = {"denoising_end": share}, {"denoising_start": share}
    else:
        then = {"strength": options["refine_strength"]}
    # A refiner's negative crop is (0, 0) unless another is given.
    if "crop" in options and "negative_crop" not in options:
        then["negative_crops_coords_top_left"] = options["crop"]
    with sampled_by(options.get("sampler", "euler"), sources.base, sources.refiner):
        first = go(sources.base, noise=noise, height=height, width=width, output_type="latent", **last, **common)
        return go(sources.refiner, noise=fresh, image=to_torch(first.latents), **common, **scores, **then)


SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}
"""Class, and its settings in addition to those of SDXL's configuration for Euler."""


@contextlib.contextmanager
def sampled_by(sampler: str, *pipelines: Any) -> Iterator[None]:
    before = [pipeline.scheduler for pipeline in pipelines]
    if sampler != "euler":
        name, options = SCHEDULERS[sampler]
        for pipeline in pipelines:
            pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
    try:
        yield
    finally:
        for pipeline, scheduler in zip(pipelines, before, strict=True):
            pipeline.scheduler = scheduler


# ---- they agree ------------------------------------------------------------------------------------------------------

CASES = (case("inpaint", 3, "absent"),)
"""What is always run: in one shape, because each shape is compiled for seconds."""


def _grid() -> Iterator[Case]:
    sizes = SIZES | NEGATIVE_SIZES
    same_crop = sizes | {"negative_crop": SIZES["crop"]}
    """The crops that diffusers conditions a base on when it starts from an image."""
    scores = {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0}
    for batch, size in ((1, (64, 64)), (3, (72, 40))):
        for stage, more in (("handoff", {}), ("refine", {"refine_strength": 0.3})):
            for negative in NEGATIVES:
                yield case(stage, batch, negative, size, **more)
            yield case(stage, batch, "given", size, **more, **scores)
            yield case(stage, batch, "absent", size, **more, **SIZES)
            yield case(stage, batch, "given", size, **more, **sizes, **scores)
            yield case(stage, batch, "absent", size, guidance=1.0, **more)
            for sampler in SCHEDULERS:
                yield case(stage, batch, "absent", size, sampler=sampler, **more)
        yield case("handoff", batch, "given", size, handoff=0.55)
        for strength in (0.3, 0.5, 1.0):
            for negative in ("absent", "given"):
                yield case("image", batch, negative, size, strength=strength)
                for stage in PAINTING:
                    yield case(stage, batch, negative, size, strength=strength)
        yield case("image", batch, "absent", size, strength=0.5, guidance=1.0)
        for stage in ("image", *PAINTING):
            yield case(stage, batch, "given", size, strength=0.5, **SIZES)
            yield case(stage, batch, "given", size, strength=0.5, **same_crop)
        for negative in ("absent", "given"):
            yield case("text", batch, negative, size, pag=3.0)
            yield case("text", batch, negative, size, guidance_rescale=0.7)
            yield case("text", batch, negative, size, pag=3.0, guidance_rescale=0.7)
        yield case("text", batch, "absent", size, pag=3.0, guidance=1.0)
        yield case("text", batch, "given", size, pag=3.0, **sizes)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in _grid() if case not in CASES)],
    ids=str,
)
def test_image_matches_diffusers(case: Case, sources: Sources, note: Note) -> None:
    made, expected = ours(sources, case), theirs(sources, case)
    if case.stage in PAINTING:
        mask, original = mask_of(case.size), photograph(case.size)
        assert (made.images[:, ~mask] == original[~mask]).all(), "outside of the mask the image stays"
        made, expected = (Sampled(each.images[:, None, mask], each.latents) for each in (made, expected))
    check_agreement(str(case), made, expected, note)


# ---- what would show -------------------------------------------------------------------------------------------------

VARIED: dict[str, dict[str, dict[str, Any]]] = {
    "handoff": {
        "nothing": {},
        "share": {"handoff": 0.55},
        "sampler": {"sampler": "dpmpp_2m"},
        "guidance": {"guidance": 7.5},
        "share, score": {"handoff": 0.55, "aesthetic_score": 9.0},
        "share, negative score": {"handoff": 0.55, "negative_aesthetic_score": 1.0},
    },
    "refine": {
        "nothing": {"refine_strength": 0.3},
        "strength": {"refine_strength": 0.5},
        "sampler": {"refine_strength": 0.3, "sampler": "dpmpp_2m"},
        "strength, score": {"refine_strength": 0.5, "aesthetic_score": 9.0},
        "strength, negative score": {"refine_strength": 0.5, "negative_aesthetic_score": 1.0},
        **{name: {"refine_strength": 0.3, name: value} for name, value in SIZES.items()},
    },
    "image": {
        "nothing": {"strength": 0.5},
        "strength": {"strength": 0.3},
        "full strength": {"strength": 1.0},
        **{name: {"strength": 0.5, name: value} for name, value in SIZES.items()},
    },
    "inpaint": {"nothing": {}, "strength": {"strength": 0.5}},
    "paint 9": {"nothing": {}, "strength": {"strength": 0.5}},
    "text": {
        "nothing": {},
        "perturbed": {"pag": 3.0},
        "perturbed less": {"pag": 1.5},
        "rescaled": {"guidance_rescale": 0.7},
        "rescaled less": {"guidance_rescale": 0.3},
        "both": {"pag": 3.0, "guidance_rescale": 0.7},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", VARIED)
def test_everything_that_is_varied_changes_the_image(stage: str, sources: Sources) -> None:
    """Otherwise agreement would prove nothing."""
    size = (64, 64)
    made = {name: theirs(sources, case(stage, 1, "given", size, **change)) for name, change in VARIED[stage].items()}
    plain = case(stage, 1, "given", size, **VARIED[stage]["nothing"])
    made |= {name: theirs(sources, plain._replace(negative=name)) for name in ("absent", "empty")}
    made["noise"] = theirs(sources, plain, noise=plain.noise()[:, ::-1].copy())
    if stage == "refine":
        made["fresh noise"] = theirs(sources, plain, fresh=plain.fresh_noise()[:, ::-1].copy())
    if stage in ("image", *PAINTING):
        made["image"] = theirs(sources, plain, image=photograph(size, 1))
    if stage in PAINTING:
        made["mask"] = theirs(sources, plain, mask=mask_of(size, 1))
    identical = {
        (one, other): difference
        for one, other in itertools.combinations(made, 2)
        if (difference := apart(made[one].latents, made[other].latents)) < 100 * TOLERANCE
    }
    assert not identical


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["image", "inpaint"])
def test_diffusers_leaves_the_negative_crop_out(stage: str, sources: Sources) -> None:
    """`_get_add_time_ids` puts the prompt's there. Should it be mended, the cases above need not give the same."""
    plain = case(stage, 1, "given", (64, 64), strength=0.5, **SIZES | NEGATIVE_SIZES)
    other = case(
        stage, 1, "given", (64, 64), strength=0.5, **SIZES | NEGATIVE_SIZES | {"negative_crop": Position(64, 5)}
    )
    assert apart(theirs(sources, plain).latents, theirs(sources, other).latents) == 0
    third = case(stage, 1, "given", (64, 64), strength=0.5, **SIZES | NEGATIVE_SIZES | {"crop": Position(64, 5)})
    assert apart(theirs(sources, plain).latents, theirs(sources, third).latents) > 100 * TOLERANCE
