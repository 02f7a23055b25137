"""Non-finite images and latents (NaN or inf): refused, with where it began and in which weights.

A program says of every image after how many steps its latent was finite, and whether its decoder's output was: a number
each, so that nothing waits for it. Only where something is wrong are text states made again and weights looked through.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdxl_jax.arrays import Params
from sdxl_jax.errors import InputError
from sdxl_jax.models.layers import Dtype
from sdxl_jax.sampling import program
from sdxl_jax.sampling.program import Inputs, Recipe, SampledBatch

_NAMED = 3
"""Weights that are named; of more, how many."""


class NonFiniteError(InputError):
    """Weights, or what they were asked for, lead to an image that is not finite."""


def check(drawn: SampledBatch, inputs: Inputs, recipe: Recipe, first: int) -> None:
    """Raises NonFiniteError if an image of the batch is not finite. drawn: numpy. first: number of its first image."""
    rows = sum(len(arrays_of_segment.plan.timestep) for arrays_of_segment in inputs.segment_arrays)
    bad = (drawn.finite_rows < rows) | ~drawn.decoded | ~np.isfinite(drawn.latents).all(axis=(1, 2, 3))
    if not bad.any():
        return
    row = int(np.flatnonzero(bad)[0])
    others = int(bad.sum()) - 1
    who = f"Image {first + row}" + (f" and {others} more of its batch" if others else "")
    model, part, where = _began(int(drawn.finite_rows[row]), row, inputs, recipe)
    found = [f"{part}/{name}" for name in _nonfinite_weights(inputs.params[model][part])]
    raise NonFiniteError(f"{who}: non-finite (NaN or inf), first {where}. {_remedy(part, found, recipe)}")


def _began(finite_rows: int, row: int, inputs: Inputs, recipe: Recipe) -> tuple[int, str, str]:
    """(number of the model, part of its parameters, place in words) where the first number was not finite."""
    who = ("", "the refiner's ")
    for number, config in enumerate(recipe.models):
        if number and (recipe.shares_text or finite_rows < _first_row(number, inputs, recipe)):
            continue
        for tower in config.text:
            towers = {tower.name: inputs.params[number][tower.name]}
            tokens = (inputs.tokens, inputs.negative_tokens)
            states = program.STAGED.text_states(towers, *tokens, towers=(tower,), guided=True, compute=recipe.compute)
            if not all(_finite(leaf) for leaf in jax.tree.leaves(states)):
                return number, tower.name, f"in the states of {who[number]}{tower.name}"
    base = recipe.models[0]
    if (init_inputs := inputs.init_inputs) is not None:
        latent = program.STAGED.encode(inputs.params[0]["vae"], init_inputs.image, config=base, compute=recipe.compute)
        if not _finite(latent):
            return 0, "vae", "in the latent of the init image, from the autoencoder's encoder"
    done = 0
    for segment, arrays_of_segment in zip(recipe.segments, inputs.segment_arrays, strict=True):
        count = len(arrays_of_segment.plan.timestep)
        if finite_rows < done + count:
            steps = sum(len(each.plan.timestep) for each in inputs.segment_arrays)
            return segment.model, "unet", f"after step {finite_rows + 1} of {steps}, from {who[segment.model]}unet"
        done += count
    return 0, "vae", "in the image, from the autoencoder's decoder; its latent is finite"


def _first_row(model: int, inputs: Inputs, recipe: Recipe) -> int:
    """Rows before the first segment of a model."""
    segments = zip(recipe.segments, inputs.segment_arrays, strict=True)
    counts = [(segment.model, len(arrays_of_segment.plan.timestep)) for segment, arrays_of_segment in segments]
    first = next((number for number, (which, _) in enumerate(counts) if which == model), len(counts))
    return sum(count for _, count in counts[:first])


def _remedy(part: str, found: list[str], recipe: Recipe) -> str:
    if not found:
        dtype = "" if recipe.compute.dtype is Dtype.FLOAT32 else "dtype float32, "
        return (
            f"All weights of {part} are finite, so numbers became too large on the way: try {dtype}less guidance, "
            "smaller weights of LoRAs and of words, or another file of the model"
        )
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    instead = "another copy of the file"
    if part == "vae":
        instead += ", or with --parts-from another autoencoder (for SDXL e.g. sdxl-vae-fp16-fix)"
    return (
        f"Non-finite weights: {', '.join(found[:_NAMED])}{more}. The file, or a LoRA that was merged, is damaged: use "
        f"{instead}"
    )


_finite_array = jax.jit(lambda array: jnp.isfinite(array).all())


def _finite(array: Any) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.floating) or bool(_finite_array(array))


def _nonfinite_weights(params: Params) -> Iterator[str]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _finite(leaf):
            yield jax.tree_util.keystr(path, simple=True, separator="/")
