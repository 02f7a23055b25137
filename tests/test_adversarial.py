"""The promises of an autoencoder's training with a discriminator, LPIPS and a learned log-variance: its parts follow
their definitions, the discriminator waits for its first step, and the loop provides what every objective has. The
formulas against torch: parity/test_autoencoding_parity.py."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import compiling
import jax
import jax.numpy as jnp
import killing
import numpy as np
import pytest
import tiny
from crashing import crash_before

from sdxl_jax import config as configuration
from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, MicroConditioning, Params, flatten, unflatten
from sdxl_jax.errors import InputError
from sdxl_jax.models import lpips, patchgan, vae
from sdxl_jax.models.initialisers import Distribution, Parameter, sample
from sdxl_jax.models.layers import Compute, count
from sdxl_jax.models.lpips import Backbone
from sdxl_jax.models.lpips import abstract as lpips_abstract
from sdxl_jax.models.lpips import lpips as perceptual_distance
from sdxl_jax.models.patchgan import Norm, PatchGanConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training import loop
from sdxl_jax.training.objectives import adversarial, adversarial_step, autoencoding, objective_of
from sdxl_jax.training.objectives.adversarial import DiscriminatorConfig
from sdxl_jax.training.objectives.adversarial_step import Parts
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig, Reduction
from sdxl_jax.training.state import TrainState
from sdxl_jax.weights.load import load_model

pytestmark = pytest.mark.usefixtures("shared_steps")

STEPS, START = 4, 2
VAE = VaeConfig(block_channels=(4,), resnets_per_block=1, groups=2)
LOSS = AutoencodingLossConfig(
    0.0, 1e-2, reduction=Reduction.SUM, perceptual_weight=0.5, learn_log_variance=True, kl_warmup_steps=3
)
DISCRIMINATOR = DiscriminatorConfig(
    PatchGanConfig(4, 2), start_step=START, lecam_weight=0.1, optimiser=OptimiserConfig(warmup_steps=0)
)


def small_lpips() -> Params:
    return {"layer": {"scale": np.array([0.2, 0.3, 0.5], np.float32)}}


@pytest.fixture(scope="module", autouse=True)
def _small_lpips() -> Any:
    """Weighted squares in place of VGG16, which takes long to compile."""
    with pytest.MonkeyPatch.context() as patch:
        abstract = {"layer": {"scale": Parameter((3,), Distribution(1.0))}}
        patch.setattr(lpips, "abstract", lambda backbone: abstract)
        patch.setattr(autoencoding, "check_lpips", lambda: None)
        patch.setattr(autoencoding, "lpips_parameters", small_lpips)
        distance = lambda backbone, params, x, y: ((x - y) ** 2 @ params["layer"]["scale"]).mean((1, 2))  # noqa: E731
        patch.setattr(adversarial_step, "perceptual_distance", distance)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> AutoencoderConfig:
    """Four steps of four images of one size, the discriminator's first is the third."""
    base = tiny.train_config(tiny.make_folder(tmp_path_factory.mktemp("data") / "images"))
    return AutoencoderConfig(
        data=dataclasses.replace(base.data, batch_size=4, buckets=((32, 32),)),
        vae=VAE,
        loss=LOSS,
        discriminator=DISCRIMINATOR,
        optimiser=OptimiserConfig(learning_rate=1e-3, warmup_steps=2, clip_norm=None),
        ema=EmaConfig(decay=0.9),
        training=AutoencodingLoopConfig(steps=STEPS),
        checkpoint=configuration.CheckpointConfig(every_steps=2, keep=2),
        validation=AutoencodingValidationConfig(every_steps=None),
    )


@pytest.fixture(scope="module")
def whole(config: AutoencoderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loop.train(config, folder := tmp_path_factory.mktemp("whole") / "run", progress=False)
    return folder


# The discriminator's network


def test_discriminator_has_the_published_size() -> None:
    assert count(patchgan.abstract(PatchGanConfig())) == 2_765_633
    image, config = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32), PatchGanConfig()
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), patchgan.abstract(config))
    logits, _ = jax.eval_shape(functools.partial(patchgan.apply, config), params, patchgan.statistics(config), image)
    assert logits.shape == (1, 30, 30, 1)
    smallest = jax.ShapeDtypeStruct((1, config.smallest, config.smallest, 3), jnp.float32)
    logits, _ = jax.eval_shape(functools.partial(patchgan.apply, config), params, patchgan.statistics(config), smallest)
    assert logits.shape == (1, 1, 1, 1)


def drawn(config: PatchGanConfig) -> Params:
    leaves = flatten(patchgan.abstract(config))
    return unflatten({path: jnp.asarray(sample(leaf, 0, path)) for path, leaf in leaves.items()})


def test_a_logit_sees_70_pixels() -> None:
    config = PatchGanConfig(base_channels=1, norm=Norm.ACT)
    params, carried = drawn(config), patchgan.statistics(config)
    params = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.1, params)  # nothing cancels

    def logit(image: Any) -> Any:
        logits, _ = patchgan.apply(config, params, carried, image)
        return logits[0, 7, 7, 0]

    seen = np.argwhere(np.asarray(jax.jit(jax.grad(logit))(jnp.ones((1, 128, 128, 3))))[0].any(-1))
    assert (seen.max(0) - seen.min(0) + 1).tolist() == [70, 70]


def test_discriminator_begins_as_published() -> None:
    """Kernels N(0, 0.02), batch norm's scales N(1, 0.02), biases uniform within ±1 / √fan-in; five deviations."""
    params = {path: np.asarray(leaf) for path, leaf in flatten(drawn(PatchGanConfig(16))).items()}
    kernel, scale, bias = params["main_8/kernel"], params["main_9/scale"], params["main_0/bias"]
    assert kernel.std() == pytest.approx(0.02, rel=5 / math.sqrt(2 * kernel.size))
    assert scale.std() == pytest.approx(0.02, rel=5 / math.sqrt(2 * scale.size)) and abs(scale.mean() - 1) < 0.01
    assert np.abs(bias).max() <= 1 / math.sqrt(48) < 1.5 * np.abs(bias).max()
    assert not params["main_3/bias"].any() and "main_2/bias" not in params


# The loss


def test_adaptive_weight_is_the_ratio_of_norms_within_its_bounds() -> None:
    ratio = lambda a, b: float(adversarial.adaptive_weight(jnp.float32(a), jnp.float32(b)))  # noqa: E731
    assert ratio(3, 1.5) == pytest.approx(3 / 1.5001)
    assert ratio(0, 0) == 0
    assert ratio(2, 0) == 1e4 == ratio(1e9, 1)  # 2 / 1e-4 would be 20,000


def parts_of(config: AutoencoderConfig) -> Parts:
    return Parts(config.vae, config.loss, config.discriminator, Compute(), STEPS)


def test_norms_at_the_last_kernel_are_those_of_its_gradients() -> None:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))  # noqa: E731
    parts, features = Parts(VAE, LOSS, None, Compute(), STEPS), normal(2, 6, 8, 4)
    last, target = {"kernel": normal(3, 3, 4, 3), "bias": normal(3)}, normal(2, 6, 8, 3)

    def loss(kernel: Any) -> Any:
        return (vae.features_to_image(VAE, {**last, "kernel": kernel}, features) * target).sum()

    expected = np.linalg.norm(jax.grad(loss)(last["kernel"]))
    zero, found = adversarial_step.kernel_norms(parts, features, last, 0 * target, target)
    assert float(zero) == 0 and float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_perceptual_term_alone_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real LPIPS, with random weights: the gradient with it minus the one without it is LPIPS's own."""
    monkeypatch.setattr(adversarial_step, "perceptual_distance", perceptual_distance)
    leaves = flatten(lpips_abstract(Backbone.VGG))
    params = unflatten({path: jnp.asarray(sample(leaf, 0, path)) for path, leaf in leaves.items()})
    rng = np.random.default_rng(0)
    image, decoded = (jnp.asarray(rng.uniform(-1, 1, (1, 16, 16, 3)), jnp.float32) for _ in range(2))
    of_decoded = []
    for weight in (0.0, 3.0):
        parts = Parts(VAE, AutoencodingLossConfig(0.0, 0.0, perceptual_weight=weight), None, Compute(), 1)
        _, (gradient, _) = adversarial_step._nll(parts, {"lpips": params}, image, decoded, {})
        of_decoded.append(gradient)
    alone = jax.grad(lambda y: perceptual_distance(Backbone.VGG, params, image, y)[0])(decoded)
    assert np.abs(alone).max() > 0
    np.testing.assert_allclose(of_decoded[1] - of_decoded[0], 3 * alone, rtol=1e-3, atol=1e-3 * np.abs(alone).max())


# A run


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def stored(run: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by path."""
    from sdxl_jax.weights.formats import orbax

    path = run / "checkpoints" / str(step)
    return {name: leaf.read() for name, leaf in orbax.leaves(path, orbax.metadata(path)[0]).items()}


def test_discriminator_is_untouched_before_its_first_step(config: AutoencoderConfig, whole: Path) -> None:
    before, after = stored(whole, START), stored(whole, STEPS)
    fresh = {
        f"auxiliary/discriminator/params/{path}": sample(leaf, 0, f"discriminator/{path}")
        for path, leaf in flatten(patchgan.abstract(DISCRIMINATOR.network)).items()
    }
    for path, value in fresh.items():
        np.testing.assert_array_equal(before[path], value, err_msg=path)
        assert not np.array_equal(after[path], value), path
    rest = [name for name in before if name.startswith("auxiliary/discriminator/") and name not in fresh]
    moments = [name for name in rest if name.startswith("auxiliary/discriminator/optimiser/")]
    assert moments and all(not before[name].any() for name in moments)
    assert all(not np.array_equal(before[name], after[name]) for name in rest)
    for line in lines(whole):
        assert (line["discriminator"] == 0) == (line["generator"] == 0) == (line["step"] <= START)


def test_every_metric_is_logged_and_the_loss_is_their_sum(config: AutoencoderConfig, whole: Path) -> None:
    for line in lines(whole):
        assert set(config.metrics) <= set(line)
        warm = min(1, line["step"] / LOSS.kl_warmup_steps)
        elements, s = 32 * 32 * 3, line["log_variance"]
        nll = (line["l1"] + 0.5 * elements * line["perceptual"]) / math.exp(s) + elements * s
        assert line["nll"] == pytest.approx(nll, rel=1e-5)
        adversarial_term = line["adaptive_weight"] * line["generator"]
        assert line["loss"] == pytest.approx(line["nll"] + warm * 1e-2 * line["kl"] + adversarial_term, rel=1e-5)


def test_average_is_of_the_autoencoder_alone(whole: Path) -> None:
    names = stored(whole, STEPS)
    assert {name.split("/")[1] for name in names if name.startswith("ema/")} == {"vae"}
    assert any(name.startswith("auxiliary/log_variance") for name in names)
    moments = [name for name in names if name.startswith("optimiser/") and name.endswith("log_variance")]
    assert len(moments) == 2  # it is in the autoencoder's optimiser


@pytest.mark.slow
def test_resumed_run_repeats_every_bit(config: AutoencoderConfig, whole: Path, tmp_path: Path) -> None:
    """Losses; both optimisers, the average, the running statistics, LeCam's means and the log-variance."""
    with crash_before(4):
        loop.train(config, tmp_path / "run", progress=False)
    loop.train(config, tmp_path / "run", progress=False)
    for one, other in zip(lines(whole), lines(tmp_path / "run"), strict=True):
        assert {name: one[name] for name in config.metrics} == {name: other[name] for name in config.metrics}
    expected, found = stored(whole, STEPS), stored(tmp_path / "run", STEPS)
    assert expected.keys() == found.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(leaf, found[path], err_msg=path)


def test_lpips_is_kept_with_the_run_and_not_exported(whole: Path) -> None:
    assert set(load_model(whole, progress=False).params) == {"vae"}
    assert (whole / "frozen").is_dir()


def a_batch(rows: int, seed: int = 0) -> Batch:
    zeros = np.zeros((rows, 2), np.int32)
    image = np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), np.uint8)
    return Batch(image, {}, MicroConditioning(zeros, zeros, zeros), zeros[:, 0], zeros[:, 0].astype(bool))


def fresh(config: AutoencoderConfig, step: int = 0) -> tuple[Any, TrainState, Params]:
    """(jitted step, state, frozen parameters)."""
    objective, mesh = objective_of(config), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract, _ = objective.abstract_state(mesh)
    state, frozen = objective.fresh_state(mesh, abstract, {}, progress=False)
    return jax.jit(objective.step()), state._replace(step=jnp.int32(step)), frozen


@pytest.mark.slow
def test_step_that_is_not_finite_changes_nothing(config: AutoencoderConfig) -> None:
    training = dataclasses.replace(config.training, on_nonfinite=configuration.OnNonfinite.SKIP)
    step, state, frozen = fresh(dataclasses.replace(config, training=training), START)
    broken = jax.tree.map(jnp.copy, state.params)
    broken["vae"]["encoder"]["conv_in"]["bias"] = broken["vae"]["encoder"]["conv_in"]["bias"].at[0].set(jnp.nan)
    after, metrics = step(state._replace(params=broken), frozen, a_batch(4))
    assert int(metrics["skipped"]) == 1 and int(after.step) == START + 1
    jax.tree.map(np.testing.assert_array_equal, (after.auxiliary, after.optimiser), (state.auxiliary, state.optimiser))
    after, metrics = step(state, frozen, a_batch(4))
    assert int(metrics["skipped"]) == 0
    assert not np.array_equal(
        after.auxiliary["discriminator"].params["main_0"]["kernel"],
        state.auxiliary["discriminator"].params["main_0"]["kernel"],
    )


@pytest.mark.slow
def test_accumulated_micro_batches_equal_the_whole_batch(config: AutoencoderConfig) -> None:
    """With a norm that sees one image at a time and a constant weight; the adaptive one is a micro-batch's own."""
    network = dataclasses.replace(DISCRIMINATOR.network, norm=Norm.GROUP)
    given = dataclasses.replace(DISCRIMINATOR, network=network, adaptive=False, lecam_weight=0.0, start_step=0)
    config = dataclasses.replace(config, discriminator=given)
    results = []
    for micro_batches in (1, 2):
        optimiser = dataclasses.replace(config.optimiser, accumulate=micro_batches)
        step, state, frozen = fresh(dataclasses.replace(config, optimiser=optimiser))
        results.append(step(state, frozen, a_batch(4))[1])
    for name in ("loss", "grad_norm", "discriminator", "discriminator_grad_norm"):
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=2e-5, err_msg=name)  # float32 sums


@pytest.mark.slow
def test_decoder_alone_leaves_the_encoders_bits_and_the_scale(config: AutoencoderConfig, tmp_path: Path) -> None:
    training = dataclasses.replace(config.training, trainable=("^vae/decoder/",), steps=START + 1)
    model = loop.train(dataclasses.replace(config, training=training), tmp_path / "run", progress=False)
    opened = load_model(tmp_path / "run", progress=False)
    assert opened.config.vae == model.config.vae == VAE
    for path, leaf in flatten(vae.abstract(VAE)).items():
        before, after = sample(leaf, 0, f"vae/{path}"), np.asarray(flatten(opened.params["vae"])[path])
        assert np.array_equal(before, after) == path.startswith("encoder/"), path


def test_tiny_autoencoder_trains_with_the_same_loss(config: AutoencoderConfig) -> None:
    loss = dataclasses.replace(LOSS, kl_weight=0.0, kl_warmup_steps=0)
    step, state, frozen = fresh(dataclasses.replace(config, vae=TinyVaeConfig(4, (1,), (1,)), loss=loss), START)
    after, metrics = step(state, frozen, a_batch(4))
    assert "kl" not in metrics and math.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.params, after.params)), strict=True)]
    assert np.mean(moved) > 0.9


@pytest.mark.slow
def test_killed_run_is_the_undisturbed_run(config: AutoencoderConfig, tmp_path: Path) -> None:
    """kill -9 at random moments, until six runs or so are finished: every line, array and validation image."""
    given = dataclasses.replace(
        config,
        loss=dataclasses.replace(LOSS, perceptual_weight=0.0),
        training=dataclasses.replace(config.training, steps=9),
        validation=AutoencodingValidationConfig(every_steps=4, images=2),
    )
    killing.uninterrupted(given, tmp_path / "whole", tmp_path, 1)
    seconds = killing.uninterrupted(given, tmp_path / "again", tmp_path, 1)  # its programs are compiled
    killing.assert_same_run(tmp_path / "again", tmp_path / "whole")
    counts = killing.campaign(given, tmp_path / "whole", tmp_path, 1, 6, seconds, seed=0)
    assert counts.total() == 6


@pytest.mark.slow
def test_several_devices_train_as_one(tmp_path: Path) -> None:
    """Two and four simulated devices, the latter with split parameters: the batch norm and the adaptive weight are over
    the whole batch. The tolerance is that of float32 sums in another order, through Adam, whose first steps divide by
    the gradient's own size."""
    program = Path(__file__).with_name("sharded_adversarial.py")
    environment = compiling.environment(tmp_path, devices=4)
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two, four = json.loads(done.stdout.splitlines()[-1])
    for many in (two, four):
        for step in range(len(one)):
            for name, value in one[step].items():
                assert many[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)


# Bad input

TINY = TinyVaeConfig(4, (1,), (1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discriminator": {"start_step": 4}}, "start_step=4 is not before the last step, training.steps=4"),
        ({"discriminator": {"weight": -1.0}}, "discriminator.weight=-1.0 is out of range"),
        ({"discriminator": {"network": PatchGanConfig(4, 4)}}, "has a side of 32 pixels; the discriminator needs 48"),
        (
            {"discriminator": {"optimiser": OptimiserConfig(beta1=2.0)}},
            "discriminator.optimiser.beta1=2.0 is out of range",
        ),
        (
            {"discriminator": {"optimiser": OptimiserConfig(accumulate=2)}},
            "discriminator.optimiser.accumulate=2 has no",
        ),
        ({"loss": {"perceptual_weight": math.inf, "log_variance": math.nan}}, "loss.log_variance=nan is not finite"),
        ({"loss": {"kl_warmup_steps": -1}}, "loss.kl_warmup_steps=-1 is out of range"),
        ({"vae": TINY}, "a tiny autoencoder has no log-variance, so there is no KL divergence. Set both to 0"),
        (
            {"vae": TinyVaeConfig(4, (1, 1), (1,)), "loss": {"kl_weight": 0.0, "kl_warmup_steps": 0}},
            "vae.encoder_blocks=1, 1 and decoder_blocks=1 differ in length",
        ),
        ({"data": {"buckets": ((8, 8),)}}, "LPIPS .* needs 16 or more"),
        ({"checkpoint": {"keep_best": "discriminato"}}, "nearest first: discriminator, "),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(
    config: AutoencoderConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fields = {
        name: dataclasses.replace(getattr(config, name), **given) if isinstance(given, dict) else given
        for name, given in changes.items()
    }
    with pytest.raises(InputError, match=message):
        loop.train(dataclasses.replace(config, **fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
