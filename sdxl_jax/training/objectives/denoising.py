"""Denoising: a latent diffusion model learns to predict what noise was added to a latent. SDXL, arXiv:2307.01952.

    image ── encode, sample ── latent ── add noise ── UNet(…, text, class, sizes) ── weighted error

A batch from a cache starts at "sample": it has the posterior and the text states, and both encoders are skipped.
`training.trainable` selects what is trained: the UNet, some of its layers, text encoders; with `adapter` it is an
adapter of these that is trained (`adapters`), with `textual_inversion` embedding vectors of a new token, alone or with
an adapter (`textual_inversion`). With `inpainting` the UNet sees masks (`inpainting`). The configuration is
`TrainConfig` (sdxl_jax/config.py).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int32, Key, Num, UInt8

from sdxl_jax import arrays, sharding
from sdxl_jax.arrays import BaseDtype, Batch, EncodedBatch, MicroConditioning, Params, type_of_array
from sdxl_jax.conditioning import classes, text
from sdxl_jax.conditioning import micro as micro_conditioning
from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.mixture import Target
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.diffusion import loss, schedule
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig, autoencoder, class_embedding, condition, unconditional_text
from sdxl_jax.models import unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.optim.ema import EmaKind
from sdxl_jax.sampling import generate
from sdxl_jax.sizes import Size
from sdxl_jax.training import encoding
from sdxl_jax.training.initial import FIRST, abstract_base, check_initial
from sdxl_jax.training.objectives import adapters, image_prompts, inpainting, textual_inversion
from sdxl_jax.training.objectives.adapters import AdapterTraining
from sdxl_jax.training.objectives.base import Examples, Grid, Objective, abstract_rows
from sdxl_jax.training.objectives.textual_inversion import EmbeddingTraining
from sdxl_jax.training.processes import Processes
from sdxl_jax.training.state import TrainState, merge
from sdxl_jax.training.step import Metrics
from sdxl_jax.weights.textual_inversion import BESIDE_ADAPTER

EmptyTokens = Int32[np.ndarray, "1 77"]
"""The token numbers of "", by one tower's tokenizer."""

_GRID_SEED = 0
_SAMPLED_TOGETHER = 8
"""Images at a time, for metrics during training."""


Config = TypeVar("Config", bound=TrainConfig)


class Denoising(Objective[Config]):
    """A latent diffusion model, or parts of it."""

    name = "denoising"
    programs = ("train", "sample")
    weighs_examples = True

    def __init__(self, config: Config):
        super().__init__(config)
        if self._trains_rows:
            self.optimiser = image_prompts.updating_pooled_rows(self.optimiser, self._pooled_width)
        self._adapters = None if config.adapter is None else AdapterTraining(config, config.adapter)
        if self._adapters is not None:
            self.optimiser = self._adapters.updating(self.optimiser)
        new_token = config.textual_inversion
        self._vectors = None if new_token is None else EmbeddingTraining(config, new_token)
        if self._vectors is not None:
            self.optimiser = self._vectors.updating(self.optimiser)

    @property
    def model_config(self) -> ModelConfig:
        if self._vectors is None:
            return self.config.model
        return dataclasses.replace(self.config.model, text=self._vectors.towers)

    @property
    def initial_config(self) -> ModelConfig:
        return self.config.model

    @property
    def _trains_rows(self) -> bool:
        return self.config.image_prompt is not None and self.config.image_prompt.pooled_rows_alone

    @property
    def _pooled_width(self) -> int:
        return self.config.model.text[-1].clip.projection_dim or 0

    def check(self) -> None:
        super().check()
        encoding.check_frozen(self.config)
        image_prompts.check(self.config)

        if self._adapters is not None:
            self._adapters.abstract_trees()
        if self._vectors is not None:
            self._vectors.check()

    def check_start(self) -> None:
        super().check_start()
        encoding.image_tower(self.config)
        if self._adapters is not None:
            self._adapters.check_start()
        if self.config.inpainting is not None:
            self._check_inputs()

    def _check_inputs(self) -> None:
        """Raises InputError where a UNet without inputs for the mask would get them and not learn to use them."""
        unet = check_initial(self.config.training, self.loaded_config, self.parts).get("unet")
        if unet is None or unet.sees_mask:
            return
        state, _ = self.abstract_state(AbstractMesh((1,) * len(sharding.AXES), sharding.AXES))
        if FIRST not in arrays.flatten(state.params):
            raise InputError(
                f"training.init_from gives a UNet of {unet.unet.in_channels} input channels, and those of the mask "
                f"and the masked image begin at zero. Here they would stay zero: {FIRST} is not trained. Add it to "
                "training.trainable, or start from a model for inpainting"
            )

    def check_heads(self, mesh: Mesh) -> None:
        sharding.check_heads(mesh, self.config.model.unet.attention_heads)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.of(self.model_config.text) if self.config.model.text else None

    @functools.cached_property
    def _empty(self) -> Mapping[str, EmptyTokens]:
        """By tower."""
        return {} if self.tokenizer is None else self.tokenizer([""])

    def check_data(self, dataset: BucketedDataset) -> None:
        """Raises InputError for data with classes that the model does not have, and for captions without the new
        token."""
        if self._vectors is not None:
            self._vectors.check_data(dataset)
        if (known := self.config.model.unet.classes) is not None and (
            last := int(dataset.labels().max())
        ) >= known.number:
            raise InputError(
                f"{dataset.where} has images of class {last} (data.label={self.config.data.label}), but the model has "
                f"the classes 0 to {known.number - 1}. Set model.unet.classes.number to {last + 1} or more"
            )

    def batches(self, dataset: BucketedDataset, frozen: Params) -> BucketedDataset:
        """Reading from `data.cache` if there is one. Raises InputError for a cache of another provenance."""
        return encoding.from_cache(self.config, dataset, frozen)

    def abstract_batch(self, mesh: Mesh | AbstractMesh, bucket: Bucket, batch_size: int) -> Batch:
        array, model, data = functools.partial(abstract_rows, mesh, batch_size), self.config.model, self.config.data
        batch = super().abstract_batch(mesh, bucket, batch_size)
        batch = batch._replace(tokens={tower.name: array(jnp.int32, 77) for tower in model.text})
        if data.aesthetic is not None:
            batch = batch._replace(micro=batch.micro._replace(aesthetic_score=array(jnp.float32)))
        if data.label is not None:
            batch = batch._replace(label=array(jnp.int32))
        if any(source.loss_weight != 1 for source in data.sources):
            batch = batch._replace(loss_weight=array(jnp.float32))
        if any(source.target is not Target.DATA for source in data.sources):
            batch = batch._replace(base_target=array(jnp.bool_))
        if any(source.masks is not None for source in data.every_source):
            batch = batch._replace(mask=array(jnp.uint8, *bucket))
        if data.cache is None:
            return batch
        latent = (*(side // model.vae.downsampling for side in bucket), model.vae.latent_channels)
        context = array(jnp.bfloat16, 77, sum(tower.clip.width for tower in model.text)) if model.text else None
        projection = model.text[-1].clip.projection_dim if model.text else None
        encoded = EncodedBatch(
            mean=array(jnp.bfloat16, *latent),
            log_variance=array(jnp.bfloat16, *latent),
            context=context,
            pooled=None if projection is None else array(jnp.bfloat16, projection),
            image_embedding=None if self.config.image_prompt is None else array(jnp.bfloat16, self._pooled_width),
        )
        return batch._replace(image=None, encoded=encoded)

    @property
    def base_dtype(self) -> BaseDtype:
        return self.config.base_dtype

    @property
    def _beside(self) -> Sequence[AdapterTraining | EmbeddingTraining]:
        """What is trained beside the frozen model; nothing: parameters of the model itself are trained."""
        return [each for each in (self._adapters, self._vectors) if each is not None]

    def abstract_state(self, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Params]:
        if not self._beside:
            return super().abstract_state(mesh)
        trained, frozen = _united(each.abstract_trees() for each in self._beside)
        base = arrays.unflatten(abstract_base(self.config.model, self.base_dtype))
        frozen = sharding.placed(mesh, base | frozen)
        return sharding.placed(mesh, jax.eval_shape(self.create, trained)), frozen

    def fresh_state(
        self, mesh: Mesh, abstract: TrainState, initial: dict[str, Float[jax.Array, "..."]], progress: bool = True
    ) -> tuple[TrainState, Params]:
        if not self._beside:
            return super().fresh_state(mesh, abstract, initial, progress)
        base = self.all_parameters(mesh, initial, progress)
        trained, frozen = _united(each.fresh(base, mesh) for each in self._beside)
        return self.jitted_start(abstract)(trained), base | frozen

    def model(self, state: TrainState, frozen: Params) -> Model:
        if not self._beside:
            return super().model(state, frozen)
        params = {part: frozen[part] for part in self.parts}
        if self._adapters is not None:
            params = self._adapters.merged(params, adapters.of(state.sampled, frozen))
        model = Model(self.config.model, params)
        return model if self._vectors is None else self._vectors.merged(model, state.sampled)

    @property
    def exports(self) -> bool:
        return bool(self._beside)

    def export(
        self,
        state: TrainState,
        frozen: Params,
        path: Path,
        step: int,
        mesh: Mesh,
        processes: Processes,
        dataset: BucketedDataset | None = None,
    ) -> dict[str, Path]:
        """The averaged adapter and vectors, as files for other programs. Beside an adapter's, that of the vectors has
        _emb in its name."""
        written, bundled, is_first = dict[str, Path](), dict[str, Any](), processes.is_first
        if self._vectors is not None:
            vectors = self._vectors.on_host(state.sampled, mesh)
            bundled = self._vectors.bundled(vectors)
            name = path if self._adapters is None else path.with_stem(f"{path.stem}{BESIDE_ADAPTER}")
            written["embedding"] = name
            if is_first:
                self._vectors.export(vectors, name, step)
        if self._adapters is not None:
            written["adapter"] = path
            factors = adapters.of(state.sampled, frozen)
            own = self.model_config.sampling  # of what was distilled; a base's own is not in the adapter
            sampling = None if own == self.config.model.sampling else own
            given = {"bundled": bundled, "sampling": sampling, "dataset": dataset}
            self._adapters.export(factors, path, step, mesh, is_first=is_first, **given)
        return written

    def export_notes(self) -> Sequence[str]:
        return () if self._adapters is None else self._adapters.export_notes()

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        terms: Metrics = {} if self.config.image_prompt is None else image_prompts.norms(batch)
        if self._trains_rows:
            trained = image_prompts.pooled_rows(trained, self._pooled_width)
        changes: Params = {}
        if self._adapters is not None:
            changes = self._adapters.of_step(adapters.of(trained, frozen), keys)
        if self._vectors is not None:
            changes = merge(changes, self._vectors.changes(trained))
        return batch_loss(trained, frozen, batch, keys, self.config, self._empty, changes or None), terms

    def counterparts(
        self, model: Model, examples: Examples, mesh: Mesh, processes: Processes
    ) -> UInt8[np.ndarray, "images height width 3"]:
        """Samples of the captions and classes, with the steps and guidance of the validation grids."""
        validation = self.config.validation
        _, height, width, _ = examples.images.shape
        options = {"seed": _GRID_SEED, "steps": validation.steps, "guidance": validation.guidance}
        batch_size = max(_SAMPLED_TOGETHER, sharding.batch_parts(mesh))

        def sample() -> UInt8[np.ndarray, "images height width 3"]:
            size = {"height": height, "width": width, "batch_size": batch_size}
            with jax.set_mesh(mesh):
                return generate.text_to_image(
                    model,
                    examples.captions if model.config.text else [""] * len(examples.images),
                    classes=examples.labels,
                    **size,
                    **options,
                    compute=self.config.compute,
                )

        # With several processes it must not be abandoned: the others would wait in its collectives.
        return processes.wait(sample) if processes.count == 1 else sample()

    @property
    def validates_every(self) -> int | None:
        validation = self.config.validation
        return validation.every_steps if validation.prompts or validation.classes else None

    @property
    def validates_at_start(self) -> bool:
        return self.config.validation.at_start

    def validation(self, model: Model, dataset: BucketedDataset, mesh: Mesh, processes: Processes) -> Grid:
        """Images of `validation.prompts` and `validation.classes` in each size, from the same noise each time; with
        inpainting, of the hidden part of an image of the data, which comes first. A stop takes effect between two
        sizes; with a single process, at any time."""
        validation = self.config.validation
        options = {"seed": _GRID_SEED, "steps": validation.steps, "guidance": validation.guidance}
        pairs = list(itertools.product(validation.classes or (None,), validation.prompts or ("",)))
        labels, prompts = zip(*pairs, strict=True)

        def sample(height: int, width: int) -> list[UInt8[np.ndarray, "height width 3"]]:
            given: dict[str, Any] = {"height": height, "width": width, **options}
            shown = list[UInt8[np.ndarray, "height width 3"]]()
            if (masks := self.config.inpainting) is not None:
                image, hidden = inpainting.example(dataset, Size(height, width), masks)
                given |= {"init_image": image, "mask": hidden}
                shown.append(inpainting.masked(image, hidden))
            with jax.set_mesh(mesh):
                generated = generate.text_to_image(model, prompts, classes=labels, **given, compute=self.config.compute)
            return shown + list(generated)

        images = list[UInt8[np.ndarray, "_height _width 3"]]()
        for height, width in validation.sizes:
            processes.stop_point()
            sample_size = functools.partial(sample, height, width)
            # With several processes it must not be abandoned: the others would wait in its collectives.
            images += processes.wait(sample_size) if processes.count == 1 else sample_size()
        weights = "parameters" if self.config.ema.kind is EmaKind.NONE else "ema"
        row = [classes.caption(prompt, label) for label, prompt in pairs]
        row = row if self.config.inpainting is None else ["the masked image", *row]
        return Grid(images, row * len(validation.sizes), len(row), {"weights": weights, **options})


def _united(pairs: Iterable[tuple[Params, Params]]) -> tuple[Params, Params]:
    """(trainable, frozen) of several things that are trained together."""
    trained, frozen = Params(), Params()
    for one, other in pairs:
        trained, frozen = trained | one, frozen | other
    return trained, frozen


def batch_loss(
    trained: Params,
    frozen: Params,
    batch: Batch,
    keys: Key[jax.Array, " batch"],
    config: TrainConfig,
    empty: Mapping[str, EmptyTokens],
    changes: Params | None = None,
) -> Float[jax.Array, ""]:
    """The loss of one (micro-)batch. keys: one per example; empty: tokens of "" by tower, for the null embedding;
    changes: adapters by part."""
    params, parts, compute = merge(trained, frozen), config.model, config.compute
    latent_keys, dropout_keys, loss_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)

    posterior, prompt = encoded(batch, params, parts, compute, changes)
    latent = vae.scaled_sample(parts.vae, posterior, latent_keys)
    network = _network(params, batch, prompt, dropout_keys, config, empty, changes)
    channels = None
    if config.inpainting is not None:
        channels = inpainting.mask_channels(batch, params, dropout_keys, config)
        network = inpainting.seeing(network, channels)
    base = None
    if batch.base_target is not None:
        of_token = textual_inversion.without_adapters(changes)
        if set(changes or {}) - {"unet"}:
            prompt = text.encode(parts.text, params, batch.tokens, compute, of_token)
        of_base = _network(params, batch, prompt, dropout_keys, config, empty, of_token)
        of_base = of_base if channels is None else inpainting.seeing(of_base, channels)
        base = loss.BaseTarget(of_base, jnp.asarray(batch.base_target))

    noise = parts.noise or schedule.make(parts.schedule)
    factors = None if batch.loss_weight is None else jnp.asarray(batch.loss_weight)
    masks = None if batch.mask is None else loss.position_weights(jnp.asarray(batch.mask), *latent.shape[1:3])
    return loss.diffusion_loss(network, latent, loss_keys, noise, parts.prediction, config.loss, factors, base, masks)


def _network(
    params: Params,
    batch: Batch,
    prompt: text.TextConditioning,
    dropout_keys: Key[jax.Array, " batch"],
    config: TrainConfig,
    empty: Mapping[str, EmptyTokens],
    changes: Params | None,
) -> loss.Network:
    """The UNet, conditioned on what dropout leaves of the batch's text states and micro-conditioning. changes: of
    `batch_loss`; without adapters for the frozen model."""
    parts, compute = config.model, config.compute
    unconditional = unconditional_text(parts, params, empty, compute, changes)
    if config.image_prompt is not None:
        keys_of_text = jax.vmap(lambda key: jax.random.fold_in(key, 2))(dropout_keys)
        prompt = image_prompts.conditioned(prompt, batch, keys_of_text, config.image_prompt)
    prompt = text.drop(prompt, unconditional, dropout_keys, config.training.caption_dropout)
    micro, label = with_dropout(batch, dropout_keys, config)
    conditioning = condition(parts, prompt, micro, class_embedding(parts, params["unet"], label))

    def network(
        x_t: Float[jax.Array, "batch height width channels"], timestep: Num[jax.Array, " batch"]
    ) -> Float[jax.Array, "batch height width channels_out"]:
        context, vector, added = conditioning
        beside = (changes or {}).get("unet")
        given = params["unet"], x_t, timestep, context, vector, compute
        return unet.apply(parts.unet, *given, adapters=beside, class_embedding=added)

    return network


def with_dropout(
    batch: Batch, keys: Key[jax.Array, " batch"], config: TrainConfig
) -> tuple[MicroConditioning, Int32[type_of_array, " batch"] | None]:
    """(micro-conditioning, classes) of a batch after dropout. keys: those of the captions' dropout, one per example."""
    training, micro, label = config.training, batch.micro, batch.label

    def own(purpose: int) -> Key[jax.Array, " batch"]:
        return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)

    if training.class_dropout and label is not None:
        label = classes.drop(label, own(0), training.class_dropout)
    if training.micro_dropout and config.model.micro is not None:
        micro = micro_conditioning.drop(config.model.micro, micro, own(1), training.micro_dropout)
    return micro, label


def encoded(
    batch: Batch, params: Params, parts: ModelConfig, compute: Compute, changes: Params | None
) -> tuple[vae.Posterior, text.TextConditioning]:
    """(posterior of the latents, text states), from the encoders or from the cache."""
    if batch.encoded is not None:
        mean, log_variance, context, pooled, _ = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch.encoded)
        return vae.Posterior(mean, log_variance), text.TextConditioning(context, pooled)
    assert batch.image is not None
    posterior = vae.encode(parts.vae, autoencoder(params), arrays.normalise(batch.image), compute)
    return posterior, text.encode(parts.text, params, batch.tokens, compute, changes)
