"""Non-finite images and latents (NaN or inf): refused, with the step, network and weights where they began.

A program reports for every image after how many steps its latent was finite, and whether its decoder's output was: one
number each, so that nothing waits for it. Only where one is not finite are text states recomputed and weights searched.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from sdxl_jax.arrays import Params, type_of_array
from sdxl_jax.errors import InputError
from sdxl_jax.model import autoencoder
from sdxl_jax.models.layers import Dtype
from sdxl_jax.sampling import program
from sdxl_jax.sampling.program import Inputs, Recipe, SampledBatch

_NAMED = 3
"""Weights that the message names; beyond that, their number."""


class NonFiniteError(InputError):
    """The model's weights, or the options, lead to a non-finite image (NaN or inf)."""


def check(batch: SampledBatch, inputs: Inputs, recipe: Recipe, first: int) -> None:
    """Raises NonFiniteError if an image of the batch is not finite. batch: numpy. first: number of its first image."""
    rows = sum(len(arrays.plan.timestep) for arrays in inputs.segment_arrays)
    bad = (batch.finite_rows < rows) | ~batch.decoded | ~np.isfinite(batch.latents).all(axis=(1, 2, 3))
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    others = int(bad.sum()) - 1
    which = f"Image {first + row}" + (f" and {others} more of its batch" if others else "")
    model, part, where = _origin(int(batch.finite_rows[row]), inputs, recipe)
    weights = [f"{part}/{name}" for name in _nonfinite_weights(inputs.params[model].get(part, {}))]
    raise NonFiniteError(f"{which}: non-finite (NaN or inf), first {where}. {_remedy(part, weights, recipe)}")


def _origin(finite_rows: int, inputs: Inputs, recipe: Recipe) -> tuple[int, str, str]:
    """(number of the model, part of its parameters, place in words) of the first non-finite value."""
    whose = ("", "the refiner's ")
    for number, config in enumerate(recipe.models):
        if number and (recipe.shares_text or finite_rows < _first_row(number, inputs, recipe)):
            continue
        for tower in config.text:
            towers = {tower.name: inputs.params[number][tower.name]}
            tokens = (inputs.tokens, inputs.negative_tokens)
            states = program.STAGED.text_states(towers, *tokens, towers=(tower,), guided=True, compute=recipe.compute)
            if not all(_finite(leaf) for leaf in jax.tree.leaves(states)):
                return number, tower.name, f"in the states of {whose[number]}{tower.name}"
    base = recipe.models[0]
    if (init_inputs := inputs.init_inputs) is not None:
        latent = program.STAGED.encode(
            autoencoder(inputs.params[0]), init_inputs.image, config=base, compute=recipe.compute
        )
        if not _finite(latent):
            return 0, "vae", "in the latent of the init image, from the autoencoder's encoder"
    done = 0
    for segment, arrays in zip(recipe.segments, inputs.segment_arrays, strict=True):
        count = len(arrays.plan.timestep)
        if finite_rows < done + count:
            steps = sum(len(each.plan.timestep) for each in inputs.segment_arrays)
            return segment.model, "unet", f"after step {finite_rows + 1} of {steps}, from {whose[segment.model]}unet"
        done += count
    return 0, "vae", "in the image, from the autoencoder's decoder; its latent is finite"


def _first_row(model: int, inputs: Inputs, recipe: Recipe) -> int:
    """Number of rows before the first segment of a model."""
    segments = zip(recipe.segments, inputs.segment_arrays, strict=True)
    counts = [(segment.model, len(arrays.plan.timestep)) for segment, arrays in segments]
    first = next((number for number, (which, _) in enumerate(counts) if which == model), len(counts))
    return sum(count for _, count in counts[:first])


def _remedy(part: str, weights: list[str], recipe: Recipe) -> str:
    """weights: the non-finite ones."""
    if not weights:
        dtype = "" if recipe.compute.dtype is Dtype.FLOAT32 else "dtype float32, "
        return (
            f"All weights of {part} are finite, so its activations overflowed: try {dtype}less guidance, smaller LoRA "
            "scales and prompt weights, or another file of the model"
        )
    more = f" and {len(weights) - _NAMED} more" if len(weights) > _NAMED else ""
    instead = "another copy of the file"
    if part == "vae":
        instead += ", or with --parts-from another autoencoder (for SDXL e.g. sdxl-vae-fp16-fix)"
    return (
        f"Non-finite weights: {', '.join(weights[:_NAMED])}{more}. The file, or a LoRA that was merged, is damaged: "
        f"use {instead}"
    )


_all_finite = jax.jit(lambda array: jnp.isfinite(array).all())


def _finite(array: Shaped[type_of_array, "..."]) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.floating) or bool(_all_finite(array))


def _nonfinite_weights(params: Params) -> Iterator[str]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _finite(leaf):
            yield jax.tree_util.keystr(path, simple=True, separator="/")
