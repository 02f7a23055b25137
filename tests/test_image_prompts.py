"""Image prompts: what takes the place of which text, sums and noise, and the command line, on a tiny model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import Outcome, call
from PIL import Image
from tiny import MODEL, random_model, write_image_tower

from sdxl_jax.commands.sample import file_and_strength, read_text
from sdxl_jax.commands.serve import Serve, _image_encoder, as_sample, describe
from sdxl_jax.conditioning.image import ImageConditioning, alpha_bar, in_place_of_pooled, summed
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.models.layers import Compute
from sdxl_jax.samplers.guidance import Conditioning
from sdxl_jax.sampling import program
from sdxl_jax.sampling.generate import Generated, encode_prompt, generate
from sdxl_jax.sampling.image_prompts import ImagePrompt, check_width, encode_images
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.program import ConditioningPair
from sdxl_jax.serving.session import Job, Request, Session, fields_of, read_fields
from sdxl_jax.weights.clip_vision import open_tower
from sdxl_jax.weights.convert import Layout, convert

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH = 8
SETTINGS: dict[str, Any] = {"height": 16, "width": 24, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(MODEL, 0)


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    convert(model, path, Layout.ORBAX, progress=False)
    return path


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_tower(tmp_path_factory.mktemp("tower") / "clip_vision.safetensors", WIDTH)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("one.png", (40, 30, 3)), ("two.png", (28, 61, 3))):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / name)
    return sorted(folder.iterdir())


def prompt(seed: int, strength: float = 1.0) -> ImagePrompt:
    return ImagePrompt(np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32), strength)


# Sums and noise


def test_the_noise_schedule_is_the_cosine_one() -> None:
    """Against the closed form, f(t) / f(0), which the largest β changes at the last level alone."""

    def curve(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    for level in (0, 50, 500, 998):
        assert alpha_bar(level) == pytest.approx(curve((level + 1) / 1000) / curve(0), rel=1e-9)
    assert alpha_bar(999) == pytest.approx(1e-3 * alpha_bar(998))


def test_image_prompts_are_added_up_with_their_strengths() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    embeddings = np.stack([prompt(0).embedding, prompt(1).embedding])
    found = summed(np.tile(embeddings, (3, 1, 1)), np.tile([0.5, -2.0], (3, 1)), 0.0, keys)
    np.testing.assert_allclose(found, np.tile(0.5 * embeddings[0] - 2 * embeddings[1], (3, 1)), rtol=1e-6)


def test_noise_keeps_the_share_of_its_level_and_is_multiplied_by_the_strength() -> None:
    """Level round(999 · 0.3) = 300: mean √ᾱ · strength · embedding, deviation √(1 − ᾱ) · strength."""
    keys = jax.random.split(jax.random.key(0), 4000)
    embedding = prompt(0).embedding
    found = np.asarray(summed(np.tile(embedding, (4000, 1, 1)), np.full((4000, 1), 2.0), 0.3, keys))
    kept = alpha_bar(300)
    # Three standard errors of 4,000 samples, and a little for the largest of eight.
    np.testing.assert_allclose(found.mean(axis=0), 2 * math.sqrt(kept) * embedding, atol=0.08)
    np.testing.assert_allclose(found.std(axis=0), 2 * math.sqrt(1 - kept), rtol=0.05)
    assert not np.array_equal(found[0], found[1])


def test_the_image_takes_the_place_of_the_pooled_text_and_of_the_context_where_it_is_alone() -> None:
    context, pooled = jnp.ones((2, 77, 16)), jnp.ones((2, WIDTH))
    embedding = np.stack([prompt(0).embedding, prompt(1).embedding])
    image = ImageConditioning(embedding, np.array([1, 0], np.float32))
    found = in_place_of_pooled(TextConditioning(context, pooled), image)
    assert found.context is not None and found.pooled is not None
    np.testing.assert_array_equal(found.pooled, embedding)
    np.testing.assert_array_equal(found.context[:, 0, 0], [1, 0])


# Sampling


def sample(model: Model, prompts: list[str | None], *images: ImagePrompt, **options: Any) -> Generated:
    return generate(model, prompts, image_prompts=images, **SETTINGS, **options)


def test_the_embedding_of_the_prompt_itself_changes_nothing(model: Model) -> None:
    pooled = encode_prompt(model, ["a red cube"]).pooled
    assert pooled is not None
    ours = sample(model, ["a red cube"] * 2, ImagePrompt(np.asarray(pooled[0])))
    theirs = sample(model, ["a red cube"] * 2)
    # The pooled text is that of a batch with the negative prompt: float32 sums in another order.
    np.testing.assert_allclose(ours.latents, theirs.latents, atol=1e-4 * np.abs(theirs.latents).max())


def test_an_image_prompt_alone_is_not_one_with_an_empty_text(model: Model) -> None:
    alone, empty = sample(model, [None, ""], prompt(0)).latents
    other = sample(model, [None, ""], prompt(1)).latents[0]
    noised = sample(model, [None, ""], prompt(0), noise_augmentation=0.5).latents[0]
    least = 1e-3 * np.abs(alone).max()
    for different in (empty, other, noised):
        assert np.abs(different - alone).max() > least
    halves = sample(model, [None, ""], prompt(0, 0.25), prompt(0, 0.75)).latents[0]
    np.testing.assert_allclose(halves, alone, atol=least / 10)


def test_each_prompt_may_have_image_prompts_of_its_own(model: Model) -> None:
    """The same as prompts one by one, noise included, although the one has fewer images than the other."""
    images, options = [[prompt(0)], [prompt(1, 0.5), prompt(2, -0.5)]], {**SETTINGS, "noise_augmentation": 0.3}
    both = generate(model, [None, "a"], image_prompts=images, **options).latents
    for number, (text, own) in enumerate(zip([None, "a"], images, strict=True)):
        alone = generate(model, [text], image_prompts=own, first_index=number, **options).latents
        # float32 sums in another order
        np.testing.assert_allclose(both[number], alone[0], atol=1e-4 * np.abs(alone).max())


def test_image_prompts_for_some_prompts_alone_are_refused(model: Model) -> None:
    with pytest.raises(InputError, match="Prompt 2 has no image prompt, and others have"):
        generate(model, ["a", "b"], image_prompts=[[prompt(0)], []], **SETTINGS)
    mixed: Any = [prompt(0), [prompt(1)]]
    with pytest.raises(InputError, match="in part lists and in part none"):
        generate(model, ["a", "b"], image_prompts=mixed, **SETTINGS)
    with pytest.raises(InputError, match="1 lists of image prompts for 2 prompts"):
        generate(model, ["a", "b"], image_prompts=[[prompt(0)]], **SETTINGS)


def test_a_refiner_is_conditioned_on_the_text() -> None:
    """Its images of the prompt, and the negative prompt, are as without image prompts."""
    seen: list[Any] = []

    def conditioning(*arguments: Any, **_: Any) -> ConditioningPair:
        seen.append(next((each for each in arguments if isinstance(each, ImageConditioning)), None))
        return ConditioningPair(Conditioning({}, None), None)

    stages = program.PLAIN._replace(conditioning=conditioning, text_states=lambda *_, **__: (None, None))
    recipe = program.Recipe((MODEL, MODEL), False, (), Compute(), None)
    image = ImageConditioning(prompt(0).embedding[None], np.ones(1, np.float32))
    params = {"unet": {}, **{tower.name: {} for tower in MODEL.text}}
    fields: dict[str, Any] = dict.fromkeys(program.Inputs._fields)
    fields |= {"params": (params, params), "micro": (None, None), "image_prompt": image}
    program._conditioning_of_each_model(recipe, program.Inputs(**fields), stages)
    assert seen == [image, None]


def test_images_are_encoded_one_by_one_as_the_tower_takes_them(tower: Path) -> None:
    found = open_tower(tower)
    images = [np.random.default_rng(number).integers(0, 256, (30, 40 + number, 3), np.uint8) for number in range(2)]
    both = encode_images(found.config, found.load(), images)
    assert both.shape == (2, WIDTH)
    np.testing.assert_array_equal(encode_images(found.config, found.load(), images[1:]), both[1:])


def test_models_that_an_image_cannot_condition_are_refused(model: Model) -> None:
    without = dataclasses.replace(MODEL, micro=None, unet=dataclasses.replace(MODEL.unet, vector_dim=None))
    with pytest.raises(InputError, match="The model has no pooled text"):
        check_width(without, WIDTH)
    with pytest.raises(InputError, match=r"embeddings have a width of 12, the model's pooled text 8\. Give the image"):
        sample(model, ["a"], ImagePrompt(np.zeros(12, np.float32)))


@pytest.mark.parametrize(
    ("prompts", "images", "options", "expected"),
    [
        ([None], [], {}, "Prompt 1 is None, and there is no image prompt"),
        (["a"], [prompt(0, math.nan)], {}, "An image prompt has the strength nan"),
        (["a"], [ImagePrompt(np.full(8, math.nan))], {}, "An image prompt's embedding has non-finite values"),
        (["a"], [prompt(0), ImagePrompt(np.zeros(3, np.float32))], {}, "embeddings of widths 3, 8"),
        (["a"], [], {"noise_augmentation": 0.0}, "noise_augmentation=0 has no effect without an image prompt"),
        (["a"], [prompt(0)], {"noise_augmentation": 1.5}, "noise_augmentation"),
    ],
)
def test_invalid_image_prompts_are_refused(
    prompts: list[str | None], images: list[ImagePrompt], options: dict[str, Any], expected: str, model: Model
) -> None:
    with pytest.raises(InputError, match=expected):
        sample(model, prompts, *images, **options)


# The command line


def run(model: Path, out: Path, *more: Any) -> Outcome:
    return call(*("sample", model, "--out", out, "--height", 16, "--width", 24, "--steps", 2), *more)


@pytest.mark.slow
def test_an_image_of_image_prompts_alone_is_repeated_from_its_png_text(
    saved: Path, tower: Path, photos: list[Path], tmp_path: Path
) -> None:
    images = ["--image-prompt", f"{photos[0]}:0.6", "--image-prompt", photos[1], "--noise-augmentation", 0.1]
    outcome = run(saved, tmp_path / "out", *images, "--image-encoder", tower)
    assert outcome.code == 0, outcome
    text = read_text(tmp_path / "out" / "000000.png")
    assert "prompt" not in text
    assert json.loads(text["image_prompt"]) == [f"{photos[0]}:0.6", str(photos[1])]
    again = ["sample", saved, "--from-png", tmp_path / "out" / "000000.png", "--out", tmp_path / "again"]
    assert call(*again).code == 0
    one, other = (np.asarray(Image.open(tmp_path / name / "000000.png"), int) for name in ("out", "again"))
    np.testing.assert_array_equal(one, other)
    before = photos[1].read_bytes()
    Image.new("RGB", (9, 9)).save(photos[1])
    outcome = call(*again, "--overwrite")
    photos[1].write_bytes(before)
    assert outcome.code == 2
    assert "was made with different image prompts" in outcome.err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            ["--image-prompt", "PHOTO"],
            "needs CLIP's image tower, which is not a part of the model. Give it with --image-",
        ),
        (["--image-encoder", "TOWER"], "--image-encoder has no effect without --image-prompt"),
        (["--image-prompt", "PHOTO:much", "--image-encoder", "TOWER"], "it is not FILE:STRENGTH with a number"),
        (["--image-prompt", "none.png", "--image-encoder", "TOWER"], "There is no image none.png"),
        (["--image-prompt", "PHOTO", "--image-encoder", "none"], "There is nothing at"),
        (["--image-prompt", "PHOTO", "--image-encoder", "OTHER"], "embeddings have a width of 12, the model's pooled"),
        (["--noise-augmentation", "0.2"], "noise_augmentation=0.2 has no effect without an image prompt"),
    ],
)
def test_invalid_image_prompts_end_with_2(
    more: list[str], expected: str, saved: Path, tower: Path, photos: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    if "OTHER" in more:
        write_image_tower(other, 12)
    named = {"PHOTO": str(photos[0]), "TOWER": str(tower), "OTHER": str(other)}
    words = [next((word.replace(name, path) for name, path in named.items() if name in word), word) for word in more]
    outcome = run(saved, tmp_path / "out", "--prompt", "a cat", *words)
    assert outcome.code == 2
    assert expected in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_colon_in_a_name_that_exists_is_not_a_strength(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert file_and_strength(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
    assert file_and_strength(str(tmp_path / "a:2:0.5")) == (tmp_path / "a:2", 0.5)


# The web page


def test_a_tower_that_does_not_fit_is_said_before_the_page_loads_the_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("sdxl_jax.commands.serve.load", load)
    write_image_tower(other := tmp_path / "other.safetensors", 12)
    outcome = call("serve", saved, "--image-encoder", other, "--port", "0")
    assert outcome.code == 2 and "embeddings have a width of 12, the model's pooled" in outcome.err


@pytest.mark.slow
def test_the_pages_image_is_that_of_its_command(
    model: Model, saved: Path, tower: Path, photos: list[Path], tmp_path: Path
) -> None:
    serve = Serve(model=saved, image_encoder=tower)
    encode = _image_encoder(serve, MODEL, Compute())
    session = Session(model, tmp_path / "images", lambda request: describe(serve, request, MODEL), encode_image=encode)
    options = Options(height=16, width=24, steps=2, noise_augmentation=0.2)
    request = Request(None, None, options, image_prompts=((photos[0], 0.7), (photos[1], 1.0)))
    (result,) = session.run(request, Job())
    given = as_sample(serve, request)
    words = [word for value in given.image_prompt for word in ("--image-prompt", value)]
    outcome = run(saved, tmp_path / "out", *words, "--image-encoder", tower, "--noise-augmentation", 0.2)
    assert outcome.code == 0, outcome
    assert (tmp_path / "out" / "000000.png").read_bytes() == result.path.read_bytes()
    assert all(word in result.command for word in (f"--image-prompt {photos[0]}:0.7", f"--image-encoder {tower}"))


def test_fields_hold_image_prompts() -> None:
    request = Request("a", None, Options(noise_augmentation=0.3), image_prompts=((Path("b.png"), 0.5),))
    assert read_fields(MODEL, fields_of(MODEL, request)) == request
    alone = request._replace(prompt=None)
    assert read_fields(MODEL, fields_of(MODEL, alone)) == alone
    fields = fields_of(MODEL, request) | {"image_prompts": [(Path("b.png"), None)]}
    with pytest.raises(InputError, match="strength of an image prompt is empty"):
        read_fields(MODEL, fields)
