"""Autoencoding: an autoencoder learns to reconstruct an image from a small latent.

    image ── encode, sample ── latent ── decode ── |error| + |error of the edges| + KL of the posterior

L1 of the pixels, L1 of the horizontal and vertical differences (edges: a substitute for a perceptual loss, which needs
a pretrained network), and the Kullback-Leibler divergence of the posterior from a standard normal distribution (Kingma
& Welling, arXiv:1312.6114, appendix B), which keeps latents smooth enough for a diffusion model. Not here: the
adversarial and perceptual losses that SDXL's own autoencoder was trained with.

It uses no captions, no conditioning and no cache: only the images of a batch are read, and images need no caption.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Key, UInt8

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, ImageBytes, Params, normalise, to_bytes
from sdxl_jax.config import LoopConfig, RunConfig
from sdxl_jax.data.buckets import assign
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.transforms import centred_crop
from sdxl_jax.errors import RENAMED, InputError, check_ranges
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import vae
from sdxl_jax.models.vae import VaeConfig
from sdxl_jax.training.objectives.base import Grid, Objective
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import merge
from sdxl_jax.training.step import Metrics


@dataclass(frozen=True)
class AutoencodingLossConfig:
    """The weights of the terms of the loss, relative to the L1 distance of the pixels."""

    edge_weight: float = 1.0
    """Weight of the L1 distance of differences between neighbouring pixels. Higher: sharper edges, rougher areas."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence of the posterior from a standard normal distribution. Higher: smoother latents,
    blurrier images."""


@dataclass(frozen=True)
class AutoencodingLoopConfig(LoopConfig):
    """The training loop of an autoencoder."""

    trainable: tuple[str, ...] = field(default=("^vae/",), metadata={RENAMED: "trains"})
    """Regular expressions found in the paths of trainable parameters; the others are frozen: ("^vae/decoder/",) keeps
    the latents."""


@dataclass(frozen=True)
class AutoencodingValidationConfig:
    """The validation grids in RUN/samples: originals, and under each its reconstruction."""

    every_steps: int | None = 1000
    """Steps between grids; None: no grids. Lower: more often, slower training."""
    images: int = 8
    """Images of the data to reconstruct, evenly spread over all of it. Higher: a larger grid, slower validation."""


@dataclass(frozen=True)
class AutoencoderConfig(RunConfig):
    """Everything that training an autoencoder depends on."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    """The autoencoder. Its `scale` has no effect on training; it is to be measured on the trained model."""
    loss: AutoencodingLossConfig = field(default_factory=AutoencodingLossConfig)
    """The weights of the loss's terms."""
    training: AutoencodingLoopConfig = field(default_factory=AutoencodingLoopConfig)
    """The training loop."""
    validation: AutoencodingValidationConfig = field(default_factory=AutoencodingValidationConfig)
    """The validation grids in RUN/samples."""

    @property
    def wants_captions(self) -> bool:
        return False

    @property
    def losses(self) -> tuple[str, ...]:
        return ("l1", "edges", "kl")

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for fields of `data` that have no effect here."""
        super().check()
        check_ranges(
            [
                ("loss.edge_weight", self.loss.edge_weight, 0, math.inf),
                ("loss.kl_weight", self.loss.kl_weight, 0, math.inf),
                ("validation.every_steps", self.validation.every_steps, 1, math.inf),
                ("validation.images", self.validation.images, 1, math.inf),
                ("vae.resnets_per_block", self.vae.resnets_per_block, 1, math.inf),
                ("vae.latent_channels", self.vae.latent_channels, 1, math.inf),
                ("vae.groups", self.vae.groups, 1, math.inf),
            ]
        )
        if uneven := [channels for channels in self.vae.block_channels if channels < 1 or channels % self.vae.groups]:
            raise InputError(
                f"vae.block_channels has {uneven[0]}, which vae.groups={self.vae.groups} does not divide. Use "
                f"multiples of {self.vae.groups}, or fewer groups"
            )
        for name in ("cache", "aesthetic"):
            if (value := getattr(self.data, name)) is not None:
                raise InputError(
                    f"data.{name}={value} has no effect: an autoencoder learns from the images alone. Leave it out "
                    "(None)"
                )
        factor = self.vae.downsampling
        for height, width in self.data.buckets:
            if height % factor or width % factor:
                raise InputError(
                    f"data.buckets has {height}×{width}. This autoencoder takes multiples of {factor}. Use "
                    f"{_nearest_multiple(height, factor)}×{_nearest_multiple(width, factor)}"
                )


def _nearest_multiple(pixels: int, factor: int) -> int:
    return max(1, round(pixels / factor)) * factor


class Autoencoding(Objective[AutoencoderConfig]):
    """Trains an autoencoder, or its encoder or decoder alone."""

    name = "autoencoding"

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(vae=self.config.vae)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("vae",)

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        assert batch.image is not None
        config, params = self.config, merge(trained, frozen)["vae"]
        image = normalise(batch.image)
        posterior = vae.encode(config.vae, params, image, config.compute)
        latent = posterior.sample(keys) * config.vae.scale
        difference = vae.decode(config.vae, params, latent, config.compute) - image
        terms = {
            "l1": jnp.abs(difference).mean(),
            "edges": sum((jnp.abs(jnp.diff(difference, axis=axis)).mean() for axis in (1, 2)), jnp.zeros(())),
            "kl": kl_divergence(posterior),
        }
        weights = config.loss
        return terms["l1"] + weights.edge_weight * terms["edges"] + weights.kl_weight * terms["kl"], terms

    @property
    def validates_every(self) -> int | None:
        return self.config.validation.every_steps

    def validation(self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes) -> Grid:
        """Centred crops of images of the data, and under each its reconstruction with its PSNR."""
        originals = examples(dataset, self.config.validation.images)
        reconstruct = reconstructor(self.config, model.params["vae"], mesh)
        reconstructions = list[UInt8[np.ndarray, "_height _width 3"]]()
        for original in originals:
            processes.stop_point()
            reconstructions.append(reconstruct(original[None])[0])
        ratios = [psnr(original, image) for original, image in zip(originals, reconstructions, strict=True)]
        captions = ["original"] * len(originals) + [f"{ratio:.1f} dB" for ratio in ratios]
        text = {"psnr_db": f"{np.mean(ratios):.3f}", "images": len(originals)}
        return Grid([*originals, *reconstructions], captions, len(originals), text)


def kl_divergence(posterior: vae.Posterior) -> Float[jax.Array, ""]:
    """KL divergence of the posterior from a standard normal distribution, in nats, mean over all elements of a latent.

    arXiv:1312.6114, appendix B. The sum over a latent, which other code uses, is this times its number of elements.
    """
    variance = jnp.exp(posterior.log_variance)
    return 0.5 * (posterior.mean**2 + variance - 1 - posterior.log_variance).mean()


def examples(dataset: BucketedDataset, count: int) -> list[UInt8[np.ndarray, "_height _width 3"]]:
    """Images evenly spread over the data, each as a centred crop of its bucket's size; the same ones each time."""
    source, buckets = dataset.source, dataset.buckets
    trained_on = np.unique(dataset.order.numbers)
    chosen = trained_on[np.linspace(0, len(trained_on) - 1, min(count, len(trained_on))).round().astype(int)]
    sizes = [buckets[int(bucket)] for bucket in assign(source.sizes[chosen], buckets).bucket]
    return [centred_crop(source.pixels(int(image), size), size) for image, size in zip(chosen, sizes, strict=True)]


def reconstructor(
    config: AutoencoderConfig, params: Params, mesh: Mesh
) -> Callable[[ImageBytes], UInt8[np.ndarray, "batch height width 3"]]:
    """A function from images to their reconstructions, through the posterior's mean. All processes call it with the
    same images, and all get the whole result."""
    replicated = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=replicated)
    def run(params: Params, image: ImageBytes) -> UInt8[jax.Array, "batch height width 3"]:
        latent = vae.encode(config.vae, params, normalise(image), config.compute).mean * config.vae.scale
        return to_bytes(vae.decode(config.vae, params, latent, config.compute))

    def reconstruct(image: ImageBytes) -> UInt8[np.ndarray, "batch height width 3"]:
        with jax.set_mesh(mesh):
            on_devices = jax.make_array_from_callback(image.shape, replicated, lambda index: np.asarray(image)[index])
            return np.asarray(run(params, on_devices).addressable_data(0))

    return reconstruct


def psnr(one: UInt8[np.ndarray, "*shape"], other: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio of two images 0..255, in dB; infinite for equal ones."""
    error = np.square(one.astype(np.float64) - other).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
