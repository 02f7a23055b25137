"""The promises of training/objectives/autoencoding: the loss follows its definition, and the loop provides what
denoising has: bit-for-bit resume, EMA, checkpoints that open, validation images, refusals before work starts."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import call
from crashing import crash_before
from PIL import Image

from sdxl_jax import config as configuration
from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, MicroConditioning, flatten, normalise, unflatten
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.evaluation.settings import Metric
from sdxl_jax.model import ModelConfig
from sdxl_jax.models import vae
from sdxl_jax.models.initialisers import sample
from sdxl_jax.models.vae import Posterior, VaeConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import loop
from sdxl_jax.training.objectives import OBJECTIVES, autoencoding, objective_of
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingLossConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.observe.scores import Scores, fixed_examples
from sdxl_jax.training.processes import Processes
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.open import open_model

pytestmark = pytest.mark.usefixtures("shared_steps")

STEPS = 4
VAE = VaeConfig(block_channels=(4, 4, 4, 4), resnets_per_block=1, groups=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderConfig:
    """Four steps of four images of one size; two sizes would compile each program twice."""
    base = tiny.train_config(tiny.make_folder(tmp_path_factory.mktemp("data") / "images"))
    return AutoencoderConfig(
        data=dataclasses.replace(base.data, batch_size=4, buckets=((32, 32),)),
        vae=VAE,
        loss=AutoencodingLossConfig(edge_weight=0.5, kl_weight=0.25),
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=2),
        ema=EmaConfig(decay=0.9),
        training=AutoencodingLoopConfig(steps=STEPS),
        checkpoint=configuration.CheckpointConfig(every_steps=2, keep=2, keep_best="validation_psnr"),
        validation=AutoencodingValidationConfig(
            every_steps=2, images=3, metrics=(Metric.PSNR, Metric.SSIM), metrics_every_steps=2, metrics_images=3
        ),
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(config: AutoencoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loop.train(config, folder := tmp_path_factory.mktemp("whole") / "run", progress=False)
    return folder


@pytest.mark.slow
def test_resumed_run_repeats_every_loss_bit_for_bit(config: AutoencoderConfig, whole: Path, tmp_path: Path) -> None:
    with crash_before(4):
        loop.train(config, tmp_path / "run", progress=False)
    model = loop.train(config, tmp_path / "run", progress=False)
    repeated = ("step", "loss", "l1", "edges", "kl", "grad_norm", "learning_rate", "bucket", "images_seen")
    repeated += ("validation_psnr", "validation_ssim")
    for one, other in zip(lines(whole), lines(tmp_path / "run"), strict=True):
        assert {name: one.get(name) for name in repeated} == {name: other.get(name) for name in repeated}
    expected = flatten(load_model(whole, progress=False).params)
    for path, leaf in flatten(model.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_metrics_during_training_are_those_of_the_checkpoints(config: AutoencoderConfig, whole: Path) -> None:
    assert [line["step"] for line in lines(whole) if "validation_psnr" in line] == [2, 4]
    dataset, mesh = BucketedDataset(config.data, None), sharding.make_mesh(MeshConfig())
    scores = Scores(objective_of(config), dataset, mesh, Processes(1.0))
    for line in lines(whole)[1::2]:
        found = scores.of(load_model(whole / "checkpoints" / str(line["step"]), progress=False))
        assert found == {name: line[name] for name in ("validation_psnr", "validation_ssim")}
    examples = fixed_examples(dataset, 100)
    assert examples.images.shape[1:3] in [tuple(bucket) for bucket in config.data.buckets]
    assert len(examples.images) == len(examples.captions) > len(fixed_examples(dataset, 2).images) == 2


def test_loss_is_the_weighted_sum_of_its_terms(config: AutoencoderConfig, whole: Path) -> None:
    for line in lines(whole):
        assert line["loss"] == pytest.approx(line["l1"] + 0.5 * line["edges"] + 0.25 * line["kl"], rel=1e-6)  # float32
    assert set(config.metrics) <= set(lines(whole)[0])


def test_terms_of_the_loss_follow_their_definitions(config: AutoencoderConfig) -> None:
    """Computed in numpy from the networks' outputs."""
    params = unflatten({path: sample(leaf, 1, path) for path, leaf in flatten(vae.abstract(VAE)).items()})
    rng = np.random.default_rng(0)
    zeros, image = np.zeros((2, 2), np.int32), rng.integers(0, 256, (2, 16, 24, 3), np.uint8)
    micro = MicroConditioning(zeros, zeros, zeros)
    batch = Batch(image, {}, micro, np.arange(2, dtype=np.int32), np.zeros(2, bool))
    keys = jax.random.split(jax.random.key(0), 2)
    value, terms = objective_of(config).loss({"vae": params}, {}, batch, keys)
    posterior = vae.encode(VAE, params, normalise(image))
    error = np.asarray(vae.decode(VAE, params, posterior.sample(keys) * VAE.scale) - normalise(image), np.float64)
    mean, log_variance = (np.asarray(x, np.float64) for x in posterior)
    expected = {
        "l1": np.abs(error).mean(),
        "edges": np.abs(error[:, 1:] - error[:, :-1]).mean() + np.abs(error[:, :, 1:] - error[:, :, :-1]).mean(),
        "kl": 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).mean(),
    }
    for name, number in expected.items():
        assert float(terms[name]) == pytest.approx(number, rel=1e-5), name  # float32 sums
    assert float(value) == pytest.approx(expected["l1"] + 0.5 * expected["edges"] + 0.25 * expected["kl"], rel=1e-5)


def test_divergence_is_zero_for_the_standard_normal_distribution_and_known_for_another() -> None:
    zeros = jnp.zeros((1, 2, 2, 4))
    assert float(autoencoding.kl_divergence(Posterior(zeros, zeros))) == 0
    # N(1, e): ½ (1 + e − 1 − 1)
    assert float(autoencoding.kl_divergence(Posterior(zeros + 1, zeros + 1))) == pytest.approx(0.5 * (math.e - 1))


def test_run_opens_as_an_autoencoder_with_its_averaged_weights(whole: Path, tmp_path: Path) -> None:
    weights = open_model(whole)
    assert list(weights.parts) == ["vae"]
    measured = json.loads((whole / "config.json").read_text())["measured"]
    assert weights.config.vae == dataclasses.replace(VAE, scale=measured["latent_scale"])
    outcome = call("convert", whole, tmp_path / "vae.safetensors", "--to", "single-file")
    assert outcome.code == 0, outcome.err
    expected, found = (
        flatten(load_model(path, progress=False).params) for path in (whole, tmp_path / "vae.safetensors")
    )
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(leaf, found[path], err_msg=path)


def test_validation_shows_originals_beside_reconstructions(whole: Path, config: AutoencoderConfig) -> None:
    assert sorted(path.name for path in (whole / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    with Image.open(whole / "samples" / "step_00000004.png") as grid:
        text, width = grid.info, grid.width
    assert text["step"] == "4" and text["images"] == "3"
    assert 0 < float(text["psnr_db"]) < 60 and -1 < float(text["ssim"]) < 1
    assert width > 3 * max(bucket[1] for bucket in config.data.buckets)  # original, reconstruction, difference


def test_difference_is_grey_where_there_is_none() -> None:
    original = np.array([[[0, 100, 255]]], np.uint8)
    shown = autoencoding.signed_difference(original, np.array([[[255, 100, 250]]], np.uint8))
    assert shown.tolist() == [[[255, 128, 123]]]


@pytest.mark.slow
def test_latents_have_unit_variance_with_the_measured_scale(config: AutoencoderConfig, whole: Path) -> None:
    """Over samples of the posteriors of all images, computed in numpy."""
    measured = json.loads((whole / "config.json").read_text())["measured"]
    model = load_model(whole, progress=False)
    dataset = BucketedDataset(config.data, None)
    posteriors = [
        vae.encode(VAE, model.params["vae"], normalise(image[None])) for image in autoencoding.examples(dataset, 16)
    ]
    means, variances = (np.concatenate([np.ravel(x) for x in each]) for each in zip(*posteriors, strict=True))
    deviation = math.sqrt(np.var(means, dtype=np.float64) + np.exp(np.float64(variances)).mean())
    assert measured["latent_images"] == 16 and measured["step"] == STEPS
    assert measured["latent_standard_deviation"] == pytest.approx(deviation, rel=1e-5)  # float32 sums
    assert measured["latent_scale"] == pytest.approx(1 / deviation, rel=1e-4)  # five digits


def test_scale_is_measured_once_and_exported(
    config: AutoencoderConfig, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoding, "latent_deviation", None)
    model = loop.train(config, whole, progress=False)  # finished already
    measured = json.loads((whole / "config.json").read_text())["measured"]
    assert model.config.vae.scale == measured["latent_scale"]
    assert call("convert", whole, tmp_path / "vae", "--to", "orbax").code == 0
    assert open_model(tmp_path / "vae").config.vae.scale == measured["latent_scale"]


def test_weights_with_another_scale_can_be_trained_on(config: AutoencoderConfig, whole: Path) -> None:
    """The scale is measured again, unless the encoder, and with it the scale, stays."""
    after = dataclasses.replace(config.training, init_from=(str(whole),))
    objective_of(dataclasses.replace(config, training=after)).check_start()
    frozen = dataclasses.replace(after, trainable=("^vae/decoder/",))
    with pytest.raises(InputError, match=r"scale: \d.* Set vae to the file's configuration"):
        objective_of(dataclasses.replace(config, training=frozen)).check_start()


def test_decoder_alone_can_be_trained(config: AutoencoderConfig) -> None:
    training = dataclasses.replace(config.training, trainable=("^vae/decoder/",))
    objective = objective_of(dataclasses.replace(config, training=training))
    state, frozen = objective.abstract_state(sharding.make_mesh(MeshConfig()))
    assert set(state.params["vae"]) == {"decoder"} and set(frozen["vae"]) == {"encoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"cache": "somewhere"}}, "data.cache=somewhere has no effect: an autoencoder learns from"),
        ({"data": {"aesthetic": "score"}}, "data.aesthetic=score has no effect"),
        (
            {"validation": {"metrics": (Metric.PSNR, Metric.CMMD)}},
            "validation.metrics has cmmd, which is not measured during training",
        ),
        ({"validation": {"metrics_images": 1}}, "validation.metrics_images=1 is out of range. Give 2 or more"),
        (
            {"data": {"buckets": ((32, 36),)}},
            "data.buckets has 32×36. This autoencoder takes multiples of 8. Use 32×32",
        ),
        ({"loss": {"kl_weight": -1.0}}, "loss.kl_weight=-1.0 is out of range. Give 0 or more"),
        ({"loss": {"edge_weight": math.nan}}, "loss.edge_weight=nan is out of range"),
        ({"vae": {"groups": 3}}, "vae.block_channels has 4, which vae.groups=3 does not divide"),
        ({"checkpoint": {"keep_best": "kll"}}, "checkpoint.keep_best=kll .* nearest first: kl, "),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(
    config: AutoencoderConfig, tmp_path: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    wrong = dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    )
    with pytest.raises(InputError, match=message):
        loop.train(wrong, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_fields_of_another_objective_are_refused(config: AutoencoderConfig) -> None:
    value = configuration.to_json(config)
    with pytest.raises(InputError, match="model"):
        configuration.from_json(value | {"model": configuration.to_json(ModelConfig())}, AutoencoderConfig)
    with pytest.raises(InputError, match="caption_dropout"):
        configuration.from_json(value | {"training": value["training"] | {"caption_dropout": 0.1}}, AutoencoderConfig)


def test_run_of_another_objective_is_refused(whole: Path) -> None:
    before = (whole / "config.json").read_text()
    with pytest.raises(InputError, match="belongs to a run of autoencoding, this configuration is one of denoising"):
        loop.train(tiny.train_config(Path("unused")), whole, progress=False)
    assert (whole / "config.json").read_text() == before


CONFIGURATION = """
import test_autoencoding, pathlib, dataclasses
def get_config():
    return test_autoencoding.given(pathlib.Path({folder!r}))
"""


def given(folder: Path) -> AutoencoderConfig:
    """The configuration that the files of these tests return."""
    base = tiny.train_config(folder)
    return AutoencoderConfig(
        data=dataclasses.replace(base.data, batch_size=4),
        vae=VAE,
        training=AutoencodingLoopConfig(steps=1),
        validation=AutoencodingValidationConfig(every_steps=None),
    )


@pytest.fixture(scope="module")
def file(config: AutoencoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "autoencoder.py"
    path.write_text(CONFIGURATION.format(folder=config.data.folder))
    return path


@pytest.mark.slow
def test_command_line_trains_it_with_its_own_fields(file: Path, tmp_path: Path) -> None:
    helped = call("train", file, "--help")
    assert helped.code == 0
    assert "--loss.kl-weight" in helped.out and "--vae.scale" in helped.out
    assert "--model." not in helped.out and "--training.caption-dropout" not in helped.out
    outcome = call("train", file, "--run-dir", tmp_path / "run", "--loss.kl-weight", 0.5)
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["loss"]["kl_weight"] == 0.5
    assert len(lines(tmp_path / "run")) == 1


def test_data_inspect_shows_what_it_will_see(file: Path) -> None:
    outcome = call("data", "inspect", file, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["images_usable"] == 16


def test_images_need_no_caption(config: AutoencoderConfig, tmp_path: Path) -> None:
    """In training and in `data inspect`; a model that learns from captions needs them."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(folder / f"{number}.png")
    bare = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=str(folder)))
    assert objective_of(bare).tokenizer is None and not bare.wants_captions
    dataset = BucketedDataset(bare.data, objective_of(bare).tokenizer)
    assert len(dataset.source) == 4
    rows = dataset.iterate()
    assert next(rows).tokens == {}
    rows.close()
    path = tmp_path / "bare.py"
    path.write_text(CONFIGURATION.format(folder=str(folder)))
    assert json.loads(call("data", "inspect", path, "--json").out)["images_usable"] == 4
    captioned = call("data", "inspect", folder)
    assert captioned.code == 2 and "image without a caption" in captioned.err


def test_commands_of_another_objective_say_so(file: Path) -> None:
    for command in (
        ("compile", file, "--topology", "v5e:2x2", "--program", "sample"),
        ("data", "encode", file, "--data.cache", "unused"),
    ):
        outcome = call(*command)
        assert outcome.code == 2
        assert "utoencod" in outcome.err and "Traceback" not in outcome.err


def test_every_objective_is_chosen_by_the_type_of_its_configuration() -> None:
    assert len({objective.name for objective in OBJECTIVES.values()}) == len(OBJECTIVES) >= 2
    for kind in OBJECTIVES:
        assert kind is not configuration.RunConfig and issubclass(kind, configuration.RunConfig)
