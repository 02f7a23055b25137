"""Distribution matching distillation (DMD2): the student's images get the density that the teacher's have.

    noise ── student, k times, without gradient ── x_τ ── student ── y ──┬── noised ── teacher, guided ─┐
                                                                         │          └─ fake score ──────┴─ difference
                                                                         └── noised ── middle of the fake score ── head

τ is one of the nodes at which the student is sampled, the same for all images of a (micro-)batch, and k the nodes
before it: the student is trained on inputs of its own making ("backward simulation"). The fake score is a copy of the
teacher that learns to denoise the student's images; the difference of the two denoised images is the gradient of
KL(student ‖ teacher) (`losses.matching_gradient`). A head on the fake score's middle tells images of the data from the
student's, at all noise levels, and trains the fake score too.

Yin et al., arXiv:2405.14867, sections 4.2 to 4.5; the numbers are those of its code for four steps of SDXL. Captions
and images are those of the data; there the captions that the student is trained with are a set of their own. The fake
score is trained as the student is: in full, or as an adapter of the same kind beside the same base. Not here: the
regression on pairs of noise and image with which the published one-step student begins.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.diffusion.loss import Network, at
from sdxl_jax.diffusion.parameterisation import target
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.model import ModelConfig
from sdxl_jax.models.discriminator_heads import MiddleHead
from sdxl_jax.optim.optimiser import OptimiserConfig
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.training.objectives.distillation import losses
from sdxl_jax.training.objectives.distillation.critic import (
    Critic,
    CriticConfig,
    CriticDistillation,
    CriticDistillationConfig,
)
from sdxl_jax.training.objectives.distillation.teacher import (
    Examples,
    TeacherConfig,
    denoised_by,
    noised,
    normal,
    split,
)
from sdxl_jax.training.step import Metrics

Array = jax.Array

HEAD = "head"
"""Key of the head among the critic's parameters, beside those of the fake score."""
_NODE = 1
"""Folded into the key of a (micro-)batch's first example, for the node of all its examples."""


@dataclass(frozen=True, kw_only=True)
class MiddleHeadConfig:
    """The head on the fake score's middle, which tells images of the data from the student's."""

    layers: int = 3
    """Convolutions of stride 2 before the last one, of 4×4: the middle of the smallest bucket needs 4·2^layers rows and
    columns. Higher: a logit sees more, and the head has more parameters."""
    student_weight: float = 5e-3
    """Weight of its term in the student's loss. Higher: sharper images, less of the teacher's density."""
    critic_weight: float = 1e-2
    """Weight of its loss beside the fake score's. Higher: it learns faster, and changes the fake score more."""


@dataclass(frozen=True)
class DistributionMatchingConfig(CriticDistillationConfig):
    """Everything that distribution matching distillation depends on
    (training/objectives/distillation/distribution_matching.py)."""

    OF_STUDENT: ClassVar[tuple[str, ...]] = ("matching", "deception")
    OF_CRITIC: ClassVar[tuple[str, ...]] = ("fake_score", "discrimination", "logits_real", "logits_fake")

    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(guidance=(8.0, 8.0)))
    """The frozen model that the student learns from."""
    critic: CriticConfig = field(
        default_factory=lambda: CriticConfig(updates=5, optimiser=OptimiserConfig(learning_rate=5e-7))
    )
    """The training of the fake score and its head."""
    steps: int = 4
    """Steps of the student: 1, 2, 4 or 8. Its nodes are trailing timesteps: 999, 749, 499 and 249 of four."""
    matched: tuple[float, float] = (0.02, 0.98)
    """First and last noise level, as fractions of the timesteps, at which the densities are compared."""
    head: MiddleHeadConfig | None = field(default_factory=MiddleHeadConfig)
    """The head of the discriminator; None: distribution matching alone, without images of the data in the loss."""

    @property
    def student(self) -> ModelConfig:
        sampling = self.model.sampling or SamplingDefaults()
        return self.as_student(replace(sampling, preset=presets.DISTRIBUTION_MATCHING, steps=self.steps, guidance=None))

    @property
    def nodes(self) -> tuple[int, ...]:
        """The timesteps that the student is sampled at, from the noisiest."""
        return presets.find(presets.DISTRIBUTION_MATCHING).timesteps[self.steps]

    def network_of(self, head: MiddleHeadConfig) -> MiddleHead:
        """The head's network."""
        return MiddleHead(self.model.unet.block_channels[-1], head.layers)

    def check(self) -> None:
        preset = presets.find(presets.DISTRIBUTION_MATCHING)
        if self.steps not in preset.steps:
            raise InputError(f"steps={self.steps}. Give {presets.listed(preset.steps)}")
        if self.model.schedule.timesteps <= max(self.nodes):
            raise InputError(
                f"model.schedule.timesteps={self.model.schedule.timesteps}, but the student's first node is "
                f"{max(self.nodes)}. Give a teacher with 1000 timesteps"
            )
        super().check()
        low, high = self.matched
        if not 0 <= low < high <= 1:
            raise InputError(f"matched={low:g},{high:g}. Give two fractions of 0 to 1, the lower first, e.g. 0.02 0.98")
        if self.head is not None:
            self._check_head(self.head)

    def _check_head(self, head: MiddleHeadConfig) -> None:
        check_ranges(
            [
                ("head.layers", head.layers, 0, 16),
                ("head.student_weight", head.student_weight, 0, np.inf),
                ("head.critic_weight", head.critic_weight, 0, np.inf),
            ]
        )
        needed = self.network_of(head).smallest
        for bucket in self.data.buckets:
            # As convolutions of stride 2 leave them.
            side = min(bucket) // self.model.vae.downsampling
            for _ in self.model.unet.block_channels[1:]:
                side = -(-side // 2)
            if side < needed:
                raise InputError(
                    f"data.buckets has {bucket[0]}×{bucket[1]}, of which {side} rows or columns reach the UNet's "
                    f"middle; head.layers={head.layers} needs {needed}. Lower it, or use larger buckets"
                )


class DistributionMatching(CriticDistillation[DistributionMatchingConfig]):
    """A student of a few steps, a fake score, and a head."""

    name = "distribution matching distillation"

    def __init__(self, config: DistributionMatchingConfig):
        super().__init__(config)
        self.critic_optimiser = self.beside_adapter(self.critic_optimiser)

    # The critic

    @property
    def critic_networks(self) -> Params:
        head = self.config.head
        return {} if head is None else {HEAD: self.config.network_of(head).abstract()}

    def critic_params(self, trained: Params, networks: Params) -> Params:
        """The fake score begins as the student does, at the teacher's weights."""
        return {**jax.tree.map(jnp.copy, trained), **networks}

    # The student's images

    def inputs(
        self, trained: Params, frozen: Params, examples: Examples, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, "batch height width channels"], Int[Array, " batch"]]:
        """(x_τ, τ) as the student is sampled: at the first node noise alone; at a later one what it made at those
        before, noised again. No gradient goes through it."""
        nodes, shape = jnp.array(self.config.nodes), examples.latent.shape
        index = jax.random.randint(jax.random.fold_in(keys[0], _NODE), (), 0, len(nodes))
        student = self.student(jax.lax.stop_gradient(trained), frozen, examples)

        def noise(number: Int[Array, ""]) -> Float[Array, "batch height width channels"]:
            return normal(jax.vmap(lambda key: jax.random.fold_in(key, number))(keys), shape[1:])

        def sampled(
            number: Int[Array, ""], x_t: Float[Array, "batch height width channels"]
        ) -> Float[Array, "batch height width channels"]:
            now, after = (jnp.full(shape[0], nodes[each]) for each in (number, number + 1))
            x0 = denoised_by(student, self.schedule, self.config.model, x_t, now).x0
            return noised(self.schedule, x0, noise(number + 1), after)

        x_t = jax.lax.fori_loop(0, index, sampled, noise(jnp.int32(0)))
        return jax.lax.stop_gradient(x_t), jnp.full(shape[0], nodes[index])

    # Losses

    def student_loss(
        self, trained: Params, critic: Critic, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        examples = self.examples(frozen, batch, keys)
        input_keys, matching_keys, _, fake_keys, _ = split(examples.keys, 5)
        x_t, timestep = self.inputs(trained, frozen, examples, input_keys)
        student = self.student(trained, frozen, examples, dropout_keys=keys)
        made = denoised_by(student, self.schedule, self.config.model, x_t, timestep).x0
        matching = self._matching(made, critic.params, frozen, examples, matching_keys)
        deception, weight = jnp.zeros(()), 0.0
        if (head := self.config.head) is not None:
            logits = self._logits(critic.params, frozen, examples, made, fake_keys)
            deception, weight = losses.softplus_of_student(logits), head.student_weight
        return matching + weight * deception, {"matching": matching, "deception": deception}

    def _matching(
        self,
        made: Float[Array, "batch height width channels"],
        critic: Params,
        frozen: Params,
        examples: Examples,
        keys: Key[Array, " batch"],
    ) -> Float[Array, ""]:
        timestep_keys, noise_keys, scale_keys = split(keys, 3)
        first, last = (int(each * len(self.schedule.alpha_bar)) for each in self.config.matched)
        timestep = _timesteps(timestep_keys, first, min(last + 1, len(self.schedule.alpha_bar)))
        x_t = noised(self.schedule, jax.lax.stop_gradient(made), normal(noise_keys, made.shape[1:]), timestep)
        networks = (
            self.teacher(frozen, examples, self.guidance_scale(scale_keys)),
            self.student(critic, frozen, examples),
        )
        real, fake = (denoised_by(network, self.schedule, self.config.model, x_t, timestep).x0 for network in networks)
        return losses.distribution_matching(made, real, fake)

    def critic_loss(
        self, params: Params, carried: Params, trained: Params, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], tuple[Params, Metrics]]:
        examples = self.examples(frozen, batch, keys)
        input_keys, _, denoising_keys, fake_keys, real_keys = split(examples.keys, 5)
        x_t, timestep = self.inputs(trained, frozen, examples, input_keys)
        student = self.student(jax.lax.stop_gradient(trained), frozen, examples)
        made = denoised_by(student, self.schedule, self.config.model, x_t, timestep).x0
        value = self._denoising(made, self.student(params, frozen, examples, dropout_keys=keys), denoising_keys)
        terms = {"fake_score": value, **dict.fromkeys(self.config.OF_CRITIC[1:], jnp.zeros(()))}
        if (head := self.config.head) is not None:
            fake = self._logits(params, frozen, examples, made, fake_keys)
            real = self._logits(params, frozen, examples, examples.latent, real_keys)
            discrimination = losses.softplus(real, fake)
            value = value + head.critic_weight * discrimination
            terms |= {"discrimination": discrimination, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return value, (carried, terms)

    def _denoising(
        self,
        made: Float[Array, "batch height width channels"],
        score: Network,
        keys: Key[Array, " batch"],
    ) -> Float[Array, ""]:
        """The loss of the fake score: that of any denoising, on the student's images."""
        timestep_keys, noise_keys = split(keys, 2)
        timestep = _timesteps(timestep_keys, 0, len(self.schedule.alpha_bar))
        noise = normal(noise_keys, made.shape[1:])
        levels = at(self.schedule.alpha, timestep), at(self.schedule.sigma_t, timestep)
        aim = target(self.config.model.prediction, made, noise, *levels)
        return jnp.square(score(noised(self.schedule, made, noise, timestep), timestep) - aim).mean()

    def _logits(
        self,
        critic: Params,
        frozen: Params,
        examples: Examples,
        latent: Float[Array, "batch height width channels"],
        keys: Key[Array, " batch"],
    ) -> Float[Array, "batch logits"]:
        """What the head makes of latents, noised to any level."""
        assert self.config.head is not None
        timestep_keys, noise_keys = split(keys, 2)
        timestep = _timesteps(timestep_keys, 0, len(self.schedule.alpha_bar))
        x_t = noised(self.schedule, latent, normal(noise_keys, latent.shape[1:]), timestep)
        features = self.student(critic, frozen, examples, ends_in_middle=True)(x_t, timestep)
        return self.config.network_of(self.config.head).logits(critic[HEAD], features)


def _timesteps(keys: Key[Array, " batch"], first: int, stop: int) -> Int[Array, " batch"]:
    """One per example, uniformly."""
    return jax.vmap(lambda key: jax.random.randint(key, (), first, stop))(keys)
