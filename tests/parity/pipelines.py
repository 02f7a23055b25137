"""Tiny pipelines of diffusers with random weights, their prompts and sizes, and the tolerance for their images.

They are built by diffusers and transformers alone; only the tokenizers' files are ours.

Tolerance: rounding, 2e-5 of a network's output at most (`agreement.py`), is multiplied by the guidance and fed back at
every step; a few 1e-6 of the largest latent are measured, 1e-4 are allowed. An image is rounded to 256 levels, where
any difference can change a byte by one level, but only few bytes: with truncation instead, half of them would differ.

The prompts have no "!", which transformers treats as padding in the tokenizers that pad with it; ours does not.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from agreement import Note
from reference import diffusers, randomise, transformers

from sdxl_jax.model import ModelConfig
from sdxl_jax.weights.formats import diffusers as folders

TOLERANCE, LEVELS, SHARE = 1e-4, 1, 0.01
"""Of the largest latent; of 255; of the bytes of an image that may differ at all."""
STEPS = 20

Size = tuple[int, int]
"""(height, width) or (top, left), in pixels."""


# ---- the pipelines ---------------------------------------------------------------------------------------------------


def tower(width: int, layers: int, heads: int, activation: str, projection_dim: int | None = None) -> Any:
    """Token numbers as in the official files, mistakes included."""
    kind = transformers.CLIPTextModel if projection_dim is None else transformers.CLIPTextModelWithProjection
    fields = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408}
    return kind(
        transformers.CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_act=activation,
            projection_dim=projection_dim or width,
            **fields,
        )
    )


def vae(scale: float) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=scale,
    )


def unet(attends: Sequence[bool], **options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        down_block_types=["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        up_block_types=["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=8,
        **options,
    )


def scheduler(prediction: str) -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        timestep_spacing="leading",
        steps_offset=1,
    )


def sdxl(tokenizers: Sequence[Any], kind: Any = diffusers.StableDiffusionXLPipeline, **unet_options: Any) -> Any:
    return kind(
        vae=vae(0.13025),
        text_encoder=tower(32, 2, 2, "quick_gelu"),
        text_encoder_2=tower(48, 3, 3, "gelu", projection_dim=40),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet(
            [False, True],
            transformer_layers_per_block=[1, 2],
            attention_head_dim=[2, 4],
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=40 + 6 * 16,
            use_linear_projection=True,
            **unet_options,
        ),
        scheduler=scheduler("epsilon"),
        add_watermarker=False,
    )


def sd(tokenizers: Sequence[Any], activation: str, prediction: str, heads: Any, linear: bool) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(0.18215),
        text_encoder=tower(32, 2, 2, activation),
        tokenizer=tokenizers[0],
        unet=unet([True, False], attention_head_dim=heads, cross_attention_dim=32, use_linear_projection=linear),
        scheduler=scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Source(NamedTuple):
    """A tiny pipeline of diffusers."""

    pipeline: Any
    path: Path
    """Where it has saved itself."""


PARTS = ("vae", "text_encoder", "text_encoder_2", "unet")


def build(published: ModelConfig, make: Callable[[Sequence[Any]], Any], folder: Path) -> Source:
    """The pipeline that `make` makes of the published model's tokenizers, random."""
    folders.write_folder(published, folder / "published")
    paths = [folder / "published" / tower.name.replace("text_encoder", "tokenizer") for tower in published.text]
    pipeline = make([transformers.CLIPTokenizer.from_pretrained(path) for path in paths])
    for seed, part in enumerate(PARTS):
        if (module := getattr(pipeline, part, None)) is not None:
            randomise(module.eval(), seed)
    pipeline.vae.decoder.conv_out.weight.data *= 0.4  # most pixels neither black nor white
    pipeline.vae.quant_conv.weight.data *= 8  # latents of images as large as noise
    return finish(pipeline, folder / "model")


def finish(pipeline: Any, path: Path) -> Source:
    """Quiet, and saved."""
    pipeline.unet.conv_out.weight.data *= 0.8  # latents not much larger than the noise that they began as
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(path)
    return Source(pipeline, path)


# ---- the images ----------------------------------------------------------------------------------------------------

LONG = "oil painting of a red house by the sea, " * 12
PROMPTS = ("a cat on a mat", "Two cafés, 3 o'clock", LONG)
"""The last one is longer than what the towers read."""


class Geometry(NamedTuple):
    """Sizes and crop that an SDXL is conditioned on; None: the image's own size."""

    original: Size | None = None
    crop: Size = (0, 0)
    target: Size | None = None


NEGATIVES = {"absent": None, "empty": "", "given": "blurry, ugly"}
GEOMETRIES: dict[str, tuple[Geometry, Geometry | None]] = {
    "own sizes": (Geometry(), None),
    "sizes given": (Geometry((1023, 333), (5, 64), (512, 1024)), None),
    "negative sizes given": (Geometry((1023, 333), (5, 64), (512, 1024)), Geometry((301, 777), (9, 0), (96, 48))),
}
"""For the prompt, and for the negative prompt; None: the same."""


class Sampled(NamedTuple):
    images: np.ndarray
    """Bytes, images height width 3."""
    latents: np.ndarray
    """In our layout, scaled as the UNet sees them."""


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of latents, as a share of the largest latent."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def check_image(sampled: Sampled) -> None:
    """Asserts that a difference would be visible in the image."""
    assert np.isfinite(sampled.latents).all()
    assert 1 < sampled.latents.std() < 20
    assert np.mean((sampled.images == 0) | (sampled.images == 255)) < 0.05
    assert (sampled.images.std(axis=(1, 2)) > 20).all(), "a colour of an image hardly varies"


def check_agreement(what: str, ours: Sampled, theirs: Sampled, note: Note) -> None:
    assert ours.images.shape == theirs.images.shape
    assert ours.latents.shape == theirs.latents.shape
    check_image(theirs)
    difference = apart(ours.latents, theirs.latents)
    levels = int(np.abs(ours.images.astype(int) - theirs.images.astype(int)).max())
    share = float(np.mean(ours.images != theirs.images))
    measured = f"images {levels} levels (allowed {LEVELS}) in {share:.2%} (allowed {SHARE:.0%})"
    note(f"image: {what}", f"{difference:.1e}  (allowed {TOLERANCE:.0e}), {measured}")
    assert difference <= TOLERANCE, f"{what}: latents differ by {difference:.2e} of the maximum"
    assert levels <= LEVELS, f"{what}: a byte of the images differs by {levels} levels"
    assert share <= SHARE, f"{what}: {share:.2%} of the images' bytes differ"
