"""Tokenizer folders, read and written: vocab.json and merges.txt, or the one tokenizer.json of transformers 5.

The vocabulary must be CLIP's own, no other is implemented; padding and added tokens are the folder's.
"""

import json
from typing import Any

from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tower
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.files.text import lines, read_text
from sdxl_jax.weights.formats import json_files
from sdxl_jax.weights.formats.json_files import Fields


def _content(token: Any) -> str | None:
    """A token of a tokenizer's files: a string, or an object with its "content"."""
    return token["content"] if isinstance(token, dict) else token


def read(directory: AnyPath, vocabulary_size: int) -> tuple[int, tuple[str, ...]]:
    """(padding token, added tokens) of a folder whose vocabulary is CLIP's own.

    Where several files name the padding token, the one counts that transformers' `from_pretrained` uses. Raises
    InputError for another vocabulary, and for files that are missing or broken.
    """
    try:
        return _parsed_tokenizer(directory, vocabulary_size)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory} has a file that is not of the form that transformers writes ({type(error).__name__}: {error})"
            ". Download it again"
        ) from error


def _parsed_tokenizer(directory: AnyPath, vocabulary_size: int) -> tuple[int, tuple[str, ...]]:
    whole = json_files.read(directory / "tokenizer.json", optional=True)
    if whole:
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    else:
        vocabulary = json_files.read(directory / "vocab.json")
        if not (path := directory / "merges.txt").is_file():
            raise InputError(f"{path} is missing. Download the model's whole directory, with its .json and .txt files")
        content = read_text(path, remedy="Download it again")
        merges = [line for line in lines(content) if line and not line.startswith("#version")]
    clip_tokens, clip_merges = text.clip_vocabulary()
    if (vocabulary, merges) != (clip_tokens, clip_merges):
        raise InputError(
            f"{directory} has {len(vocabulary)} tokens and {len(merges)} merges that are not CLIP's own "
            f"{len(clip_tokens)} and {len(clip_merges)}; other vocabularies are not implemented. Use a model with "
            "CLIP's tokenizer"
        )
    settings = json_files.read(directory / "tokenizer_config.json", optional=True)
    entries = [(entry["id"], entry["content"]) for entry in whole.get("added_tokens", [])]
    entries += [(int(number), _content(token)) for number, token in settings.get("added_tokens_decoder", {}).items()]
    entries += [
        (token_id, token) for token, token_id in json_files.read(directory / "added_tokens.json", optional=True).items()
    ]
    if wrong := sorted({token for token_id, token in entries if vocabulary.get(token, token_id) != token_id}):
        raise InputError(
            f"{directory} gives tokens of CLIP's vocabulary other ids: {', '.join(map(repr, wrong[:3]))}. Give added "
            "tokens new names"
        )
    added = sorted({(token_id, token) for token_id, token in entries if token not in vocabulary})
    added_ids = {token: token_id for token_id, token in added}
    expected_ids = list(range(len(vocabulary), vocabulary_size))
    if [token_id for token_id, _ in added] != expected_ids or len(added_ids) < len(added):
        expected = f"the ids {expected_ids[0]} to {expected_ids[-1]}, each once" if expected_ids else "none"
        listed = ", ".join(f"{token!r} with id {token_id}" for token_id, token in added[:8])
        raise InputError(
            f"{directory} has {len(added)} added tokens{f', {listed}' if added else ''}, but the text encoder's "
            f"vocab_size={vocabulary_size} has room for {expected}. Save tokenizer and text encoder together again"
        )
    # transformers ignores special_tokens_map.json if tokenizer_config.json has added_tokens_decoder; else it is first.
    special_tokens = directory / "special_tokens_map.json"
    special = {} if "added_tokens_decoder" in settings else json_files.read(special_tokens, optional=True)
    named = (_content(source.get("pad_token")) for source in (special, settings, whole.get("padding") or {}))
    pad = next((token for token in named if token is not None), "<|endoftext|>")
    if pad not in vocabulary and pad not in added_ids:
        raise InputError(f"{directory} pads with {pad!r}, which is not one of its tokens. Correct pad_token")
    return {**vocabulary, **added_ids}[pad], tuple(added_ids)


def files(tower: Tower) -> dict[str, Fields | str]:
    """The files of a tokenizer's folder, in the form that every version of transformers reads."""
    vocabulary, merges = text.clip_vocabulary()
    tokens = [*vocabulary, *tower.added_tokens]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = tokens[tower.pad_token]
    files: dict[str, Fields | str] = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": text.TOKENS,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        },
    }
    if tower.added_tokens:
        first = len(vocabulary)
        files["added_tokens.json"] = {token: first + index for index, token in enumerate(tower.added_tokens)}
    return files
