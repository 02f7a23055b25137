"""Guidance distillation: one evaluation of the student is the teacher's two of classifier-free guidance.

    E λ(t) ‖ student(x_t, t, c, w) − [(1 + w) teacher(x_t, t, c) − w teacher(x_t, t, ∅)] ‖²,   w uniform

Stage 1 of Meng et al., arXiv:2210.03142, section 3.1. The scale enters by an embedding that begins at zero, so that the
student begins as the teacher without guidance. Noise levels, their weights and the noise are those of `config.loss`, as
in denoising; the paper's weight, the larger of SNR and 1 for an error in x₀, is not among them. Sampling has as many
steps as before, at half the cost.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Key

from sdxl_jax.arrays import Batch, Params
from sdxl_jax.diffusion import loss
from sdxl_jax.errors import InputError
from sdxl_jax.model import ModelConfig
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.sampling.options import GUIDANCE
from sdxl_jax.training.objectives.distillation.teacher import (
    Distillation,
    DistillationConfig,
    check_guidance_dim,
    fitting,
    split,
)
from sdxl_jax.training.step import Metrics


@dataclass(frozen=True)
class GuidanceDistillationConfig(DistillationConfig):
    """Everything that guidance distillation depends on (training/objectives/distillation/guidance.py)."""

    has_loss_config: ClassVar[bool] = True

    guidance_dim: int = 256
    """Width of the sinusoid of the guidance scale, the student's input: an even number, 4 or more."""

    @property
    def student(self) -> ModelConfig:
        before = self.model.sampling or SamplingDefaults()
        # Named: a UNet with this input and no sampler is taken for a consistency model.
        sampler = before.sampler_of(self.model.schedule.zero_terminal_snr, distilled=False)
        sampling = replace(before, sampler=sampler, guidance=fitting(GUIDANCE, self.teacher.guidance))
        return self.as_student(sampling, unet=replace(self.model.unet, guidance_dim=self.guidance_dim))

    def check(self) -> None:
        super().check()
        if self.model.unet.guidance_dim is not None or self.model.distilled:
            raise InputError(
                "model is a teacher with guidance in its weights already (model.unet.guidance_dim, model.distilled). "
                "Give one that is guided by two evaluations"
            )
        if self.teacher.guidance is None:
            raise InputError("teacher.guidance=None leaves no guidance to distil. Give a range of scales, e.g. 1 15")
        check_guidance_dim(self, self.guidance_dim)


class GuidanceDistillation(Distillation[GuidanceDistillationConfig]):
    """A latent diffusion model with guidance as an input."""

    name = "guidance distillation"

    def loss(
        self, trained: Params, frozen: Params, batch: Batch, keys: Key[jax.Array, " batch"]
    ) -> tuple[Float[jax.Array, ""], Metrics]:
        examples = self.examples(frozen, batch, keys)
        scale_keys, noise_keys = split(examples.keys, 2)
        scale = self.guidance_scale(scale_keys)
        guided = loss.BaseTarget(self.teacher(frozen, examples, scale), jnp.ones(len(examples.keys), jnp.bool_))
        value = loss.diffusion_loss(
            self.student(trained, frozen, examples, scale),
            examples.latent,
            noise_keys,
            self.schedule,
            self.config.model.prediction,
            self.config.loss,
            base=guided,
        )
        return value, {}
