"""How far a reconstruction y is from its image x, and a posterior from a standard normal distribution.

    map     |x − y| or (x − y)² + perceptual_weight · LPIPS(x, y), one number per image, at every element of the map
    edges   |differences of x − y between neighbours|, horizontal and vertical
    nll     (map + edge_weight · edges) / exp(s) + s           s: log-variance, one number, fixed or learned
    KL      ½ (μ² + σ² − 1 − log σ²)

`Reduction.MEAN` takes means over everything. `Reduction.SUM` sums over the elements of an image and takes the mean over
images, as latent-diffusion and generative-models do (`LPIPSWithDiscriminator`); LPIPS then counts once per element,
196,608 times at 256×256. The log-variance is theirs too: nll is then that of a Laplace distribution (of a normal one
with squares), up to a constant. Sources: Rombach et al., arXiv:2112.10752, appendix G; KL: Kingma & Welling,
arXiv:1312.6114, appendix B.
"""

import enum
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sdxl_jax.arrays import Image
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.models import vae
from sdxl_jax.training.step import Metrics


class PixelLoss(enum.Enum):
    """The distance of pixels."""

    L1 = "l1"
    """Absolute."""
    L2 = "l2"
    """Squared: smoother images, higher PSNR."""


class Reduction(enum.Enum):
    """How terms become one number."""

    MEAN = "mean"
    """The mean over all elements: of the pixels, of the latent."""
    SUM = "sum"
    """The sum over the elements of an image, the mean over images: of the pixels, of the latent."""


@dataclass(frozen=True)
class AutoencodingLossConfig:
    """The terms of the loss and their weights, relative to the distance of the pixels."""

    edge_weight: float = 1.0
    """Weight of the L1 distance of differences between neighbouring pixels. Higher: sharper edges, rougher areas."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of the posterior from a standard normal distribution. Higher: smoother latents,
    blurrier images."""
    pixel: PixelLoss = PixelLoss.L1
    """The distance of pixels."""
    reduction: Reduction = Reduction.MEAN
    """How terms become one number: means, or sums over an image, as in latent-diffusion."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS, with VGG16, whose weights `sdxl-jax evaluate --fetch-weights` gets; 0: not computed. Higher:
    textures rather than exact pixels."""
    log_variance: float = 0.0
    """Logarithm of the variance that errors are divided by; where it is learned, its first value. Higher: errors count
    less beside KL and the adversarial term."""
    learn_log_variance: bool = False
    """Whether the log-variance is learned, by the autoencoder's optimiser."""
    kl_warmup_steps: int = 0
    """Steps over which the weight of the KL divergence rises from 0. Higher: sharper images before latents become
    smooth."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a function of image and posterior alone: not of the step, a learned number or another
        network."""
        learned = self.learn_log_variance or self.log_variance
        return not (learned or self.perceptual_weight or self.kl_warmup_steps)

    def check(self) -> None:
        """Raises InputError for numbers out of range."""
        weights = ("edge_weight", "kl_weight", "perceptual_weight", "kl_warmup_steps")
        check_ranges([(f"loss.{name}", getattr(self, name), 0, math.inf) for name in weights])
        if not math.isfinite(self.log_variance):
            raise InputError(f"loss.log_variance={self.log_variance} is not finite. Give a number, e.g. 0")


def reconstruction_loss(
    config: AutoencodingLossConfig,
    image: Image,
    decoded: Image,
    log_variance: Float[jax.Array, ""] | float = 0.0,
    perceptual: Float[jax.Array, "batch"] | None = None,
) -> tuple[Float[jax.Array, ""], Metrics]:
    """(nll, its terms). perceptual: LPIPS of each image; None: without it."""
    difference, summed = decoded - image, config.reduction is Reduction.SUM

    def reduced(x: Float[jax.Array, "batch rows columns 3"]) -> Float[jax.Array, ""]:
        return x.sum() / len(x) if summed else x.mean()

    error = jnp.abs(difference) if config.pixel is PixelLoss.L1 else jnp.square(difference)
    edges = sum((reduced(jnp.abs(jnp.diff(difference, axis=axis))) for axis in (1, 2)), jnp.zeros(()))
    terms = {config.pixel.value: reduced(error), "edges": edges}
    nll, elements = terms[config.pixel.value], math.prod(image.shape[1:]) if summed else 1
    if perceptual is not None:
        terms["perceptual"] = perceptual.mean()
        nll = nll + config.perceptual_weight * elements * terms["perceptual"]
    nll = nll + config.edge_weight * edges
    if config.learn_log_variance or config.log_variance:
        nll = nll / jnp.exp(log_variance) + elements * log_variance
    return nll, terms


def kl_divergence(posterior: vae.Posterior, reduction: Reduction = Reduction.MEAN) -> Float[jax.Array, ""]:
    """KL divergence of the posterior from a standard normal distribution, in nats: the mean over all elements of a
    latent, or their sum, mean over images. arXiv:1312.6114, appendix B."""
    variance = jnp.exp(posterior.log_variance)
    doubled = posterior.mean**2 + variance - 1 - posterior.log_variance
    return 0.5 * (doubled.mean() if reduction is Reduction.MEAN else doubled.sum() / len(doubled))


def kl_weight(config: AutoencodingLossConfig, step: Int[jax.Array, ""]) -> Float[jax.Array, ""] | float:
    """The weight of the KL divergence at the step that follows `step` steps."""
    if not config.kl_warmup_steps:
        return config.kl_weight
    return config.kl_weight * jnp.minimum(1.0, (step + 1) / config.kl_warmup_steps)
