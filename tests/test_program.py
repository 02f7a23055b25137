"""Sampling in stages or as one program, all kinds of guidance, refiners, init images, long prompts.

Models are tiny, with random weights. Expected images are other images: of the same sampling expressed by other options,
or of its limit. Agreement with diffusers is in `parity/`.
"""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL, random_model

from sdxl_jax import sharding
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.prompts import LongPrompts
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig, UnconditionalKind
from sdxl_jax.models import vae
from sdxl_jax.models.layers import Compute, Dtype
from sdxl_jax.models.unet import ClassConfig, UNetPart
from sdxl_jax.samplers.steps import SAMPLERS, Family, Sigmas, Spacing
from sdxl_jax.sampling import program
from sdxl_jax.sampling.generate import Generated, StepState, _Generation, generate, image_to_image, inpaint, refine
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import SegmentStart, Terms, plan_segments
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.sizes import Position

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["a red cube", "two green birds"]
SETTINGS: dict[str, Any] = {"height": 16, "width": 24, "steps": 4, "batch_size": 2}
SAME, EFFECT = 1e-4, 1e-3
"""Of the largest latent. The same image from another program: float32 sums in another order, through four steps of
the network, guided; and what counts as an effect: ten times that."""

REFINER: ModelConfig = dataclasses.replace(
    MODEL,
    text=MODEL.text[-1:],
    micro=MicroConfig(Numbers.SIZE_CROP_AESTHETIC, MODEL.micro.embedding_dim if MODEL.micro else 8),
    unconditional=UnconditionalKind.EMPTY,
)
REFINER = dataclasses.replace(
    REFINER,
    unet=dataclasses.replace(
        REFINER.unet,
        context_dim=REFINER.text[0].clip.width,
        vector_dim=(REFINER.text[0].clip.projection_dim or 0) + REFINER.micro.vector_dim,  # pyright: ignore
    ),
)
PAINTER = dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, in_channels=9))


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, 0)


@pytest.fixture(scope="module")
def refiner() -> Model:
    return random_model(REFINER, 1)


@pytest.fixture(scope="module")
def reference(model: Model) -> Generated:
    return generate(model, PROMPTS, **SETTINGS)


def unlike(one: Generated, other: Generated) -> float:
    return float(np.abs(one.latents - other.latents).max() / np.abs(other.latents).max())


def photograph(height: int = 16, width: int = 24) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 12, x * 9, (y + x) * 5], axis=-1).astype(np.uint8)


LEFT = np.zeros((16, 24), bool)
LEFT[:, :8] = True
"""A mask of whole latent pixels."""


# Programs


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "dpmpp_2m_sde"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({}, {"sampler": "unipc"}, {"sampler": "heun"}, {"guidance_interval": (0.25, 0.75)})
        ),
    ],
    ids=str,
)
def test_one_program_three_programs_and_single_steps_give_the_same(options: dict[str, Any], model: Model) -> None:
    three = generate(model, PROMPTS, **options, **SETTINGS)
    one = generate(model, PROMPTS, one_program=True, **options, **SETTINGS)
    steps = generate(model, PROMPTS, callback=lambda seen: None, **options, **SETTINGS)
    for other in (one, steps):
        assert unlike(other, three) < SAME
        assert np.abs(other.images.astype(int) - three.images).max() <= 1


def compiled() -> int:
    functions: list[Any] = [*program.STAGED, program.whole]
    return sum(function._cache_size() for function in functions)


@pytest.mark.parametrize("one_program", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_other_values_of_the_same_shapes_compile_nothing(one_program: bool, model: Model) -> None:
    sample = lambda *prompts, **options: generate(model, list(prompts), one_program=one_program, **options)  # noqa: E731
    sample(*PROMPTS, guidance=3.0, guidance_rescale=0.5, pag=1.0, **SETTINGS)
    before = compiled()
    sample("another", "prompt", guidance=9.0, guidance_rescale=0.1, pag=2.0, seed=7, first_index=5, **SETTINGS)
    sample("one prompt", num_images=2, guidance=2.0, guidance_rescale=0.3, pag=0.5, crop=Position(3, 4), **SETTINGS)
    # Noise levels are numbers too.
    sample(*PROMPTS, guidance=3.0, guidance_rescale=0.5, pag=1.0, sigmas=Sigmas.KARRAS, **SETTINGS)
    sample(*PROMPTS, guidance=3.0, guidance_rescale=0.5, pag=1.0, timestep_spacing=Spacing.TRAILING, **SETTINGS)
    assert compiled() == before


def test_with_a_callback_other_steps_and_samplers_compile_nothing(model: Model) -> None:
    callback: Callable[[StepState], None] = lambda seen: None  # noqa: E731
    generate(model, PROMPTS, callback=callback, **SETTINGS)
    before = compiled()
    generate(model, PROMPTS, callback=callback, **{**SETTINGS, "steps": 7})
    generate(model, PROMPTS, callback=callback, sampler="ddim", **SETTINGS)
    assert compiled() == before


def test_weights_on_a_mesh_of_one_compile_a_step_once(model: Model, reference: Generated) -> None:
    """As `load_model` places them: the state after a step must have the sharding of the state before."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    placed = model._replace(params=sharding.put(mesh, model.params))
    denoise: Any = program.STAGED.denoise
    before = denoise._cache_size()
    made = generate(placed, PROMPTS, callback=lambda seen: None, **SETTINGS)
    assert denoise._cache_size() == before + 1
    assert unlike(made, reference) < SAME


def test_the_callback_receives_every_step_and_ends_at_the_latent(model: Model) -> None:
    seen: list[StepState] = []
    made = generate(model, [*PROMPTS, "three"], callback=seen.append, **SETTINGS)
    assert [(each.step, each.steps) for each in seen] == [(step, 4) for step in (1, 2, 3, 4)] * 2
    assert [(each.first, each.images) for each in seen] == [(0, 2)] * 4 + [(2, 1)] * 4
    np.testing.assert_allclose(seen[3].x0, made.latents[:2], atol=1e-6)
    np.testing.assert_allclose(seen[7].x0, made.latents[2:], atol=1e-6)


def test_a_callback_that_raises_ends_the_call(model: Model) -> None:
    def stop(seen: StepState) -> None:
        if seen.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, callback=stop, **SETTINGS)


@pytest.mark.slow
def test_bfloat16_stays_near(model: Model, reference: Generated) -> None:
    halved = model._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    made = generate(halved, PROMPTS, compute=Compute(dtype=Dtype.BFLOAT16), **SETTINGS)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(halved.params)) * 2 == sum(
        leaf.nbytes for leaf in jax.tree.leaves(model.params)
    )
    # bfloat16 keeps 8 bits: 0.4 % of each number, through 30 layers, four steps and guidance of 5.
    assert EFFECT < unlike(made, reference) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_gives_the_same_in_any_batch(name: str, model: Model) -> None:
    together = generate(model, PROMPTS, sampler=name, **SETTINGS)
    assert np.isfinite(together.latents).all()
    alone = generate(model, PROMPTS[1:], sampler=name, first_index=1, **{**SETTINGS, "batch_size": 1})
    assert np.abs(alone.latents[0] - together.latents[1]).max() < SAME * np.abs(together.latents).max()


@pytest.mark.slow
def test_samplers_differ_from_each_other_but_euler_is_ddim(model: Model) -> None:
    """Where both visit the same timesteps: x₀ + sigma ε along the same ε."""
    made = {name: generate(model, PROMPTS[:1], sampler=name, **SETTINGS) for name in SAMPLERS}
    for one, other in itertools.combinations(made, 2):
        if {one, other} == {"ddim", "euler"}:
            assert unlike(made[one], made[other]) < SAME
        else:
            assert unlike(made[one], made[other]) > EFFECT, (one, other)


# Guidance


@pytest.mark.slow
def test_sequential_guidance_is_batched_guidance(model: Model, reference: Generated) -> None:
    assert unlike(generate(model, PROMPTS, sequential=True, **SETTINGS), reference) < SAME
    both = [generate(model, PROMPTS, sequential=each, pag=2.0, **SETTINGS) for each in (False, True)]
    assert unlike(*both) < SAME


def evaluations(monkeypatch: pytest.MonkeyPatch, model: Model, **options: Any) -> list[int]:
    """Network evaluations per step of one image."""
    rows: list[int] = []

    def spy(*given: Any, state: Any, terms: Terms, **static: Any) -> Any:
        rows.append(1 + terms.guided + bool(terms.perturbed))
        return state._replace(finite_rows=state.finite_rows + 1)

    with monkeypatch.context() as patch:
        patch.setattr(program, "STAGED", program.STAGED._replace(denoise=spy))
        generate(model, PROMPTS[:1], callback=lambda seen: None, **{**SETTINGS, "batch_size": 1}, **options)
    return rows


def test_steps_outside_the_interval_evaluate_the_prompt_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluations(monkeypatch, model) == [2, 2, 2, 2]
    assert evaluations(monkeypatch, model, guidance=1.0) == [1, 1, 1, 1]
    assert evaluations(monkeypatch, model, guidance_interval=(0.25, 0.75)) == [1, 2, 2, 1]
    assert evaluations(monkeypatch, model, guidance_interval=(0.5, 1.0), pag=2.0) == [1, 1, 3, 3]
    assert evaluations(monkeypatch, model, pag=2.0, guidance=1.0) == [2, 2, 2, 2]
    assert evaluations(monkeypatch, model, guidance_interval=(0.0, 0.5), sampler="heun") == [2, 2, 2, 2, 1, 1, 1]


@pytest.mark.slow
def test_guidance_over_no_step_is_none_and_over_all_is_all(model: Model, reference: Generated) -> None:
    without = generate(model, PROMPTS, guidance=1.0, **SETTINGS)
    assert unlike(generate(model, PROMPTS, guidance_interval=(0.0, 0.01), **SETTINGS), without) < SAME
    half = generate(model, PROMPTS, guidance_interval=(0.0, 0.5), **SETTINGS)
    assert unlike(half, reference) > EFFECT
    assert unlike(half, without) > EFFECT


@pytest.mark.slow
def test_perturbed_attention_and_rescaling_change_the_image_by_their_strength(
    model: Model, reference: Generated
) -> None:
    for name, nearly, much in (("pag", 1e-5, 2.0), ("guidance_rescale", 1e-5, 0.7)):
        assert unlike(generate(model, PROMPTS, **{name: nearly}, **SETTINGS), reference) < SAME
        assert unlike(generate(model, PROMPTS, **{name: much}, **SETTINGS), reference) > EFFECT
    parts = [
        generate(model, PROMPTS, pag=2.0, pag_parts=each, **SETTINGS) for each in ((UNetPart.MIDDLE,), (UNetPart.UP,))
    ]
    assert unlike(*parts) > EFFECT


@pytest.mark.slow
def test_a_distilled_model_is_sampled_without_guidance(model: Model) -> None:
    distilled = model._replace(config=dataclasses.replace(MODEL, distilled=True))
    made = generate(distilled, PROMPTS, **SETTINGS)
    assert unlike(made, generate(model, PROMPTS, guidance=1.0, sampler="lcm", **SETTINGS)) == 0
    off = generate(distilled, PROMPTS, guidance=0.0, **SETTINGS)
    np.testing.assert_array_equal(off.images, made.images)
    with pytest.raises(InputError, match=r"guidance=5, but this model is distilled.*set it to 1"):
        generate(distilled, PROMPTS, guidance=5.0, **SETTINGS)


# Base and refiner


def test_the_refiner_takes_over_at_the_handoff(model: Model, refiner: Model) -> None:
    options = Options(steps=20, handoff=0.8)
    segments, segment_arrays = plan_segments(MODEL, REFINER, options)
    assert [
        (segment.model, segment.start, len(each.plan.timestep))
        for segment, each in zip(segments, segment_arrays, strict=True)
    ] == [
        (0, SegmentStart.NOISE, 16),
        (1, SegmentStart.HAND_OVER, 4),
    ]
    assert segment_arrays[0].plan.timestep.min() >= 200 > segment_arrays[1].plan.timestep.max()
    np.testing.assert_array_equal(segment_arrays[0].plan.sigma_t_next[-1], segment_arrays[1].plan.sigma_t[0])
    assert int(segment_arrays[1].first) == 16


@pytest.mark.slow
def test_a_refiner_that_is_the_model_itself_changes_nothing_by_taking_over(model: Model, reference: Generated) -> None:
    """Euler has no memory, so two segments give what one gives."""
    segments, segment_arrays = plan_segments(MODEL, MODEL, Options(steps=4, handoff=0.5))
    whole, _ = plan_segments(MODEL, None, Options(steps=4))
    assert [segment.model for segment in segments] == [0, 1]
    assert len(whole) == 1
    recipe = program.Recipe((MODEL, MODEL), False, segments, Compute(), None)
    generation = _Generation(model, model, PROMPTS, None, None, (), None, None, None, Options(**SETTINGS))
    inputs = program.Inputs(
        params=(model.params, model.params),
        segment_arrays=segment_arrays,
        strengths=program.Strengths(*map(np.float32, (5, 0, 0))),
        scale=np.float32(1),
        **generation.rows,
    )
    latents = program.staged(inputs, recipe).latents
    assert np.abs(np.asarray(latents) - reference.latents).max() < SAME * np.abs(reference.latents).max()


@pytest.mark.slow
def test_a_refiner_changes_the_image_in_both_ways_and_more_if_it_has_more_steps(
    model: Model, refiner: Model, reference: Generated
) -> None:
    made = [
        generate(model, PROMPTS, refiner=refiner, **given, **SETTINGS)
        for given in ({"handoff": 0.75}, {"handoff": 0.25}, {"refine_strength": 0.5}, {"refine_strength": 1.0})
    ]
    for index, one in enumerate(made):
        assert unlike(one, reference) > EFFECT
        for other in made[:index]:
            assert unlike(one, other) > EFFECT
    scored = generate(model, PROMPTS, refiner=refiner, handoff=0.25, aesthetic_score=9.0, **SETTINGS)
    assert unlike(scored, made[1]) > EFFECT
    negative = generate(model, PROMPTS, refiner=refiner, handoff=0.25, negative_aesthetic_score=9.0, **SETTINGS)
    assert unlike(negative, made[1]) > EFFECT


def test_each_model_has_the_dropped_conditions_that_it_was_trained_with(model: Model, refiner: Model) -> None:
    """The refiner's negative prompt once had the base's: none dropped for a base without sizes, and as many as the base
    has, which need not be the refiner's."""
    zeros = UnconditionalKind.ALL_ZEROS
    dropping = refiner._replace(config=dataclasses.replace(REFINER, unconditional=zeros))
    for base, kept in (
        (model, [None, 3]),
        (model._replace(config=dataclasses.replace(MODEL, unconditional=zeros)), [3, 3]),
    ):
        options = Options(**SETTINGS, negative_aesthetic_score=2.0)
        rows = _Generation(base, dropping, PROMPTS, None, None, (), None, None, None, options).rows["micro"]
        found = [negative.kept for _, negative in rows]
        assert [None if each is None else each.shape[1] for each in found] == kept
        assert found[1] is not None and found[1][0].tolist() == [0, 0, 1]
        assert all(positive.kept is None for positive, _ in rows)


def test_one_set_of_text_states_serves_both(model: Model, refiner: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = MODEL.text[-1].name
    same = refiner._replace(params={**refiner.params, tower: model.params[tower]})
    without = refiner._replace(params={name: part for name, part in same.params.items() if name != tower})
    own = generate(model, PROMPTS, refiner=same, handoff=0.5, **SETTINGS)
    encoded: list[Any] = []
    real = program.STAGED.text_states

    def spy(*given: Any, towers: Any, **static: Any) -> Any:
        encoded.append([each.name for each in towers])
        return real(*given, towers=towers, **static)

    monkeypatch.setattr(program, "STAGED", program.STAGED._replace(text_states=spy))
    shared = generate(model, PROMPTS, refiner=without, handoff=0.5, **SETTINGS)
    assert encoded == [[each.name for each in MODEL.text]]
    assert unlike(shared, own) < SAME


def test_a_refiner_that_breaks_is_named(model: Model, refiner: Model) -> None:
    """At the first of its steps, the third of four."""
    unet = refiner.params["unet"]
    kernel = unet["conv_in"]["kernel"].at[0].set(np.nan)
    broken = refiner._replace(
        params={**refiner.params, "unet": {**unet, "conv_in": {**unet["conv_in"], "kernel": kernel}}}
    )
    with pytest.raises(
        InputError, match=r"after step 3 of 4, from the refiner's unet. Non-finite weights: unet/conv_in"
    ):
        generate(model, PROMPTS, refiner=broken, handoff=0.5, **SETTINGS)


@pytest.mark.slow
def test_a_refiners_images_do_not_depend_on_the_batch(model: Model, refiner: Model) -> None:
    for given in ({"handoff": 0.5}, {"refine_strength": 0.5}):
        together = generate(model, PROMPTS, refiner=refiner, **given, **SETTINGS)
        alone = generate(model, PROMPTS, refiner=refiner, **given, **{**SETTINGS, "batch_size": 1})
        assert unlike(alone, together) < SAME


# Init images


@pytest.mark.slow
def test_less_of_the_init_image_remains_with_strength(model: Model) -> None:
    first = program.STAGED.encode(model.params["vae"], jnp.asarray(photograph()[None]), config=MODEL, compute=Compute())

    def distance(strength: float) -> float:
        made = generate(
            model, PROMPTS[:1], init_image=photograph(), strength=strength, guidance=1.0, **{**SETTINGS, "steps": 8}
        )
        return float(np.abs(made.latents - np.asarray(first)).mean())

    distances = [distance(strength) for strength in (0.125, 0.5, 1.0)]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * distances[2]


@pytest.mark.slow
def test_init_images_of_any_size_are_fitted_and_set_the_default_size(model: Model) -> None:
    images = image_to_image(model, PROMPTS[:1], photograph(21, 35), steps=2, strength=0.5)
    assert images.shape == (1, 16, 32, 3)
    assert image_to_image(model, PROMPTS[:1], photograph(40, 40), **SETTINGS).shape == (1, 16, 24, 3)


@pytest.mark.slow
def test_refining_an_image_is_image_to_image_with_the_refiner(refiner: Model) -> None:
    made = refine(refiner, PROMPTS[:1], photograph(), **SETTINGS)
    np.testing.assert_array_equal(made, image_to_image(refiner, PROMPTS[:1], photograph(), strength=0.3, **SETTINGS))


@pytest.mark.parametrize("strength", [pytest.param(None, marks=pytest.mark.slow), 0.5])
def test_inpainting_keeps_every_pixel_outside_of_the_mask(strength: float | None, model: Model) -> None:
    images = inpaint(model, PROMPTS, photograph(), LEFT, strength=strength, **SETTINGS)
    for image in images:
        np.testing.assert_array_equal(image[~LEFT], photograph()[~LEFT])
        assert (image[LEFT] != photograph()[LEFT]).mean() > 0.5


def test_inpainting_leaves_the_latent_as_it_was_outside_of_the_mask(model: Model) -> None:
    made = generate(model, PROMPTS, init_image=photograph(), mask=LEFT, **SETTINGS)
    first = program.STAGED.encode(model.params["vae"], jnp.asarray(photograph()[None]), config=MODEL, compute=Compute())
    np.testing.assert_allclose(made.latents[:, :, 1:], np.repeat(first, 2, axis=0)[:, :, 1:], atol=1e-6)


def test_a_mask_over_everything_is_text_to_image(model: Model, reference: Generated) -> None:
    made = generate(model, PROMPTS, init_image=photograph(), mask=np.ones((16, 24), bool), **SETTINGS)
    assert unlike(made, reference) < SAME


@pytest.mark.slow
def test_a_unet_of_nine_channels_sees_mask_and_masked_image(monkeypatch: pytest.MonkeyPatch) -> None:
    painter = random_model(PAINTER, 2)
    seen: list[Any] = []
    real = program.STAGED.denoise

    def spy(*given: Any, mask_channels: Any, known_image: Any, **static: Any) -> Any:
        seen.append((mask_channels, known_image))
        return real(*given, mask_channels=mask_channels, known_image=known_image, **static)

    made = generate(painter, PROMPTS, init_image=photograph(), mask=LEFT, **SETTINGS)
    for image in made.images:
        np.testing.assert_array_equal(image[~LEFT], photograph()[~LEFT])
    with monkeypatch.context() as patch:
        patch.setattr(program, "STAGED", program.STAGED._replace(denoise=spy))
        again = generate(painter, PROMPTS, init_image=photograph(), mask=LEFT, **SETTINGS)
    (mask_channels, known_image), *_ = seen
    assert known_image is None
    assert mask_channels.shape == (2, 2, 3, 5)
    np.testing.assert_array_equal(mask_channels[..., 0], [[[1, 0, 0], [1, 0, 0]]] * 2)
    # 0 in −1..1, as diffusers multiplies by the mask there; no byte is that.
    rest = np.where(LEFT[..., None], 0.0, photograph() / 127.5 - 1).astype(np.float32)
    encoded = jax.jit(functools.partial(vae.encode, PAINTER.vae))(painter.params["vae"], jnp.asarray(rest[None])).mean
    np.testing.assert_allclose(mask_channels[0, ..., 1:], PAINTER.vae.scale * encoded[0], atol=1e-5)
    assert unlike(again, made) < SAME
    # The rest of the image has an effect.
    other = generate(painter, PROMPTS, init_image=photograph()[::-1].copy(), mask=LEFT, **SETTINGS)
    assert unlike(other, made) > EFFECT


# Prompts


def test_long_prompts_are_encoded_in_chunks_and_short_ones_as_before(model: Model, reference: Generated) -> None:
    chunks = {"long_prompts": LongPrompts.CHUNKS, **SETTINGS}
    assert unlike(generate(model, PROMPTS, **chunks), reference) == 0
    words = " ".join(["a small house by the sea"] * 20)
    ends = [generate(model, [words + end] * 2, **chunks) for end in (" red", " blue")]
    assert unlike(*ends) > EFFECT
    cut = [generate(model, [words + end] * 2, **SETTINGS) for end in (" red", " blue")]
    assert unlike(*cut) == 0


def test_brackets_are_text_without_prompt_weights(model: Model, reference: Generated) -> None:
    weighted = generate(model, ["a (red:1.5) cube", PROMPTS[1]], prompt_weights=True, **SETTINGS)
    assert unlike(weighted, reference) > EFFECT
    # The second prompt has no weights, but the batch has.
    assert np.abs(weighted.latents[1] - reference.latents[1]).max() < SAME * np.abs(reference.latents).max()
    one = generate(model, ["a (red:1) cube", PROMPTS[1]], prompt_weights=True, **SETTINGS)
    assert unlike(one, reference) < SAME
    assert unlike(generate(model, ["a (red:1) cube", PROMPTS[1]], **SETTINGS), reference) > EFFECT


# The autoencoder


@pytest.mark.slow
def test_an_image_decoded_in_tiles_is_the_image(model: Model) -> None:
    settings: dict[str, Any] = {"height": 160, "width": 200, "steps": 1, "guidance": 1.0}
    whole = generate(model, PROMPTS[:1], **settings)
    tiles = generate(model, PROMPTS[:1], decode_tile=128, **settings)
    np.testing.assert_array_equal(whole.latents, tiles.latents)
    assert np.abs(whole.images.astype(int) - tiles.images).max() <= 1


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.5}, "eta=0.5 has no effect on sampler euler. Use sampler ddim"),
        ({"eta": 1.5, "sampler": "ddim"}, "eta=1.5 is out of range. Give 0 to 1"),
        ({"guidance": -1.0}, "guidance=-1.0 is out of range. Give 0 to 1000"),
        ({"guidance": float("nan")}, "guidance=nan is out of range. Give 0 to 1000"),
        ({"prompts": ["a", "caf\udce9"]}, r"Prompt 2 is not UTF-8 text, at character 4, near 'caf.udce9'. Give it in"),
        ({"prompts": ["\ud83d fox", "b"]}, "Prompt 1 is not UTF-8 text, at character 1"),
        ({"negative_prompts": [None, "\udcff"]}, "Negative prompt 2 is not UTF-8 text"),
        ({"guidance_rescale": -0.1}, "guidance_rescale=-0.1 is out of range. Give 0 to 1"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval=0.5 0.5: expected two numbers"),
        ({"strength": 0.5}, "strength=0.5 has no effect without an init image"),
        ({"strength": 1.5, "init_image": photograph()}, "strength=1.5 is out of range. Give 0 to 1"),
        ({"strength": -1.0, "init_image": photograph()}, "strength=-1.0 is out of range. Give 0 to 1"),
        ({"strength": 0.1, "init_image": photograph()}, "strength=0.1 leaves 0 of 4 steps to run. Give at least 0.25"),
        ({"handoff": 0.8}, "handoff=0.8 has no effect without a refiner"),
        ({"refine_strength": 0.3}, "refine_strength=0.3 has no effect without a refiner"),
        ({"mask": LEFT}, "A mask needs an init image"),
        ({"mask": LEFT[:8], "init_image": photograph()}, "mask has 8×24 pixels .* init image 16×24"),
        ({"mask": ~LEFT & LEFT, "init_image": photograph()}, "The mask is all black"),
        ({"decode_tile": 100}, "decode_tile=100: expected a multiple of 8, 128 or more"),
        ({"height": 160000, "width": 160000}, "more than 268,435,456 pixels. Give a smaller size"),
        ({"sampler": "lcm", "timestep_spacing": Spacing.TRAILING}, "no effect on sampler lcm"),
        ({"sampler": "lcm", "steps": 60}, "steps=60, but sampler lcm takes at most 50 steps"),
        (
            {"sampler": "ddim", "sigmas": Sigmas.KARRAS},
            "sigmas=karras has no effect on sampler ddim, which visits whole timesteps. Use sampler euler, ",
        ),
        ({"first_index": -1}, "first_index=-1 is out of range. Give 0 or more"),
        ({"pag": 1.0, "pag_parts": ()}, "pag=1, but pag_parts is empty"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(changes: dict[str, Any], message: str, model: Model) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, **{"prompts": PROMPTS, **SETTINGS, **changes})


def test_steps_with_non_finite_weights_are_refused_with_the_most_that_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = SAMPLERS["euler"]

    def moments(levels: Any, eta: float) -> Any:
        for moment in real.moments(levels, eta):
            yield moment._replace(row={"x": {"x0": np.nan}}) if len(levels.timestep) > 12 else moment

    monkeypatch.setitem(SAMPLERS, "euler", dataclasses.replace(real, moments=moments))
    with pytest.raises(InputError, match=r"steps=20: sampler euler has non-finite weights.*Use 12 steps or fewer"):
        plan_segments(MODEL, None, Options(steps=20))
    # A schedule whose first timestep has no noise at all.
    clean = dataclasses.replace(MODEL, schedule=dataclasses.replace(MODEL.schedule, beta_start=0.0))
    with pytest.raises(InputError, match="Use another sampler or timestep_spacing"):
        plan_segments(clean, None, Options(sampler="euler_ancestral", timestep_spacing=Spacing.LINSPACE, steps=3))


def test_noise_prediction_at_zero_terminal_snr_is_refused() -> None:
    config = dataclasses.replace(MODEL, schedule=dataclasses.replace(MODEL.schedule, zero_terminal_snr=True))
    with pytest.raises(InputError, match=r"zero terminal SNR.*--prediction v_prediction"):
        plan_segments(config, None, Options(sampler="ddim", timestep_spacing=Spacing.TRAILING))


def test_refiners_and_bases_are_not_taken_for_each_other(model: Model, refiner: Model) -> None:
    with pytest.raises(
        InputError, match=r"The model given as --refiner is not a refiner.*not conditioned on an aesthetic score"
    ):
        generate(model, PROMPTS, refiner=model, **SETTINGS)
    with pytest.raises(InputError, match=r"The model is a refiner itself.*Give the base as the model"):
        generate(refiner, PROMPTS, refiner=refiner, **SETTINGS)
    both: dict[str, Any] = {"handoff": 0.8, "refine_strength": 0.3}
    with pytest.raises(InputError, match="two ways to use a refiner"):
        generate(model, PROMPTS, refiner=refiner, **both, **SETTINGS)
    for handoff, who in ((1.0, "the refiner"), (0.0, "the base")):
        with pytest.raises(InputError, match=f"leaves {who} none of the 4 steps"):
            generate(model, PROMPTS, refiner=refiner, handoff=handoff, **SETTINGS)


def test_a_refiner_of_other_classes_is_refused(model: Model, refiner: Model) -> None:
    def of_classes(given: Model, number: int) -> Model:
        unet = dataclasses.replace(given.config.unet, classes=ClassConfig(number))
        return given._replace(config=dataclasses.replace(given.config, unet=unet))

    with pytest.raises(InputError, match="The model has 10 classes, the refiner 5"):
        generate(of_classes(model, 10), PROMPTS, refiner=of_classes(refiner, 5), **SETTINGS)


def test_out_of_memory_is_an_error_with_what_to_change(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")

    monkeypatch.setattr(program, "staged", full)
    with pytest.raises(
        InputError,
        match=r"The devices are out of memory.*Try, in this order: batch_size below 2; dtype bfloat16; sequential",
    ):
        generate(model, PROMPTS, **SETTINGS)


def test_lcm_alone_has_no_timestep_spacing() -> None:
    assert [name for name, each in SAMPLERS.items() if each.family is Family.CONSISTENCY] == ["lcm"]


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_mesh(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sharded_sampling.py")
    environment = compiling.environment(tmp_path / "compiled", devices=4)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    differences = json.loads(done.stdout.splitlines()[-1])
    assert len(differences) == 4
    assert max(differences.values()) < SAME, differences
