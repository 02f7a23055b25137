"""Training of an adapter beside a frozen model: LoRA and its kin (`TrainConfig.adapter`).

    base (frozen) ────────────┐
                              ├── UNet, text encoders ── loss ── gradient of the factors ── update ── limit of norms
    factors ── dropout ───────┘

The factors are the trainable tree, {"adapters": {"unet": …}}; alphas, which are constant, are frozen beside the base.
Checkpoints, resume, the average and the mesh are those of any training. Formulas are in `adapters/`, files in
`weights/`.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Key, Shaped

from sdxl_jax import sharding
from sdxl_jax.adapters import changes, dora, kinds, targets
from sdxl_jax.adapters.changes import Resolved
from sdxl_jax.adapters.kinds import Factors, Kind
from sdxl_jax.adapters.targets import AdapterConfig
from sdxl_jax.arrays import BaseDtype, Parameter, Params, flatten, type_of_array, unflatten
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.files.trees import differences
from sdxl_jax.models.layers import dequantised
from sdxl_jax.samplers import presets
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.training.initial import placed_network
from sdxl_jax.training.objectives import adapter_metadata
from sdxl_jax.training.state import merge
from sdxl_jax.weights.adapter_files import export, readers, reading
from sdxl_jax.weights.adapter_files.names import layers_of
from sdxl_jax.weights.eight_bits import scale_path
from sdxl_jax.weights.lazy import Initial, abstract_leaves

ADAPTERS = "adapters"
"""Key of the factors, in the trainable and in the frozen tree."""
_DROPOUT = 3
"""Folded into the key of a micro-batch's first example; its own three uses are split off (`denoising.batch_loss`)."""


class AdapterTraining:
    """What the denoising objective does differently for an adapter. Holds no arrays."""

    def __init__(self, config: TrainConfig, adapter: AdapterConfig):
        self._config, self._adapter = config, adapter

    @functools.cached_property
    def layers(self) -> dict[str, int | None]:
        """How many layers are stacked in each parameter."""
        return layers_of(self._config.model)

    @functools.cached_property
    def abstract(self) -> dict[str, Parameter]:
        """The factors by path, "unet/…/kernel/down". Raises InputError for settings that do not fit the model."""
        trainable = self._config.training.trainable
        return targets.abstract(self._adapter, abstract_leaves(self._config.model), self.layers, trainable)

    def check_start(self) -> None:
        """Raises InputError for an adapter to train on that is missing, or of other settings."""
        if self._adapter.init_from is not None:
            self._from_file(self._adapter.init_from)

    # State

    def abstract_trees(self) -> tuple[Params, Params]:
        """(trainable, frozen): the abstract trees of factors and of alphas."""
        return _split(dict(self.abstract))

    def fresh(self, base: Params, mesh: Mesh) -> tuple[Params, Params]:
        """(trainable, frozen) before the first step: new, or from `adapter.init_from`. base: the model's parameters."""
        seed = self._config.training.seed
        leaves = {path: Initial(leaf, f"{ADAPTERS}/{path}", seed) for path, leaf in self.abstract.items()}
        made = flatten(placed_network(ADAPTERS, leaves, mesh))
        if self._adapter.init_from is not None:
            given = flatten(self._from_file(self._adapter.init_from))
            made = {path: jax.device_put(given[path], value.sharding) for path, value in made.items()}
        else:
            flat = flatten(base)
            for path, value in made.items():
                parameter, _, name = path.rpartition("/")
                if name == "magnitude":
                    axis, stacked = dora.axis_of(value.shape), self.layers[parameter] is not None
                    norms = _norms(flat[parameter], flat.get(scale_path(parameter)), axis, stacked)
                    made[path] = jax.device_put(norms, value.sharding)
        return _split(made)

    def _from_file(self, path: str) -> Params:
        """The adapter of a file, with the alphas of the configuration. Raises InputError for one of other settings."""
        file = reading.read(path)
        found = changes.tree(reading.resolve(file, self._config.model), self.layers)
        resolved: Resolved = {
            parameter: [(layer, self._with_our_alpha(parameter, factors)) for layer, factors in rows]
            for parameter, rows in changes.untree(found, self.layers).items()
        }
        tree = changes.tree(resolved, self.layers)
        have = {name: value.shape for name, value in flatten(tree).items()}
        if different := differences(have, {name: value.shape for name, value in self.abstract.items()}):
            raise InputError(
                f"adapter.init_from={path} is another adapter than this configuration's: {len(different)} factors "
                f"differ, the first is {different[0]} (there -> here). Set adapter.kind, rank and layers as they are "
                "there (sdxl-jax lora list), or change the file's rank with `sdxl-jax lora resize`"
            )
        return tree

    def _with_our_alpha(self, parameter: str, factors: Factors) -> Factors:
        """The same change with another alpha: what it scales is scaled."""
        declared = self.abstract.get(f"{parameter}/alpha")
        return factors if declared is None else _with_alpha(factors, declared.distribution.mean)

    # Step

    def of_step(self, whole: Params, keys: Key[jax.Array, " batch"]) -> Params:
        """The adapters that a (micro-)batch is computed with: without what its dropout leaves out, the same for all of
        its examples. whole: of `of`. keys: one per example."""
        adapter = self._adapter
        if not adapter.rank_dropout and not adapter.module_dropout:
            return whole
        flat = flatten(whole)
        of_ranks, of_layers = jax.random.split(jax.random.fold_in(keys[0], _DROPOUT))
        groups = changes.by_parameter(flat)
        if adapter.rank_dropout:
            names = {parameter: kinds.with_ranks(factors) for parameter, factors in groups.items()}
            paths = [f"{parameter}/{name}" for parameter, name in names.items() if name is not None]
            masks = _kept(of_ranks, adapter.rank_dropout, [flat[path].shape[:-1] for path in paths])
            for path, kept in zip(paths, masks, strict=True):
                flat[path] = flat[path] * kept[..., None] / (1 - adapter.rank_dropout)
        if adapter.module_dropout:
            paths = [f"{parameter}/{kinds.linear_in(factors)}" for parameter, factors in groups.items()]
            counts = [self.layers[parameter] for parameter in groups]
            masks = _kept(of_layers, adapter.module_dropout, [() if count is None else (count,) for count in counts])
            for path, kept in zip(paths, masks, strict=True):
                flat[path] = flat[path] * _beside(kept, flat[path])
        return unflatten(flat)

    def updating(self, optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimiser with the learning rate of `up_rate`, and the limit of norms."""
        rules: list[Any] = []
        if self._adapter.up_rate != 1:
            rules.append(optax.stateless(cast(Any, self._with_up_rate)))
        if self._adapter.norm_limit is not None:
            rules.append(optax.stateless(cast(Any, self._limited)))
        return optax.chain(optimiser, *rules) if rules else optimiser

    def _with_up_rate(self, updates: Params, _: Params | None) -> Params:
        flat = flatten(updates[ADAPTERS])
        for path, update in flat.items():
            flat[path] = self._adapter.up_rate * update if path.endswith("/up") else update
        return {**updates, ADAPTERS: unflatten(flat)}

    def _limited(self, updates: Params, params: Params) -> Params:
        """Updates after which no change ΔW is longer than `norm_limit`."""
        limit, flat = self._adapter.norm_limit, flatten(updates[ADAPTERS])
        before = flatten(params[ADAPTERS])
        assert limit is not None
        after = {path: before[path] + update for path, update in flat.items()}
        for parameter, factors in changes.by_parameter(after).items():
            if not parameter.endswith("kernel"):
                continue
            alpha, count = self.abstract.get(f"{parameter}/alpha"), self.layers[parameter]
            if alpha is not None:
                factors["alpha"] = jnp.full(alpha.shape, alpha.distribution.mean)
            ratio = limit / jnp.maximum(_change_norm(factors, count is not None), limit)
            names = _LIMITED[kinds.kind_of(factors)]
            names = [name for name in names if name in factors]
            for name in names:
                path, share = f"{parameter}/{name}", ratio ** (1 / len(names))
                share = _beside(share, factors[name])
                flat[path] = jnp.where(share < 1, factors[name] * share - before[path], flat[path])
        return {**updates, ADAPTERS: unflatten(flat)}

    # The model, and the file

    def merged(self, base: Params, whole: Params) -> Params:
        """The model's parameters with the changes of adapters (`of`) merged into the base; its dtypes and shardings
        stay, but a changed kernel is no longer in eight bits."""
        flat = flatten(base)
        for parameter, factors in changes.by_parameter(flatten(whole)).items():
            value, scale = flat[parameter], flat.pop(scale_path(parameter), None)
            dtype = value.dtype if scale is None else BaseDtype.INT8.dtype
            changed = _changed(value, scale, factors, self.layers[parameter] is not None, dtype)
            flat[parameter] = jax.device_put(changed, value.sharding)
        return unflatten(flat)

    def export(
        self,
        whole: Params,
        path: Path,
        step: int,
        mesh: Mesh,
        *,
        is_first: bool,
        bundled: Mapping[str, Float[np.ndarray, "..."]] | None = None,
        sampling: SamplingDefaults | None = None,
        dataset: BucketedDataset | None = None,
    ) -> None:
        """Writes adapters (`of`) to a file. All processes call it, and the first writes. bundled: embeddings that go
        into it. sampling: how the model with the adapter is sampled. dataset: what was trained on, if that is known."""
        on_host = jax.device_get(jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(whole))
        if is_first:
            # One alpha for all: where they differ, diffusers applies the most frequent one to most layers.
            alphas = Counter(leaf.distribution.mean for path, leaf in self.abstract.items() if path.endswith("alpha"))
            alpha = max(alphas, key=lambda one: alphas[one], default=1.0)
            resolved: Resolved = {
                parameter: [(layer, _with_alpha(factors, alpha)) for layer, factors in rows]
                for parameter, rows in changes.untree(on_host, self.layers).items()
            }
            dtype = jnp.dtype(self._adapter.file_dtype.value)
            metadata = adapter_metadata.of_training(self._config, self._adapter, self.abstract, step, dataset)
            if said := presets.stated(sampling):
                metadata[presets.STATED] = json.dumps(said)
            spelling = self._adapter.file_spelling
            export.write(path, resolved, self._config.model, spelling, dtype, metadata, bundled)

    def export_notes(self) -> list[str]:
        """Which programs do not read the file."""
        return readers.notes(changes.by_parameter(self.abstract), self._adapter.file_spelling)


_LIMITED = {
    Kind.LORA: ("down", "up"),
    Kind.LOHA: ("up_1",),
    Kind.LOKR: ("w1", "w1_up"),
    Kind.DIFFERENCE: ("diff",),
}
"""The factors that a limit of the norm is shared by."""


def of(trained: Params, frozen: Params) -> Params:
    """The adapters with their alphas, by part, of a run's two trees."""
    return merge(trained, {ADAPTERS: frozen.get(ADAPTERS, {})})[ADAPTERS]


def _with_alpha(factors: Factors, alpha: float) -> Factors:
    """The same change with another alpha: what it scales is scaled. Kinds without one stay as they are."""
    if (rank := kinds.rank_of(factors)) is None:
        return factors
    value = np.asarray(alpha, np.float32)
    ratio = np.asarray(rank * factors["alpha"] / value, np.float32)
    return {**kinds.scaled({**factors, "alpha": ratio}), "alpha": value}


def _split(flat: dict[str, Any]) -> tuple[Params, Params]:
    """(trainable, frozen) trees of factors by path."""
    is_frozen = {path: path.endswith(kinds.FROZEN) for path in flat}
    trees = [unflatten({path: flat[path] for path in flat if is_frozen[path] is frozen}) for frozen in (False, True)]
    return {ADAPTERS: trees[0]}, {ADAPTERS: trees[1]} if trees[1] else {}


@functools.partial(jax.jit, static_argnums=(2, 3))
def _norms(
    kernel: Shaped[jax.Array, "*shape"], scale: Float[jax.Array, "..."] | None, axis: dora.Axis, stacked: bool
) -> Float[jax.Array, "..."]:
    """The magnitudes with which a DoRA begins. scale: of a kernel in eight bits."""
    kernel = jnp.asarray(dequantised(kernel, scale), jnp.float32)
    return jnp.asarray(jax.vmap(lambda one: dora.norm(one, axis))(kernel) if stacked else dora.norm(kernel, axis))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _changed(
    value: Shaped[jax.Array, "*shape"],
    scale: Float[jax.Array, "..."] | None,
    factors: Factors,
    stacked: bool,
    dtype: np.dtype,
) -> Float[jax.Array, "*shape"]:
    """A parameter with its change, computed in float32, one layer at a time. scale: of a kernel in eight bits. dtype:
    of the result."""

    def one(layer: tuple[Any, Any, Factors]) -> Any:
        value, scale, factors = layer
        return kinds.changed(dequantised(value, scale).astype(jnp.float32), factors).astype(dtype)

    return jax.lax.map(one, (value, scale, factors)) if stacked else one((value, scale, factors))


def _kept(key: Key[jax.Array, ""], dropout: float, shapes: Sequence[tuple[int, ...]]) -> list[Bool[jax.Array, "..."]]:
    """Masks that keep the share 1 − dropout, from one draw: a draw for each would be most of the program."""
    if not shapes:
        return []
    sizes = [math.prod(shape) for shape in shapes]
    drawn = jax.random.bernoulli(key, 1 - dropout, (sum(sizes),))
    parts = jnp.split(drawn, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _beside(numbers: Shaped[jax.Array, "*layers"], value: Shaped[type_of_array, "..."]) -> Shaped[jax.Array, "..."]:
    """A number, or one for each layer, with the axes of a factor."""
    return numbers.reshape(*numbers.shape, *(1,) * (value.ndim - numbers.ndim))


def _change_norm(factors: Factors, stacked: bool) -> Float[jax.Array, "*layers"]:
    """‖ΔW‖ of each layer; of a LoRA without ΔW, by products as narrow as the rank."""

    def of_lora(factors: Factors) -> Any:
        each = kinds.scaled(factors)
        down = each["down"] @ each["mid"] if "mid" in each else each["down"]
        narrow, up = down.reshape(-1, down.shape[-1]), each["up"]
        return jnp.sqrt(jnp.sum((narrow.T @ narrow) * (up @ up.T)).clip(0))

    if kinds.kind_of(factors) is Kind.LORA:
        return jax.vmap(of_lora)(factors) if stacked else of_lora(factors)

    def of_other(factors: Factors) -> Any:
        return jnp.linalg.norm(jnp.asarray(kinds.delta(factors)).reshape(-1))

    return jax.lax.map(of_other, factors) if stacked else of_other(factors)
