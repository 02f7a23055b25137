"""The reference networks of diffusers and transformers: tiny, every parameter random; and the same weights here.

A network of ours is described by our configuration alone; the functions below translate it for the reference. Weights
go through `weights.names`, so its tables are tested as well.

Sizes are tiny but leave nothing out: several levels, stacks deeper than one, several heads, 32 groups of more than one
channel (with one channel a group, a norm would cancel the time embedding).
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdxl_jax.arrays import Params
from sdxl_jax.conditioning import text
from sdxl_jax.models import clip, layers, taesd, unet, vae
from sdxl_jax.weights import names
from sdxl_jax.weights.names import Dialect, Naming

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # tiny tensors; threads wait for each other longer than they work

FOURIER_DIM = 16
"""Width of one embedded number in the tiny conditioning vectors (256 at full size)."""
POOLED_DIM = 32
"""Width of the tiny pooled text state (1280 at full size)."""

UNETS: dict[str, unet.UNetConfig] = {
    "SDXL base": unet.UNetConfig((64, 128, 128), 2, (0, 2, 3), 3, (2, 4, 2), 48, POOLED_DIM + 6 * FOURIER_DIM),
    "SDXL refiner": unet.UNetConfig(
        (64, 128, 128, 128), 1, (0, 2, 2, 0), 2, (2, 4, 4, 2), 40, POOLED_DIM + 5 * FOURIER_DIM
    ),
    "SD 1.x": unet.UNetConfig((64, 64, 128, 128), 1, (1, 1, 1, 0), 1, (4, 4, 4, 4), 48, None, conv_projection=True),
    "SD 2.x": unet.UNetConfig((64, 128), 1, (1, 0), 1, (1, 4), 40, None),
    "SD 1.x inpainting": unet.UNetConfig(
        (64, 128), 1, (1, 0), 1, (2, 2), 48, None, conv_projection=True, in_channels=9
    ),
}
UNET_FOR_GRADIENTS = unet.UNetConfig((64, 128), 1, (0, 2), 2, (2, 4), 48, POOLED_DIM + 6 * FOURIER_DIM)
"""Every kind of weight once or twice: the gradient of a larger one takes a minute to compile."""
VAE = vae.VaeConfig((64, 64, 128, 128))
TINY_VAE = taesd.TinyVaeConfig(16, (1, 2, 3), (3, 2, 1))

START, END, ADDED = 98, 99, 110
"""Tokens of the tiny vocabulary. `ADDED` is beyond `END`, as a textual inversion's token is."""
TOWERS: dict[str, clip.ClipTextConfig] = {
    "CLIP-L": clip.ClipTextConfig(48, 3, 3, 192, clip.Activation.QUICK_GELU, None, 120, END),
    "CLIP-H": clip.ClipTextConfig(64, 4, 4, 256, clip.Activation.GELU, 64, 120, END),
    "CLIP-bigG": clip.ClipTextConfig(80, 5, 5, 320, clip.Activation.GELU, 56, 120, END),
}


class Pair(NamedTuple):
    """One network twice."""

    model: Any
    """torch's."""
    table: names.Table
    params: Params
    """Ours: the same weights."""


# Layers that write what a later norm reads, where eps matters only beside a small variance.
_QUIET = re.compile(r"conv_in|conv[12]|time_emb_proj|attentions\.\d\.proj_in|to_out\.0|net\.2|fc2|out_proj")
# Layers that the whole signal passes: what they enlarge stays large to the end.
_CARRYING = re.compile(r"conv_shortcut|samplers")


def randomise(model: Any, seed: int) -> None:
    """Every parameter random: nothing zero, no norm with scale 1 and bias 0.

    Weights keep the size of what flows through them, except the quiet ones: those make the variance before a norm about
    1e-3, so that an eps of 1e-5 in the place of 1e-6 shows.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in layer.rpartition(".")[2]:
            value = 0.3 * noise + (kind == "weight")
        elif kind == "bias" or layer.endswith(("token_embedding", "position_embedding")):
            value = 0.03 * noise
        else:
            gain = 0.03 if _QUIET.search(layer) else 0.7 if _CARRYING.search(layer) else 1.5
            value = gain * noise / parameter[0].numel() ** 0.5
        parameter.data.copy_(value)


def weights(model: Any) -> dict[str, np.ndarray]:
    """The named tensors, as a weight file would have them."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def pair_of(model: Any, config: names.TableConfig, dialect: Dialect, seed: int) -> Pair:
    randomise(model, seed)
    table = names.table(config, Naming(dialect))
    params = names.from_tensors(table, weights(model))
    return Pair(model.eval(), table, jax.tree.map(jnp.asarray, params))


def unet_pair(config: unet.UNetConfig, seed: int = 0) -> Pair:
    return pair_of(unet_model(config), config, Dialect.DIFFUSERS, seed)


def unet_model(config: unet.UNetConfig, fourier_dim: int = FOURIER_DIM) -> Any:
    attends = [depth > 0 for depth in config.transformer_depth]
    depths = [max(depth, 1) for depth in config.transformer_depth]  # not read where a level has no attention
    depths[-1] = config.middle_depth  # diffusers reads the middle's depth there
    assert config.transformer_depth[-1] in (0, config.middle_depth)
    options = {}
    if config.vector_dim is not None:
        options = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": fourier_dim,
            "projection_class_embeddings_input_dim": config.vector_dim,
        }
    if config.classes is not None:
        options["num_class_embeds"] = config.classes.number
    if config.guidance_dim is not None:
        options["time_cond_proj_dim"] = config.guidance_dim
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_channels,
        layers_per_block=config.resnets_per_block,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        transformer_layers_per_block=depths,
        attention_head_dim=config.heads,  # misnamed there: it is the number of heads
        cross_attention_dim=config.context_dim,
        use_linear_projection=not config.conv_projection,
        **options,
    )


def vae_pair(config: vae.VaeConfig, seed: int = 0) -> Pair:
    levels = len(config.block_channels)
    model = diffusers.AutoencoderKL(
        block_out_channels=config.block_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.resnets_per_block,
        latent_channels=config.latent_channels,
    )
    return pair_of(model, config, Dialect.DIFFUSERS, seed)


def tiny_vae_pair(config: taesd.TinyVaeConfig, seed: int = 0) -> Pair:
    return pair_of(tiny_vae_model(config), config, Dialect.DIFFUSERS, seed)


def tiny_vae_with(config: taesd.TinyVaeConfig, params: Params) -> Pair:
    """The same with weights that are given, ours."""
    model, table = tiny_vae_model(config), names.table(config, Naming(Dialect.DIFFUSERS))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in names.to_tensors(table, params).items()})
    return Pair(model.eval(), table, params)


def tiny_vae_model(config: taesd.TinyVaeConfig) -> Any:
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(config.channels,) * len(config.encoder_blocks),
        decoder_block_out_channels=(config.channels,) * len(config.decoder_blocks),
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        latent_channels=config.latent_channels,
    )


def clip_tokenizer() -> Any:
    """transformers' tokenizer over CLIP's vocabulary."""
    vocabulary, merges = text.clip_vocabulary()
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges])


def tower_pair(config: clip.ClipTextConfig, seed: int = 0) -> Pair:
    description = transformers.CLIPTextConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation.value,
        max_position_embeddings=config.tokens,
        projection_dim=config.projection_dim or config.width,
        bos_token_id=START,
        eos_token_id=config.end_token,
    )
    with_projection = config.projection_dim is not None
    model = (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(description)
    short = "embeddings.token_embedding.weight" in model.state_dict()  # transformers 5 leaves a prefix out
    return pair_of(model, config, Dialect.TRANSFORMERS_5 if short else Dialect.TRANSFORMERS, seed)


class UNetInputs(NamedTuple):
    """One batch of two, numpy, in our layout."""

    latent: np.ndarray
    timestep: np.ndarray
    context: np.ndarray
    pooled: np.ndarray | None
    numbers: np.ndarray | None
    """Sizes and crops, or sizes, crops and a score: integers, embedded each on its own."""

    def ours(self) -> dict[str, Any]:
        """Arguments of `unet.apply`; the vector is pooled | embedded numbers."""
        vector = None
        if self.pooled is not None and self.numbers is not None:
            embedded = layers.sinusoidal_embedding(jnp.asarray(self.numbers), FOURIER_DIM)
            vector = jnp.concatenate([self.pooled, embedded.reshape(len(self.pooled), -1)], axis=-1)
        arrays = {"latent": self.latent, "timestep": self.timestep, "context": self.context}
        return {**{name: jnp.asarray(array) for name, array in arrays.items()}, "vector": vector}


def unet_inputs(config: unet.UNetConfig, height: int, width: int, seed: int = 0) -> UNetInputs:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    pooled = numbers = None
    if config.vector_dim is not None:
        pooled = normal(2, POOLED_DIM)
        count = (config.vector_dim - POOLED_DIM) // FOURIER_DIM
        numbers = np.array([[1023, 333, 0, 64, 1024, 8191], [576, 1920, 5, 0, 512, 1]])[:, :count]
    latent, context = normal(2, height, width, config.in_channels), normal(2, 7, config.context_dim or 0)
    return UNetInputs(latent, np.array([3, 987]), context, pooled, numbers)


def to_torch(array: np.ndarray) -> Any:
    """A tensor in torch's layout."""
    tensor = torch.from_numpy(array)
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def from_torch(tensor: Any) -> np.ndarray:
    """An array in our layout."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def run_unet(model: Any, inputs: UNetInputs, latent: Any, labels: np.ndarray | None = None) -> Any:
    """torch's prediction for `latent`, a tensor, and the rest of `inputs`, in the latent's dtype. labels: classes."""
    conditions = None
    if inputs.pooled is not None and inputs.numbers is not None:
        conditions = {"text_embeds": to_torch(inputs.pooled).to(latent.dtype), "time_ids": to_torch(inputs.numbers)}
    timestep, context = to_torch(inputs.timestep), to_torch(inputs.context).to(latent.dtype)
    classes = None if labels is None else to_torch(labels)
    return model(latent, timestep, context, class_labels=classes, added_cond_kwargs=conditions).sample
