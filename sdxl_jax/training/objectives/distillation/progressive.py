"""Progressive distillation: one step of the student is two of the teacher's; each round halves the number of steps.

    x_t ── teacher, DDIM ── x_t' ── teacher, DDIM ── x_t''
    x̃ = (x_t'' − (σ''/σ) x_t) / (α'' − (σ''/σ) α)         the x₀ with which one step of DDIM leads to x_t''
    E max(α²/σ², 1) ‖ x̂₀(x_t, t) − x̃ ‖²

Salimans & Ho, arXiv:2202.00512, algorithm 2, and its weight "truncated SNR" (section 4); with guidance in the first
round, or as an input in all of them, stage 2 of Meng et al., arXiv:2210.03142. The timesteps are trailing ones: of N
steps 1000/N − 1, …, 999, and after the least noisy one the finished image. A round is a run: `training.init_from` is
the run before, which is teacher and first student.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.diffusion.loss import Network, at
from sdxl_jax.diffusion.schedule import Schedule
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults, Spacing
from sdxl_jax.samplers.steps import timesteps
from sdxl_jax.sampling.options import GUIDANCE
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
from sdxl_jax.training.step import Metrics

Array = jax.Array


@dataclass(frozen=True)
class ProgressiveConfig(DistillationConfig):
    """Everything that a round of progressive distillation depends on
    (training/objectives/distillation/progressive.py)."""

    steps: int = 64
    """Steps of the student, a power of two; the teacher's are twice as many. Lower: faster sampling, a harder round."""
    guidance_dim: int | None = 256
    """Width of the sinusoid of the guidance scale, where that is an input of the student: an even number, 4 or more.
    None: it is not; the student has the guidance of `teacher.guidance` in its weights."""

    @property
    def student(self) -> ModelConfig:
        before = self.model.sampling or SamplingDefaults()
        sampling = replace(
            before,
            sampler="ddim",
            spacing=Spacing.TRAILING,
            set_alpha_to_one=True,
            preset=presets.PROGRESSIVE,
            steps=self.steps,
            guidance=None if self.guidance_dim is None else fitting(GUIDANCE, self.teacher.guidance),
        )
        return self.as_student(sampling, unet=replace(self.model.unet, guidance_dim=self.guidance_dim))

    def check(self) -> None:
        super().check()
        known = presets.find(presets.PROGRESSIVE).steps
        if self.steps not in known or 2 * self.steps > self.model.schedule.timesteps:
            most = max(each for each in known if 2 * each <= self.model.schedule.timesteps)
            raise InputError(f"steps={self.steps} is not a power of two from 1 to {most}. Give e.g. 4")
        if self.model.distilled:
            raise InputError(
                "model.distilled=True: a consistency model has no trajectory that steps of DDIM follow. Give another "
                "teacher"
            )
        check_guidance_dim(self, self.guidance_dim)


class Progressive(Distillation[ProgressiveConfig]):
    """A latent diffusion model of few steps of DDIM."""

    name = "progressive distillation"

    def check_teacher(self, teacher: ModelConfig) -> None:
        super().check_teacher(teacher)
        steps, taught = self.config.steps, None if teacher.sampling is None else teacher.sampling.steps
        if taught not in (None, 2 * steps):
            raise InputError(
                f"steps={steps}, but the teacher was distilled for {taught} steps. Set steps to {taught // 2}"
                if taught > 1
                else "The teacher was distilled for one step, which cannot be halved. Give another teacher"
            )

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        examples = self.examples(frozen, batch, keys)
        index_keys, noise_keys, scale_keys = split(examples.keys, 3)
        index = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.config.steps))(index_keys)
        scale, noise = self.guidance_scale(scale_keys), normal(noise_keys, examples.latent.shape[1:])
        student = self.student(trained, frozen, examples, scale, keys)
        return self.distance(student, self.teacher(frozen, examples, scale), examples.latent, noise, index), {}

    def distance(
        self,
        student: Network,
        teacher: Network,
        latent: Float[Array, "batch height width channels"],
        noise: Float[Array, "batch height width channels"],
        index: Int[Array, " batch"],
    ) -> Float[Array, ""]:
        """The loss. teacher: guided. index: of the student's steps, from the one at the least noise, 0."""
        nodes = jnp.asarray(_nodes(2 * self.config.steps, len(self.schedule.alpha_bar)))
        # As numbers of a schedule with the finished image before its first timestep.
        padded = Schedule(np.concatenate([[1.0], self.schedule.alpha_bar]))
        start, middle, end = (nodes[2 * index + offset] for offset in (2, 1, 0))
        x_t = noised(padded, latent, noise, start)
        x = x_t
        for timestep, after in ((start, middle), (middle, end)):
            x = noised(padded, *denoised_by(teacher, self.schedule, self.config.model, x, timestep - 1), after)
        ratio = at(padded.sigma_t, end) / at(padded.sigma_t, start)
        aim = (x - ratio * x_t) / (at(padded.alpha, end) - ratio * at(padded.alpha, start))
        x0 = denoised_by(student, self.schedule, self.config.model, x_t, start - 1).x0
        weight = jnp.maximum(at(self.schedule.snr, start - 1), 1.0)
        return jnp.mean(weight * (x0 - jax.lax.stop_gradient(aim)) ** 2)


def _nodes(steps: int, length: int) -> Int[np.ndarray, " nodes"]:
    """The levels of so many steps, from the finished image, 0, to the noisiest: timesteps plus 1."""
    visited = timesteps(steps, length, Spacing.TRAILING)[::-1].astype(int)
    return np.append(0, visited + 1)
