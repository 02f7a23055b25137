"""The tiny autoencoder: detection of its files, in halves and whole, and encoding and decoding of images.

Agreement with diffusers is in `parity/test_taesd_parity.py`. The published weights are found by the environment
variable SDXL_JAX_TEST_DATA, a folder with taesdxl/ and coco363/.
"""

import dataclasses
import functools
import json
from pathlib import Path

import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_data
from foreign import BASE
from test_models import random_params
from test_open import assert_holds, assert_part_holds, component, make_run
from tiny import train_config

from sdxl_jax import config as configuration
from sdxl_jax.config import TrainConfig
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.models import taesd, vae
from sdxl_jax.models.layers import Compute, Dtype, count
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.sharding import MeshConfig, make_mesh
from sdxl_jax.training.objectives import objective_of
from sdxl_jax.weights.convert import Layout, convert
from sdxl_jax.weights.lazy import lacking_half
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.names import Dialect, Naming
from sdxl_jax.weights.open import open_model

TINY = TinyVaeConfig(8, (1, 2), (3, 1))
"""Not its own mirror: a half alone does not determine the other."""
ENCODER, DECODER = Naming(Dialect.TAESD_ENCODER), Naming(Dialect.TAESD_DECODER)
WITH_TINY = dataclasses.replace(BASE, vae=TINY)


def half(folder: Path, naming: Naming, config: TinyVaeConfig = TINY) -> Path:
    name = f"{naming.dialect.value}.safetensors"
    return foreign.save(folder / name, foreign.tensors(config, naming))


# Files


@pytest.mark.parametrize(("naming", "own"), [(ENCODER, "encoder"), (DECODER, "decoder")])
def test_half_alone_is_found_out(tmp_path: Path, naming: Naming, own: str) -> None:
    opened = open_model(half(tmp_path, naming))
    assert isinstance(opened.config.vae, TinyVaeConfig)
    blocks = f"{own}_blocks"
    assert getattr(opened.config.vae, blocks) == getattr(TINY, blocks)
    assert (opened.config.vae.channels, opened.config.vae.latent_channels) == (8, 4)
    assert {path.split("/")[1] for path in opened.leaves} == {own}
    assert opened.parts == ("vae",)
    assert lacking_half(opened) in ("encoder", "decoder") and lacking_half(opened) != own


@pytest.mark.parametrize("order", [(ENCODER, DECODER), (DECODER, ENCODER)])
def test_halves_given_together_are_one(tmp_path: Path, order: tuple[Naming, Naming]) -> None:
    first, second = (half(tmp_path, naming) for naming in order)
    opened = open_model(first, parts_from=[second])
    assert opened.config.vae == TINY
    assert_part_holds(opened, "vae", TINY)


def test_halves_replace_the_autoencoder_of_a_model(tmp_path: Path) -> None:
    base = foreign.single_file(tmp_path / "base.safetensors", BASE)
    halves = [half(tmp_path, naming) for naming in (DECODER, ENCODER)]
    alone = open_model(base, parts_from=halves[:1])
    assert lacking_half(alone) == "encoder"
    assert_holds(open_model(base, parts_from=halves), WITH_TINY)
    large = component(tmp_path / "large", BASE.vae)
    assert_holds(open_model(base, parts_from=[*halves, large]), BASE)


def test_halves_of_two_autoencoders_are_refused(tmp_path: Path) -> None:
    other = half(tmp_path / "other", ENCODER, dataclasses.replace(TINY, channels=4))
    with pytest.raises(InputError, match="has 4 channels and latents of 4, the decoder that it joins 8 and 4: halves"):
        open_model(half(tmp_path, DECODER), parts_from=[other])


@pytest.mark.parametrize("beside", [True, False])
def test_diffusers_directory_and_its_file_are_found_out(tmp_path: Path, beside: bool) -> None:
    folder = component(tmp_path / "tiny", TINY)
    assert_part_holds(open_model(folder), "vae", TINY)
    if not beside:
        (folder / "config.json").unlink()
    opened = open_model(folder / "diffusion_pytorch_model.safetensors")
    assert opened.config.vae == TINY
    assert opened.scale_is_known
    assert_part_holds(opened, "vae", TINY)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("act_fn", "silu", 'act_fn="silu", which is not implemented; implemented is "relu"'),
        ("scaling_factor", 0.5, "scaling_factor=0.5, which is not implemented"),
        ("num_encoder_blocks", [1, 2, 3], "num_encoder_blocks=.*as many levels as the decoder's 2"),
        ("encoder_block_out_channels", [4, 4], "encoder_block_out_channels=.*the decoder's"),
        ("decoder_block_out_channels", [8, 4], "decoder_block_out_channels=.*one number for all levels"),
    ],
)
def test_field_that_is_not_implemented_is_refused(tmp_path: Path, field: str, value: object, expected: str) -> None:
    folder = component(tmp_path / "tiny", TINY)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(InputError, match=expected):
        open_model(folder)


@pytest.mark.parametrize("naming", [ENCODER, DECODER])
def test_half_returns_from_every_layout_with_every_bit(tmp_path: Path, naming: Naming) -> None:
    source = half(tmp_path, naming)
    for to, name in ((Layout.ORBAX, "there"), (Layout.SINGLE_FILE, "there.safetensors")):
        convert(source, tmp_path / name, to, progress=False)
        assert lacking_half(open_model(tmp_path / name)) == lacking_half(open_model(source))
        convert(tmp_path / name, tmp_path / f"{to.value}-back.safetensors", Layout.SINGLE_FILE, progress=False)
        assert foreign.contents(tmp_path / f"{to.value}-back.safetensors") == foreign.contents(source)
    with pytest.raises(
        InputError, match=r"AutoencoderTiny needs encoder and decoder, and the (en|de)coder is missing\. "
    ):
        convert(source, tmp_path / "refused", Layout.DIFFUSERS, progress=False)


def test_whole_goes_between_the_layouts_that_have_a_place_for_it(tmp_path: Path) -> None:
    halves = open_model(half(tmp_path, DECODER), parts_from=[half(tmp_path, ENCODER)])
    convert(halves, tmp_path / "diffusers", Layout.DIFFUSERS, progress=False)
    written = component(tmp_path / "expected", TINY)
    assert foreign.contents(tmp_path / "diffusers") == foreign.contents(written)
    convert(tmp_path / "diffusers", tmp_path / "orbax", Layout.ORBAX, progress=False)
    assert_part_holds(open_model(tmp_path / "orbax"), "vae", TINY)
    with pytest.raises(InputError, match="taesd keeps encoder and decoder in two files"):
        convert(halves, tmp_path / "refused.safetensors", Layout.SINGLE_FILE, progress=False)


def test_model_with_a_tiny_autoencoder_is_a_diffusers_directory_and_no_single_file(tmp_path: Path) -> None:
    folder = foreign.diffusers_folder(tmp_path / "model", WITH_TINY)
    opened = open_model(folder)
    assert_holds(opened, WITH_TINY)
    convert(opened, tmp_path / "again", Layout.DIFFUSERS, progress=False)
    assert foreign.contents(tmp_path / "again") == foreign.contents(folder)
    with pytest.raises(InputError, match="no place for a tiny autoencoder"):
        convert(opened, tmp_path / "refused.safetensors", Layout.SINGLE_FILE, progress=False)


# Configurations


def test_either_configuration_returns_from_json() -> None:
    for config in (BASE, WITH_TINY):
        assert configuration.from_json(configuration.to_json(config), ModelConfig) == config
    unknown = configuration.to_json(WITH_TINY)
    unknown["vae"]["chanels"] = 8
    with pytest.raises(InputError, match=r"extra fields found.*chanels"):
        configuration.from_json(unknown, ModelConfig)


def test_run_keeps_which_autoencoder_it_had(tmp_path: Path) -> None:
    assert_holds(open_model(make_run(tmp_path / "run", WITH_TINY)), WITH_TINY, unet=4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TinyVaeConfig(0), "channels=0"),
        (TinyVaeConfig(8, (1, 0), (1, 1)), "Give 1 or more everywhere"),
        (TinyVaeConfig(8, (1,), (1, 1)), "differ in length"),
        (TinyVaeConfig(latent_channels=16), "latent_channels=16 and model.unet.out_channels=4 differ"),
    ],
)
def test_configuration_that_cannot_be_is_refused(config: TinyVaeConfig, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        dataclasses.replace(BASE, vae=config).check()


# What it does


def test_public_functions_take_either_autoencoder() -> None:
    """The published size; 1,222,532 and 1,222,531 weights are in the files."""
    abstract = vae.abstract(taesd.TAESDXL)
    assert count(abstract["encoder"]) == 1_222_532 and count(abstract["decoder"]) == 1_222_531
    for config in (taesd.TAESDXL, vae.SDXL_VAE):
        params = vae.abstract(config)
        image = jax.ShapeDtypeStruct((2, 64, 48, 3), jnp.float32)
        posterior = jax.eval_shape(functools.partial(vae.encode, config), params, image)
        assert posterior.mean.shape == posterior.log_variance.shape == (2, 8, 6, 4)
        decoded = jax.eval_shape(functools.partial(vae.decode, config), params, posterior.mean)
        assert (decoded.shape, decoded.dtype) == (image.shape, jnp.float32)
        assert config.downsampling == 8


def test_latent_is_the_mean_exactly_and_not_scaled() -> None:
    params = random_params(vae.abstract, TINY)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    posterior = vae.encode(TINY, params, image)
    latent = vae.scaled_sample(TINY, posterior, jax.random.split(jax.random.key(0), 2))
    alone = taesd.TinyEncoder(TINY, Compute()).apply({"params": params["encoder"]}, image)
    np.testing.assert_array_equal(latent, np.asarray(alone))
    kept = vae.Posterior(*(jnp.asarray(part, jnp.bfloat16) for part in posterior))  # as a cache keeps it
    latent = vae.scaled_sample(TINY, kept, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_array_equal(latent, jnp.asarray(kept.mean, jnp.float32))


def test_bfloat16_returns_float32() -> None:
    params, compute = random_params(vae.abstract, TINY), Compute(Dtype.BFLOAT16)
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)), jnp.float32)
    latent = vae.encode(TINY, params, image, compute).mean
    decoded = vae.decode(TINY, params, latent, compute)
    assert latent.dtype == decoded.dtype == jnp.float32
    # 8 bits, some ten roundings one after the other.
    exact = vae.decode(TINY, params, latent)
    assert 0 < jnp.abs(decoded - exact).max() / jnp.abs(exact).max() < 0.05


@pytest.mark.parametrize(("naming", "function"), [(DECODER, vae.encode), (ENCODER, vae.decode)])
def test_missing_half_is_named_where_it_is_needed(tmp_path: Path, naming: Naming, function: object) -> None:
    model = load_model(half(tmp_path, naming), progress=False)
    lacking = "encoder" if function is vae.encode else "decoder"
    with pytest.raises(InputError, match=f"has no {lacking}, only its .*taesdxl_{lacking}.safetensors"):
        function(model.config.vae, model.params["vae"], jnp.zeros((1, 4, 4, 3)))  # pyright: ignore[reportCallIssue]


def test_training_from_one_half_alone_is_refused(tmp_path: Path) -> None:
    decoder, encoder = (str(half(tmp_path, naming)) for naming in (DECODER, ENCODER))
    config = train_config(tmp_path / "images")

    def starting_from(*files: str) -> TrainConfig:
        training = dataclasses.replace(config.training, init_from=files)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vae=TINY), training=training)

    mesh = make_mesh(MeshConfig())
    with pytest.raises(InputError, match=r"without its encoder, which would have random weights\. Add the encoder's"):
        objective_of(starting_from(decoder)).initial_weights(mesh, progress=False)
    both = objective_of(starting_from(decoder, encoder)).initial_weights(mesh, progress=False)
    assert {path.split("/")[1] for path in both} == {"encoder", "decoder"}


# The published weights


def test_published_weights_give_a_photograph_back() -> None:
    """33 dB is about what this photograph gives, enlarged by half. Another range of images or latents, or a layer
    amiss, gives 20 or less."""
    files = real_data.files("taesdxl/taesdxl_decoder.safetensors", "taesdxl/taesdxl_encoder.safetensors")
    model = load_model(files[0], np.float32, parts_from=files[1:], progress=False)
    assert model.config.vae == taesd.TAESDXL
    image = jnp.asarray(real_data.photograph(512))
    latent = vae.encode(model.config.vae, model.params["vae"], image).mean
    # SDXL's latents have unit variance after the scale; a single image's may be half or twice that.
    assert 0.5 < float(latent.std()) < 2
    decoded = np.clip(np.asarray(vae.decode(model.config.vae, model.params["vae"], latent)), -1, 1)
    assert 10 * np.log10(4 / np.mean((decoded - image) ** 2)) > 31
