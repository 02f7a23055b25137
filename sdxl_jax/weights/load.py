"""`load_model`: a path to a model with its parameters on devices. What a path may hold is listed in `open`."""

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import PurePath

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from sdxl_jax import sharding
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.progress import tqdm
from sdxl_jax.sharding import MeshConfig
from sdxl_jax.weights.eight_bits import quantised
from sdxl_jax.weights.lazy import DTYPES, Leaf, Weights, cast
from sdxl_jax.weights.open import OpenOptions, open_model


def load_model(
    path: str | PurePath,
    dtype: np.dtype | type | str | None = None,
    mesh: Mesh | None = None,
    *,
    parts_from: Sequence[str | PurePath] = (),
    variant: str | None = None,
    prediction: Prediction | None = None,
    allow_partial: bool = False,
    raw: bool = False,
    progress: bool = True,
    quantize: str | None = None,
) -> Model:
    """The model at a path, its parameters placed on `mesh` (default: a copy on every device).

    Each parameter is read and put on its devices before the next is read; a process reads the slices of a safetensors
    file's tensors that its devices hold.

    Args:
        path: local, or gs://…; what it may hold is listed in `open`. One network alone gives a model with that part.
        dtype: of the parameters; None keeps theirs; stacked layers that differ in dtype become float32. The dtype of
            the computation is set by `Compute`.
        parts_from: models, or networks alone, whose parts replace this model's; the last one wins.
        variant: of a diffusers directory, e.g. "fp16"; None: the files without a variant.
        prediction: what the UNet outputs, where the files do not say.
        allow_partial: load a model whose tensors do not all fit; those that are left out are listed.
        raw: of a run, the trained weights instead of their average.
        quantize: "int8" stores the kernels of UNet and text encoders in eight bits (`eight_bits`).
        progress: show a progress bar for large models, and notes on the files.

    Raises InputError if there is no model that this version can read, and for tensors that are missing, unknown or of
    another shape; MachineError for a bucket that does not answer, and where the disk has no room for a copy.
    """
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target.name not in DTYPES:
        raise InputError(f"dtype={target.name} is not implemented for parameters. Choose one of {', '.join(DTYPES)}")
    if quantize not in (None, "int8"):
        raise InputError(f"quantize={quantize} is not implemented. Give int8, or None")
    weights = open_model(path, OpenOptions(variant, prediction, allow_partial, raw), parts_from)
    weights = weights if target is None else cast(weights, target)
    return load_weights(weights if quantize is None else quantised(weights), mesh, progress)


def say(notes: Iterable[str]) -> None:
    """Prints notes to stderr, above any progress bar."""
    for note in notes:
        tqdm.write(f"note: {note}", file=sys.stderr)


def bar(weights: Weights, what: str, progress: bool) -> tqdm:
    """A progress bar over a model's bytes."""
    return tqdm(total=weights.size, desc=what, unit="B", unit_scale=True, disable=not progress, mininterval=0.5)


def load_weights(weights: Weights, mesh: Mesh | None = None, progress: bool = True) -> Model:
    """Reads what `open_model` found: every parameter to the devices that the sharding rules give it."""
    if progress:
        say(weights.notes)
    mesh = mesh or sharding.make_mesh(MeshConfig())
    return Model(weights.config, unflatten(place(weights, mesh, "loading", progress)))


def place(weights: Weights, mesh: Mesh, what: str, progress: bool) -> dict[str, jax.Array]:
    """Every parameter by path, on the devices that the sharding rules give it. what: for the progress bar."""
    shardings = flatten(sharding.place(mesh, unflatten(dict(weights.leaves))))
    params = {}
    with bar(weights, what, progress and weights.size > 2**28) as shown:
        for path, leaf in weights.leaves.items():
            part = functools.cache(functools.partial(_part, leaf))
            params[path] = jax.make_array_from_callback(
                leaf.shape,
                shardings[path],
                lambda index, part=part: part(tuple((i.start, i.stop) for i in index or ())),
            )
            # Waiting frees the host's copy before the next is read.
            shown.update(jax.block_until_ready(params[path]).nbytes)
    return params


def _part(leaf: Leaf, bounds: tuple[tuple[int | None, int | None], ...]) -> Shaped[np.ndarray, "..."]:
    return leaf.read(tuple(slice(*pair) for pair in bounds))
