"""The quickstart's configuration: a small SDXL base, for two CPU cores and a few minutes.

All parts of SDXL are there: two text encoders, pooled text, size, crop and target size, three levels of which the
finest has no attention, three aspect-ratio buckets, EMA. Two things differ, because training takes minutes only: the
network predicts v instead of ε, because the loss of ε has little weight at high noise levels, where the composition of
the image is decided; and the text encoders start from random weights and are trained as well.
"""

from pathlib import Path

from sdxl_jax.conditioning.micro import MicroConfig
from sdxl_jax.conditioning.text import END_OF_TEXT, Tower
from sdxl_jax.config import CheckpointConfig, TrainConfig, TrainingConfig, ValidationConfig
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.optim.ema import EmaConfig
from sdxl_jax.optim.optimiser import Decay, OptimiserConfig
from sdxl_jax.quickstart import autoencoder

BUCKETS = autoencoder.BUCKETS
_TEXT = (
    Tower("text_encoder", ClipTextConfig(64, 2, 2, 256), END_OF_TEXT),
    Tower("text_encoder_2", ClipTextConfig(64, 2, 2, 256, Activation.GELU, 64), 0),
)

_TRAINABLE = ("^unet/", r"^text_encoder(_2)?/(?!token_embedding)")
"""The UNet, and the text encoders without their token embeddings: random ones are enough to distinguish words."""


def model_config(vae_weights: Path = autoencoder.WEIGHTS) -> ModelConfig:
    """The small model, with the autoencoder at `vae_weights`."""
    return ModelConfig(
        unet=UNetConfig(
            block_channels=(64, 128, 192),
            resnets_per_block=1,
            transformer_depth=(0, 1, 1),
            middle_depth=1,
            heads=(2, 4, 6),
            context_dim=128,
            vector_dim=64 + 6 * 32,
        ),
        vae=autoencoder.load(vae_weights)[0],
        text=_TEXT,
        micro=MicroConfig(embedding_dim=32),
        prediction=Prediction.V,
        default_size=(128, 128),
    )


def get_config(
    images: str = "runs/quickstart/pictures", vae_weights: Path = autoencoder.WEIGHTS, seed: int = 0
) -> TrainConfig:
    """images: the folder into which `quickstart` unpacks its images."""
    return TrainConfig(
        data=DataConfig(folder=images, buckets=BUCKETS, batch_size=16, seed=seed),
        model=model_config(vae_weights),
        optimiser=OptimiserConfig(
            learning_rate=1e-3, warmup_steps=100, decay=Decay.COSINE, beta2=0.99, weight_decay=0.0
        ),
        ema=EmaConfig(decay=0.99),
        training=TrainingConfig(steps=1000, seed=seed, trainable=_TRAINABLE, init_from=(str(vae_weights),)),
        checkpoint=CheckpointConfig(every_steps=400, keep=1),
        validation=ValidationConfig(
            every_steps=400,
            prompts=(
                "a panda face",
                "a slice of watermelon",
                "a flying rocket",
                "a planet with rings",
                "a snowman with a scarf",
                "an orange butterfly",
                "a yellow gift box",
                "a spouting whale",
            ),
            sizes=((128, 128),),
            steps=20,
        ),
    )
