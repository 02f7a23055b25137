"""One step of consistency distillation against diffusers' formulas: loss and gradient, with fixed noise, timesteps and
guidance scales.

Theirs is computed in float64, from the parts that diffusers has as functions: the noise schedule, the scales of the
consistency function, the embedding of the guidance scale. The steps between them are those of its scripts
(examples/consistency_distillation).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from agreement import Agree
from reference import diffusers, from_torch, to_torch, torch

from sdxl_jax.arrays import MicroConditioning, Params
from sdxl_jax.conditioning.micro import MicroConfig
from sdxl_jax.conditioning.text import TextConditioning
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.model import ModelConfig
from sdxl_jax.training.objectives.distillation.consistency import Consistency, ConsistencyConfig, ConsistencyTarget
from sdxl_jax.training.objectives.distillation.teacher import TEACHER, Examples
from sdxl_jax.weights import names

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

# Rounding of three networks in float32, of which x₀ of the noisiest level has 15 times that of ε; the measured figures
# are some 1e-6. A scale that is off by one, another order of sine and cosine, or a step to another timestep is off by a
# hundredth and more.
TOLERANCE = 1e-5
INDEX = np.array([0, 43])
"""The node of each example: the least noisy one, whose target is the end of the trajectory, and a noisy one."""
SCALE = np.array([1.125, 1.5], np.float32)
"""Small ones: the embedding has sines of 1000 times them, of which float32 loses 1e-4, and of larger ones more."""
HUBER = 0.1
"""Not 0.001: the gradient of a difference below c is that of the difference times 1/c, and so are its roundings."""


def their_loss(networks: dict[str, Any], inputs: reference.UNetInputs, noise: np.ndarray, with_scale: bool) -> Any:
    scheduler, consistency = diffusers.DDPMScheduler(), diffusers.LCMScheduler()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # scaled_linear
    alphas, w = torch.cumprod(1 - betas, 0), torch.from_numpy(SCALE).double() - 1
    embedded = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, 32, torch.float64)
    w = w.reshape(-1, 1, 1, 1)
    latent, epsilon = (to_torch(each).double() for each in (inputs.latent, noise))
    nodes = torch.from_numpy(np.arange(1, 51) * 20 - 1)
    index = torch.from_numpy(INDEX)
    start, end = nodes[index], torch.clamp(nodes[index] - 20, min=0)
    scheduler.alphas_cumprod = alphas
    noisy = scheduler.add_noise(latent, epsilon, start)
    assert inputs.numbers is not None and inputs.pooled is not None
    numbers, pooled = to_torch(inputs.numbers), to_torch(inputs.pooled).double()
    context = to_torch(inputs.context).double()

    def level(timestep: Any) -> tuple[Any, Any]:
        bar = alphas[timestep].reshape(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def run(network: Any, x: Any, timestep: Any, context: Any, pooled: Any, scale: Any = None) -> tuple[Any, Any]:
        """(x₀, ε)"""
        conditions = {"text_embeds": pooled, "time_ids": numbers}
        output = network(x, timestep, context, timestep_cond=scale, added_cond_kwargs=conditions).sample
        alpha, sigma = level(timestep)
        return (x - sigma * output) / alpha, output

    def function(network: Any, x: Any, timestep: Any) -> Any:
        scales = [consistency.get_scalings_for_boundary_condition_discrete(each) for each in timestep.double()]
        skip, out = (torch.stack(each).reshape(-1, 1, 1, 1) for each in zip(*scales, strict=True))
        x0, _ = run(network, x, timestep, context, pooled, embedded if with_scale else None)
        return skip * x + out * x0

    with torch.no_grad():
        with_prompt = run(networks["teacher"], noisy, start, context, pooled)
        without = run(networks["teacher"], noisy, start, torch.zeros_like(context), torch.zeros_like(pooled))
        x0, eps = (one + w * (one - other) for one, other in zip(with_prompt, without, strict=True))
        bar = torch.where(index > 0, alphas[nodes[index - 1]], alphas[0]).reshape(-1, 1, 1, 1)
        before = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
        target = function(networks["target"], before, end)
    difference = function(networks["student"], noisy, start) - target
    return torch.mean(torch.sqrt(difference**2 + HUBER**2) - HUBER)


def our_loss(
    config: ConsistencyConfig, trained: Params, frozen: Params, inputs: reference.UNetInputs, noise: np.ndarray
) -> Any:
    objective = Consistency(config)
    numbers, pooled, context = (jnp.asarray(each) for each in (inputs.numbers, inputs.pooled, inputs.context))
    prompt = TextConditioning(context, pooled)
    null = jax.tree.map(jnp.zeros_like, prompt)
    micro = MicroConditioning(*(numbers[:, first : first + 2] for first in (0, 2, 4)))
    keys: Any = jax.random.split(jax.random.key(0), 2)
    examples = Examples(jnp.asarray(inputs.latent), prompt, null, micro, None, keys)
    target = trained if config.target is ConsistencyTarget.STUDENT else {"unet": frozen["target"]}
    return objective.distance(
        objective.student(trained, frozen, examples, jnp.asarray(SCALE)),
        objective.student(target, frozen, examples, jnp.asarray(SCALE)),
        objective.teacher(frozen, examples, jnp.asarray(SCALE)),
        examples.latent,
        jnp.asarray(noise),
        jnp.asarray(INDEX),
    )


@pytest.mark.parametrize("guidance_dim", [32, None], ids=["LCM", "LCM-LoRA"])
def test_a_step_of_consistency_distillation_matches_diffusers_formulas(guidance_dim: int | None, agree: Agree) -> None:
    """LCM: the scale as an input, an average as the target. LCM-LoRA: neither (of the whole UNet here)."""
    plain = reference.UNET_FOR_GRADIENTS
    with_input = dataclasses.replace(plain, guidance_dim=guidance_dim)
    pairs = {"teacher": reference.unet_pair(plain, 0), "student": reference.unet_pair(with_input, 1)}
    pairs["target"] = reference.unet_pair(with_input, 2) if guidance_dim else pairs["student"]
    inputs = reference.unet_inputs(plain, 8, 12)
    noise = np.random.default_rng(5).standard_normal(inputs.latent.shape, np.float32)

    networks = {name: pair.model.double() for name, pair in pairs.items()}
    theirs = their_loss(networks, inputs, noise, with_scale=guidance_dim is not None)
    theirs.backward()
    gradient = {name: parameter.grad.numpy() for name, parameter in networks["student"].named_parameters()}

    config = ConsistencyConfig(
        data=DataConfig(str(Path("unused"))),
        model=ModelConfig(unet=plain, micro=MicroConfig(embedding_dim=reference.FOURIER_DIM)),
        guidance_dim=guidance_dim,
        target=ConsistencyTarget.AVERAGE if guidance_dim else ConsistencyTarget.STUDENT,
        huber_c=HUBER,
    )
    frozen = {TEACHER: {"unet": pairs["teacher"].params}, "target": pairs["target"].params}

    def loss(trained: Params) -> Any:
        return our_loss(config, trained, frozen, inputs, noise)

    ours, by_parameter = jax.jit(jax.value_and_grad(loss))({"unet": pairs["student"].params})
    agree("loss of consistency distillation", np.asarray(ours)[None], from_torch(theirs)[None], TOLERANCE)
    found = names.to_tensors(pairs["student"].table, by_parameter["unet"])
    assert found.keys() == gradient.keys()
    one, other = (np.concatenate([tree[name].reshape(-1) for name in found]) for tree in (found, gradient))
    error = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    assert np.linalg.norm(other) > 0 and error < TOLERANCE, f"relative error of the gradient {error:.1e}"
    assert ("time_embedding.cond_proj.weight" in found) == (guidance_dim is not None)
