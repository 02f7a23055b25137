"""The UNet against diffusers: the prediction of each variant, and gradients. Tolerance: see `agreement.TOLERANCE`."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from agreement import TOLERANCE, Agree
from reference import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_jax import flops
from sdxl_jax import model as models
from sdxl_jax.arrays import Params
from sdxl_jax.conditioning import classes
from sdxl_jax.models import unet
from sdxl_jax.models.layers import Attention, Compute, Remat
from sdxl_jax.models.unet import ClassConfig, ClassPlace, UNetPart
from sdxl_jax.weights import names

PAGMixin = pytest.importorskip("diffusers.pipelines.pag.pag_utils").PAGMixin

# Heights and widths that halve evenly all the way, on the way, or not at all; never a square.
SIZES = {
    "SDXL base": (9, 16),
    "SDXL refiner": (11, 6),
    "SD 1.x": (8, 24),
    "SD 2.x": (13, 7),
    "SD 1.x inpainting": (5, 6),
}

FULL_SIZE = {
    "SDXL base": (models.SDXL_BASE.unet, (128, 128)),
    "SDXL refiner": (models.SDXL_REFINER.unet, (96, 72)),
    "SD 1.x": (models.SD1.unet, (64, 40)),
    "SD 2.x": (models.SD2.unet, (66, 90)),
}


QUICK = ("SDXL base", "SD 2.x")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in reference.UNETS]
)
def test_unet_matches_diffusers(name: str, agree: Agree) -> None:
    config = reference.UNETS[name]
    pair = reference.unet_pair(config)
    inputs = reference.unet_inputs(config, *SIZES[name])
    with torch.no_grad():
        theirs = reference.run_unet(pair.model, inputs, reference.to_torch(inputs.latent))
    ours = jax.jit(functools.partial(unet.apply, config))(pair.params, **inputs.ours())
    agree(f"UNet {name}", ours, reference.from_torch(theirs))


def test_unet_with_classes_matches_diffusers(agree: Agree) -> None:
    """Classes beside the timestep, `num_class_embeds` there."""
    known = ClassConfig(7, ClassPlace.TIMESTEP)
    config = dataclasses.replace(reference.UNET_FOR_GRADIENTS, classes=known)
    pair = reference.unet_pair(config)
    inputs, labels = reference.unet_inputs(config, 9, 16), np.array([6, 2])
    with torch.no_grad():
        theirs = reference.run_unet(pair.model, inputs, reference.to_torch(inputs.latent), labels)
        others = reference.run_unet(pair.model, inputs, reference.to_torch(inputs.latent), labels[::-1].copy())
    embedded = classes.embed(known, pair.params, labels.astype(np.int32))
    ours = jax.jit(functools.partial(unet.apply, config))(pair.params, **inputs.ours(), class_embedding=embedded)
    agree("UNet with classes", ours, reference.from_torch(theirs))
    moved = np.abs(reference.from_torch(theirs) - reference.from_torch(others)).max()
    assert moved > 100 * TOLERANCE, f"the classes move the prediction by {moved:.1e} alone"


class Perturbing(PAGMixin):
    """What diffusers' pipelines with perturbed-attention guidance do to their UNet: other processors in some layers."""

    def __init__(self, model: Any, parts: tuple[UNetPart, ...]) -> None:
        self.unet = model
        self.set_pag_applied_layers([part.value for part in parts])
        self._set_pag_attn_processor(self.pag_applied_layers, do_classifier_free_guidance=True)


@pytest.mark.parametrize("parts", [pytest.param((UNetPart.MIDDLE,), marks=pytest.mark.slow), tuple(UNetPart)])
def test_unet_with_perturbed_rows_matches_diffusers(parts: tuple[UNetPart, ...], agree: Agree) -> None:
    """A batch as diffusers makes it: the negative prompt, the prompt, the prompt perturbed."""
    config = reference.UNET_FOR_GRADIENTS  # stacks of two, all parts with attention, quick to compile
    pair = reference.unet_pair(config)
    inputs = jax.tree.map(lambda rows: rows[[0, 1, 1]], reference.unet_inputs(config, 9, 16))
    Perturbing(pair.model, parts)
    with torch.no_grad():
        theirs = reference.from_torch(reference.run_unet(pair.model, inputs, reference.to_torch(inputs.latent)))
    apply = jax.jit(functools.partial(unet.apply, config, perturbed_parts=parts))
    ours = apply(pair.params, **inputs.ours(), perturbed=jnp.array([False, False, True]))
    agree(f"UNet perturbed {' '.join(part.value for part in parts)}", ours, theirs)
    moved = np.abs(theirs[1] - theirs[2]).max() / np.abs(theirs).max()
    assert moved > 100 * TOLERANCE, f"the perturbation moves the prediction by {moved:.1e} alone"


KINDS = {
    "conv_in": r"^conv_in\.weight",
    "time embedding": r"^time_embedding\.linear_2\.weight",
    "added embedding": r"^add_embedding\.linear_1\.weight",
    "resnet conv1": r"resnets\.\d\.conv1\.weight",
    "resnet time_emb_proj": r"resnets\.\d\.time_emb_proj\.weight",
    "resnet norm scale": r"resnets\.\d\.norm2\.weight",
    "resnet shortcut": r"resnets\.\d\.conv_shortcut\.weight",
    "transformer norm": r"attentions\.\d\.norm\.weight",
    "transformer proj_in": r"attentions\.\d\.proj_in\.weight",
    "self-attention to_q": r"transformer_blocks\.[1-9]\.attn1\.to_q\.weight",
    "self-attention to_k": r"transformer_blocks\.[1-9]\.attn1\.to_k\.weight",
    "self-attention to_v": r"transformer_blocks\.[1-9]\.attn1\.to_v\.weight",
    "self-attention to_out": r"transformer_blocks\.[1-9]\.attn1\.to_out\.0\.weight",
    "cross-attention to_q": r"transformer_blocks\.[1-9]\.attn2\.to_q\.weight",
    "cross-attention to_k": r"transformer_blocks\.[1-9]\.attn2\.to_k\.weight",
    "cross-attention to_v": r"transformer_blocks\.[1-9]\.attn2\.to_v\.weight",
    "cross-attention to_out": r"transformer_blocks\.[1-9]\.attn2\.to_out\.0\.weight",
    "block norm": r"transformer_blocks\.[1-9]\.norm3\.bias",
    "feed-forward in": r"transformer_blocks\.[1-9]\.ff\.net\.0\.proj\.weight",
    "feed-forward out": r"transformer_blocks\.[1-9]\.ff\.net\.2\.weight",
    "downsample": r"downsamplers\.0\.conv\.weight",
    "upsample": r"upsamplers\.0\.conv\.weight",
    "conv_out": r"^conv_out\.weight",
}
"""Weights by kind; in a stack, a layer other than the first."""

# What a softmax or a group norm subtracts leaves these gradients small differences of large sums: up to 4e-5 was seen,
# where torch's own float32 gradient is 9e-5 from its float64 one.
CANCELLING = ("to_q", "to_k", "time_emb_proj", "all others")


def test_unet_gradients_match_torch_autograd(agree: Agree) -> None:
    """With respect to the latent and to every weight, of the inner product of the prediction with a fixed random array.

    A weight's gradient sums over batch and positions on top, 288 of them here: most still agree as well as a prediction
    does. torch computes in float64 here, so that the differences are our rounding alone.
    """
    config = reference.UNET_FOR_GRADIENTS
    pair = reference.unet_pair(config)
    inputs = reference.unet_inputs(config, 9, 16)
    cotangent = np.random.default_rng(1).standard_normal((*inputs.latent.shape[:3], config.out_channels), np.float32)

    model = pair.model.double()
    latent = reference.to_torch(inputs.latent).double().requires_grad_()
    (reference.run_unet(model, inputs, latent) * reference.to_torch(cotangent)).sum().backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}

    def loss(params: Params, latent: jax.Array) -> jax.Array:
        compute = Compute(remat=Remat.BLOCK)  # as in training; the sums are the same
        return jnp.sum(cotangent * unet.apply(config, params, **{**inputs.ours(), "latent": latent}, compute=compute))

    by_weight, by_latent = jax.jit(jax.grad(loss, argnums=(0, 1)))(pair.params, jnp.asarray(inputs.latent))
    ours = names.to_tensors(pair.table, by_weight)

    def differs(name: str) -> float:
        return np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()

    assert ours.keys() == theirs.keys()
    agree("UNet gradient: latent", by_latent, reference.from_torch(latent.grad))
    chosen = {kind: [name for name in ours if re.search(pattern, name)] for kind, pattern in KINDS.items()}
    assert all(chosen.values()), "no weight has the name of one of the kinds"
    chosen["all others"] = sorted(ours.keys() - {name for kind in chosen.values() for name in kind})
    for kind, members in chosen.items():
        worst = max(members, key=differs)
        agree(f"UNet gradient: {kind}", ours[worst], theirs[worst], 1e-4 if kind.endswith(CANCELLING) else TOLERANCE)


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.slow
def test_operations_of_the_full_size_are_those_that_torch_counts(name: str) -> None:
    """Nothing is computed: torch counts on its device "meta", we in the traced program."""
    config, size = FULL_SIZE[name]
    latent = (1, *size, config.in_channels)
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        shapes = [(1,), (1, 77, config.context_dim)]
        conditions = None
        if config.vector_dim is not None:
            numbers = (config.vector_dim - 1280) // 256
            conditions = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, numbers)}
        model = reference.unet_model(config, 256)
        model(torch.zeros(latent).permute(0, 3, 1, 2), *map(torch.zeros, shapes), added_cond_kwargs=conditions)

    def forward(params: Params, latent: jax.Array) -> jax.Array:
        vector = None if config.vector_dim is None else jnp.zeros((1, config.vector_dim))
        plain = Compute(attention=Attention.XLA)
        timestep, context = map(jnp.zeros, shapes)
        return unet.apply(config, params, latent, timestep, context, vector, plain)

    params = unet.abstract(config)
    assert flops.count(forward, params, jax.ShapeDtypeStruct(latent, jnp.float32)).total == counted.get_total_flops()
