"""Textual inversion: added tokens of a text encoder, whose embedding vectors were learnt from images.

Gal et al. 2022, arXiv:2208.01618. Only the token embedding changes: it gets one row per vector after CLIP's own 49408,
and the tower's `added_tokens` name the rows. A concept `<tok>` of three vectors is the tokens `<tok>`, `<tok>_1` and
`<tok>_2`, as in diffusers; prompts use `<tok>`. Files are safetensors, in one of three forms:

    {"<tok>": [vectors, features]}                              diffusers: one text encoder
    {"emb_params": [vectors, features]}                         AUTOMATIC1111's: the same, named after the file
    {"clip_l": [vectors, 768], "clip_g": [vectors, 1280]}       SDXL's two, named after the file

A single vector may be [features]. A LoRA file may hold such embeddings beside its own tensors, each as bundle_emb.NAME
and one of these keys. Pickled files, which both tools wrote earlier, are refused: loading a pickle may run any program
that is in it.

The pooled vector of a prompt with added tokens is read at the end of the text. transformers reads it at the added token
if its configuration has `eos_token_id: 2`, as those of SDXL do, and warns in a comment that this is incompatible with
added tokens; so diffusers' pooled vector, which SDXL uses, differs there.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sdxl_jax.arrays import Params, type_of_array
from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tower
from sdxl_jax.errors import InputError, nearest_first
from sdxl_jax.files import atomic
from sdxl_jax.files.paths import AnyPath, absolute, located
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.weights.adapter_files import metadata
from sdxl_jax.weights.formats.safetensors import PICKLES, Tensor, Writer, open_file

TOWERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Which text encoder a key of SDXL's files is for."""
BESIDE_ADAPTER = "_emb"
"""After the name of an adapter's file, that of the embedding which was trained with it."""
_NAMELESS = ("emb_params", *TOWERS)
BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+)\.(?P<key>clip_l|clip_g|emb_params|string_to_param\.\*)")
"""A tensor of an embedding bundled in a LoRA file."""
_FORMS = 'Expected {"<token>": vectors}, {"emb_params": vectors} or {"clip_l": vectors, "clip_g": vectors}'

_WHAT = "the embedding"

Vectors = Float[np.ndarray, "_vectors _features"]
Embedding = Float[type_of_array, "_vocabulary _features"]


def read(path: str | PurePath, token: str | None = None) -> dict[str, Vectors]:
    """The vectors of a file by its own keys, float32. token: the one to read, of several in a LoRA's file.

    Raises InputError for a file that is missing, damaged, pickled, or not a textual inversion.
    """
    return _read(located(path, _WHAT), token)[0]


def _read(path: AnyPath, token: str | None) -> tuple[dict[str, Vectors], str]:
    """(vectors by the file's keys, name of the embedding). path: of the file, or of a run that trained it."""
    if path.is_dir():
        names = (f"{absolute(path).name}{end}.safetensors" for end in (BESIDE_ADAPTER, ""))
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} is a pickle, which can run any program when it is loaded. Convert it to .safetensors with the "
            "tool that made it"
        )
    found, _ = open_file(path)
    name = None
    if bundled := _bundled(found):
        name = next((name for name in bundled if token in (name, f"<{name}>")), None)
        name = next(iter(bundled)) if name is None and len(bundled) == 1 else name
        if name is None:
            raise InputError(
                f"{path} holds several embeddings: {', '.join(nearest_first(token or '', bundled))}. Give the name of "
                f"one: --embedding {path}:{next(iter(bundled))} (in Python: token=…)"
            )
        found = bundled[name]
    keys = list(found)
    if len(keys) != 1 and set(keys) != set(TOWERS):
        listed = ", ".join(keys[:4]) + (" …" if len(keys) > 4 else "")
        raise InputError(f"{path} holds {len(keys)} arrays ({listed}) and is not a textual inversion. {_FORMS}")
    vectors = {key: tensor.read() for key, tensor in found.items()}
    for key, rows in vectors.items():
        if rows.ndim not in (1, 2) or not rows.size or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise InputError(
                f"{path} has {key} of shape {rows.shape} and dtype {rows.dtype}. Give one with floating-point vectors "
                "[vectors, features]"
            )
        if not np.isfinite(rows.astype(np.float32)).all():
            raise InputError(
                f"{path} has {key} with non-finite numbers (NaN or inf). Download it again, or use another"
            )
    if name is None:
        name = path.stem if keys[0] in _NAMELESS else keys[0]
    return {key: np.atleast_2d(rows.astype(np.float32)) for key, rows in vectors.items()}, name


def _bundled(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The embeddings bundled in a LoRA file by name, each with the keys that a file of its own would have."""
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        if match := BUNDLED.fullmatch(full):
            key = "emb_params" if match["key"].startswith("string_to_param") else match["key"]
            found.setdefault(match["name"], {})[key] = tensor
    return found


def add(model: Model, path: str | PurePath, token: str | None = None) -> Model:
    """The model with one more concept; the given model is not changed.

    token: its name in prompts; default: the name in the file, or of the file. Selects one of several in a LoRA file.

    Raises InputError for a file that `read` refuses, vectors that do not match all of this model's text encoders, and a
    token that the model has already or that cannot be added.
    """
    path = located(path, _WHAT)
    vectors, name = _read(path, token)
    token = name if token is None else token
    given = _by_tower(model.config.text, vectors, path)

    remedy = 'Give another name with token="…", or --embedding FILE:NAME on the command line'
    towers = [with_token(tower, token, len(given[tower.name]), path, remedy) for tower in model.config.text]
    return grown(model, towers, given)


def with_token(tower: Tower, token: str, vectors: int, where: AnyPath | str, remedy: str) -> Tower:
    """The tower with one more concept. where: what asks for it, for messages; remedy: how to give it another name.

    Raises InputError for a token that the tower has already, or that cannot be added.
    """
    added = (*tower.added_tokens, token, *(f"{token}_{number}" for number in range(1, vectors)))
    _check_names(tower, token, added, where, remedy)
    return _with_tokens(tower, added, text.FIRST_ADDED + len(added))


def grown(model: Model, towers: Sequence[Tower], rows: Mapping[str, Embedding]) -> Model:
    """The model with the last rows of its text encoders' tables added, or in the place of rows that have no token.
    towers: those of the result; rows: by tower."""
    params = dict(model.params)
    for before, tower in zip(model.config.text, towers, strict=True):
        used, new = text.FIRST_ADDED + len(before.added_tokens), rows[tower.name]
        old = _embedding(params, tower)
        if isinstance(old, jax.Array):
            table = jnp.concatenate([old[:used], jnp.asarray(new, old.dtype)])
        else:
            table = np.concatenate([old[:used], np.asarray(new).astype(old.dtype)])
        params[tower.name] = _with_embedding(params[tower.name], table)
    return model._replace(config=dataclasses.replace(model.config, text=tuple(towers)), params=params)


def tensors(vectors: Mapping[str, Vectors]) -> dict[str, Vectors]:
    """The tensors of a file with the vectors of each text encoder, float32: of a model with two, clip_l and clip_g; of
    one with a single one, emb_params."""
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if len(vectors) > 1 else {}
    return {keys.get(name, "emb_params"): np.asarray(rows, np.float32) for name, rows in vectors.items()}


def bundle(token: str, vectors: Mapping[str, Vectors]) -> dict[str, Vectors]:
    """The same tensors, with the names that they have in a LoRA's file."""
    return {f"bundle_emb.{token}.{key}": value for key, value in tensors(vectors).items()}


def write(path: Path, vectors: Mapping[str, Vectors], config: ModelConfig, token: str, step: int) -> None:
    """Writes a file that A1111, ComfyUI, sd-scripts, OneTrainer and diffusers read, atomically. vectors: by text
    encoder. step: of the training."""
    held = tensors(vectors)
    described = {
        "ss_base_model_version": metadata.family(config)[0],
        "ss_output_name": path.stem,
        "ss_steps": str(step),
        **metadata.modelspec(config, "textual-inversion"),
        "modelspec.title": path.stem,
        "modelspec.trigger_phrase": token,
        "modelspec.hash_sha256": f"0x{metadata.hash_of(held)}",
        "format": "pt",
    }
    shapes = {key: (value.shape, value.dtype) for key, value in held.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as partial, Writer(partial, shapes, described) as writer:
        for key, value in held.items():
            writer.put(key, value)


def remove(model: Model, token: str) -> Model:
    """The model without a concept and all of its vectors; the rows of later ones move up.

    Raises InputError for a concept that the model does not have.
    """
    known = names(model)
    if token not in known:
        listed = f"Give one of (nearest first): {', '.join(nearest_first(token, known))}" if known else "It has none"
        raise InputError(f"The model has no textual inversion {token!r}. {listed}")
    towers, params = [], dict(model.params)
    for tower in model.config.text:
        added = tower.added_tokens
        removed = text.concept_tokens(token, added) if token in added else ()
        old = _embedding(params, tower)
        rows = np.array([text.FIRST_ADDED + added.index(each) for each in removed], int)
        new = (jnp if isinstance(old, jax.Array) else np).delete(old, rows, axis=0)
        towers.append(_with_tokens(tower, tuple(each for each in added if each not in removed), len(new)))
        params[tower.name] = _with_embedding(params[tower.name], new)
    return model._replace(config=dataclasses.replace(model.config, text=tuple(towers)), params=params)


def names(model: Model) -> dict[str, int]:
    """The model's concepts by their names in prompts, with their number of vectors; the most of any text encoder."""
    counts: dict[str, int] = {}
    for tower in model.config.text:
        for token, count in text.concepts(tower.added_tokens).items():
            counts[token] = max(count, counts.get(token, 0))
    return counts


def _by_tower(towers: tuple[Tower, ...], vectors: Mapping[str, Vectors], path: AnyPath) -> dict[str, Vectors]:
    """The vectors by text encoder. Raises InputError if one does not fit, or is missing."""
    widths = {tower.name: tower.clip.width for tower in towers}
    if set(vectors) <= set(TOWERS):
        given = {TOWERS[key]: rows for key, rows in vectors.items()}
        if len(given) > 1 and list(widths) == ["text_encoder_2"]:  # the refiner reads one of the base's two
            del given["text_encoder"]
    else:
        (rows,) = vectors.values()
        given = {next((name for name, width in widths.items() if width == rows.shape[1]), "none"): rows}
    if any(widths.get(name) != rows.shape[1] for name, rows in given.items()):
        held = ", ".join(f"{key} {rows.shape[1]}" for key, rows in vectors.items())
        expected = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise InputError(
            f"{path} was made for another family of models: the widths of its vectors are {held}, those of this "
            f"model's text encoders {expected}. Use one that was made for this family"
        )
    if missing := [name for name in widths if name not in given]:
        raise InputError(
            f"{path} has vectors for {' and '.join(given)}, but none for this model's {' and '.join(missing)}. Use one "
            "that was made for this model; if it is in two files, join them in one with the keys clip_l and clip_g"
        )
    return given


def _check_names(tower: Tower, token: str, grown: tuple[str, ...], where: AnyPath | str, remedy: str) -> None:
    """Raises InputError if the tokens from len(tower.added_tokens) on are unusable, or ambiguous with others."""
    before, added = tower.added_tokens, grown[len(tower.added_tokens) :]
    if unusable := [word for word in added if not text.can_be_added(word)]:
        raise InputError(
            f"{where} cannot have the token {unusable[0]!r}: it is in CLIP's own vocabulary, empty, not UTF-8, or "
            f"begins or ends with a space. {remedy}"
        )
    repeated = {word.lower() for word in before} & {word.lower() for word in added}  # prompts are lowercased
    # Or one concept would become vectors of another, as <tok>_1 would of <tok>.
    if repeated or text.concepts(grown) != {**text.concepts(before), token: len(added)}:
        raise InputError(
            f"{where}: the model already has a token {token!r}, or one that would be ambiguous with it; it has "
            f"{', '.join(text.concepts(before))}. {remedy}"
        )


def _embedding(params: Params, tower: Tower) -> Embedding:
    return params[tower.name]["token_embedding"]["embedding"]


def _with_tokens(tower: Tower, added: tuple[str, ...], rows: int) -> Tower:
    return dataclasses.replace(tower, added_tokens=added, clip=dataclasses.replace(tower.clip, vocabulary=rows))


def _with_embedding(params: Params, new: Embedding) -> Params:
    """A tower's parameters with another token embedding, with the sharding of the old one."""
    old = params["token_embedding"]["embedding"]
    placed = jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new
    return {**params, "token_embedding": {**params["token_embedding"], "embedding": placed}}
