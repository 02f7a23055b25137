r"""Prompt syntax: brackets that weight words, and how a prompt that is too long is truncated or split into chunks.

    "a (red:1.3) car, [old]"   →   "a " 1 | "red" 1.3 | " car, " 1 | "old" 1/1.1

Weights are those of AUTOMATIC1111's stable-diffusion-webui, `modules/prompt_parser.py`:

    (word)        × 1.1               ((word))      × 1.21: nested weights multiply
    (word:1.2)    × 1.2               [word]        × 1/1.1
    \( \) \[ \] \: \\   the character as text

A colon is text unless a number and the closing bracket follow it. Stricter than webui, this refuses an unbalanced
bracket, a number in square brackets (webui's prompt editing, which is not implemented) and weights beyond ±10. ComfyUI
differs: there a number replaces the weights around it, and square brackets are text.

Each piece is tokenised on its own. The tokens are those of the text without its brackets, unless a bracket stands
within a word or a run of punctuation: "(sun)flower" is read as "sun" and "flower", and "(wow!)!" ends in two tokens
where "wow!!" ends in one. Adjacent text of one weight is one piece, so brackets change nothing if all weights are 1.

A CLIP tower reads 75 tokens. More are truncated, or split into further chunks of 75, each of which is encoded as a
prompt of its own. A chunk ends after the last comma among its last 20 tokens, as in webui
(`modules/sd_hijack_clip.py`); if there is none, after a whole word or a whole concept of textual inversion; and if one
of these fills a whole chunk, within it.

Only the text is handled here: tokens and states are in `text`. No numpy, which the command line imports only after its
arguments are read.
"""

import array
import enum
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from sdxl_jax.errors import InputError

CHUNK = 75
"""Tokens of a chunk, without its start and end."""
NEAR_THE_END = 20
"""A comma among so many last tokens of a chunk ends it, and those after it move to the next."""
STEP = 1.1
"""Weight of brackets without a number."""
LARGEST_WEIGHT = 10.0
"""Beyond it, positive or negative, states are so far from any that a UNet has seen that it is a typing error: 12 for
1.2."""


class LongPrompts(enum.Enum):
    """How tokens beyond the first 75 are treated."""

    TRUNCATE = "truncate"
    """They are not read."""
    CHUNKS = "chunks"
    """They are encoded in further chunks, and the UNet attends to all: 77 more states per chunk."""


class WeightedText(NamedTuple):
    """A piece of a prompt with one weight."""

    text: str
    """Without brackets and escapes."""
    weight: float
    """−10 to 10, a float32."""


def check_text(given: str, what: str) -> None:
    """Raises InputError for what cannot be tokenised: anything but a str, and lone surrogates, which stand for bytes of
    a command line that are not UTF-8, and which JSON can hold."""
    if not isinstance(given, str):
        raise InputError(f"{what} is of type {type(given).__name__}. Give a str")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        near = given[max(0, error.start - 20) : error.start + 20]
        raise InputError(
            f"{what} is not UTF-8 text, at character {error.start + 1}, near {near!a}. Give it in UTF-8. The output of "
            "a terminal or script in another encoding, such as Latin-1, is converted by iconv -f latin1 -t utf-8"
        ) from error


_LEXEMES = re.compile(
    r"""
    \\ (?P<escaped> [\]\[():\\] )
    | (?P<colon> : \s* (?= [-+.,]* [0-9] ) (?P<number> [-+.,eE0-9]+ ) \s* )? (?P<close> [\])] )
    | (?P<open> [\[(] )
    | (?P<text> . )
    """,
    re.VERBOSE | re.DOTALL,
)


def weighted_texts(prompt: str) -> list[WeightedText]:
    """The prompt's text in pieces of one weight; adjacent pieces have different weights.

    Raises InputError for an unbalanced bracket and for a number that is not a weight, with its position.
    """
    characters: list[str] = []
    weights: list[float] = []
    positions: list[int] = []
    opened: list[tuple[int, int]] = []  # position in the prompt, number of characters before
    for found in _LEXEMES.finditer(prompt):
        if found["open"]:
            opened.append((found.start(), len(characters)))
        elif found["close"]:
            at, start = opened.pop() if opened else (None, 0)
            factor = _factor(prompt, at, found)
            weights[start:] = [weight * factor for weight in weights[start:]]
        else:
            characters.append(found["escaped"] or found["text"])
            weights.append(1.0)
            positions.append(found.start())
    if opened:
        at, _ = opened[-1]
        raise _refusal(
            prompt, at, f"{prompt[at]} is never closed", f"Close it, or write \\{prompt[at]} where it is text"
        )
    for weight, position in zip(weights, positions, strict=True):
        if not abs(weight) <= LARGEST_WEIGHT:  # so that NaN, 0 · ∞, is refused too
            size = f"{weight:g}" if math.isfinite(weight) else "not finite"
            remedy = f"Give −{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g} for the product of all brackets around it"
            raise _refusal(
                prompt, position, f"the weight is {size}", remedy + r", or write \: for a colon that is text"
            )
    # float32, as they are used: 1.1 · (1 / 1.1) must not differ from 1.
    weighted = zip(characters, array.array("f", weights), strict=True)
    groups = itertools.groupby(weighted, key=lambda pair: pair[1])
    return [WeightedText("".join(character for character, _ in group), weight) for weight, group in groups]


def _factor(prompt: str, opened_at: int | None, found: re.Match[str]) -> float:
    """The factor that a closing bracket, with the number before it, gives the weights within."""
    close, number = found["close"], found["number"]
    at = found.start("close")
    as_text = f"Write \\{close} where it is text"
    if opened_at is None:
        raise _refusal(prompt, at, f"{close} closes nothing", as_text)
    opening = prompt[opened_at]
    if opening + close not in ("()", "[]"):
        raise _refusal(
            prompt, at, f"{close} does not close the {opening} at character {opened_at + 1}, which is open", as_text
        )
    if number is None:
        return STEP if opening == "(" else 1 / STEP
    at = found.start("colon")
    if opening == "[":
        remedy = r"Give it in round brackets, (word:0.8), or write \: for a colon that is text"
        raise _refusal(prompt, at, f"the number {number} stands in square brackets", remedy)
    try:
        return float(number)
    except ValueError as error:
        remedy = r"Give one such as 1.2, or write \: for a colon that is text"
        raise _refusal(prompt, at, f"{number} is not a number", remedy) from error


def _refusal(prompt: str, at: int, what: str, remedy: str) -> InputError:
    start, end = max(0, at - 20), at + 21
    near = "…" * (start > 0) + prompt[start:end] + "…" * (end < len(prompt))
    return InputError(f"Prompt weights: at character {at + 1} of the prompt, near {near!r}, {what}. {remedy}")


def chunk_ends(joined: Sequence[bool], commas: Sequence[bool]) -> list[int]:
    """Where the chunks of a prompt end, as numbers of tokens from its beginning; the last is the prompt's own end.

    joined: whether each token belongs to one word with the next. commas: whether each is a comma. No tokens: [0].
    """
    ends = [0]
    while len(joined) - ends[-1] > CHUNK:
        full = ends[-1] + CHUNK
        after_comma = (end for end in range(full, full - NEAR_THE_END, -1) if commas[end - 1])
        after_word = (end for end in range(full, ends[-1], -1) if not joined[end - 1])
        ends.append(next(itertools.chain(after_comma, after_word), full))
    return [*ends[1:], len(joined)]
