"""Autoencoding: an autoencoder learns to give an image back through a latent of few numbers.

    image ── encode, sample ── latent ── decode ── |error| + |error of the edges| + KL of the posterior

L1 of the pixels, L1 of the horizontal and vertical differences (edges: a stand-in for a perceptual loss, which needs a
pretrained network), and the Kullback-Leibler divergence of the posterior from a standard normal distribution (Kingma &
Welling, arXiv:1312.6114, appendix B), which keeps latents smooth enough to be generated. Adversarial and perceptual
losses, as SDXL's own autoencoder was trained with, are not here.

It wants no captions, no conditioning and no cache: of a batch only the image is read, and images need no caption.
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
    """How the terms of the loss are weighted against the L1 distance of the pixels."""

    edge_weight: float = 1.0
    """Of the L1 distance of differences between neighbouring pixels. Higher: sharper edges, rougher areas."""
    kl_weight: float = 1e-6
    """Of the divergence of the posterior from a standard normal distribution. Higher: smoother latents, blurrier
    images."""


@dataclass(frozen=True)
class AutoencodingLoopConfig(LoopConfig):
    """What the loop does, of an autoencoder."""

    trainable: tuple[str, ...] = field(default=("^vae/",), metadata={RENAMED: "trains"})
    """Patterns of the paths of trainable parameters; the others are frozen: ("^vae/decoder/",) keeps the latents."""


@dataclass(frozen=True)
class AutoencodingValidationConfig:
    """The images in RUN/samples: originals, and under each what the autoencoder gives back."""

    every_steps: int | None = 1000
    """Steps between grids; None: none."""
    images: int = 8
    """Images of the data that are shown, spread over all of it."""


@dataclass(frozen=True)
class AutoencoderConfig(RunConfig):
    """Everything that the training of an autoencoder depends on."""

    vae: VaeConfig = field(default_factory=VaeConfig)
    """The autoencoder. Its `scale` has no effect on training; it is measured afterwards, over what was learnt."""
    loss: AutoencodingLossConfig = field(default_factory=AutoencodingLossConfig)
    """How the error is weighted."""
    training: AutoencodingLoopConfig = field(default_factory=AutoencodingLoopConfig)
    """What the loop does."""
    validation: AutoencodingValidationConfig = field(default_factory=AutoencodingValidationConfig)
    """The images in RUN/samples."""

    @property
    def wants_captions(self) -> bool:
        return False

    @property
    def losses(self) -> tuple[str, ...]:
        return ("l1", "edges", "kl")

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for fields of the data that have no effect here."""
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
                    f"data.{name}={value} has no effect: an autoencoder learns from the images alone. Leave it out"
                )
        factor = self.vae.downsampling
        for height, width in self.data.buckets:
            if height % factor or width % factor:
                raise InputError(f"data.buckets has {height}×{width}. This autoencoder takes multiples of {factor}")


class Autoencoding(Objective[AutoencoderConfig]):
    """An autoencoder, or a half of it."""

    name = "autoencoding"

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(vae=self.config.vae)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("vae",)

    def init(self, key: Key[jax.Array, ""]) -> Params:
        return {"vae": vae.init(key, self.config.vae)}

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
        """Images of the data, as a centred crop shows them, and under each its reconstruction with its PSNR."""
        originals = examples(dataset, self.config.validation.images)
        reconstruct = reconstructor(self.config, model.params["vae"], mesh)
        given_back = list[UInt8[np.ndarray, "height width 3"]]()
        for original in originals:
            processes.point()
            given_back.append(reconstruct(original[None])[0])
        ratios = [psnr(original, image) for original, image in zip(originals, given_back, strict=True)]
        captions = ["original"] * len(originals) + [f"{ratio:.1f} dB" for ratio in ratios]
        text = {"psnr_db": f"{np.mean(ratios):.3f}", "images": len(originals)}
        return Grid([*originals, *given_back], captions, len(originals), text)


def kl_divergence(posterior: vae.Posterior) -> Float[jax.Array, ""]:
    """Of the posterior from a standard normal distribution, in nats, the mean over all elements of a latent.

    arXiv:1312.6114, appendix B. The sum over a latent, as others use it, is this times its number of elements.
    """
    variance = jnp.exp(posterior.log_variance)
    return 0.5 * (posterior.mean**2 + variance - 1 - posterior.log_variance).mean()


def examples(dataset: BucketedDataset, count: int) -> list[UInt8[np.ndarray, "_height _width 3"]]:
    """Images of the data, evenly spread over it, each as a centred crop of its bucket: the same each time."""
    source, buckets = dataset.source, dataset.buckets
    trained_on = np.unique(dataset.order.numbers)
    chosen = trained_on[np.linspace(0, len(trained_on) - 1, min(count, len(trained_on))).round().astype(int)]
    sizes = [buckets[int(bucket)] for bucket in assign(source.sizes[chosen], buckets).bucket]
    return [centred_crop(source.pixels(int(image), size), size) for image, size in zip(chosen, sizes, strict=True)]


def reconstructor(config: AutoencoderConfig, params: Params, mesh: Mesh) -> Callable[[ImageBytes], np.ndarray]:
    """The function from images to what the autoencoder makes of them, by way of the posterior's mean. All processes
    give it the same images and have the same result."""
    everywhere = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def run(params: Params, image: ImageBytes) -> UInt8[jax.Array, "batch height width 3"]:
        latent = vae.encode(config.vae, params, normalise(image), config.compute).mean * config.vae.scale
        return to_bytes(vae.decode(config.vae, params, latent, config.compute))

    def reconstruct(image: ImageBytes) -> np.ndarray:
        with jax.set_mesh(mesh):
            given = jax.make_array_from_callback(image.shape, everywhere, lambda index: np.asarray(image)[index])
            return np.asarray(run(params, given).addressable_data(0))

    return reconstruct


def psnr(one: UInt8[np.ndarray, "*shape"], other: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio of two images 0..255, in dB; infinite for equal ones."""
    error = np.square(one.astype(np.float64) - other).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
