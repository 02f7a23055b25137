"""`load_model`: a path to a model, its parameters on devices. What a path may hold is listed in `open`."""

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sdxl_jax import sharding
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.weights.lazy import DTYPES, Leaf, Weights, cast
from sdxl_jax.weights.open import OpenOptions, open_model


def load_model(
    path: str | Path,
    dtype: np.dtype | type | str | None = None,
    mesh: Mesh | None = None,
    *,
    parts_from: Sequence[str | Path] = (),
    variant: str | None = None,
    prediction: Prediction | None = None,
    allow_partial: bool = False,
    progress: bool = True,
) -> Model:
    """The model at a path, its parameters placed on `mesh` (default: a copy on every device).

    Each parameter goes from the disk to where it belongs before the next is read; of a tensor in a safetensors file, a
    process reads the part that its devices hold.

    Args:
        path: what it may hold is listed in `open`. One network alone gives a model with that part.
        dtype: of the parameters; None keeps theirs; layers of one stack that differ in theirs become float32. It is not
            that of the computation, which `Compute` sets.
        parts_from: models, or networks alone, whose parts take the place of this model's; the last one wins.
        variant: of a diffusers directory, e.g. "fp16"; None: the files without a variant.
        prediction: what the UNet outputs, where the files do not tell.
        allow_partial: take a model whose tensors do not all fit; what is left out is listed.
        progress: show a bar for large models, and say what was found.

    Raises InputError if there is no model that this version can read, and for tensors that are missing, unknown or of
    another shape.
    """
    asked = None if dtype is None else np.dtype(dtype)
    if asked is not None and asked.name not in DTYPES:
        raise InputError(f"dtype={asked.name} is not implemented for parameters. Choose one of {', '.join(DTYPES)}")
    open_options = OpenOptions(variant, prediction, allow_partial)
    weights = open_model(path, open_options, parts_from)
    return load_weights(weights if asked is None else cast(weights, asked), mesh, progress)


def say(notes: Iterable[str]) -> None:
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)


def bar(weights: Weights, what: str, progress: bool) -> tqdm:
    """A progress bar over a model's bytes."""
    return tqdm(total=weights.size, desc=what, unit="B", unit_scale=True, disable=not progress, mininterval=0.5)


def load_weights(weights: Weights, mesh: Mesh | None = None, progress: bool = True) -> Model:
    """What `open_model` found, read: every parameter to where the sharding rules say that it belongs."""
    if progress:
        say(weights.notes)
    mesh = mesh or sharding.make_mesh(MeshConfig())
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in weights.leaves.items()}
    places = flatten(sharding.place(mesh, unflatten(abstract)))
    params = {}
    with bar(weights, "loading", progress and weights.size > 2**28) as shown:
        for path, leaf in weights.leaves.items():
            part = functools.cache(functools.partial(_part, leaf))
            params[path] = jax.make_array_from_callback(
                leaf.shape, places[path], lambda index, part=part: part(tuple((i.start, i.stop) for i in index or ()))
            )
            # Waiting frees the process's copy before the next is read.
            shown.update(jax.block_until_ready(params[path]).nbytes)
    return Model(weights.config, unflatten(params))


def _part(leaf: Leaf, bounds: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
    return leaf.read(tuple(slice(*pair) for pair in bounds))
