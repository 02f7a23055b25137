"""Adversarial diffusion distillation (ADD), by which SDXL-Turbo was made.

    image ── encode ── noise at a node s ── student ── ŷ ── decode ── features ── heads: real or not?
                                                       │
                                                       └── noised at any t ── teacher ── x̂ ── decode
    2.5 · c(t) mean (decode ŷ − decode x̂)² + adversarial term, both in pixels; no gradient through x̂

The nodes are those that the student is sampled at, one to four of 999, 749, 499 and 249; at the first one the input is
noise alone (zero terminal SNR). The heads judge features of a frozen network (`models.image_features`), and are
conditioned on the pooled text and on the image of the data that was noised; R1 is at their inputs.

    c(t)   exponential  α_t                            a noisier x̂ counts less
           SDS          ½ α_t σ_t                      the gradient in latents is then that of score distillation
           NFSD         that of SDS, with x̂ for which that gradient has no noise in it (Katzir et al.)

Sauer et al., arXiv:2311.17042; its heads and what is known of its numbers: `models.discriminator_heads`, configs/
turbo.py. Not read in the paper, and so decided here: that squared distances are means over pixels, and w(t) = σ_t² of
score distillation (DreamFusion's, arXiv:2209.14988; with it, c = α w / 2σ follows from x₀ = (x_t − σ ε) / α); of NFSD
(arXiv:2310.17590) the negative prompt and the timestep below which it is not used, from memory. Images are not
augmented before the discriminator. Not here: LADD, whose features are those of the teacher.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int, Key

from sdxl_jax import sharding
from sdxl_jax.arrays import Batch, Image, Params, flatten, normalise
from sdxl_jax.conditioning import text
from sdxl_jax.diffusion.loss import at
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.evaluation import weights
from sdxl_jax.model import Model, ModelConfig, autoencoder
from sdxl_jax.models import vae
from sdxl_jax.models.dinov2 import DinoV2Config
from sdxl_jax.models.discriminator_heads import FeatureHeads
from sdxl_jax.models.image_features import DINOV2_LAYERS, DinoV2Features, FeatureNetwork, Features, VggFeatures
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults, Spacing
from sdxl_jax.samplers.steps import timesteps
from sdxl_jax.training.initial import placed_network
from sdxl_jax.training.objectives.distillation import losses
from sdxl_jax.training.objectives.distillation.critic import (
    Critic,
    CriticConfig,
    CriticDistillation,
    CriticDistillationConfig,
)
from sdxl_jax.training.objectives.distillation.teacher import (
    Examples,
    denoised_by,
    noised,
    normal,
    split,
)
from sdxl_jax.training.state import TrainState
from sdxl_jax.training.step import Metrics
from sdxl_jax.weights.dinov2 import DinoV2Weights, open_dinov2
from sdxl_jax.weights.lazy import InMemory

Array = jax.Array

FEATURES = "image_features"
"""Where the frozen parameters have those of the network whose features are judged."""
DISCRIMINATOR = "discriminator"
"""Key of the heads among the critic's parameters."""
_VGG_FILE = "lpips_vgg"
_NFSD_CLEAN = 200
"""Timesteps below this are without the negative prompt."""


class DistillationWeighting(enum.Enum):
    """How the distance to the teacher's image is weighted at timestep t, c(t)."""

    EXPONENTIAL = "exponential"
    """By α_t: noisier timesteps count less."""
    SDS = "sds"
    """As in score distillation sampling: by α_t σ_t / 2."""
    NFSD = "nfsd"
    """Noise-free score distillation: as SDS, without the noise that the teacher does not remove."""


class DiscriminatorCondition(enum.Enum):
    """What the heads are conditioned on."""

    NONE = "none"
    TEXT = "text"
    """The pooled text."""
    IMAGE = "image"
    """The embedding, by the network of the features, of the image that the student's input was made from."""
    BOTH = "both"

    @property
    def has_text(self) -> bool:
        return self in (DiscriminatorCondition.TEXT, DiscriminatorCondition.BOTH)

    @property
    def has_image(self) -> bool:
        return self in (DiscriminatorCondition.IMAGE, DiscriminatorCondition.BOTH)


@dataclass(frozen=True, kw_only=True)
class FeatureDiscriminatorConfig:
    """The discriminator: heads on features of a frozen network."""

    dinov2: DinoV2Config | None = None
    """The DINOv2 whose features are judged; None: VGG16, whose weights come with `sdxl-jax evaluate --fetch-weights`.
    """
    weights: str | None = None
    """DINOv2's weights, as transformers saves them: a directory with config.json and model.safetensors."""
    layers: tuple[int, ...] = DINOV2_LAYERS
    """Numbers of DINOv2's layers after which its states are judged, 0 for those before the first. Of VGG16 it is always
    the five that LPIPS compares."""
    condition: DiscriminatorCondition = DiscriminatorCondition.BOTH
    """What the heads are conditioned on."""
    r1_weight: float = 1e-5
    """Weight of the penalty on the heads' gradient at features of real images. Higher: smoother heads."""

    @property
    def network(self) -> FeatureNetwork:
        """The network whose features are judged."""
        return VggFeatures() if self.dinov2 is None else DinoV2Features(self.dinov2, self.layers)

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for settings that have no effect."""
        check_ranges([("discriminator.r1_weight", self.r1_weight, 0, np.inf)], below_high=True)
        network = self.network
        if isinstance(network, DinoV2Features):
            network.check()
            if self.weights is None:
                raise InputError(
                    "discriminator.dinov2 needs discriminator.weights, the directory of its weights. Give it, or set "
                    "discriminator.dinov2=None for VGG16"
                )
        elif self.weights is not None or self.layers != DINOV2_LAYERS:
            name = "layers" if self.weights is None else "weights"
            raise InputError(
                f"discriminator.{name}={getattr(self, name)} has no effect on VGG16. Leave it out, or set "
                "discriminator.dinov2"
            )

    def opened(self) -> DinoV2Weights | None:
        """DINOv2's weights, not read yet; None for VGG16. Raises InputError for weights that are missing, or those of
        another network."""
        if self.dinov2 is None:
            weights.check(_VGG_FILE)
            return None
        assert self.weights is not None
        try:
            found = open_dinov2(self.weights)
        except InputError as error:
            raise InputError(f"discriminator.weights={self.weights}: {error}") from error
        if found.config != self.dinov2:
            raise InputError(
                f"discriminator.weights={self.weights} holds {found.config}, but discriminator.dinov2 is "
                f"{self.dinov2}. Set it to the file's"
            )
        return found


def _critic() -> CriticConfig:
    return CriticConfig(optimiser=OptimiserConfig(learning_rate=1e-4, warmup_steps=0))


@dataclass(frozen=True)
class AdversarialDiffusionConfig(CriticDistillationConfig):
    """Everything that adversarial diffusion distillation depends on
    (training/objectives/distillation/adversarial_diffusion.py)."""

    OF_STUDENT: ClassVar[tuple[str, ...]] = ("distillation", "deception")
    OF_CRITIC: ClassVar[tuple[str, ...]] = ("discrimination", "r1", "logits_real", "logits_fake")

    critic: CriticConfig = field(default_factory=_critic)
    """The heads' training."""
    discriminator: FeatureDiscriminatorConfig = field(default_factory=FeatureDiscriminatorConfig)
    """The discriminator."""
    steps: int = 4
    """Steps of the student, 1 to 4. Its nodes are trailing timesteps: 999, 749, 499 and 249 of four."""
    distillation_weight: float = 2.5
    """Weight of the distance to the teacher's image beside the adversarial term. Higher: closer to the teacher, less
    sharp."""
    weighting: DistillationWeighting = DistillationWeighting.EXPONENTIAL
    """How that distance is weighted at each timestep."""
    negative_prompt: str = (
        "unrealistic, blurry, low quality, out of focus, ugly, low contrast, dull, dark, low-resolution, gloomy"
    )
    """Prompt of NFSD for what the teacher takes to be noise."""

    @property
    def student(self) -> ModelConfig:
        sampling = self.model.sampling or SamplingDefaults()
        return self.as_student(replace(sampling, preset=presets.ADVERSARIAL, steps=self.steps, guidance=None))

    @property
    def nodes(self) -> tuple[int, ...]:
        """The timesteps that the student is sampled at, from the noisiest."""
        return tuple(map(int, timesteps(self.steps, self.model.schedule.timesteps, Spacing.TRAILING)))

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text; 0: there is none."""
        return self.model.text[-1].clip.projection_dim or 0 if self.model.text else 0

    @property
    def heads(self) -> FeatureHeads:
        """The discriminator's networks that are trained."""
        network, condition = self.discriminator.network, self.discriminator.condition
        width = self.pooled_dim * condition.has_text + network.embedding_dim * condition.has_image
        return FeatureHeads(network.channels, network.axes, width)

    def check(self) -> None:
        preset = presets.find(presets.ADVERSARIAL)
        if self.steps not in preset.steps:
            raise InputError(f"steps={self.steps}. Give {presets.listed(preset.steps)}")
        super().check()
        self.discriminator.check()
        check_ranges([("distillation_weight", self.distillation_weight, 0, np.inf)], below_high=True)
        if self.model.schedule.zero_terminal_snr:
            raise InputError(
                "model.schedule.zero_terminal_snr=True: the student is sampled with euler_ancestral, which has no step "
                "from noise alone. Give a teacher with another schedule; the student begins at noise alone with any"
            )
        if self.data.cache is not None:
            raise InputError(
                f"data.cache={self.data.cache} holds no images, which the discriminator judges. Leave it out (None)"
            )
        if self.discriminator.condition.has_text and not self.pooled_dim:
            raise InputError(
                f"discriminator.condition={self.discriminator.condition.value}, but this model has no pooled text. Set "
                "it to image or none"
            )
        if self.weighting is DistillationWeighting.NFSD and self.teacher.guidance is None:
            raise InputError("weighting=nfsd needs the teacher's guidance. Give teacher.guidance, e.g. 7.5 7.5")
        smallest = self.discriminator.network.smallest
        if small := [bucket for bucket in self.data.buckets if min(bucket) < smallest]:
            raise InputError(
                f"data.buckets has {small[0][0]}×{small[0][1]}; the discriminator's features need {smallest} pixels or "
                "more. Use larger buckets"
            )


class AdversarialDiffusion(CriticDistillation[AdversarialDiffusionConfig]):
    """A student of a few steps, a teacher, and a discriminator on features of images."""

    name = "adversarial diffusion distillation"

    def check_start(self) -> None:
        super().check_start()
        self.config.discriminator.opened()

    # The critic, and the frozen network

    @property
    def critic_networks(self) -> Params:
        return {DISCRIMINATOR: self.config.heads.abstract()}

    @property
    def critic_carried(self) -> Params:
        return {DISCRIMINATOR: self.config.heads.carried()}

    def abstract_state(self, mesh: Mesh | AbstractMesh) -> tuple[TrainState, Params]:
        state, frozen = super().abstract_state(mesh)
        return state, frozen | sharding.placed(mesh, {FEATURES: self.config.discriminator.network.abstract()})

    def fresh_state(
        self, mesh: Mesh, abstract: TrainState, initial: dict[str, Float[Array, "..."]], progress: bool = True
    ) -> tuple[TrainState, Params]:
        state, frozen = super().fresh_state(mesh, abstract, initial, progress)
        found = self.config.discriminator.opened()
        params = weights.load(_VGG_FILE)["backbone"] if found is None else found.load()
        leaves = {path: InMemory(value) for path, value in flatten(params).items()}
        return state, {**frozen, FEATURES: placed_network(FEATURES, leaves, mesh)}

    def model(self, state: TrainState, frozen: Params) -> Model:
        return super().model(state, {part: params for part, params in frozen.items() if part != FEATURES})

    # The student's images

    def inputs(
        self, latent: Float[Array, "batch height width channels"], keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch height width channels"], Int[Array, " batch"]]:
        """(x_s, s): latents of the data noised at the nodes, one per example; at the first node the noise alone."""
        node_keys, noise_keys = split(keys, 2)
        nodes = jnp.array(self.config.nodes)
        index = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(nodes)))(node_keys)
        kept = jnp.where(index == 0, 0.0, 1.0)[:, None, None, None]
        return noised(self.schedule, kept * latent, normal(noise_keys, latent.shape[1:]), nodes[index]), nodes[index]

    def _made(
        self, trained: Params, frozen: Params, examples: Examples, keys: Key[Array, " batch"], dropout_keys: Any
    ) -> Float[Array, "batch height width channels"]:
        """The student's x₀."""
        x_s, timestep = self.inputs(examples.latent, keys)
        student = self.student(trained, frozen, examples, dropout_keys=dropout_keys)
        return denoised_by(student, self.schedule, self.config.model, x_s, timestep).x0

    def _decoded(self, frozen: Params, latent: Float[Array, "batch latent_height latent_width channels"]) -> Image:
        return vae.decode(self.config.model.vae, autoencoder(frozen), latent, self.config.compute)

    def _features(self, frozen: Params, image: Image) -> Features:
        return self.config.discriminator.network(frozen[FEATURES], image)

    def _condition(self, examples: Examples, real: Features) -> Float[Array, "batch features"] | None:
        """What the heads are conditioned on. real: of the images of the data."""
        condition, parts = self.config.discriminator.condition, []
        if condition.has_text:
            parts.append(examples.prompt.pooled)
        if condition.has_image:
            parts.append(real.embedding)
        return jnp.concatenate(parts, axis=-1) if parts else None

    # Losses

    def student_loss(
        self, trained: Params, critic: Critic, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        assert batch.image is not None
        examples, heads = self.examples(frozen, batch, keys), self.config.heads
        input_keys, teacher_keys = split(examples.keys, 2)
        made = self._made(trained, frozen, examples, input_keys, keys)
        image = self._decoded(frozen, made)
        real = self._features(frozen, normalise(batch.image))
        normalised, _ = heads.normalised(critic.params[DISCRIMINATOR], critic.carried[DISCRIMINATOR])
        logits = heads.logits(normalised, self._features(frozen, image).layers, self._condition(examples, real))
        deception = losses.hinge_of_student(logits)
        distillation = self._distillation(made, image, frozen, examples, teacher_keys)
        terms = {"distillation": distillation, "deception": deception}
        return deception + self.config.distillation_weight * distillation, terms

    def _distillation(
        self,
        made: Float[Array, "batch latent_height latent_width channels"],
        image: Image,
        frozen: Params,
        examples: Examples,
        keys: Key[Array, " batch"],
    ) -> Float[Array, ""]:
        """The distance to the teacher's images. made, image: the student's latents, and what they are decoded to."""
        timestep_keys, noise_keys, scale_keys = split(keys, 3)
        fixed, stop = jax.lax.stop_gradient(made), len(self.schedule.alpha_bar)
        timestep = jax.vmap(lambda key: jax.random.randint(key, (), 0, stop))(timestep_keys)
        noise = normal(noise_keys, made.shape[1:])
        x_t = noised(self.schedule, fixed, noise, timestep)
        teacher = self.teacher(frozen, examples, self.guidance_scale(scale_keys))
        found = denoised_by(teacher, self.schedule, self.config.model, x_t, timestep)
        aim = found.x0
        if self.config.weighting is DistillationWeighting.NFSD:
            negative = denoised_by(
                self.teacher(frozen, self._negative(frozen, examples)), self.schedule, self.config.model, x_t, timestep
            )
            clean = (timestep < _NFSD_CLEAN)[:, None, None, None]
            direction = found.epsilon - jnp.where(clean, 0, negative.epsilon)
            aim = fixed - at(self.schedule.sigma_t / self.schedule.alpha, timestep) * direction
        aim = jax.lax.stop_gradient(self._decoded(frozen, aim))
        weight = at(distillation_weights(self.schedule.alpha, self.schedule.sigma_t, self.config.weighting), timestep)
        return (weight * jnp.square(image - aim)).mean()

    def _negative(self, frozen: Params, examples: Examples) -> Examples:
        """The same examples with the negative prompt."""
        assert self.tokenizer is not None
        tokens: Mapping[str, Any] = self.tokenizer([self.config.negative_prompt])
        prompt = text.encode(self.config.model.text, frozen, tokens, self.config.compute, None)
        return examples._replace(
            prompt=jax.tree.map(lambda row, like: jnp.broadcast_to(row, like.shape), prompt, examples.prompt)
        )

    def critic_loss(
        self, params: Params, carried: Params, trained: Params, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], tuple[Params, Metrics]]:
        assert batch.image is not None
        config, heads, examples = self.config.discriminator, self.config.heads, self.examples(frozen, batch, keys)
        input_keys, _ = split(examples.keys, 2)
        made = self._made(jax.lax.stop_gradient(trained), frozen, examples, input_keys, keys)
        fake = self._features(frozen, self._decoded(frozen, made)).layers
        real = self._features(frozen, normalise(batch.image))
        condition = self._condition(examples, real)
        normalised, after = heads.normalised(params[DISCRIMINATOR], carried[DISCRIMINATOR])
        of_real, of_fake = (heads.logits(normalised, each, condition) for each in (real.layers, fake))
        discrimination, penalty = losses.hinge(of_real, of_fake), jnp.zeros(())
        if config.r1_weight:
            penalty = losses.r1(lambda features: heads.logits(normalised, features, condition), real.layers)
        means = {
            name: jnp.stack([each.mean() for each in logits]).mean()
            for name, logits in (("logits_real", of_real), ("logits_fake", of_fake))
        }
        terms = {"discrimination": discrimination, "r1": penalty, **means}
        return discrimination + config.r1_weight * penalty, ({DISCRIMINATOR: after}, terms)


def distillation_weights(
    alpha: Float[np.ndarray, " timesteps"], sigma_t: Float[np.ndarray, " timesteps"], weighting: DistillationWeighting
) -> Float[np.ndarray, " timesteps"]:
    """c(t)."""
    return alpha if weighting is DistillationWeighting.EXPONENTIAL else alpha * sigma_t / 2
