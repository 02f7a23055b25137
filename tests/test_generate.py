"""From prompts to images and files, on a tiny model with random weights.

Compiling takes most of the time: the tests share sizes and settings, so that few programs are compiled.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import MODEL, random_model, train_config

from sdxl_jax import sharding
from sdxl_jax.config import ValidationConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.model import Model, UnconditionalKind
from sdxl_jax.samplers.steps import SAMPLERS, Levels, Moment, Spacing
from sdxl_jax.sampling import program
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png
from sdxl_jax.sampling.generate import Generated, encode_prompt, generate, micro_rows, text_to_image
from sdxl_jax.sampling.nonfinite import NonFiniteError
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.program import Inputs, Recipe, SampledBatch
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.sizes import Position, Size
from sdxl_jax.training.objectives.denoising import Denoising
from sdxl_jax.training.observe.validation import write_grid
from sdxl_jax.training.processes import Processes

PROMPTS = ["a red cube", "two green birds"]
SETTINGS: dict[str, Any] = {"height": 16, "width": 24, "steps": 2, "batch_size": 2}
LATENT = (2, 3, 4)
SAMPLE: Any = program.STAGED.denoise
DECODE: Any = program.STAGED.decode


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, 0)


@pytest.fixture(scope="module")
def reference(model: Model) -> Generated:
    """What the other tests compare with: two prompts, one image each, seed 0."""
    return generate(model, PROMPTS, seed=0, **SETTINGS)


def unlike(one: Generated, other: Generated) -> float:
    """Largest difference of the latents, as a share of their largest value."""
    return float(np.abs(one.latents - other.latents).max() / np.abs(other.latents).max())


# The same image, compiled for another batch size: float32 sums in another order, through two steps of the network.
SAME = 1e-4
# What counts as an effect: ten times that.
EFFECT = 1e-3


def assert_same_images(ours: np.ndarray, expected: np.ndarray) -> None:
    """Within one level of 0..255: where a value lies between two, the last digit of a float32 decides."""
    assert ours.dtype == expected.dtype == np.uint8
    assert np.abs(ours.astype(int) - expected).max() <= 1


# Images


def test_images_are_bytes_of_the_given_size(model: Model, reference: Generated) -> None:
    images = text_to_image(model, PROMPTS, **SETTINGS)
    assert images.dtype == np.uint8
    assert images.shape == (2, 16, 24, 3)
    assert reference.latents.shape == (2, *LATENT)
    assert reference.latents.dtype == np.float32
    np.testing.assert_array_equal(images, reference.images)
    assert 20 < images.mean() < 235, "neither black nor white, where nothing could be compared"
    assert (images[0] != images[1]).mean() > 0.5


def test_the_size_is_the_models_own_unless_another_is_given(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []

    def spy(inputs: Inputs, recipe: Recipe, callback: Any) -> SampledBatch:
        ((positive, negative),) = inputs.micro
        conditioning = np.asarray(positive.original_size)[0].tolist(), np.asarray(negative.target_size)[0].tolist()
        sizes.append((inputs.noise.shape[1:3], *conditioning))
        return finite_batch(inputs, jnp.zeros((1, 8, 8, 3), jnp.uint8), inputs.noise)

    monkeypatch.setattr(program, "staged", spy)
    config = dataclasses.replace(MODEL, default_size=(16, 40))
    generate(Model(config, model.params), PROMPTS[:1])
    generate(Model(config, model.params), PROMPTS[:1], height=24)
    generate(Model(config, model.params), PROMPTS[:1], width=8)
    assert sizes == [((h // 8, w // 8), [h, w], [h, w]) for h, w in ((16, 40), (24, 40), (16, 8))]


def test_the_same_seed_gives_the_same_bytes_and_seed_0_is_a_seed(model: Model, reference: Generated) -> None:
    # Elsewhere `if seed:` takes seed 0 for no seed, and every image of it is another.
    np.testing.assert_array_equal(generate(model, PROMPTS, seed=0, **SETTINGS).images, reference.images)
    other = [generate(model, PROMPTS, seed=seed, **SETTINGS) for seed in (1, 2)]
    assert unlike(other[0], reference) > 0.1
    assert unlike(other[0], other[1]) > 0.1


def test_an_image_does_not_depend_on_the_number_of_images_or_the_batch_size(model: Model) -> None:
    four = generate(model, PROMPTS[:1], num_images=4, **SETTINGS)
    assert len({image.tobytes() for image in four.images}) == 4
    # Three in batches of two: the same program, the last batch filled up. Bit for bit.
    three = generate(model, PROMPTS[:1], num_images=3, **SETTINGS)
    np.testing.assert_array_equal(three.images, four.images[:3])
    np.testing.assert_array_equal(three.latents, four.latents[:3])
    # One at a time is another program.
    single = generate(model, PROMPTS[:1], num_images=2, **{**SETTINGS, "batch_size": 1})
    np.testing.assert_allclose(single.latents, four.latents[:2], atol=SAME * np.abs(four.latents).max())
    assert_same_images(single.images, four.images[:2])


def test_images_come_in_the_order_of_prompts_then_images(model: Model) -> None:
    both = generate(model, PROMPTS, num_images=2, **SETTINGS)
    first = generate(model, PROMPTS[:1], num_images=2, **SETTINGS)
    np.testing.assert_array_equal(both.images[:2], first.images)
    # Images of the second prompt are numbers 2 and 3, whose noise is their own.
    again = generate(model, [PROMPTS[1]] * 4, **SETTINGS)
    np.testing.assert_array_equal(both.images[2:], again.images[2:])


def test_another_prompt_of_the_same_shape_compiles_nothing(model: Model, reference: Generated) -> None:
    before = SAMPLE._cache_size(), DECODE._cache_size()
    assert min(before) > 0
    changed = generate(
        model,
        ["a much longer prompt with many more words than the others", ""],
        negative_prompts=["blurry", None],
        guidance=7.5,
        seed=3,
        original_size=Size(40, 50),
        crop=Position(1, 2),
        target_size=Size(16, 24),
        **SETTINGS,
    )
    assert unlike(changed, reference) > EFFECT
    assert (SAMPLE._cache_size(), DECODE._cache_size()) == before


# Guidance and negative prompts


def traced(inputs: Inputs, recipe: Recipe, callback: Any = None) -> SampledBatch:
    """Zeros instead of images and latents: the program is traced, not compiled."""
    shapes = jax.eval_shape(functools.partial(program.generate_batch, recipe=recipe), inputs)
    return finite_batch(inputs, jnp.zeros(shapes.images.shape, shapes.images.dtype), jnp.zeros(shapes.latents.shape))


def finite_batch(inputs: Inputs, images: jax.Array, latents: jax.Array) -> SampledBatch:
    """As from a program in which all numbers are finite."""
    rows = sum(len(each.plan.timestep) for each in inputs.segment_arrays)
    return SampledBatch(images, latents, jnp.full(len(images), rows), jnp.ones(len(images), bool))


def test_guidance_1_evaluates_the_prompt_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    evaluate = program.unet.apply

    def spy(config: Any, params: Any, latent: jax.Array, *rest: Any, **options: Any) -> jax.Array:
        batches.append(len(latent))
        return evaluate(config, params, latent, *rest, **options)

    monkeypatch.setattr(program.unet, "apply", spy)
    monkeypatch.setattr(program, "staged", traced)
    for guidance, expected in ((1.0, 2), (5.0, 4), (0.0, 2), (0.5, 2), (1.001, 4)):
        batches.clear()
        generate(model, PROMPTS, guidance=guidance, **SETTINGS)
        assert set(batches) == {expected}, guidance


def test_guidance_1_is_the_limit_of_guidance(model: Model, reference: Generated) -> None:
    # If prompt and negative prompt were mixed up, guidance near 1 would be near the negative.
    alone = generate(model, PROMPTS, guidance=1.0, **SETTINGS)
    nearly = generate(model, PROMPTS, guidance=1.00001, **SETTINGS)
    assert unlike(nearly, alone) < SAME
    assert unlike(reference, alone) > EFFECT, "guidance 5 is not 1"


@pytest.mark.parametrize("guidance", [0.0, -0.0, 0.5])
def test_guidance_up_to_1_is_off_as_in_diffusers(guidance: float, model: Model) -> None:
    # Elsewhere 0 is the negative prompt's image, whatever the prompt; cards say guidance_scale=0.0 for off.
    alone = generate(model, PROMPTS, guidance=1.0, **SETTINGS)
    off = generate(model, PROMPTS, negative_prompts=PROMPTS[::-1], guidance=guidance, **SETTINGS)
    np.testing.assert_array_equal(off.images, alone.images)
    np.testing.assert_array_equal(off.latents, alone.latents)
    assert (off.images[0] != off.images[1]).any()


def test_options_without_effect_are_noted() -> None:
    note = "guidance=0 turns guidance off: it needs a scale above 1. No effect: the negative prompt, negative-crop"
    assert Options(guidance=0.0, negative_crop=Position(0, 8)).notes(MODEL, "blurry") == [note]
    assert Options(guidance=0.5).notes(MODEL) == ["guidance=0.5 turns guidance off: it needs a scale above 1"]
    assert Options(guidance=1.0).notes(MODEL) == Options(guidance=0.0).notes(MODEL) == []
    assert Options().notes(MODEL, "blurry") == Options(guidance=1.5).notes(MODEL, "blurry") == []
    (distilled,) = Options().notes(dataclasses.replace(MODEL, distilled=True), "blurry")
    assert distilled.startswith("guidance=1 turns guidance off")


def test_no_negative_prompt_is_zeros_in_sdxl_and_not_the_empty_one(model: Model, reference: Generated) -> None:
    empty = generate(model, PROMPTS, negative_prompts=["", ""], **SETTINGS)
    assert unlike(empty, reference) > EFFECT
    # Each image for itself.
    mixed = generate(model, PROMPTS, negative_prompts=[None, ""], **SETTINGS)
    np.testing.assert_array_equal(mixed.images[0], reference.images[0])
    np.testing.assert_array_equal(mixed.images[1], empty.images[1])


def test_no_negative_prompt_is_the_empty_one_in_models_that_were_trained_so(model: Model) -> None:
    other = Model(dataclasses.replace(MODEL, unconditional=UnconditionalKind.EMPTY), model.params)
    absent = generate(other, PROMPTS, **SETTINGS)
    np.testing.assert_array_equal(absent.images, generate(other, PROMPTS, negative_prompts=["", ""], **SETTINGS).images)
    assert unlike(absent, generate(other, PROMPTS, negative_prompts=["blurry", "grey"], **SETTINGS)) > EFFECT
    # "" means the same in both.
    sdxl = generate(model, PROMPTS, negative_prompts=["", ""], **SETTINGS)
    assert unlike(absent, sdxl) < SAME


def test_each_prompt_has_its_own_negative_prompt_also_for_several_images(model: Model) -> None:
    several = generate(model, PROMPTS, negative_prompts=["blurry", "grey"], num_images=2, **SETTINGS)
    spelt_out = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    negatives = ["blurry", "blurry", "grey", "grey"]
    expected = generate(model, spelt_out, negative_prompts=negatives, **SETTINGS)
    np.testing.assert_array_equal(several.images, expected.images)


# Sizes and crops


SIZES: dict[str, Any] = {"original_size": Size(60, 24), "crop": Position(0, 9), "target_size": Size(16, 40)}


@pytest.mark.parametrize("name", SIZES)
def test_each_size_changes_the_image_for_the_prompt_and_for_the_negative(
    name: str, model: Model, reference: Generated
) -> None:
    # Elsewhere the negative crop is ignored.
    own: Any = Position(0, 0) if name == "crop" else Size(16, 24)
    both = generate(model, PROMPTS, **{name: SIZES[name]}, **SETTINGS)
    prompt = generate(model, PROMPTS, **{name: SIZES[name], f"negative_{name}": own}, **SETTINGS)
    negative = generate(model, PROMPTS, **{f"negative_{name}": SIZES[name]}, **SETTINGS)
    versions = [reference, both, prompt, negative]
    for index, one in enumerate(versions):
        for other in versions[:index]:
            assert unlike(one, other) > EFFECT


def test_negative_sizes_are_right_for_every_image_of_a_batch(model: Model) -> None:
    # Elsewhere they are right at batch 1 alone.
    given: dict[str, Any] = {
        **{"original_size": Size(50, 40), "crop": Position(3, 1)},
        **{"negative_original_size": Size(20, 90), "negative_crop": Position(0, 7)},
        **{"negative_target_size": Size(8, 8), "num_images": 2},
    }
    together = generate(model, PROMPTS[:1], **given, **SETTINGS)
    one_by_one = generate(model, PROMPTS[:1], **given, **{**SETTINGS, "batch_size": 1})
    assert unlike(together, one_by_one) < SAME
    assert_same_images(together.images, one_by_one.images)


def test_sizes_are_height_then_width_and_by_default_the_images_own() -> None:
    for rows in micro_rows(MODEL, Options(), 2, Size(24, 40)):
        np.testing.assert_array_equal(rows.original_size, [[24, 40]] * 2)
        np.testing.assert_array_equal(rows.crop_top_left, [[0, 0]] * 2)
        np.testing.assert_array_equal(rows.target_size, [[24, 40]] * 2)
        assert {np.asarray(array).dtype for array in rows[:3]} == {np.dtype(np.int32)}
    given = Options(
        original_size=Size(1, 2),
        crop=Position(3, 4),
        target_size=Size(5, 6),
        aesthetic_score=7.5,
        negative_crop=Position(0, 0),
    )
    positive, negative = micro_rows(MODEL, given, 1, Size(24, 40))
    assert [np.asarray(array).ravel().tolist() for array in positive[:4]] == [[1, 2], [3, 4], [5, 6], [7.5]]
    assert [np.asarray(array).ravel().tolist() for array in negative[:4]] == [[1, 2], [0, 0], [5, 6], [2.5]]


def test_the_negative_has_its_own_aesthetic_score() -> None:
    def conditioning(**options: Any) -> list[list[float]]:
        both = micro_rows(MODEL, Options(**options), 2, Size(8, 8))
        return [np.asarray(rows.aesthetic_score).tolist() for rows in both]

    assert conditioning() == [[6.0] * 2, [2.5] * 2]
    assert conditioning(aesthetic_score=9.0) == [[9.0] * 2, [2.5] * 2]
    assert conditioning(negative_aesthetic_score=1.0) == [[6.0] * 2, [1.0] * 2]


# Noise


def test_initial_noise_takes_the_place_of_the_seed(model: Model) -> None:
    noise = np.random.default_rng(0).standard_normal((2, *LATENT), np.float32)
    prompts = PROMPTS[:1] * 2
    first = generate(model, prompts, init_noise=noise, **SETTINGS)
    np.testing.assert_array_equal(first.images, generate(model, prompts, init_noise=noise, seed=5, **SETTINGS).images)
    # Each image has its own row of it.
    swapped = generate(model, prompts, init_noise=noise[::-1].copy(), **SETTINGS)
    np.testing.assert_array_equal(swapped.images, first.images[::-1])
    assert (first.images[0] != first.images[1]).any()


# Refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.5])
@pytest.mark.parametrize(
    "name",
    [
        *("guidance", "guidance_rescale", "guidance_interval", "pag", "eta", "strength", "handoff", "refine_strength"),
        *("aesthetic_score", "negative_aesthetic_score"),
    ],
)
def test_every_number_out_of_its_range_is_refused_with_the_range(name: str, value: float) -> None:
    given: Any = (value, 1.0) if name == "guidance_interval" else value
    with pytest.raises(InputError, match=rf"^{name}=.*(out of range. Give 0 to|expected two numbers of 0 to 1)"):
        Options(**{name: given}).check(MODEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 12}, "height 12 × width 24: expected positive multiples of 8"),
        ({"width": 20}, "height 16 × width 20: expected positive multiples of 8"),
        ({"height": 0}, "height 0 × width 24: expected positive multiples of 8"),
        ({"width": -8}, "height 16 × width -8: expected positive multiples of 8"),
        ({"steps": 0}, "steps=0 is out of range. Give 1 to 1000"),
        ({"steps": 1001}, "steps=1001 is out of range. Give 1 to 1000"),
        ({"sampler": "eular"}, r"no sampler 'eular'. Known, nearest first: euler, "),
        ({"sampler": "ddimm"}, r"no sampler 'ddimm'. Known, nearest first: ddim, "),
        ({"seed": -1}, "seed=-1 is out of range. Give 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 is out of range. Give 0 to 4294967295"),
        ({"guidance": 1e39}, r"guidance=1e\+39 is out of range. Give 0 to 1000"),
        ({"num_images": 0}, "num_images=0 is out of range. Give 1 or more"),
        ({"batch_size": 0}, "batch_size=0 is out of range. Give 1 or more"),
        ({"prompts": []}, "There are no prompts. Give at least one"),
        ({"negative_prompts": ["blurry"]}, "1 negative prompts for 2 prompts. Give one per prompt, or none"),
        ({"negative_prompts": []}, "0 negative prompts for 2 prompts. Give one per prompt, or none"),
        (
            {"init_noise": np.full((2, *LATENT), np.inf, np.float32)},
            "initial noise has non-finite values",
        ),
        (
            {"init_noise": np.zeros((2, 3, 2, 4), np.float32)},
            "initial noise has the shape 2 × 3 × 2 × 4, expected 2 × 2 × 3 × 4 .*latent height.*Give noise of that",
        ),
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_compiled(
    changes: dict[str, Any], message: str, model: Model
) -> None:
    before = SAMPLE._cache_size()
    with pytest.raises(InputError, match=message):
        generate(model, **{"prompts": PROMPTS, **SETTINGS, **changes})
    assert SAMPLE._cache_size() == before


def test_a_model_with_parts_missing_is_refused_by_their_names(model: Model) -> None:
    alone = model._replace(params={"vae": model.params["vae"]})
    with pytest.raises(InputError, match=r"no unet, text_encoder, text_encoder_2, only vae\. .*--parts-from"):
        generate(alone, PROMPTS, **SETTINGS)
    with pytest.raises(InputError, match=r"no text_encoder, text_encoder_2, only vae"):
        encode_prompt(alone, PROMPTS)


def test_a_model_for_inpainting_is_refused(model: Model) -> None:
    config = dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, in_channels=9))
    with pytest.raises(
        InputError, match=r"takes 9 channels, the latent has 4: a model for inpainting. Give an init image and a mask"
    ):
        generate(model._replace(config=config), PROMPTS, **SETTINGS)


def test_zero_terminal_snr_is_sampled_without_infinities(model: Model) -> None:
    rescaled = dataclasses.replace(MODEL.schedule, zero_terminal_snr=True)
    config = dataclasses.replace(MODEL, schedule=rescaled, prediction=Prediction.V)
    made = generate(Model(config, model.params), PROMPTS, timestep_spacing=Spacing.TRAILING, **SETTINGS)
    assert np.isfinite(made.latents).all()


# Non-finite images


DAMAGED = {
    "unet": ("unet", "conv_in", "kernel"),
    "vae": ("vae", "decoder", "conv_out", "kernel"),
    "text_encoder": ("text_encoder", "token_embedding", "embedding"),
    "text_encoder_2": ("text_encoder_2", "token_embedding", "embedding"),
}


def damaged(tree: Any, path: tuple[str, ...], value: float) -> Any:
    """With the last row of one weight replaced."""
    if path:
        return {**tree, path[0]: damaged(tree[path[0]], path[1:], value)}
    return tree.at[-1].set(value)


@pytest.mark.parametrize(
    ("part", "value", "where"),
    [
        ("unet", np.nan, "after step 1 of 2, from unet"),
        ("unet", np.inf, "after step 1 of 2, from unet"),
        ("vae", np.nan, "in the image, from the autoencoder's decoder; its latent is finite"),
        ("vae", -np.inf, "in the image, from the autoencoder's decoder; its latent is finite"),
        ("text_encoder", np.nan, "in the states of text_encoder"),
        ("text_encoder_2", np.inf, "in the states of text_encoder_2"),
    ],
)
def test_damaged_weights_give_no_image_and_are_named(part: str, value: float, where: str, model: Model) -> None:
    # Elsewhere a black image, and success.
    before = SAMPLE._cache_size()
    broken = model._replace(params=damaged(model.params, DAMAGED[part], value))
    with pytest.raises(NonFiniteError) as refused:
        generate(broken, PROMPTS, **SETTINGS)
    assert str(refused.value).startswith(
        f"Image 0 and 1 more of its batch: non-finite (NaN or inf), first {where}. Non-finite weights: "
        f"{'/'.join(DAMAGED[part])}. The file"
    )
    assert ("sdxl-vae-fp16-fix" in str(refused.value)) == (part == "vae")
    assert SAMPLE._cache_size() <= before + 1, "the loop is not compiled again to find the weights"


def test_a_non_finite_image_is_named_and_no_image_is_returned(model: Model) -> None:
    noise = np.random.default_rng(0).standard_normal((4, *LATENT), np.float32)
    noise[3] = 3e38  # finite, but it overflows
    expected = r"^Image 10: non-finite .*after step 1 of 2, from unet. All weights of unet are finite, so"
    with pytest.raises(NonFiniteError, match=expected):
        generate(model, PROMPTS * 2, init_noise=noise, first_index=7, **SETTINGS)


@pytest.mark.parametrize(
    "given",
    [
        {},
        *(
            pytest.param(given, marks=pytest.mark.slow)
            for given in ({"callback": lambda seen: None}, {"one_program": True})
        ),
    ],
    ids=["staged", "callback", "one program"],
)
def test_the_first_non_finite_step_is_reported(given: dict[str, Any], model: Model) -> None:
    """With a sampler whose third step of four overflows float32."""
    assert steps_before_overflow(model, **given) == "after step 3 of 4, from unet"


def steps_before_overflow(model: Model, **given: Any) -> str:
    real = SAMPLERS["euler"]

    def moments(levels: Levels, eta: float) -> Iterator[Moment]:
        for number, moment in enumerate(real.moments(levels, eta)):
            yield moment._replace(row={"x": {"x0": 3e38, "epsilon": 3e38}}) if number == 2 else moment

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SAMPLERS, "euler", dataclasses.replace(real, moments=moments))
        with pytest.raises(NonFiniteError) as refused:
            generate(model, PROMPTS, **{**SETTINGS, "steps": 4}, **given)
    return str(refused.value).partition("first ")[2].partition(". ")[0]


@pytest.mark.slow
def test_a_validation_grid_that_is_not_finite_is_noted_and_does_not_end_the_run(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ValidationConfig(prompts=tuple(PROMPTS), sizes=((16, 24),), steps=2)
    config = dataclasses.replace(train_config(tmp_path), validation=shown)
    processes = create_autospec(Processes, instance=True, count=1, is_first=True)
    processes.wait.side_effect = lambda work: work()
    broken = model._replace(params=damaged(model.params, DAMAGED["unet"], np.nan))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    write_grid(Denoising(config), create_autospec(BucketedDataset), processes, tmp_path, 7, broken, mesh)
    output = capsys.readouterr().out
    assert output.startswith("note: no samples/step_00000007.png: Image 0 and 1 more of its batch: non-finite")
    assert "unet/conv_in/kernel" in output
    assert list(tmp_path.iterdir()) == []


# Text states


def test_encoded_prompts_are_one_row_each(model: Model) -> None:
    condition = encode_prompt(model, PROMPTS)
    assert condition.context is not None and condition.context.shape == (2, 77, MODEL.unet.context_dim)
    assert condition.pooled is not None
    assert condition.pooled.shape == (2, 8)
    assert float(jnp.abs(condition.pooled[0] - condition.pooled[1]).max()) > 0.01


# Files


def random_images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 200, (*size, 3), np.uint8) for size in sizes]


def test_contact_sheet_shows_every_image_in_rows_with_something_under_each() -> None:
    images = random_images((16, 24), (24, 16), (16, 24))
    captions = ["a cat", "a dog", "a bird"]
    sheet, blank = (np.asarray(contact_sheet(images, texts, columns=2)) for texts in (captions, [""] * 3))

    def position(image: np.ndarray, where: np.ndarray) -> tuple[int, int]:
        height, width, _ = image.shape
        places = [
            (top, left)
            for top in range(where.shape[0] - height + 1)
            for left in range(where.shape[1] - width + 1)
            if np.array_equal(where[top : top + height, left : left + width], image)
        ]
        assert len(places) == 1
        return places[0]

    (top_0, left_0), (top_1, left_1), (top_2, left_2) = (position(image, sheet) for image in images)
    assert top_0 == top_1 < top_0 + 24 <= top_2
    assert left_2 == left_0 < left_0 + 24 <= left_1
    # Without captions, nothing but the images is drawn, and the sheet is lower.
    for image in images:
        top, left = position(image, blank)
        blank = blank.copy()
        blank[top : top + image.shape[0], left : left + image.shape[1]] = 255
    assert (blank == 255).all()
    assert sheet.shape[0] > blank.shape[0]
    assert (sheet[top_0 + 24 : top_2] < 128).any(), "captions are written under the first row"


def test_contact_sheet_enlarges_small_images() -> None:
    images = random_images((16, 24))
    sheet = contact_sheet(images, [""], columns=5, scale=3)
    assert sheet.width >= 72
    assert sheet.height >= 48
    assert sheet.width < 2 * 72, "one image takes no room for five"


def test_png_has_its_pixels_and_its_text(tmp_path: Path) -> None:
    (pixels,) = random_images((16, 24))
    text = {"prompt": "a café, 漢字 🐈", "seed": "0"}
    path = tmp_path / "new" / "folder" / "000000.png"
    save_png(Image.fromarray(pixels), path, text)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.text == text  # pyright: ignore[reportAttributeAccessIssue]
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert [file.name for file in path.parent.iterdir()] == ["000000.png"]


def test_png_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (Image.fromarray(image) for image in random_images((16, 24), (16, 24)))
    path, new = tmp_path / "a.png", tmp_path / "b.png"
    save_png(before, path)
    kept = path.read_bytes()

    def full_disk(image: Image.Image, target: Any, **options: Any) -> None:
        Path(target).write_bytes(kept[:50])
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    for target in (path, new):
        with pytest.raises(OSError, match="no space left"):
            save_png(after, target)
    assert path.read_bytes() == kept
    assert not new.exists()


# Prompt accuracy


def test_prompt_accuracy_is_a_hit_where_the_nearest_image_has_the_caption() -> None:
    training = np.stack(random_images(*[(40, 48)] * 3))
    captions = ["a", "b", "c"]
    noisy = np.clip(training.astype(int) + np.random.default_rng(1).integers(-20, 21, training.shape), 0, 255)
    samples = noisy.astype(np.uint8)
    assert hits(samples, captions, training, captions) == [True, True, True]
    assert hits(samples, ["a", "c", "b"], training, captions) == [True, False, False]
    # Two images of one caption: either will do.
    assert hits(samples, ["a", "a", "c"], training, ["a", "a", "c"]) == [True, True, True]
