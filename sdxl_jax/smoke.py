"""Smoke configurations: a small version of a training configuration that runs in seconds on a CPU, to test that
everything fits together.

Only the fields in `SHRUNK` change: sizes of networks and images, counts, the mesh, and paths. All others stay, among
them prediction, loss, conditioning, precision, rematerialisation, optimiser and EMA.
"""

import math
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TypeVar

from sdxl_jax.conditioning.text import Tower
from sdxl_jax.config import RunConfig, TrainConfig
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.taesd import TinyVaeConfig
from sdxl_jax.models.vae import LearntVaeConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.training.objectives.autoencoding import AutoencoderConfig
from sdxl_jax.training.objectives.distillation.adversarial_diffusion import AdversarialDiffusionConfig
from sdxl_jax.training.objectives.distillation.critic import CriticDistillationConfig
from sdxl_jax.training.objectives.distillation.distribution_matching import DistributionMatchingConfig
from sdxl_jax.training.objectives.distillation.progressive import ProgressiveConfig

_Config = TypeVar("_Config", bound=RunConfig)

SMALLER = 8
"""Divisor of image sides."""
STEPS = 3

SHRUNK = (
    *("data.buckets", "data.min_size", "data.batch_size", "data.batch_pixels"),
    *("data.folder", "data.sources", "data.cache"),
    *("model.unet.block_channels", "model.unet.resnets_per_block", "model.unet.transformer_depth"),
    *("model.unet.middle_depth", "model.unet.heads", "model.unet.context_dim", "model.unet.vector_dim"),
    *("model.unet.groups", "model.vae.block_channels", "model.vae.resnets_per_block", "model.vae.groups"),
    *("model.vae.channels", "model.vae.encoder_blocks", "model.vae.decoder_blocks"),
    *("model.text", "model.micro.embedding_dim", "model.default_size"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices"),
    *("optimiser.warmup_steps", "optimiser.accumulate"),
    *("training.steps", "training.init_from", "training.compilation_cache"),
    *("checkpoint.every_steps", "checkpoint.keep", "image_prompt.encoder", "adapter.rank"),
    *("validation.every_steps", "validation.prompts", "validation.sizes", "validation.steps"),
    *("vae.block_channels", "vae.resnets_per_block", "vae.groups"),
    *("vae.channels", "vae.encoder_blocks", "vae.decoder_blocks", "validation.images"),
    *("discriminator.network.base_channels", "discriminator.network.layers", "discriminator.start_step"),
    *("steps", "critic.updates", "head.layers", "discriminator.weights", "discriminator.layers"),
    *(f"discriminator.dinov2.{name}" for name in ("width", "layers", "heads", "mlp_width", "side")),
)
"""Fields in which a smoke configuration may differ. In `model.text` these are the towers' widths, layers, heads and
projections."""


def smoke_config(config: TrainConfig, root: str = "smoke") -> TrainConfig:
    """The smoke configuration of a training configuration.

    root: folder that all its relative paths are put into, so that each stage finds the smoke run of the stage before
    it, not the run at full size: runs/sdxl_base_256 becomes smoke/runs/sdxl_base_256.

    Of the buckets it keeps the widest, the squarest and the tallest.
    """
    small, validation, prompt = _small_run(config, root), config.validation, config.image_prompt
    if isinstance(small, ProgressiveConfig | DistributionMatchingConfig):
        small = replace(small, steps=2)  # which its validation has to have
    adapter = config.adapter
    if isinstance(small, CriticDistillationConfig):
        small = _small_critic(small, root)
    return replace(
        small,
        image_prompt=None if prompt is None else replace(prompt, encoder=str(PurePosixPath(root, prompt.encoder))),
        adapter=None if adapter is None else replace(adapter, rank=min(2, adapter.rank)),
        model=_small_model(config.model),
        validation=replace(
            validation,
            every_steps=None if validation.every_steps is None else STEPS,
            prompts=validation.prompts[:1],
            sizes=tuple(_smaller(size) for size in validation.sizes[:1]),
            steps=2,
        ),
    )


def smoke_autoencoder(config: AutoencoderConfig, root: str = "smoke") -> AutoencoderConfig:
    """The smoke configuration of an autoencoder's training. root: as for `smoke_config`."""
    validation, discriminator = config.validation, config.discriminator
    if discriminator is not None:
        network = replace(discriminator.network, base_channels=4, layers=min(2, discriminator.network.layers))
        discriminator = replace(discriminator, network=network, start_step=min(1, discriminator.start_step))
    every = None if validation.every_steps is None else STEPS
    return replace(
        _small_run(config, root),
        vae=_small_vae(config.vae),
        discriminator=discriminator,
        validation=replace(validation, every_steps=every, images=2),
    )


def _small_critic(config: CriticDistillationConfig, root: str) -> CriticDistillationConfig:
    """A distillation with a small critic, that gives the student several updates."""
    config = replace(config, critic=replace(config.critic, updates=min(2, config.critic.updates)))
    if isinstance(config, DistributionMatchingConfig) and config.head is not None:
        return replace(config, head=replace(config.head, layers=0))  # at SDXL's three levels, 128 pixels leave 4
    if isinstance(config, AdversarialDiffusionConfig) and config.discriminator.dinov2 is not None:
        given = config.discriminator
        network = replace(config.discriminator.dinov2, width=16, layers=2, heads=2, mlp_width=32, side=28)
        weights = None if given.weights is None else str(PurePosixPath(root, given.weights))
        return replace(config, discriminator=replace(given, dinov2=network, weights=weights, layers=(0, 2)))
    return config


def _small_run(config: _Config, root: str) -> _Config:
    """What runs of every objective have, in small."""
    data, training, cache = config.data, config.training, config.training.compilation_cache

    def inside(path: str) -> str:
        return str(PurePosixPath(root, path))

    return replace(
        config,
        data=replace(
            data,
            folder=None if data.folder is None else inside(data.folder),
            sources=tuple(replace(source, folder=inside(source.folder)) for source in data.sources),
            cache=None if data.cache is None else inside(data.cache),
            buckets=tuple(_smaller(size) for size in _extremes(data.buckets)),
            min_size=max(1, data.min_size // SMALLER),
            batch_size=8,
            batch_pixels=None,
        ),
        mesh=MeshConfig(),
        optimiser=replace(config.optimiser, warmup_steps=min(1, config.optimiser.warmup_steps), accumulate=1),
        training=replace(
            training,
            steps=STEPS,
            init_from=tuple(map(inside, training.init_from)),
            compilation_cache=cache if cache in (None, "user") else inside(cache),
        ),
        checkpoint=replace(config.checkpoint, every_steps=1, keep=STEPS),
    )


def _smaller(size: tuple[int, int]) -> tuple[int, int]:
    """A size in multiples of 64, as buckets have, divided to multiples of 8, which the autoencoder needs."""
    height, width = size
    return height // SMALLER, width // SMALLER


def _extremes(buckets: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    def log_aspect(size: tuple[int, int]) -> float:
        return math.log(size[0] / size[1])

    squarest = min(buckets, key=lambda size: abs(log_aspect(size)))
    return tuple(dict.fromkeys((min(buckets, key=log_aspect), squarest, max(buckets, key=log_aspect))))


def _small_model(config: ModelConfig) -> ModelConfig:
    """A model with the same levels, the same kinds of blocks, and widths in about the same proportions."""
    towers = tuple(map(_small_tower, config.text))
    micro = None if config.micro is None else replace(config.micro, embedding_dim=4)
    pooled, unet = towers[-1].clip.projection_dim if towers else 0, config.unet
    alone = None if unet.context_dim is None else 16
    return replace(
        config,
        unet=replace(
            unet,
            block_channels=tuple(8 * (channels // unet.block_channels[0]) for channels in unet.block_channels),
            resnets_per_block=1,
            transformer_depth=tuple(min(2, depth) for depth in unet.transformer_depth),
            middle_depth=min(2, unet.middle_depth),
            heads=tuple(heads // unet.heads[0] for heads in unet.heads),  # SDXL: 1, 2, 4
            context_dim=sum(tower.clip.width for tower in towers) if towers else alone,
            vector_dim=None if micro is None or pooled is None else pooled + micro.vector_dim,
            groups=4,
        ),
        vae=config.vae if isinstance(config.vae, WaveletConfig) else _small_vae(config.vae),
        text=towers,
        micro=micro,
        default_size=_smaller(config.default_size),
    )


def _small_vae(config: LearntVaeConfig) -> LearntVaeConfig:
    if isinstance(config, TinyVaeConfig):
        one = (1,) * len(config.decoder_blocks)
        return replace(config, channels=4, encoder_blocks=one, decoder_blocks=one)
    return replace(config, block_channels=(4,) * len(config.block_channels), resnets_per_block=1, groups=2)


def _small_tower(tower: Tower) -> Tower:
    width = tower.clip.width // 64  # L, H and bigG keep different widths: 12, 16, 20
    projection = None if tower.clip.projection_dim is None else width
    clip = replace(tower.clip, width=width, layers=2, heads=2, mlp_width=2 * width, projection_dim=projection)
    return replace(tower, clip=clip)
