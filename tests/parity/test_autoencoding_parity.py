"""The loss of an autoencoder and its discriminator against a twin in torch, written from the formulas of latent-
diffusion and generative-models: every term, the adaptive weight, every gradient, running statistics, ActNorm.

1e-5 of the maximum: ours is float32, the twin float64. A factor of 1 − 1/n in the running variance, a mean in place of
a sum, or a KL in the adaptive weight, would be 1e-3 and more.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import tiny
from agreement import Agree, Note
from command import call
from reference import torch

from sdxl_jax.arrays import Batch, MicroConditioning, Params, flatten, normalise, unflatten
from sdxl_jax.models import patchgan, vae
from sdxl_jax.models.initialisers import sample
from sdxl_jax.models.layers import Compute
from sdxl_jax.models.patchgan import Norm, PatchGanConfig
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.training import loop
from sdxl_jax.training.objectives import adversarial, adversarial_step
from sdxl_jax.training.objectives.adversarial import AdversarialLoss, Adversary, DiscriminatorConfig
from sdxl_jax.training.objectives.adversarial_step import Parts
from sdxl_jax.training.objectives.autoencoding import (
    AutoencoderConfig,
    AutoencodingLoopConfig,
    AutoencodingValidationConfig,
)
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig, PixelLoss, Reduction
from sdxl_jax.weights import names

TOLERANCE = 1e-5
nn, functional = torch.nn, torch.nn.functional


# The discriminator


class ActNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Any) -> Any:
        return self.weight * (x + self.bias)

    def initialise(self, x: Any) -> None:
        rows = x.detach().permute(1, 0, 2, 3).flatten(1)
        self.bias.data.copy_(-rows.mean(1).view_as(self.bias))
        self.weight.data.copy_(1 / (rows.std(1).view_as(self.weight) + 1e-6))


def group_norm(channels: int) -> Any:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def twin(config: PatchGanConfig, params: Params) -> Any:
    """The PatchGAN in torch, float64, with our parameters."""
    norms = {
        Norm.BATCH: nn.BatchNorm2d,
        Norm.GROUP: lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
        Norm.ACT: ActNorm,
    }
    layers, width, bias = [], config.base_channels, config.norm is not Norm.BATCH
    layers += [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for n in range(1, config.layers + 1):
        before, channels = width * min(2 ** (n - 1), 8), width * min(2**n, 8)
        stride = 2 if n < config.layers else 1
        layers += [nn.Conv2d(before, channels, 4, stride, 1, bias=bias), norms[config.norm](channels)]
        layers += [nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(width * min(2**config.layers, 8), 1, 4, 1, 1)]
    model = nn.Sequential(*layers).double()
    for parameter, ours in zip(model.parameters(), in_order(params, model), strict=True):
        parameter.data.copy_(torch.from_numpy(np.array(ours, np.float64)).view_as(parameter))
    return model


def in_order(params: Params, model: Any) -> list[np.ndarray]:
    """Ours, in torch's layout and in the order of the model's parameters."""
    found = []
    for name, _ in model.named_parameters():
        number, kind = name.split(".")
        layer = params[f"main_{number}"]
        found.append(np.asarray(layer["bias" if kind == "bias" else "kernel" if "kernel" in layer else "scale"]))
    return [each.transpose(3, 2, 0, 1) if each.ndim == 4 else each for each in found]


def random_params(config: PatchGanConfig, seed: int = 0) -> Params:
    made = {path: sample(leaf, seed, path) for path, leaf in flatten(patchgan.abstract(config)).items()}
    return jax.tree.map(lambda leaf: jnp.asarray(5 * leaf), unflatten(made))  # logits around ±1, not 0


def tensor(array: Any) -> Any:
    return torch.from_numpy(np.array(array, np.float64)).permute(0, 3, 1, 2)


def pairs(params: Params, model: Any, what: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(ours, torch's) by torch's names. what: "data" or "grad" of the model's parameters."""
    ours = dict(zip(dict(model.named_parameters()), in_order(params, model), strict=True))
    theirs = {name: getattr(parameter, what).numpy() for name, parameter in model.named_parameters()}
    return ours, {name: value.reshape(ours[name].shape) for name, value in theirs.items()}


def agree_on_leaves(what: str, ours: Any, theirs: Any, note: Note, tolerance: float = TOLERANCE) -> None:
    """Each leaf within the tolerance of its maximum, but those that are rounding alone: what a softmax or a norm
    subtracts has no gradient."""
    assert ours.keys() == theirs.keys()
    largest = {name: np.abs(leaf).max() for name, leaf in theirs.items()}
    counted = [name for name, value in largest.items() if value > 1e-9 * max(largest.values())]
    worst = {name: np.abs(ours[name] - theirs[name]).max() / largest[name] for name in counted}
    name = max(worst, key=lambda name: worst[name])
    note(f"{what}, {len(counted)} leaves", f"{worst[name]:.1e}  (allowed {tolerance:.0e})")
    assert worst[name] <= tolerance, (what, name, worst[name])


def images(seed: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (3, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("norm", Norm)
def test_discriminator_matches_torch(norm: Norm, agree: Agree, note: Note) -> None:
    """Logits, gradients of parameters and image, running statistics after two batches, and evaluation with them."""
    config = PatchGanConfig(base_channels=8, layers=3, norm=norm)
    params, carried = random_params(config), patchgan.statistics(config)
    model = twin(config, params)
    first, second = images(1), images(2)

    @jax.jit
    def total(params: Params, x: Any) -> Any:
        logits, after = patchgan.apply(config, params, carried, x)
        _, after = patchgan.apply(config, params, after, second)
        return jnp.square(logits).sum() + logits.sum(), (logits, after, patchgan.apply(config, params, after, x, False))

    gradients, (logits, after, (evaluated, unchanged)) = jax.grad(total, (0, 1), has_aux=True)(params, first)
    x = tensor(first).requires_grad_()
    theirs = model(x)
    (theirs.square().sum() + theirs.sum()).backward()
    model(tensor(second))
    agree(f"PatchGAN {norm.value}: logits", logits, theirs.permute(0, 2, 3, 1).detach(), TOLERANCE)
    agree(f"PatchGAN {norm.value}: gradient of the image", gradients[1], x.grad.permute(0, 2, 3, 1), TOLERANCE)
    agree_on_leaves(f"PatchGAN {norm.value}: gradient", *pairs(gradients[0], model, "grad"), note)
    jax.tree.map(np.testing.assert_array_equal, after, unchanged)
    if norm is Norm.BATCH:
        for name, statistics in after.items():
            theirs = model[int(name.removeprefix("main_"))]
            agree(f"PatchGAN: running mean of {name}", statistics["mean"], theirs.running_mean, TOLERANCE)
            agree(f"PatchGAN: running variance of {name}", statistics["variance"], theirs.running_var, TOLERANCE)
    model.eval()
    agree(f"PatchGAN {norm.value}: evaluation", evaluated, model(tensor(first)).permute(0, 2, 3, 1).detach(), TOLERANCE)


def test_act_norm_begins_as_torchs(note: Note) -> None:
    config = PatchGanConfig(base_channels=8, layers=2, norm=Norm.ACT)
    params = random_params(config)
    ours, carried = jax.jit(functools.partial(patchgan.initialised, config))(
        params, patchgan.statistics(config), images(1)
    )
    model, x = twin(config, params), tensor(images(1))
    for layer in model:
        if isinstance(layer, ActNorm):
            layer.initialise(x)
        x = layer(x)
    agree_on_leaves("ActNorm: parameters after the first batch", *pairs(ours, model, "data"), note)
    assert int(carried["initialised"]) == 1
    again, _ = patchgan.initialised(config, ours, carried, images(2))
    jax.tree.map(np.testing.assert_array_equal, again, ours)


# The whole loss

VAE = VaeConfig(block_channels=(32, 32), resnets_per_block=1, latent_channels=2, scale=0.3)
NETWORK = PatchGanConfig(base_channels=8, layers=2)


def perceptual(x: Any, y: Any) -> Any:
    """Stands for LPIPS, which has a parity test of its own: one number per image, in jax and in torch."""
    return ((x - y) ** 2 + 0.1 * (x - y) ** 4).sum((1, 2, 3)) / 50_000


def own(parts: Parts, params: Params, adversary: Adversary | None, pixels: np.ndarray, s: float, step: int) -> Any:
    zeros = np.zeros((len(pixels), 2), np.int32)
    batch = Batch(pixels, {}, MicroConditioning(zeros, zeros, zeros), zeros[:, 0], zeros[:, 0].astype(bool))
    keys = jax.random.split(jax.random.key(0), len(pixels))
    optimised = {"vae": params} | ({"loss": {"log_variance": jnp.float32(s)}} if parts.loss.learn_log_variance else {})
    run = jax.jit(functools.partial(adversarial_step.gradients, parts, step=jnp.int32(step)))
    return run(optimised, {"lpips": {}}, adversary, batch, keys)


def torch_loss(
    parts: Parts, model: Any, judge: Any, state: Adversary | None, x: Any, noise: Any, s: Any, step: int
) -> dict[str, Any]:
    """The formulas, in torch. `total` and `judges` are what the two optimisers descend."""
    loss, given, count = parts.loss, parts.discriminator, len(x)
    posterior = model.encode(x).latent_dist
    mean, log_variance = posterior.mean, posterior.logvar
    y = model.decode(mean + torch.exp(0.5 * log_variance) * noise).sample
    error = (x - y).abs() if loss.pixel is PixelLoss.L1 else (x - y) ** 2
    edges = [(x - y).diff(dim=axis).abs() for axis in (2, 3)]
    reduce = (lambda t: t.sum() / count) if loss.reduction is Reduction.SUM else (lambda t: t.mean())
    rec = error + loss.perceptual_weight * perceptual(x, y).view(-1, 1, 1, 1)
    nll = reduce(rec / torch.exp(s) + s) + loss.edge_weight * sum(map(reduce, edges)) / torch.exp(s)
    kl = reduce(0.5 * (mean**2 + log_variance.exp() - 1 - log_variance))
    warm = min(1.0, (step + 1) / loss.kl_warmup_steps) if loss.kl_warmup_steps else 1.0
    found = {parts.loss.pixel.value: reduce(error), "edges": sum(map(reduce, edges)), "nll": nll, "kl": kl}
    found |= {"perceptual": perceptual(x, y).mean(), "total": nll + loss.kl_weight * warm * kl}
    if given is None or step < given.start_step:
        return found
    assert state is not None
    g = -judge(y).mean()
    kernel = model.decoder.conv_out.weight
    of_nll, of_g = (torch.autograd.grad(value, kernel, retain_graph=True)[0].norm() for value in (nll, g))
    weight = torch.clamp(of_nll / (of_g + 1e-4), 0, 1e4).detach() * given.weight if given.adaptive else given.weight
    found["total"] = found["total"] + weight * g
    real_image = x.clone().requires_grad_()
    real, fake = judge(real_image), judge(y.detach())
    if given.loss is AdversarialLoss.HINGE:
        judges = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    else:
        judges = 0.5 * (functional.softplus(-real).mean() + functional.softplus(fake).mean())
    means = {name: float(value) for name, value in state.means.items()}
    lecam = torch.relu(real.mean() - means["fake"]) ** 2 + torch.relu(means["real"] - fake.mean()) ** 2
    (slope,) = torch.autograd.grad(real.sum(), real_image, create_graph=True)
    penalty = 0.5 * (slope**2).sum((1, 2, 3)).mean()
    if given.r1_weight:
        found["r1"] = penalty
    found |= {"generator": g, "adaptive_weight": torch.as_tensor(weight), "discriminator": judges, "lecam": lecam}
    found["discriminator"] = judges + given.lecam_weight * lecam + given.r1_weight * penalty
    return found


CASES = {
    "latent-diffusion": (
        AutoencodingLossConfig(0.0, 1e-6, reduction=Reduction.SUM, perceptual_weight=1.0),
        DiscriminatorConfig(NETWORK, start_step=3),
    ),
    "generative-models": (
        AutoencodingLossConfig(
            0.0, 1.0, reduction=Reduction.SUM, perceptual_weight=0.25, log_variance=0.3, learn_log_variance=True
        ),
        DiscriminatorConfig(NETWORK, AdversarialLoss.VANILLA, start_step=5, weight=0.5),
    ),
    "means, squares, regularised": (
        AutoencodingLossConfig(0.7, 1e-2, PixelLoss.L2, perceptual_weight=0.5, kl_warmup_steps=20),
        DiscriminatorConfig(
            PatchGanConfig(8, 2, Norm.GROUP), start_step=0, weight=0.2, lecam_weight=0.3, r1_weight=0.4
        ),
    ),
    "before the discriminator": (
        AutoencodingLossConfig(0.0, 1e-3, reduction=Reduction.SUM, perceptual_weight=1.0),
        DiscriminatorConfig(NETWORK, start_step=6),
    ),
}


@pytest.mark.parametrize(
    "name", [name if name == "latent-diffusion" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_loss_and_every_gradient_match_torch(
    name: str, agree: Agree, note: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adversarial_step, "perceptual_distance", lambda backbone, params, x, y: perceptual(x, y))
    loss, given = CASES[name]
    parts, step, s = Parts(VAE, loss, given, Compute(), 100), 5, loss.log_variance
    pair = reference.vae_pair(VAE)
    params, pixels = random_params(given.network), np.random.default_rng(5).integers(0, 256, (2, 24, 32, 3), np.uint8)
    state = adversarial.create(given, params, 100)
    state = state._replace(means={"real": jnp.float32(0.2), "fake": jnp.float32(-0.3)})
    gradients, after = own(parts, pair.params, state, pixels, s, step)

    keys = jax.random.split(jax.random.key(0), len(pixels))
    shape = (pixels.shape[1] // 2, pixels.shape[2] // 2, VAE.latent_channels)
    noise = np.stack([jax.random.normal(key, shape) for key in keys])
    model, judge = pair.model.double(), twin(given.network, params)
    variable = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    expected = torch_loss(parts, model, judge, state, tensor(normalise(pixels)), tensor(noise), variable, step)
    started = "discriminator" in expected
    expected["loss"] = expected.pop("total")
    for term, value in expected.items():
        agree(f"{name}: {term}", gradients.metrics[term], value.detach(), TOLERANCE)

    expected["loss"].backward(retain_graph=True)
    theirs = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    theirs = flatten(names.from_tensors(pair.table, theirs))
    mine = flatten(gradients.autoencoder["vae"])
    whole = np.concatenate([leaf.ravel() for leaf in theirs.values()])
    difference = np.concatenate([(mine[path] - theirs[path]).ravel() for path in theirs])
    assert np.linalg.norm(difference) <= TOLERANCE * np.linalg.norm(whole)
    agree_on_leaves(f"{name}: gradient of the autoencoder", mine, theirs, note, 2 * TOLERANCE)
    if loss.learn_log_variance:
        agree(f"{name}: gradient of s", gradients.autoencoder["loss"]["log_variance"], variable.grad, TOLERANCE)
    assert after is not None and gradients.discriminator is not None
    if not started:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients.discriminator))
        jax.tree.map(np.testing.assert_array_equal, after, state)
        return
    judge.zero_grad()
    expected["discriminator"].backward()
    agree_on_leaves(f"{name}: gradient of the discriminator", *pairs(gradients.discriminator, judge, "grad"), note)
    for kind in after.means:
        decayed = 0.999 * state.means[kind] + 0.001 * gradients.metrics[f"logits_{kind}"]
        agree(f"{name}: LeCam's mean of {kind} logits", after.means[kind], decayed, TOLERANCE)
    for key, statistics in after.carried.items():
        layer = judge[int(key.removeprefix("main_"))]
        agree(f"{name}: running variance of {key}", statistics["variance"], layer.running_var, TOLERANCE)


# Export


@pytest.mark.slow
def test_autoencoder_trained_here_reconstructs_the_same_in_diffusers(
    agree: Agree, tmp_path: Path, quick_compilation: None
) -> None:
    """A run, converted by the command, with the latent scale that was measured on it."""
    base = tiny.train_config(tiny.make_folder(tmp_path / "images"), steps=2)
    config = AutoencoderConfig(
        data=dataclasses.replace(base.data, buckets=((32, 32),), batch_size=4),
        vae=VAE,
        optimiser=base.optimiser,
        ema=base.ema,
        training=AutoencodingLoopConfig(steps=2),
        validation=AutoencodingValidationConfig(every_steps=None),
    )
    model = loop.train(config, tmp_path / "run", progress=False)
    done = call("convert", tmp_path / "run", tmp_path / "vae", "--to", "diffusers")
    assert done.code == 0, done.err
    theirs = reference.diffusers.AutoencoderKL.from_pretrained(str(tmp_path / "vae"))
    assert theirs.config.scaling_factor == model.config.vae.scale != VAE.scale
    image = images(3, 32)
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(reference.to_torch(image)).latent_dist.mean).sample
    params, given = model.params["vae"], model.config.vae
    latent = vae.encode(given, params, jnp.asarray(image)).mean * given.scale
    agree("trained autoencoder", vae.decode(given, params, latent), reference.from_torch(expected), TOLERANCE)
