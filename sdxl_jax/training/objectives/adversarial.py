"""The adversarial term of an autoencoder's loss: a discriminator (PatchGAN) learns to tell images x from
reconstructions y, and the autoencoder learns to deceive it.

    autoencoder     λ g,   g = −mean D(y)
    λ               weight · clamp(‖∂nll/∂W‖ / (‖∂g/∂W‖ + 1e-4), 0, 10⁴), W the kernel of the decoder's last convolution
    discriminator   hinge    ½ (mean relu(1 − D(x)) + mean relu(1 + D(y)))
                    vanilla  ½ (mean softplus(−D(x)) + mean softplus(D(y)))
                    + LeCam (Tseng et al., arXiv:2104.03310)  relu(mean D(x) − ema_fake)² + relu(ema_real − mean D(y))²
                    + R1 (Mescheder et al., arXiv:1801.04406, eq. 9)  ½ mean over images of ‖∂ΣD(x)/∂x‖²

Sources: Esser et al., arXiv:2012.09841, eq. 7; taming-transformers, latent-diffusion and generative-models, whose
`LPIPSWithDiscriminator` this is. Before the first step of the discriminator there is no g, and nothing of it changes.

Everything here is over the whole batch, on all devices. In the sources each GPU has its own λ and its own batch norm.
"""

import enum
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from sdxl_jax.arrays import Image, Params
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.models import patchgan
from sdxl_jax.models.patchgan import PatchGanConfig
from sdxl_jax.optim.optimiser import OptimiserConfig, make_optimiser
from sdxl_jax.training.step import Metrics

_LARGEST_RATIO = 1e4
METRICS = (
    "generator",
    "adaptive_weight",
    "discriminator",
    "logits_real",
    "logits_fake",
    "lecam",
    "r1",
)
"""What is reported of it, besides the norm of its gradient; 0 before its first step."""


class AdversarialLoss(enum.Enum):
    """The discriminator's loss."""

    HINGE = "hinge"
    """No gradient from logits beyond ±1."""
    VANILLA = "vanilla"
    """Cross-entropy."""


def _discriminator_optimiser() -> OptimiserConfig:
    return OptimiserConfig(learning_rate=4.5e-6, warmup_steps=0, beta1=0.5, beta2=0.9, weight_decay=0.0, clip_norm=None)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator, its loss, and its weight in the autoencoder's loss."""

    network: PatchGanConfig = field(default_factory=PatchGanConfig)
    """The discriminator's network."""
    loss: AdversarialLoss = AdversarialLoss.HINGE
    """The discriminator's loss."""
    start_step: int = 50_001
    """Steps of the autoencoder alone before the adversarial term begins. Higher: a better autoencoder to begin with."""
    weight: float = 0.5
    """Weight of the adversarial term. Higher: sharper textures, farther from the original."""
    adaptive: bool = True
    """Whether the weight is multiplied by the ratio of gradients, so that the term pulls as strongly as the
    reconstruction does."""
    lecam_weight: float = 0.0
    """Weight of LeCam's regularisation, e.g. 0.001. Higher: logits of real and fake images stay closer together."""
    lecam_decay: float = 0.999
    """Share of the running means of logits, which LeCam uses, that a step keeps, 0 to below 1. Higher: slower."""
    r1_weight: float = 0.0
    """Weight of the penalty on the gradient at real images, e.g. 10. Higher: a smoother discriminator."""
    optimiser: OptimiserConfig = field(default_factory=_discriminator_optimiser)
    """The discriminator's own optimiser. `accumulate` is the autoencoder's."""

    def check(self, steps: int, smallest_side: int) -> None:
        """Raises InputError for numbers out of range. steps: of the run; smallest_side: of its images, in pixels."""
        check_ranges(
            [
                ("discriminator.network.base_channels", self.network.base_channels, 1, math.inf),
                ("discriminator.network.layers", self.network.layers, 1, math.inf),
                ("discriminator.start_step", self.start_step, 0, math.inf),
                ("discriminator.weight", self.weight, 0, math.inf),
                ("discriminator.lecam_weight", self.lecam_weight, 0, math.inf),
                ("discriminator.r1_weight", self.r1_weight, 0, math.inf),
            ]
        )
        check_ranges([("discriminator.lecam_decay", self.lecam_decay, 0, 1)], below_high=True)
        if steps and self.start_step >= steps:
            raise InputError(
                f"discriminator.start_step={self.start_step} is not before the last step, training.steps={steps}: the "
                "discriminator would never train. Lower it, or leave out the discriminator (None)"
            )
        if smallest_side < (needed := self.network.smallest):
            raise InputError(
                f"data.buckets has a side of {smallest_side} pixels; the discriminator needs {needed} or more. Use "
                "larger buckets, or fewer discriminator.network.layers"
            )
        if self.optimiser.accumulate != 1:
            raise InputError(
                f"discriminator.optimiser.accumulate={self.optimiser.accumulate} has no effect: the discriminator sees "
                "the micro-batches of optimiser.accumulate. Leave it at 1"
            )
        try:
            self.optimiser.check()
        except InputError as error:
            raise InputError(str(error).replace("optimiser.", "discriminator.optimiser.")) from error


class Adversary(NamedTuple):
    """The discriminator's part of the training state."""

    params: Params
    carried: Params
    """Batch norm's running statistics; whether ActNorm is initialised."""
    means: dict[str, Float[jax.Array, ""]]
    """LeCam's running means of the logits of "real" and "fake" images."""
    optimiser: optax.OptState


def optimiser_of(config: DiscriminatorConfig, steps: int) -> optax.GradientTransformation:
    """steps: of the whole run."""
    return make_optimiser(config.optimiser, max(1, steps - config.start_step))


def create(config: DiscriminatorConfig, params: Params, steps: int) -> Adversary:
    """Before the first step."""
    means = {name: jnp.zeros(()) for name in ("real", "fake")}
    return Adversary(params, patchgan.statistics(config.network), means, optimiser_of(config, steps).init(params))


def adaptive_weight(of_nll: Float[jax.Array, ""], of_generator: Float[jax.Array, ""]) -> Float[jax.Array, ""]:
    """The ratio of two norms of gradients, 0 to 10⁴; 0 for 0 / 0."""
    return jnp.clip(of_nll / (of_generator + 1e-4), 0, _LARGEST_RATIO)


def generator_loss(
    config: DiscriminatorConfig, params: Params, carried: Params, image: Image
) -> tuple[Float[jax.Array, ""], Params]:
    """(g of reconstructions, the discriminator's statistics after them)."""
    logits, carried = patchgan.apply(config.network, params, carried, image)
    return -logits.mean(), carried


def discriminator_loss(
    config: DiscriminatorConfig, params: Params, adversary: Adversary, real: Image, fake: Image
) -> tuple[Float[jax.Array, ""], tuple[Params, dict[str, Float[jax.Array, ""]], Metrics]]:
    """(the loss, (statistics, LeCam's means, both after this batch; metrics)). params: the discriminator's, on which
    the loss depends. Real and fake images go through it one after the other, as in the sources."""
    of_real, carried = patchgan.apply(config.network, params, adversary.carried, real)
    of_fake, carried = patchgan.apply(config.network, params, carried, fake)
    match config.loss:
        case AdversarialLoss.HINGE:
            loss = 0.5 * (jax.nn.relu(1 - of_real).mean() + jax.nn.relu(1 + of_fake).mean())
        case AdversarialLoss.VANILLA:
            loss = 0.5 * (jax.nn.softplus(-of_real).mean() + jax.nn.softplus(of_fake).mean())
    means, running = {"real": of_real.mean(), "fake": of_fake.mean()}, adversary.means
    lecam = jnp.square(jax.nn.relu(means["real"] - running["fake"]))
    lecam += jnp.square(jax.nn.relu(running["real"] - means["fake"]))
    penalty = jnp.zeros(())
    if config.r1_weight:
        at_real = jax.grad(lambda x: patchgan.apply(config.network, params, adversary.carried, x)[0].sum())(real)
        penalty = 0.5 * jnp.square(at_real).sum((1, 2, 3)).mean()
    metrics = {"logits_real": means["real"], "logits_fake": means["fake"], "lecam": lecam, "r1": penalty}
    decay = config.lecam_decay
    means = jax.tree.map(lambda old, new: decay * old + (1 - decay) * jax.lax.stop_gradient(new), running, means)
    return loss + config.lecam_weight * lecam + config.r1_weight * penalty, (carried, means, metrics)


def update(config: DiscriminatorConfig, steps: int, adversary: Adversary, gradient: Params) -> Adversary:
    """The discriminator after one update. steps: of the whole run."""
    updates, moments = optimiser_of(config, steps).update(gradient, adversary.optimiser, adversary.params)
    return adversary._replace(params=optax.apply_updates(adversary.params, updates), optimiser=moments)
