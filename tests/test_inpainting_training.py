"""Training for inpainting: masks, what the UNet sees, and a beginning that changes nothing."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from sdxl_jax import sharding
from sdxl_jax.aot import compile as aot_compile
from sdxl_jax.arrays import Batch, MicroConditioning, flatten, unflatten
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.config import InpaintingConfig, TrainConfig
from sdxl_jax.diffusion.continuous import FlowConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.settings import Metric
from sdxl_jax.models import unet
from sdxl_jax.models.vae import Posterior
from sdxl_jax.sampling import init_images, program
from sdxl_jax.sampling.generate import inpaint
from sdxl_jax.sizes import Size
from sdxl_jax.training import loop
from sdxl_jax.training.objectives import denoising, inpainting, objective_of
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.load import load_model

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")

NINE = dataclasses.replace(tiny.MODEL, unet=dataclasses.replace(tiny.MODEL.unet, in_channels=9))
KERNEL = "unet/conv_in/kernel"


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    base = dataclasses.replace(tiny.train_config(folder), model=NINE, inpainting=InpaintingConfig())
    for name, fields in changes.items():
        value = dataclasses.replace(getattr(base, name), **fields) if isinstance(fields, dict) else fields
        base = dataclasses.replace(base, **{name: value})
    return base


def masks(count: int, height: int = 64, width: int = 96, **fields: Any) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    draw = functools.partial(inpainting.random_mask, height=height, width=width, config=InpaintingConfig(**fields))
    return np.asarray(jax.jit(jax.vmap(draw))(keys))


# Masks


def test_a_quarter_of_the_masks_hide_the_whole_image_and_all_hide_some() -> None:
    drawn = masks(400)
    shares = drawn.mean((1, 2))
    # Five standard errors of a share of 0.25; strokes hardly ever cover everything.
    assert (shares == 1).mean() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 400) ** 0.5)
    assert shares.min() > 0
    assert len(np.unique(shares)) > 200, "of several sizes"
    assert shares.min() < 0.1 and shares[shares < 1].max() > 0.6


def test_boxes_are_up_to_three_rectangles_away_from_the_border() -> None:
    drawn = masks(100, 128, 96, whole_share=0.0, box_share=1.0)
    margin, least = int(96 / 256 * 10), int(96 / 256 * 30)
    assert not drawn[:, :margin].any() and not drawn[:, :, -margin:].any()
    for mask in drawn[:20]:
        rows = [tuple(row) for row in mask]
        # Rows of a union of three rectangles change at most six times.
        assert sum(above != below for above, below in itertools.pairwise(rows)) <= 6
        assert mask.sum(0).max() >= least - 1 and mask.sum(1).max() >= least - 1


def test_strokes_are_lines_of_some_width() -> None:
    """Each line of a stroke hides what is within half its width of it, and nothing else."""
    start, end = jnp.array([[10.0, 10.0]]), jnp.array([[10.0, 30.0]])
    distance = np.asarray(inpainting._distance(20, 40, start, end))[0]
    assert distance[9, 20] == distance[10, 20] == pytest.approx(0.5)
    assert distance[10, 34] == pytest.approx(np.hypot(0.5, 4.5))
    point = np.asarray(inpainting._distance(20, 40, start, start))[0]
    assert point[13, 10] == pytest.approx(np.hypot(3.5, 0.5))
    strokes = masks(50, 16, 24, whole_share=0.0, box_share=0.0)  # a line of 5 of 256 pixels is a third of one here
    assert strokes.any((1, 2)).all()
    assert len({mask.tobytes() for mask in strokes}) == 50


# What the UNet sees


def batch_of(count: int = 2) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 48, 3), np.uint8)
    zeros = np.zeros((count, 2), np.int32)
    return Batch(pixels, {}, MicroConditioning(zeros, zeros, zeros), np.arange(count), np.zeros(count, bool))


def pooled(_: Any, __: Any, image: jax.Array, ___: Any = None) -> Posterior:
    """An autoencoder that averages 8 × 8 pixels, and repeats a channel."""
    latent = image.reshape(len(image), 4, 8, 6, 8, 3).mean((2, 4))
    return Posterior(jnp.concatenate([latent, latent[..., :1]], -1), jnp.full((len(image), 4, 6, 4), -jnp.inf))


@pytest.mark.parametrize("law", [None, FlowConfig()])
def test_the_unet_sees_the_latent_the_mask_and_the_masked_image_as_in_sampling(
    law: FlowConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def apply(_: Any, __: Any, x: jax.Array, *___: Any, **____: Any) -> jax.Array:
        seen.append(np.asarray(x))
        return x[..., :4]

    monkeypatch.setattr(inpainting, "random_mask", jax.jit(inpainting.random_mask, static_argnums=(1, 2, 3)))
    monkeypatch.setattr(denoising, "merge", lambda *_: {"unet": {}, "vae": {}})
    monkeypatch.setattr(denoising.vae, "encode", pooled)
    monkeypatch.setattr(denoising.unet, "apply", apply)
    monkeypatch.setattr(
        denoising.text, "encode", lambda *_: TextConditioning(jnp.zeros((2, 77, 16)), jnp.zeros((2, 8)))
    )
    monkeypatch.setattr(
        denoising, "unconditional_text", lambda *_: TextConditioning(jnp.zeros((1, 77, 16)), jnp.zeros((1, 8)))
    )
    model = NINE if law is None else dataclasses.replace(NINE, noise=law, prediction=Prediction.FLOW)
    config, batch = config_of(Path("unused"), model=model), batch_of()
    keys = jax.random.split(jax.random.key(5), 2)
    denoising.batch_loss({"unet": {}}, {}, batch._replace(base_target=np.ones(2, bool)), keys, config, {})
    one, of_base = seen
    np.testing.assert_array_equal(one, of_base)
    for row, key in enumerate(keys):
        _, dropout_key, _ = jax.random.split(key, 3)
        hidden = np.asarray(
            inpainting.random_mask(jax.random.fold_in(dropout_key, 3), 32, 48, config.inpainting or InpaintingConfig())
        )
        np.testing.assert_array_equal(one[row, ..., 4:5], init_images.latent_mask(hidden, 8))
        assert isinstance(batch.image, np.ndarray)
        masked = program.encode(
            {},
            jnp.asarray(batch.image[row][None]),
            jnp.asarray(hidden)[None, :, :, None],
            config=model,
            compute=config.compute,
        )
        np.testing.assert_allclose(one[row, ..., 5:], masked[0], atol=1e-7)
        grey = np.asarray(inpainting.masked(batch.image[row], hidden))
        assert (grey[hidden] == 128).all() and (grey[~hidden] == batch.image[row][~hidden]).all()


# Where it starts


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a model that sees the latent alone."""
    path = tmp_path_factory.mktemp("model") / "four.safetensors"
    convert(tiny.random_model(tiny.MODEL, 0), path, "single-file", progress=False)
    return path


def test_new_input_channels_begin_at_zero(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(Path("unused"), training={"init_from": (str(four),)})
    objective = objective_of(config)
    initial = objective.initial_weights(sharding.make_mesh(config.mesh), progress=False)
    assert "its inputs for mask and masked image begin at zero" in capsys.readouterr().out
    theirs = flatten(load_model(four).params)
    assert initial.keys() == theirs.keys()
    assert initial[KERNEL].shape == (3, 3, 9, 8)
    for path, value in initial.items():
        ours = np.asarray(value)
        if path == KERNEL:
            assert not ours[:, :, 4:].any()
            ours = ours[:, :, :4]
        np.testing.assert_array_equal(ours, theirs[path], err_msg=path)


def test_zeros_that_would_stay_are_refused(four: Path) -> None:
    config = config_of(Path("unused"), training={"init_from": (str(four),), "trainable": ("^unet/up_blocks",)})
    with pytest.raises(InputError, match=r"of 4 input channels, .* unet/conv_in/kernel is not trained"):
        objective_of(config).check_start()


@pytest.mark.slow
def test_the_first_prediction_is_that_of_the_model_without_a_mask(four: Path) -> None:
    """Float32: the sums of the first convolution have other terms, of zero, in between."""
    config = config_of(Path("unused"), training={"init_from": (str(four),)})
    params = objective_of(config).initial_weights(sharding.make_mesh(config.mesh), progress=False)
    rng = np.random.default_rng(1)
    x, channels, context, vector = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, 4, 4, 4), (1, 4, 4, 5), (1, 77, 16), (1, 32))
    )
    given = jnp.array([500]), context, vector
    theirs = load_model(four).params["unet"]
    ours = unflatten(params)["unet"]
    expected = unet.apply(tiny.MODEL.unet, theirs, x, *given)
    made = unet.apply(NINE.unet, ours, jnp.concatenate([x, channels], -1), *given)
    np.testing.assert_allclose(made, expected, atol=1e-6 * float(jnp.abs(expected).max()))


# Configurations


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inpainting": None}, r"in_channels=9, .* receives the latent alone. Set it to 4, or set inpainting to train"),
        ({"model": tiny.MODEL}, r"in_channels=4, .* receives the latent, a mask .* Set it to 9"),
        ({"data": {"cache": "cache", "crops_per_image": 1}}, "data.cache=cache holds the latents of whole images"),
        ({"inpainting": {"box_share": 1.5}}, "inpainting.box_share=1.5 is out of range"),
        ({"validation": {"metrics": (Metric.FID,)}}, "validation.metrics compares images sampled from captions alone"),
    ],
)
def test_what_does_not_fit_inpainting_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config_of(Path("unused"), **changes).check()


# Runs


@pytest.mark.slow
def test_a_run_shows_inpainted_images_resumes_and_is_sampled_with_a_mask(four: Path, tmp_path: Path) -> None:
    folder = tiny.make_folder(tmp_path / "images")
    validation = {"every_steps": 4, "prompts": ("one", "two"), "sizes": ((32, 32),), "steps": 2}
    whole = config_of(folder, training={"init_from": (str(four),)}, validation=validation)
    half = dataclasses.replace(whole, training=dataclasses.replace(whole.training, steps=2))
    loop.train(whole, tmp_path / "whole", progress=False)
    for config in (half, whole):
        loop.train(config, tmp_path / "stopped", progress=False)
    runs = [load_model(tmp_path / name) for name in ("whole", "stopped")]
    for path, value in flatten(runs[0].params).items():
        np.testing.assert_array_equal(value, flatten(runs[1].params)[path], err_msg=path)
    assert np.asarray(flatten(runs[0].params)[KERNEL])[:, :, 4:].any(), "the mask is learnt from"
    with Image.open(tmp_path / "whole" / "samples" / "step_00000004.png") as grid:
        assert grid.width >= 3 * 32, "the masked image and two inpainted ones"
    image = np.full((32, 32, 3), 100, np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[:, 16:] = True
    (made,) = inpaint(runs[0], ["one"], image, mask, steps=2)
    np.testing.assert_array_equal(made[:, :16], image[:, :16])
    assert (made[:, 16:] != 100).any()


@pytest.mark.slow
def test_the_sampler_of_such_a_configuration_can_be_compiled_ahead() -> None:
    config = config_of(Path("unused"))
    _, sampler, _ = aot_compile._sampler_programs(config, sharding.make_mesh(config.mesh), Size(32, 32), 1)
    mask_channels = sampler.arguments[-1]
    assert mask_channels.shape == (1, 4, 4, 5)
    assert "1x4x4x9xf32" in sampler.function.lower(*sampler.arguments).as_text()
