"""Autoencoding: an autoencoder learns to reconstruct an image from a small latent.

    image ── encode, sample ── latent ── decode ── reconstruction loss + KL of the posterior + adversarial term

The terms are those of SDXL's own autoencoder and of its relatives: distances of pixels, of edges and of features
(LPIPS), the Kullback-Leibler divergence of the posterior (`reconstruction`), and a discriminator (`adversarial`). By
default there are pixels, edges and KL alone: edges are a substitute for a perceptual loss, which needs a pretrained
network.

It uses no captions, no conditioning and no cache: only the images of a batch are read, and images need no caption. An
autoencoder has its own latent scale, which is measured when training ends.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Float32, Key, UInt8

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, ImageBytes, Params, flatten, normalise, to_bytes, unflatten
from sdxl_jax.config import LoopConfig, RunConfig, ValidationMetricsConfig
from sdxl_jax.data.examples import crop_of, evenly_spread, images_of, sizes_of
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import RENAMED, InputError, check_ranges
from sdxl_jax.evaluation import image_metrics, weights
from sdxl_jax.evaluation.settings import OF_INCEPTION, OF_PAIRS
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import lpips, patchgan, vae
from sdxl_jax.models.lpips import SMALLEST, Backbone
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import LearntVaeConfig, VaeConfig
from sdxl_jax.progress import tqdm
from sdxl_jax.training.initial import placed_network, random_weights
from sdxl_jax.training.objectives import adversarial, adversarial_step
from sdxl_jax.training.objectives.adversarial import DiscriminatorConfig
from sdxl_jax.training.objectives.adversarial_step import DISCRIMINATOR, LPIPS, Parts
from sdxl_jax.training.objectives.base import Examples, Grid, Measured, Objective
from sdxl_jax.training.objectives.reconstruction import AutoencodingLossConfig, kl_divergence, reconstruction_loss
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import TrainState, merge, partition
from sdxl_jax.training.step import Metrics, Step
from sdxl_jax.weights.lazy import Initial, InMemory, abstract_leaves

SCALE_LATENTS = 10_000
"""Images of whose latents the scale is measured; all of the data, if there are fewer."""
_LPIPS_FILE = "lpips_vgg"
_MEASURED_TOGETHER = 16
"""Images of which latents are measured at a time."""


@dataclass(frozen=True)
class AutoencodingLoopConfig(LoopConfig):
    """The training loop of an autoencoder."""

    trainable: tuple[str, ...] = field(default=("^vae/",), metadata={RENAMED: "trains"})
    """Regular expressions found in the paths of trainable parameters; the others are frozen: ("^vae/decoder/",) keeps
    the latents."""


@dataclass(frozen=True)
class AutoencodingValidationConfig(ValidationMetricsConfig):
    """The validation grids in RUN/samples: each row has an original, its reconstruction, and their difference. And
    metrics of reconstructions during training."""

    every_steps: int | None = 1000
    """Steps between grids; None: no grids. Lower: more often, slower training."""
    images: int = 8
    """Images of the data to reconstruct, evenly spread over all of it. Higher: a larger grid, slower validation."""


@dataclass(frozen=True)
class AutoencoderConfig(RunConfig):
    """Everything that training an autoencoder depends on."""

    vae: LearntVaeConfig = field(default_factory=VaeConfig)
    """The autoencoder, a full one or a tiny one (TAESD). Its `scale` has no effect on training; that of the trained
    model is measured at the end, unless its encoder is frozen."""
    loss: AutoencodingLossConfig = field(default_factory=AutoencodingLossConfig)
    """The terms of the loss and their weights."""
    discriminator: DiscriminatorConfig | None = None
    """The discriminator and its part in the loss; None: no adversarial term."""
    training: AutoencodingLoopConfig = field(default_factory=AutoencodingLoopConfig)
    """The training loop."""
    validation: AutoencodingValidationConfig = field(default_factory=AutoencodingValidationConfig)
    """The validation grids in RUN/samples."""

    @property
    def wants_captions(self) -> bool:
        return False

    @property
    def is_plain(self) -> bool:
        """Whether the loss depends on image and posterior alone, so that the step is that of every objective."""
        return self.loss.is_plain and self.discriminator is None

    @property
    def losses(self) -> tuple[str, ...]:
        kl = () if isinstance(self.vae, TinyVaeConfig) else ("kl",)
        names = (self.loss.pixel.value, "edges", *kl)
        if self.is_plain:
            return names
        more = [("perceptual", self.loss.perceptual_weight), ("log_variance", self.loss.learn_log_variance)]
        names += ("nll", *(name for name, has in more if has))
        return names if self.discriminator is None else (*names, *adversarial.METRICS, "discriminator_grad_norm")

    @property
    def validation_metrics(self) -> ValidationMetricsConfig:
        return self.validation

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for fields that have no effect here."""
        super().check()
        self.validation.check_metrics((*OF_PAIRS, *OF_INCEPTION))
        self.loss.check()
        check_ranges(
            [
                ("validation.every_steps", self.validation.every_steps, 1, math.inf),
                ("validation.images", self.validation.images, 1, math.inf),
            ]
        )
        self._check_vae()
        for name in ("cache", "aesthetic", "label"):
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
        smallest = min(min(size) for size in self.data.buckets) if self.data.buckets else math.inf
        if self.loss.perceptual_weight and smallest < SMALLEST[Backbone.VGG]:
            raise InputError(
                f"data.buckets has a side of {smallest} pixels; LPIPS (loss.perceptual_weight) needs "
                f"{SMALLEST[Backbone.VGG]} or more. Use larger buckets, or set the weight to 0"
            )
        if self.discriminator is not None:
            self.discriminator.check(self.training.steps, int(min(smallest, 2**30)))

    def _check_vae(self) -> None:
        given = self.vae
        if isinstance(given, TinyVaeConfig):
            if self.loss.kl_weight or self.loss.kl_warmup_steps:
                raise InputError(
                    f"loss.kl_weight={self.loss.kl_weight} and loss.kl_warmup_steps={self.loss.kl_warmup_steps} have "
                    "no effect: a tiny autoencoder has no log-variance, so there is no KL divergence. Set both to 0"
                )
            given.check("vae")
            return
        check_ranges(
            [
                ("vae.resnets_per_block", given.resnets_per_block, 1, math.inf),
                ("vae.latent_channels", given.latent_channels, 1, math.inf),
                ("vae.groups", given.groups, 1, math.inf),
            ]
        )
        if uneven := [channels for channels in given.block_channels if channels < 1 or channels % given.groups]:
            raise InputError(
                f"vae.block_channels has {uneven[0]}, which vae.groups={given.groups} does not divide. Use "
                f"multiples of {given.groups}, or fewer groups"
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

    @property
    def measures_scale(self) -> bool:
        trained, _ = partition(
            unflatten(abstract_leaves(self.model_config, self.parts)), self.config.training.trainable
        )
        return isinstance(self.config.vae, VaeConfig) and "encoder" in trained["vae"]

    def model(self, state: TrainState, frozen: Params) -> Model:
        return super().model(state, {part: value for part, value in frozen.items() if part != LPIPS})

    def check_start(self) -> None:
        super().check_start()
        if self._has_lpips:
            check_lpips()

    # State

    @property
    def _has_lpips(self) -> bool:
        return self.config.loss.perceptual_weight > 0

    @property
    def _parts(self) -> Parts:
        config = self.config
        return Parts(config.vae, config.loss, config.discriminator, config.compute, config.training.steps)

    def create(self, params: Params) -> TrainState:
        """The state before the first step. params: the trainable ones, and the discriminator's."""
        trained = {part: value for part, value in params.items() if part != DISCRIMINATOR}
        return adversarial_step.create(self._parts, trained, params.get(DISCRIMINATOR), self.optimiser, self.config.ema)

    def abstract_state(self, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Params]:
        params, discriminator = unflatten(abstract_leaves(self.model_config, self.parts)), self.config.discriminator
        trained, frozen = partition(params, self.config.training.trainable)
        if discriminator is not None:
            trained = {**trained, DISCRIMINATOR: patchgan.abstract(discriminator.network)}
        if self._has_lpips:
            frozen = {**frozen, LPIPS: lpips.abstract(Backbone.VGG)}
        return sharding.placed(mesh, jax.eval_shape(self.create, trained)), sharding.placed(mesh, frozen)

    def fresh_state(
        self, mesh: Mesh, abstract: TrainState, initial: dict[str, Float32[jax.Array, "..."]], progress: bool = True
    ) -> tuple[TrainState, Params]:
        training, discriminator = self.config.training, self.config.discriminator
        random = random_weights(training, self.model_config, mesh, parts=self.parts, given=initial, progress=progress)
        trained, frozen = partition(unflatten(random | initial), training.trainable)
        if discriminator is not None:
            leaves = flatten(patchgan.abstract(discriminator.network)).items()
            made = {path: Initial(leaf, f"{DISCRIMINATOR}/{path}", training.seed) for path, leaf in leaves}
            trained = {**trained, DISCRIMINATOR: placed_network(DISCRIMINATOR, made, mesh)}
        if self._has_lpips:
            found = {path: InMemory(value) for path, value in flatten(lpips_parameters()).items()}
            frozen = {**frozen, LPIPS: placed_network(LPIPS, found, mesh)}
        return self.jitted_start(abstract)(trained), frozen

    # Step

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        """Without what `AutoencoderConfig.is_plain` excludes: those terms are in `adversarial_step`."""
        assert batch.image is not None
        config, params = self.config, merge(trained, frozen)["vae"]
        image = normalise(batch.image)
        posterior = vae.encode(config.vae, params, image, config.compute)
        latent = vae.scaled_sample(config.vae, posterior, keys)
        decoded = vae.decode(config.vae, params, latent, config.compute)
        loss, terms = reconstruction_loss(config.loss, image, decoded)
        if not isinstance(config.vae, TinyVaeConfig):
            terms["kl"] = kl_divergence(posterior, config.loss.reduction)
            loss = loss + config.loss.kl_weight * terms["kl"]
        return loss, terms

    def step(self) -> Step:
        if self.config.is_plain:
            return super().step()
        return adversarial_step.make_step(self._parts, self.config, self.optimiser)

    # Validation

    @property
    def validates_every(self) -> int | None:
        return self.config.validation.every_steps

    def validation(self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes) -> Grid:
        """Rows of three: a centred crop of an image of the data, its reconstruction with PSNR and SSIM, and their
        difference, grey where there is none."""
        originals = examples(dataset, self.config.validation.images)
        reconstruct = reconstructor(self.config, model.params["vae"], mesh)
        images, captions, scores = (
            list[UInt8[np.ndarray, "_height _width 3"]](),
            list[str](),
            list[tuple[float, float]](),
        )
        for original in originals:
            processes.stop_point()
            reconstruction = reconstruct(original[None])
            ratio = float(image_metrics.psnr(original[None], reconstruction)[0])
            similarity = float(image_metrics.ssim(original[None], reconstruction)[0])
            scores.append((ratio, similarity))
            images += [original, reconstruction[0], signed_difference(original, reconstruction[0])]
            captions += ["original", f"{ratio:.1f} dB, SSIM {similarity:.3f}", "difference"]
        ratio, similarity = np.mean(scores, axis=0)
        text = {"psnr_db": f"{ratio:.3f}", "ssim": f"{similarity:.4f}", "images": len(originals)}
        return Grid(images, captions, 3, text)

    def counterparts(
        self, model: Model, examples: Examples, mesh: Mesh, processes: Processes
    ) -> UInt8[np.ndarray, "images height width 3"]:
        """Reconstructions."""
        reconstruct = reconstructor(self.config, model.params["vae"], mesh)
        made = list[UInt8[np.ndarray, "batch height width 3"]]()
        for first in range(0, len(examples.images), _MEASURED_TOGETHER):
            processes.stop_point()
            made.append(reconstruct(examples.images[first : first + _MEASURED_TOGETHER]))
        return np.concatenate(made)

    def measure(
        self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes, progress: bool = True
    ) -> Measured | None:
        """The latent's scale, if the encoder was trained."""
        config = self.config.vae
        if not self.measures_scale or isinstance(config, TinyVaeConfig):
            return None
        images, deviation = latent_deviation(self.config, model.params["vae"], dataset, mesh, processes, progress)
        scale = float(f"{1 / deviation:.5g}")
        if progress:
            tqdm.write(f"  latent scale {scale}: 1 / {deviation:.5g}, the standard deviation over {images} images")
        values = {"latent_scale": scale, "latent_standard_deviation": deviation, "latent_images": images}
        return Measured(replace(model.config, vae=replace(config, scale=scale)), values)


def check_lpips() -> None:
    """Raises InputError if the weights of LPIPS have not been fetched."""
    weights.check(_LPIPS_FILE)


def lpips_parameters() -> Params:
    """Those of LPIPS with VGG16. Raises InputError as `check_lpips`."""
    return weights.load(_LPIPS_FILE)


def examples(dataset: BucketedDataset, count: int) -> list[UInt8[np.ndarray, "_height _width 3"]]:
    """Images evenly spread over the data, each as a centred crop of its bucket's size; the same ones each time."""
    numbers = evenly_spread(images_of(dataset), count)
    return [crop_of(dataset, image, size) for image, size in zip(numbers, sizes_of(dataset, numbers), strict=True)]


def reconstructor(
    config: AutoencoderConfig, params: Params, mesh: Mesh
) -> Callable[[ImageBytes], UInt8[np.ndarray, "batch height width 3"]]:
    """A function from images to their reconstructions, through the posterior's mean. All processes call it with the
    same images, and all get the whole result."""
    replicated = sharding.replicated(mesh)

    @functools.partial(jax.jit, out_shardings=replicated)
    def run(params: Params, image: ImageBytes) -> UInt8[jax.Array, "batch height width 3"]:
        latent = vae.scaled(config.vae, vae.encode(config.vae, params, normalise(image), config.compute).mean)
        return to_bytes(vae.decode(config.vae, params, latent, config.compute))

    def reconstruct(image: ImageBytes) -> UInt8[np.ndarray, "batch height width 3"]:
        with jax.set_mesh(mesh):
            on_devices = jax.make_array_from_callback(image.shape, replicated, lambda index: np.asarray(image)[index])
            return np.asarray(run(params, on_devices).addressable_data(0))

    return reconstruct


def signed_difference(
    original: UInt8[np.ndarray, "height width 3"], reconstruction: UInt8[np.ndarray, "height width 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The reconstruction minus the original, around grey, clipped to 0..255."""
    return np.clip(reconstruction.astype(int) - original + 128, 0, 255).astype(np.uint8)


def latent_deviation(
    config: AutoencoderConfig,
    params: Params,
    dataset: BucketedDataset,
    mesh: Mesh,
    processes: Processes,
    progress: bool = True,
) -> tuple[int, float]:
    """(images, standard deviation of all elements of their sampled latents, unscaled): of `SCALE_LATENTS` images evenly
    spread over the data, or all. All processes compute it together.

    The variance of samples is that of the posteriors' means plus the mean of the posteriors' variances.
    """
    numbers, place = evenly_spread(images_of(dataset), SCALE_LATENTS), sharding.batch_sharding(mesh)
    sizes, parts = sizes_of(dataset, numbers), sharding.batch_parts(mesh)
    rows = max(1, _MEASURED_TOGETHER // parts) * parts

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def moments(params: Params, image: ImageBytes) -> Float[jax.Array, "batch 3"]:
        posterior = vae.encode(config.vae, params, normalise(image), config.compute)
        each = posterior.mean, posterior.mean**2, jnp.exp(posterior.log_variance)
        return jnp.stack([values.mean((1, 2, 3)) for values in each], axis=-1)

    total, pixels = np.zeros(3), 0
    with jax.set_mesh(mesh), tqdm(total=len(numbers), desc="latent scale", unit="image", disable=not progress) as bar:
        for size in dict.fromkeys(sizes):
            images = numbers[[other == size for other in sizes]]
            for start in range(0, len(images), rows):
                processes.stop_point()
                chosen = images[start : start + rows]
                # The last batch is filled up with its own images, which do not count twice.
                batch = np.stack([crop_of(dataset, image, size) for image in np.resize(chosen, rows)])
                on_devices = jax.make_array_from_callback(batch.shape, place, lambda index, batch=batch: batch[index])
                found = np.asarray(moments(params, on_devices).addressable_data(0), np.float64)[: len(chosen)]
                total, pixels = (
                    total + size.height * size.width * found.sum(0),
                    pixels + batch[0, ..., 0].size * len(found),
                )
                bar.update(len(chosen))
    mean, square, variance = total / pixels
    return len(numbers), math.sqrt(square - mean**2 + variance)
