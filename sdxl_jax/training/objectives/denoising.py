"""Denoising: a latent diffusion model learns to predict what noise was added to a latent. SDXL, arXiv:2307.01952.

    image ── encode, sample ── latent ── add noise ── UNet(…, text, sizes) ── weighted error

A batch of a cache begins at "sample": it has the posterior and the text states, and both encoders are left out. What
trains of the model is `training.trainable`: the UNet, some layers of it, text encoders. Its configuration is `TrainConfig`
(sdxl_jax/config.py).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int32, Key

from sdxl_jax import arrays, sharding
from sdxl_jax import model as models
from sdxl_jax.arrays import Batch, EncodedBatch, Params
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.diffusion import loss, schedule
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.optim.ema import EmaKind
from sdxl_jax.sampling import generate
from sdxl_jax.training import encoding
from sdxl_jax.training.objectives.base import Grid, Objective, abstract_rows
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import merge
from sdxl_jax.training.step import Metrics

NoTokens = Int32[np.ndarray, "1 77"]

_GRID_SEED = 0


class Denoising(Objective[TrainConfig]):
    """A latent diffusion model, or parts of it."""

    name = "denoising"
    programs = ("train", "sample")

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model

    def init(self, key: Key[jax.Array, ""]) -> Params:
        return models.init(key, self.config.model)

    def check(self) -> None:
        super().check()
        encoding.check_frozen(self.config)

    def check_heads(self, mesh: Mesh) -> None:
        sharding.check_heads(mesh, self.config.model.unet.attention_heads)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.of(self.config.model.text)

    @functools.cached_property
    def _empty(self) -> Mapping[str, NoTokens]:
        """The token numbers of [""]."""
        return self.tokenizer([""])

    def batches(self, dataset: BucketedDataset, frozen: Params) -> BucketedDataset:
        """From `data.cache`, if there is one. Raises InputError for a cache of something else."""
        return encoding.from_cache(self.config, dataset, frozen)

    def abstract_batch(self, mesh: Mesh | AbstractMesh, bucket: Bucket, batch_size: int) -> Batch:
        array, model, data = functools.partial(abstract_rows, mesh, batch_size), self.config.model, self.config.data
        batch = super().abstract_batch(mesh, bucket, batch_size)
        batch = batch._replace(tokens={tower.name: array(jnp.int32, 77) for tower in model.text})
        if data.aesthetic is not None:
            batch = batch._replace(micro=batch.micro._replace(aesthetic_score=array(jnp.float32)))
        if data.cache is None:
            return batch
        latent = (*(side // model.vae.downsampling for side in bucket), model.vae.latent_channels)
        projection = model.text[-1].clip.projection_dim
        encoded = EncodedBatch(
            mean=array(jnp.bfloat16, *latent),
            log_variance=array(jnp.bfloat16, *latent),
            context=array(jnp.bfloat16, 77, model.unet.context_dim),
            pooled=None if projection is None else array(jnp.bfloat16, projection),
        )
        return batch._replace(image=None, encoded=encoded)

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        return batch_loss(trained, frozen, batch, keys, self.config, self._empty), {}

    @property
    def validates_every(self) -> int | None:
        return self.config.validation.every_steps if self.config.validation.prompts else None

    def validation(self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes) -> Grid:
        """Images of `validation.prompts` in each size, from the same noise each time. A stop is heard between two
        sizes, and of one process at any time."""
        del dataset
        validation = self.config.validation
        options = {"seed": _GRID_SEED, "steps": validation.steps, "guidance": validation.guidance}

        def draw(height: int, width: int) -> list[Any]:
            size = {"height": height, "width": width}
            with jax.set_mesh(mesh):
                return list(
                    generate.text_to_image(model, validation.prompts, **size, **options, compute=self.config.compute)
                )

        images = list[Any]()
        for height, width in validation.sizes:
            processes.point()
            draw_size = functools.partial(draw, height, width)
            # Other processes would wait inside for what one abandons, and the checkpoint after it.
            images += processes.wait(draw_size) if processes.count == 1 else draw_size()
        weights = "parameters" if self.config.ema.kind is EmaKind.NONE else "ema"
        captions = list(validation.prompts) * len(validation.sizes)
        return Grid(images, captions, len(validation.prompts), {"weights": weights, **options})


def batch_loss(
    trained: Params,
    frozen: Params,
    batch: Batch,
    keys: Key[jax.Array, " batch"],
    config: TrainConfig,
    empty: Mapping[str, NoTokens],
) -> Float[jax.Array, ""]:
    """The loss of one (micro-)batch. keys: one an example; empty: the token numbers of [""]."""
    params, parts, compute = merge(trained, frozen), config.model, config.compute
    latent_keys, dropout_keys, loss_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)

    posterior, prompt = _encoded(batch, params, parts, compute)
    latent = vae.scaled_sample(parts.vae, posterior, latent_keys)
    nothing = models.unconditional_text(parts, params, empty, compute)
    prompt = text.drop(prompt, nothing, dropout_keys, config.training.caption_dropout)
    condition = models.condition(parts, prompt, batch.micro)

    def network(x_t: jax.Array, timestep: jax.Array) -> jax.Array:
        return unet.apply(parts.unet, params["unet"], x_t, timestep, condition.context, condition.vector, compute)

    return loss.diffusion_loss(network, latent, loss_keys, schedule.make(parts.schedule), parts.prediction, config.loss)


def _encoded(
    batch: Batch, params: Params, parts: ModelConfig, compute: Compute
) -> tuple[vae.Posterior, text.TextConditioning]:
    """Posterior of the latents and states of the text: of the frozen encoders, now or when the cache was written."""
    if batch.encoded is not None:
        mean, log_variance, context, pooled = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch.encoded)
        return vae.Posterior(mean, log_variance), text.TextConditioning(context, pooled)
    assert batch.image is not None
    posterior = vae.encode(parts.vae, params["vae"], arrays.normalise(batch.image), compute)
    return posterior, text.encode(parts.text, params, batch.tokens, compute)
