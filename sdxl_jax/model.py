"""A complete latent diffusion model: autoencoder, text encoders, UNet, and how they fit together.

    ModelConfig   what the weights depend on and how they must be used; hashable, so that compiled functions key on it
    Model         a configuration with parameters: {"unet": …, "vae": …, "text_encoder": …, …}, named as in diffusers

Also the function that training and sampling share: the UNet's conditioning (`condition`).
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
from jaxtyping import Float, Int32

from sdxl_jax.adapters.changes import Lora
from sdxl_jax.arrays import MicroConditioning, Params, TokenIds, flatten, type_of_array, unflatten
from sdxl_jax.conditioning import classes, text
from sdxl_jax.conditioning import micro as micro_conditioning
from sdxl_jax.conditioning.micro import MicroConfig, Numbers
from sdxl_jax.conditioning.text import TextConditioning, Tower
from sdxl_jax.diffusion.continuous import EdmConfig, FlowConfig
from sdxl_jax.diffusion.parameterisation import DISCRETE, Prediction
from sdxl_jax.diffusion.schedule import ScheduleConfig
from sdxl_jax.errors import RENAMED, InputError
from sdxl_jax.models import clip, initialisers, unet, vae
from sdxl_jax.models.layers import Compute
from sdxl_jax.models.unet import ClassPlace, UNetConfig
from sdxl_jax.models.vae import AnyVaeConfig, VaeConfig
from sdxl_jax.models.wavelet import WaveletConfig
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.guidance import Conditioning


class UnconditionalKind(enum.Enum):
    """Which embedding is the unconditional (null) one: for dropped captions, and for guidance without a negative
    prompt."""

    ZEROS = "zeros"
    """Embeddings of zeros: SDXL base."""
    EMPTY = "empty"
    """The embeddings of "": SDXL refiner, SD 1.x and 2.x."""
    ALL_ZEROS = "all_zeros"
    """Embeddings of zeros, of the sizes and positions too: sgm's class-conditional models, trained with
    `training.micro_dropout`."""

    @property
    def zeros_text(self) -> bool:
        """Whether the text's embeddings are zeros."""
        return self is not UnconditionalKind.EMPTY


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, noise schedule and prediction of a model. The defaults are SDXL base 1.0."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    """The denoising network."""
    vae: AnyVaeConfig = field(default_factory=VaeConfig)
    """The autoencoder between images and latents: the full one, or a tiny one (TAESD) with the same latents; or the
    exact one, for diffusion of pixels."""
    text: tuple[Tower, ...] = text.SDXL_BASE_TEXT
    """The text encoders, in the order in which their states are concatenated. (): none, of a model of classes."""
    micro: MicroConfig | None = field(default_factory=MicroConfig)
    """Micro-conditioning: the sizes and positions that the UNet is conditioned on; None: no micro-conditioning (SD 1.x
    and 2.x)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The noise schedule that the weights were trained with."""
    prediction: Prediction = Prediction.EPSILON
    """What the UNet outputs."""
    unconditional: UnconditionalKind = field(default=UnconditionalKind.ZEROS, metadata={RENAMED: "no_prompt"})
    """The unconditional embedding."""
    default_size: tuple[int, int] = (1024, 1024)
    """(height, width) in pixels of sampled images, by default."""
    distilled: bool = False
    """Whether guidance is in the weights, as after consistency distillation: sampling then uses guidance 1, or the
    scale that is an input (`unet.guidance_dim`)."""
    sampling: SamplingDefaults | None = None
    """Default sampler, spacing and noise levels; None: those of SDXL's official files."""
    noise: EdmConfig | FlowConfig | None = None
    """Continuous noise levels in the place of `schedule`: EDM's or those of flow matching; None: the schedule's."""

    @property
    def is_refiner(self) -> bool:
        """Whether the UNet is conditioned on an aesthetic score, as SDXL's refiner alone is."""
        return self.micro is not None and self.micro.numbers is Numbers.SIZE_CROP_AESTHETIC

    @property
    def has_autoencoder(self) -> bool:
        """Whether the autoencoder has parameters and so is a part of the model; the exact one has none."""
        return not isinstance(self.vae, WaveletConfig)

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys of the parameters."""
        return ("unet", *(("vae",) if self.has_autoencoder else ()), *(tower.name for tower in self.text))

    @property
    def sees_mask(self) -> bool:
        """Whether the UNet is one for inpainting: its input is latent, mask, and the latent of the masked image."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1

    def check(self) -> None:
        """Raises InputError for parts that do not fit together, and for sizes below 1."""
        self._check_text()
        for name in ("resnets_per_block", "middle_depth", "in_channels", "out_channels", "groups"):
            if (value := getattr(self.unet, name)) < 1:  # parameters without elements, which no checkpoint holds
                raise InputError(f"model.unet.{name}={value}. Give 1 or more")
        if (width := self.unet.guidance_dim) is not None and (width < 4 or width % 2):
            raise InputError(f"model.unet.guidance_dim={width}. Give an even number, 4 or more, e.g. 256, or None")
        self._check_conditioning()
        if self.vae.latent_channels != self.unet.out_channels:
            raise InputError(
                f"model.vae.latent_channels={self.vae.latent_channels} and model.unet.out_channels="
                f"{self.unet.out_channels} differ. Set both to the same number"
            )
        grouped: list[tuple[str, UNetConfig | VaeConfig]] = [("unet", self.unet)]
        if isinstance(self.vae, VaeConfig):
            self.vae.check("model.vae")
            grouped.append(("vae", self.vae))
        else:
            self.vae.check("model.vae")
        for name, part in grouped:
            if uneven := [channels for channels in part.block_channels if channels % part.groups]:
                raise InputError(
                    f"model.{name}.block_channels has {_listed(uneven)}, not divisible by model.{name}.groups="
                    f"{part.groups}. Use multiples of {part.groups}, or fewer groups"
                )
        lengths = [len(each) for each in (self.unet.block_channels, self.unet.transformer_depth, self.unet.heads)]
        if len(set(lengths)) != 1:
            raise InputError(
                f"model.unet.block_channels, transformer_depth and heads have {_listed(lengths)} numbers. Give each of "
                "them one number per level"
            )
        for channels, heads in zip(self.unet.block_channels, self.unet.heads, strict=True):
            if channels % heads:
                raise InputError(
                    f"model.unet.heads has {heads} heads for {channels} channels. Use a number that divides {channels}"
                )
        self.check_noise()
        if self.schedule.zero_terminal_snr and self.prediction is Prediction.EPSILON:
            raise InputError(
                "model.schedule.zero_terminal_snr=True with model.prediction=epsilon: the last timestep is noise "
                "alone, from which noise cannot be predicted. Set model.prediction=v_prediction"
            )

    def check_noise(self) -> None:
        """Raises InputError for a prediction that does not go with the noise levels."""
        fitting: tuple[Prediction, ...] = DISCRETE
        if self.noise is not None:
            self.noise.check("model.noise")
            fitting = (Prediction.FLOW,) if isinstance(self.noise, FlowConfig) else (Prediction.EDM, Prediction.V)
        if self.prediction not in fitting:
            kind = "None" if self.noise is None else type(self.noise).__name__
            raise InputError(
                f"model.prediction={self.prediction.value} does not go with model.noise={kind}. Set model.prediction "
                f"to {' or '.join(each.value for each in fitting)}, or set model.noise"
            )
        if self.noise is not None and (self.schedule != ScheduleConfig() or self.distilled):
            raise InputError(
                "model.schedule and model.distilled have no effect beside model.noise, which takes the schedule's "
                "place. Leave them out, or set model.noise=None"
            )

    def _check_conditioning(self) -> None:
        """Raises InputError for a UNet whose inputs do not have the widths of what it is conditioned on."""
        is_token = self.unet.classes is not None and self.unet.classes.place is ClassPlace.TOKEN
        given, context = self.unet.context_dim, sum(tower.clip.width for tower in self.text)
        if self.text and context != given:
            raise InputError(
                f"model.unet.context_dim={given}, but the concatenated text states have a width of {context}. Set it "
                f"to {context}"
            )
        if not self.text and (given is not None) != is_token:
            remedy = "a width, e.g. 1024" if is_token else "None"
            attended = "its class token" if is_token else "nothing"
            raise InputError(
                f"model.unet.context_dim={given}, but without text encoders the UNet attends to {attended}. Set it to "
                f"{remedy}"
            )
        pooled = self.text[-1].clip.projection_dim if self.text else 0
        if self.micro is not None and pooled is None:
            raise InputError(
                "model.micro needs a pooled text vector, and the last encoder of model.text has clip.projection_dim="
                "None. Set its projection_dim, or set model.micro=None"
            )
        expected = None if self.micro is None or pooled is None else pooled + self.micro.vector_dim
        if expected != self.unet.vector_dim:
            width = f"pooled text and micro-conditioning have a width of {expected} together"
            if expected is None:
                width = "model.micro=None: there is no micro-conditioning"
            raise InputError(f"model.unet.vector_dim={self.unet.vector_dim}, but {width}. Set it to {expected}")

    def _check_text(self) -> None:
        names = [tower.name for tower in self.text]
        if (not names and self.unet.classes is None) or len(set(names)) < len(names):
            given = f"the names {_listed(names)}" if names else "no text encoder"
            raise InputError(
                f"model.text has {given}. Give at least one text encoder, each with its own name, or classes "
                "(model.unet.classes)"
            )
        if self.unet.classes is not None and self.unet.classes.number < 1:
            raise InputError(f"model.unet.classes.number={self.unet.classes.number}. Give 1 or more")
        for tower in self.text:
            clip_config = tower.clip
            if clip_config.tokens != text.TOKENS or clip_config.vocabulary <= text.END_OF_TEXT:
                raise InputError(
                    f"{tower.name} has clip.tokens={clip_config.tokens} and clip.vocabulary={clip_config.vocabulary}. "
                    f"CLIP's tokenizer needs {text.TOKENS} tokens and a vocabulary of {text.END_OF_TEXT + 1} or more"
                )
            added = tower.added_tokens
            if clip_config.vocabulary < text.FIRST_ADDED + len(added):
                raise InputError(
                    f"{tower.name} has {len(added)} added tokens, but clip.vocabulary={clip_config.vocabulary}. Set it "
                    f"to {text.FIRST_ADDED + len(added)}"
                )
            if unusable := [word for n, word in enumerate(added) if word in added[:n] or not text.can_be_added(word)]:
                raise InputError(
                    f"{tower.name} has the added tokens {_listed(map(repr, unusable))}, which are repeated, CLIP's "
                    "own, or begin or end in a space. Give each another name"
                )
            if clip_config.width % clip_config.heads:
                raise InputError(
                    f"{tower.name} has clip.heads={clip_config.heads} for clip.width={clip_config.width}. Use a number "
                    f"of heads that divides {clip_config.width}"
                )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


SDXL_BASE = ModelConfig()
SDXL_REFINER = ModelConfig(
    unet=unet.SDXL_REFINER,
    text=text.SDXL_REFINER_TEXT,
    micro=MicroConfig(Numbers.SIZE_CROP_AESTHETIC),
    unconditional=UnconditionalKind.EMPTY,
)
SD1 = ModelConfig(
    unet=unet.SD1,
    vae=vae.SD_VAE,
    text=text.SD1_TEXT,
    micro=None,
    unconditional=UnconditionalKind.EMPTY,
    default_size=(512, 512),
)
SD2 = ModelConfig(
    unet=unet.SD2,
    vae=vae.SD_VAE,
    text=text.SD2_TEXT,
    micro=None,
    unconditional=UnconditionalKind.EMPTY,
    default_size=(512, 512),
)


class Adapter(NamedTuple):
    """A LoRA that is merged into a model's parameters."""

    name: str
    scale: float
    lora: Lora
    """Its tensors, so that it can be listed and removed again."""


class Model(NamedTuple):
    """A configuration with its parameters: what sampling needs."""

    config: ModelConfig
    params: Params
    adapters: tuple[Adapter, ...] = ()
    """LoRAs that `weights.lora.add` has merged into the parameters, in that order."""


def abstract(config: ModelConfig) -> Params:
    """The parameters of every part and how they begin (`initialisers.Parameter`); nothing is computed."""
    towers = {tower.name: clip.abstract(tower.clip) for tower in config.text}
    autoencoder = {"vae": vae.abstract(config.vae)} if config.has_autoencoder else {}
    return {"unet": unet.abstract(config.unet), **autoencoder, **towers}


def init(config: ModelConfig, seed: int) -> Params:
    """Random initial parameters of every part, float32, on the default device: those of a run with this seed."""
    parameters = flatten(abstract(config))
    made = {path: jax.device_put(initialisers.sample(one, seed, path)) for path, one in parameters.items()}
    return unflatten(made)


def unconditional_text(
    config: ModelConfig,
    params: Params,
    empty: Mapping[str, TokenIds],
    compute: Compute,
    adapters: Params | None = None,
) -> TextConditioning:
    """The unconditional (null) embedding, batch 1. empty: the token numbers of [""]."""
    condition = text.encode(config.text, params, empty, compute, adapters)
    return text.zeros_like(condition) if config.unconditional.zeros_text else condition


def class_embedding(
    config: ModelConfig, unet_params: Params, label: Int32[type_of_array, " batch"] | None
) -> Float[jax.Array, "batch features"] | None:
    """The embeddings of class labels; None for a model without classes. unet_params: the UNet's."""
    if config.unet.classes is None:
        return None
    assert label is not None, "every example of a model with classes has a label"
    return classes.embed(config.unet.classes, unet_params, label)


def condition(
    config: ModelConfig,
    prompt: TextConditioning,
    micro: MicroConditioning,
    embedded: Float[jax.Array, "batch features"] | None = None,
) -> Conditioning:
    """The UNet's conditioning: text states, and the vector of pooled text and micro-conditioning; with the class, where
    `class_embedding` gives one (`embedded`)."""
    context, added = prompt.context, embedded
    if embedded is not None and config.unet.classes is not None and config.unet.classes.place is ClassPlace.TOKEN:
        context, added = classes.with_token(context, embedded), None
    vector = None if config.micro is None else micro_conditioning.vector(config.micro, prompt.pooled, micro)
    return Conditioning(context, vector, added)


def autoencoder(params: Params) -> Params:
    """The autoencoder's parameters among a model's. An exact autoencoder has none, and so no part."""
    return params.get("vae", {})
