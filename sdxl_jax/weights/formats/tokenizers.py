"""Tokenizer folders, both ways: vocab.json and merges.txt of old, the one tokenizer.json of transformers 5.

The vocabulary must be CLIP's own, which is all that is implemented; padding and added tokens are the folder's.
"""

import json
from pathlib import Path
from typing import Any

from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import Tower
from sdxl_jax.errors import InputError
from sdxl_jax.files import text as texts
from sdxl_jax.weights.formats import json_files
from sdxl_jax.weights.formats.json_files import Fields


def _word(token: Any) -> str | None:
    """A token of a tokenizer's files: a string, or an object with its "content"."""
    return token["content"] if isinstance(token, dict) else token


def read(directory: Path, vocabulary_size: int) -> tuple[int, tuple[str, ...]]:
    """(padding token, added tokens), once the rest is seen to be CLIP's own.

    Of several files that name the padding, the one counts that transformers' `from_pretrained` heeds.
    """
    try:
        return _parsed_tokenizer(directory, vocabulary_size)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory} has a file of another form than transformers writes ({error!r}). Download it again"
        ) from error


def _parsed_tokenizer(directory: Path, vocabulary_size: int) -> tuple[int, tuple[str, ...]]:
    whole = json_files.read(directory / "tokenizer.json", optional=True)
    if whole:
        vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    else:
        vocabulary = json_files.read(directory / "vocab.json")
        if not (path := directory / "merges.txt").is_file():
            raise InputError(f"{path} is missing. Download the model's directory whole, with its .json and .txt files")
        lines = texts.lines(texts.read_text(path, remedy="Download it again"))
        merges = [line for line in lines if line and not line.startswith("#version")]
    words, lines = text.clip_vocabulary()
    if (vocabulary, merges) != (words, lines):
        raise InputError(
            f"{directory} has {len(vocabulary)} words and {len(merges)} merges that are not CLIP's own {len(words)} "
            f"and {len(lines)}; other vocabularies are not implemented. Use a model with CLIP's tokenizer"
        )
    settings = json_files.read(directory / "tokenizer_config.json", optional=True)
    entries = [(entry["id"], entry["content"]) for entry in whole.get("added_tokens", [])]
    entries += [(int(number), _word(token)) for number, token in settings.get("added_tokens_decoder", {}).items()]
    entries += [
        (number, word) for word, number in json_files.read(directory / "added_tokens.json", optional=True).items()
    ]
    if wrong := sorted({word for number, word in entries if vocabulary.get(word, number) != number}):
        raise InputError(f"{directory} gives words of CLIP's other numbers: {wrong[:3]}. Give added tokens new names")
    added = sorted({(number, word) for number, word in entries if word not in vocabulary})
    words = {word: number for number, word in added}
    numbers = list(range(len(vocabulary), vocabulary_size))
    if [number for number, _ in added] != numbers or len(words) < len(added):
        expected = f"{numbers[0]} to {numbers[-1]}, each once" if numbers else "none"
        raise InputError(
            f"{directory} has the added tokens {added}, but the text encoder's vocab_size={vocabulary_size} "
            f"has room for {expected}. Save tokenizer and text encoder together again"
        )
    # Files that list added_tokens_decoder are read without special_tokens_map.json, others with it before all else.
    named_apart = directory / "special_tokens_map.json"
    special = {} if "added_tokens_decoder" in settings else json_files.read(named_apart, optional=True)
    named = (_word(source.get("pad_token")) for source in (special, settings, whole.get("padding") or {}))
    pad = next((word for word in named if word is not None), "<|endoftext|>")
    if pad not in vocabulary and pad not in words:
        raise InputError(f"{directory} pads with {pad!r}, which is none of its words. Correct pad_token")
    return {**vocabulary, **words}[pad], tuple(words)


def files(tower: Tower) -> dict[str, Fields | str]:
    """The files of a tokenizer's folder, in the form that every version of transformers reads."""
    vocabulary, merges = text.clip_vocabulary()
    words = [*vocabulary, *tower.added_tokens]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = words[tower.pad_token]
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
        files["added_tokens.json"] = {word: first + index for index, word in enumerate(tower.added_tokens)}
    return files
