"""Training of a new token's vectors beside a frozen model: textual inversion (`TrainConfig.textual_inversion`).

    text encoders, UNet (frozen) ──────────────┐
                                               ├── loss ── gradient of the vectors ── update ── pulled back
    vectors, one set per text encoder ─────────┘

The vectors are the trainable tree, {"embeddings": {"text_encoder": {"embedding": [vectors, features]}}}; what they are
pulled back to is frozen beside the base. With an adapter they are trained together, up to a share of the steps: pivotal
tuning. The rules are in `adapters.embeddings`, files in `weights.textual_inversion`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from sdxl_jax import sharding
from sdxl_jax.adapters.embeddings import ROWS, TABLE, Norm, TextualInversionConfig, pulled_back, target
from sdxl_jax.arrays import Distribution, Parameter, Params, flatten, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tokenizer, Tower
from sdxl_jax.config import TrainConfig
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.optim.optimiser import updates_made
from sdxl_jax.training.initial import placed_network
from sdxl_jax.weights import textual_inversion
from sdxl_jax.weights.lazy import Initial, InMemory, Leaf

EMBEDDINGS = "embeddings"
"""Key of the vectors, in the trainable tree, and of what they are pulled back to, in the frozen one."""


class EmbeddingTraining:
    """What the denoising objective does differently for new embedding vectors. Holds no arrays."""

    def __init__(self, config: TrainConfig, given: TextualInversionConfig):
        self._config, self._given = config, given
        self._stop = max(1, round(given.stop * config.training.steps))

    @functools.cached_property
    def towers(self) -> tuple[Tower, ...]:
        """The text encoders with the new token. Raises InputError for a token that cannot be added to all of them."""
        given, remedy = self._given, "Give another name: textual_inversion.token, e.g. <dog>"
        for tower in self._config.model.text:
            if spare := tower.clip.vocabulary - text.FIRST_ADDED - len(tower.added_tokens):
                raise InputError(
                    f"{tower.name} has {spare} rows without a token at the end of its table, where those of "
                    "textual_inversion would be. Train from a model without them"
                )
        return tuple(
            textual_inversion.with_token(tower, given.token, given.vectors, "textual_inversion", remedy)
            for tower in self._config.model.text
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.of(self.towers)

    @functools.cached_property
    def abstract(self) -> dict[str, Parameter]:
        """The vectors by path."""
        return {
            f"{tower.name}/embedding": Parameter((self._given.vectors, tower.clip.width), Distribution())
            for tower in self._config.model.text
        }

    @functools.cached_property
    def initial(self) -> dict[str, list[int]] | None:
        """By text encoder, the token whose vector each new one begins as; None: random ones. Raises InputError for more
        tokens than vectors."""
        given, found = self._given, dict[str, list[int]]()
        if given.initial is None:
            return None
        for name, rows in Tokenizer.of(self._config.model.text)([given.initial]).items():
            words = rows[0, 1 : rows[0].tolist().index(text.END_OF_TEXT)].tolist()
            if len(words) > given.vectors:
                raise InputError(
                    f"textual_inversion.initial={given.initial!r} is {len(words)} tokens of CLIP's vocabulary, more "
                    f"than textual_inversion.vectors={given.vectors}. Give words of fewer tokens, or set "
                    f"textual_inversion.vectors={len(words)}"
                )
            found[name] = [words[number % len(words)] for number in range(given.vectors)]
        return found

    def check(self) -> None:
        """Raises InputError for a token or words that do not fit the model."""
        _ = self.towers, self.initial

    def check_data(self, dataset: BucketedDataset) -> None:
        """Raises InputError where no caption contains the token."""
        token = self._given.token
        if not any(token.lower() in caption.lower() for caption in dataset.captions()):
            raise InputError(
                f"No caption in {dataset.where} contains {token!r}, so that nothing would be learnt. Write it into the "
                f'captions, or set data.caption_template, e.g. "a photo of {token}, {{caption}}"'
            )

    # State

    def abstract_trees(self) -> tuple[Params, Params]:
        """(trainable, frozen): the abstract trees of vectors, and of what they are pulled back to."""
        frozen = {}
        if self._given.norm is not Norm.FREE:
            frozen = {path.split("/")[0]: {"target": Parameter((), Distribution())} for path in self.abstract}
        return {EMBEDDINGS: unflatten(self.abstract)}, {EMBEDDINGS: frozen} if frozen else {}

    def fresh(self, base: Params, mesh: Mesh) -> tuple[Params, Params]:
        """(trainable, frozen) before the first step. base: the model's parameters."""
        leaves, targets = dict[str, Leaf](), dict[str, Leaf]()
        on_host = jax.jit(lambda value: value, out_shardings=sharding.replicated(mesh))
        for path, leaf in self.abstract.items():
            name = path.split("/")[0]
            table = flatten(base[name])[TABLE]
            if self.initial is None:
                deviation = float(on_host(_target(Norm.DEVIATION, table)))
                random = Parameter(leaf.shape, Distribution(0.0, deviation))
                leaves[path] = Initial(random, f"{EMBEDDINGS}/{path}", self._config.training.seed)
            else:
                rows = on_host(table[jnp.asarray(self.initial[name])])
                leaves[path] = InMemory(np.asarray(rows).astype(np.float32))
            if self._given.norm is not Norm.FREE:
                targets[f"{name}/target"] = InMemory(np.asarray(on_host(_target(self._given.norm, table))))
        frozen = {EMBEDDINGS: placed_network(EMBEDDINGS, targets, mesh)} if targets else {}
        return {EMBEDDINGS: placed_network(EMBEDDINGS, leaves, mesh)}, frozen

    # Step

    def changes(self, trained: Params) -> Params:
        """The vectors as an adapter of the text encoders' tables, by part."""
        vectors = trained[EMBEDDINGS]
        return unflatten({f"{name}/{TABLE}/{ROWS}": each["embedding"] for name, each in vectors.items()})

    def updating(self, optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
        """The optimiser with the vectors' own learning rate, their norms, and their end."""
        given, stop = self._given, self._stop
        if given.rate == 1 and given.norm is Norm.FREE and given.stop == 1:
            return optimiser

        def update(gradient: Params, state: Any, params: Params, *, frozen: Params) -> tuple[Params, optax.OptState]:
            learns = updates_made(state) < stop
            if given.stop < 1:  # before the norm of all gradients is limited
                ended = jax.tree.map(lambda leaf: jnp.where(learns, leaf, 0), gradient[EMBEDDINGS])
                gradient = {**gradient, EMBEDDINGS: ended}
            updates: Any
            updates, state = optimiser.update(gradient, state, params)
            found, before = flatten(updates[EMBEDDINGS]), flatten(params[EMBEDDINGS])
            for path, own in found.items():
                own = own if given.rate == 1 else given.rate * own
                if given.norm is not Norm.FREE:
                    aim = frozen[EMBEDDINGS][path.split("/")[0]]["target"]
                    own = pulled_back(given.norm, before[path] + own, aim) - before[path]
                # −0, not 0: 0 would turn a number of −0 into 0.
                found[path] = own if given.stop == 1 else jnp.where(learns, own, -0.0)
            return {**updates, EMBEDDINGS: unflatten(found)}, state

        return optax.GradientTransformationExtraArgs(optimiser.init, cast(Any, update))

    # The model, and the file

    def merged(self, base: Model, vectors: Params) -> Model:
        """The model with the new token. vectors: of the trainable tree."""
        return textual_inversion.grown(base, self.towers, _by_tower(vectors))

    def on_host(self, vectors: Params, mesh: Mesh) -> dict[str, Float[np.ndarray, "_vectors _features"]]:
        """The vectors by text encoder. All processes call it."""
        whole = jax.jit(lambda tree: tree, out_shardings=sharding.replicated(mesh))(vectors)
        return {name: np.asarray(rows, np.float32) for name, rows in _by_tower(jax.device_get(whole)).items()}

    def bundled(self, vectors: Mapping[str, Float[np.ndarray, "_vectors _features"]]) -> dict[str, Any]:
        """The tensors that go into an adapter's file too; none unless asked for."""
        return textual_inversion.bundle(self._given.token, vectors) if self._given.bundle else {}

    def export(self, vectors: Mapping[str, Float[np.ndarray, "_vectors _features"]], path: Path, step: int) -> None:
        """Writes the vectors to a file."""
        textual_inversion.write(path, vectors, self._config.model, self._given.token, step)


def without_adapters(changes: Params | None) -> Params | None:
    """Of changes by part, the vectors of the new token alone: the frozen model knows the token too."""
    flat = {path: value for path, value in flatten(changes or {}).items() if path.endswith(f"/{ROWS}")}
    return unflatten(flat) or None


def _by_tower(vectors: Params) -> dict[str, Any]:
    return {name: each["embedding"] for name, each in vectors[EMBEDDINGS].items()}


_target = jax.jit(target, static_argnums=0)
