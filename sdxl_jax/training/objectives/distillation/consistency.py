"""Consistency distillation: latent consistency models (LCM), and adapters that make one of a model (LCM-LoRA).

    x_t ──┬── f(x_t, t) ───────────────────────────────────────────── distance, gradient
          └── teacher, guided ── one step of DDIM ── x_s ── f⁻(x_s, s) ──┘

The consistency function f(x_t, t) = c_skip x_t + c_out x̂₀ leads from any level of a trajectory to its end, f(x, 0) = x.
t is one of the 50 timesteps that the sampler `lcm` visits, s the next one, with the teacher's guidance between them. f⁻
is the average of the student's parameters, or the student itself, without gradient. The distance is pseudo-Huber's,
√(d² + c²) − c.

Luo et al., arXiv:2310.04378, algorithm 1, and arXiv:2311.05556; numbers of diffusers' scripts for SDXL. There the scale
is not given to the student of SDXL; here it is, as in the paper, where `guidance_dim` is set.
"""

import enum
import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.diffusion.loss import Network, at
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.model import ModelConfig
from sdxl_jax.optim.ema import EmaKind
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.steps import consistency_scales, consistency_timesteps
from sdxl_jax.training.objectives.distillation.teacher import (
    Distillation,
    DistillationConfig,
    check_guidance_dim,
    denoised_by,
    fitting,
    noised,
    normal,
    split,
)
from sdxl_jax.training.state import TrainState
from sdxl_jax.training.step import Metrics, Step

Array = jax.Array

AVERAGE = "average"
"""Key of the student's average, which a step adds to the frozen parameters."""


class ConsistencyTarget(enum.Enum):
    """Which parameters the target is computed with, without gradient."""

    AVERAGE = "average"
    """The average (`ema`): LCM."""
    STUDENT = "student"
    """The student's own: LCM-LoRA."""


@dataclass(frozen=True)
class ConsistencyConfig(DistillationConfig):
    """Everything that consistency distillation depends on (training/objectives/distillation/consistency.py)."""

    guidance_dim: int | None = 256
    """Width of the sinusoid of the guidance scale, where that is an input of the student: an even number, 4 or more.
    None: it is not; the student has the guidance of `teacher.guidance` in its weights. An adapter cannot have it."""
    target: ConsistencyTarget = ConsistencyTarget.AVERAGE
    """Which parameters the target is computed with."""
    huber_c: float = 0.001
    """c of the pseudo-Huber distance. Higher: closer to the squared error, below it to the absolute one."""

    @property
    def student(self) -> ModelConfig:
        preset = presets.CONSISTENCY if self.adapter is None else presets.CONSISTENCY_LORA
        guidance = None
        if self.guidance_dim is not None:
            preset = presets.CONSISTENCY
            guidance = fitting(presets.find(preset).input_guidance or math.inf, self.teacher.guidance)
        sampling = replace(self.model.sampling or SamplingDefaults(), preset=preset, steps=None, guidance=guidance)
        unet = replace(self.model.unet, guidance_dim=self.guidance_dim)
        return self.as_student(sampling, unet=unet, distilled=True)

    def check(self) -> None:
        super().check()
        check_ranges([("huber_c", self.huber_c, 0, math.inf)], above_low=True, below_high=True)
        if self.model.schedule.timesteps % len(consistency_timesteps(self.model.schedule.timesteps)):
            raise InputError(
                f"model.schedule.timesteps={self.model.schedule.timesteps} is not a multiple of 50, the number of "
                "timesteps of consistency distillation. Give a teacher with e.g. 1000"
            )
        has_average = self.ema.kind is not EmaKind.NONE
        if self.target is ConsistencyTarget.AVERAGE and not has_average:
            raise InputError(
                "target=average needs an average, and ema.kind=none. Set target=student, or ema.kind=constant"
            )
        check_guidance_dim(self, self.guidance_dim)


class Consistency(Distillation[ConsistencyConfig]):
    """A latent consistency model."""

    name = "consistency distillation"

    def step(self) -> Step:
        one = super().step()
        if self.config.target is ConsistencyTarget.STUDENT:
            return one

        def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
            return one(state, {**frozen, AVERAGE: state.ema}, batch)

        return step

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        examples = self.examples(frozen, batch, keys)
        index_keys, noise_keys, scale_keys = split(examples.keys, 3)
        nodes = consistency_timesteps(len(self.schedule.alpha_bar))
        index = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(nodes)))(index_keys)
        scale, noise = self.guidance_scale(scale_keys), normal(noise_keys, examples.latent.shape[1:])
        online = self.student(trained, frozen, examples, scale, keys)
        of_target = frozen[AVERAGE] if self.config.target is ConsistencyTarget.AVERAGE else trained
        target = self.student(jax.lax.stop_gradient(of_target), frozen, examples, scale)
        return self.distance(online, target, self.teacher(frozen, examples, scale), examples.latent, noise, index), {}

    def distance(
        self,
        online: Network,
        target: Network,
        teacher: Network,
        latent: Float[Array, "batch height width channels"],
        noise: Float[Array, "batch height width channels"],
        index: Int[Array, " batch"],
    ) -> Float[Array, ""]:
        """The loss. teacher: guided. index: of the trajectory's nodes, from the least noisy one, 0."""
        nodes = jnp.asarray(consistency_timesteps(len(self.schedule.alpha_bar)))
        timestep = nodes[index]
        after = jnp.where(index > 0, nodes[index - 1], 0)
        x_t = noised(self.schedule, latent, noise, timestep)
        x0, epsilon = denoised_by(teacher, self.schedule, self.config.model, x_t, timestep)
        x_s = jax.lax.stop_gradient(noised(self.schedule, x0, epsilon, after))
        aim = jax.lax.stop_gradient(self.function(target, x_s, after))
        c = self.config.huber_c
        return jnp.mean(jnp.sqrt((self.function(online, x_t, timestep) - aim) ** 2 + c**2) - c)

    def function(
        self, network: Network, x_t: Float[Array, "batch height width channels"], timestep: Int[Array, " batch"]
    ) -> Float[Array, "batch height width channels"]:
        """f(x_t, t), in the latents' units."""
        skip, out = consistency_scales(np.arange(len(self.schedule.alpha_bar), dtype=np.float64))
        x0 = denoised_by(network, self.schedule, self.config.model, x_t, timestep).x0
        return at(skip, timestep) * x_t + at(out, timestep) * x0
