"""Guidance against the arithmetic of diffusers' pipelines: classifier-free, perturbed-attention, rescaled.

Tolerance: a handful of float32 operations in another order, 6e-8 each; the deviation is a sum of sixty squares.
"""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree
from reference import to_torch, torch

from sdxl_jax.samplers.guidance import Outputs, combine, rescale

TOLERANCE = 1e-6

PAGMixin = pytest.importorskip("diffusers.pipelines.pag.pag_utils").PAGMixin
theirs = pytest.importorskip("diffusers.pipelines.pag.pipeline_pag_sd_xl")


def outputs(count: int) -> list[np.ndarray]:
    """Of unlike deviations, from row to row too, and not centred."""
    rng = np.random.default_rng(0)
    sizes = np.array([1.0, 0.3], np.float32).reshape(2, 1, 1, 1)
    return [rng.standard_normal((2, 3, 5, 4), np.float32) * sizes * (n + 1) + n for n in range(count)]


@pytest.mark.parametrize("guidance", [None, 5.0])
@pytest.mark.parametrize("pag", [0.0, 3.0])
def test_perturbed_attention_guidance_is_diffusers(guidance: float | None, pag: float, agree: Agree) -> None:
    guided = guidance is not None
    rows = outputs(3 if guided else 2)
    pipeline = SimpleNamespace(_get_pag_scale=lambda timestep: pag)
    expected = PAGMixin._apply_perturbed_attention_guidance(
        pipeline, torch.cat([to_torch(row) for row in rows]), guided, guidance, 500
    )
    *negative, positive, perturbed = map(jnp.asarray, rows)
    ours = combine(
        Outputs(positive, negative[0] if guided else None, perturbed),
        jnp.float32(guidance) if guided else None,
        jnp.float32(pag),
    )
    what = f"guidance {guidance or 'none'}, perturbed-attention guidance {pag:g}"
    agree(what, ours, expected.permute(0, 2, 3, 1).numpy(), TOLERANCE)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_is_diffusers(phi: float, agree: Agree) -> None:
    guided, positive = outputs(2)
    expected = theirs.rescale_noise_cfg(to_torch(guided), to_torch(positive), phi)
    ours = rescale(jnp.asarray(guided), jnp.asarray(positive), jnp.float32(phi))
    agree(f"guidance rescaled by {phi:g}", ours, expected.permute(0, 2, 3, 1).numpy(), TOLERANCE)


def test_all_terms_together_are_diffusers(agree: Agree) -> None:
    """In the order of `StableDiffusionXLPAGPipeline.__call__`: both kinds of guidance, then the rescaling."""
    rows = outputs(3)
    pipeline = SimpleNamespace(_get_pag_scale=lambda timestep: 3.0)
    guided, text = PAGMixin._apply_perturbed_attention_guidance(
        pipeline, torch.cat([to_torch(row) for row in rows]), True, 7.5, 500, True
    )
    expected = theirs.rescale_noise_cfg(guided, text, 0.7)
    negative, positive, perturbed = map(jnp.asarray, rows)
    ours = combine(Outputs(positive, negative, perturbed), jnp.float32(7.5), jnp.float32(3), jnp.float32(0.7))
    agree("guidance of all kinds", ours, expected.permute(0, 2, 3, 1).numpy(), TOLERANCE)
