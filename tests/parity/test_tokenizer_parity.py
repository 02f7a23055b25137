"""Token ids against transformers' `CLIPTokenizer`: equal, for captions and for what nobody would write.

Without tolerance. A difference in one rule (letters, digits, case, spaces, special tokens) shows in one of the texts.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import reference

from sdxl_jax.conditioning import text
from sdxl_jax.conditioning.text import END_OF_TEXT, Tokenizer

ADDED = ("<cat-toy>", "<cat-toy>_1", "Sks", "café", "<Ünïcode>", "a b", "zzq")
NASTY = [
    *("", " ", "\n\t \r", "!", "!!!", "a" * 400, "word " * 100, "1234567890 1 2", "١٢٣ ½ Ⅷ ²", "3.14e-5", "a1b2"),
    *("<|startoftext|>", "a<|endoftext|>b", "<|ENDOFTEXT|> <|endoftext |>", "<|endoftext|><|endoftext|>", "<|pad|>"),
    *("it's they're I'll we've he'd I'm don't", "IT'S THEY'RE I'LL", "‘it’s’ “quoted”", "'s't'll'", "''s", "o'clock"),
    *("café", "cafe\u0301", "ﬁne ﬂow", "İstanbul ıI ẞ ß ΑΣ ΟΔΟΣ", "K Å", "é" * 90, "ａｂｃ １２３", "Ǆ ǅ ǆ"),
    *("a\u00a0b\u2003c\u200bd\ufeffe\u2028f\u0085g\x1ch\x00i", "tab\tand  spaces   ", "\u180e\u3000", "\x7f\x80\x9f"),
    *(
        "日本語のテキスト",
        "한국어",
        "ไทยภาษา",
        "عربى",
        "हिन्दी",
        "🙂👨‍👩‍👧‍👦🏳️‍🌈",
        "𝓪𝔟𝕔 𐍈 \U0010ffff",
        "\ue000\ufffd\uffff",
    ),
    *(
        "&amp; &lt;b&gt;",
        "http://a.b/c?d=e&f#g",
        "a_b-c/d\\e",
        "(word:1.2) [old]",
        "...,,,;;;",
        "-- —– ‐",
        "#hash @at $5 50%",
    ),
    *("CamelCase UPPER lower", "naïve façade", "x²+y³=z⁴", "Ω≈ç√∫˜µ≤≥÷", "\u0301\u0302\u0303", "a\u0301\u0302\u0323b"),
    *(
        "<cat-toy> <CAT-TOY>_1",
        "sks SKS asksb",
        "CAFÉ cafe\u0301 x",
        "<ünïcode>",
        "a  b A\nB",
        "zzzqzzq pizzqa",
        "a<cat-toy>b",
    ),
]


def random_texts(count: int) -> list[str]:
    """Strings of random characters: of all of Unicode, of its first blocks, and of ASCII."""
    rng = np.random.default_rng(0)
    tops = rng.choice([0x80, 0x3000, 0x20000, 0x110000], count)
    codes = [rng.integers(0, top, rng.integers(1, 60)) for top in tops]
    return ["".join(chr(code) for code in each if not 0xD800 <= code < 0xE000) for each in codes]


def captions() -> list[str]:
    """Captions of COCO and prompts of benchmarks, where the folder of test data has them."""
    folder = Path(os.environ.get("SDXL_JAX_TEST_DATA", ""))
    if not (coco := folder / "coco363" / "captions.json").is_file():
        return []
    texts = [caption for image in json.loads(coco.read_text()) for caption in image["captions"]]
    texts += [line for path in sorted(folder.glob("prompts/*.t[xs][tv]")) for line in path.read_text().splitlines()]
    return texts


@pytest.mark.parametrize("added", [(), ADDED])
def test_token_ids_are_those_of_transformers(added: tuple[str, ...]) -> None:
    theirs = reference.clip_tokenizer()
    theirs.add_tokens(list(added))
    texts = [*NASTY, *random_texts(1500), *captions()]
    whole = theirs(texts, verbose=False)["input_ids"]
    # Concepts of several tokens are for `test_textual_inversion_parity`; here the text is as it stands.
    assert [each.ids for each in text._encoder(None, added).encode_batch(texts)] == whole
    assert len({token for row in whole for token in row}) > 1000, "the texts have many tokens"
    assert not added or {*range(49408, 49408 + len(added))} <= {token for row in whole for token in row}
    if not added:
        cut = theirs(texts, truncation=True, max_length=77)["input_ids"]
        for pad in (END_OF_TEXT, 0):
            ours = Tokenizer((("tower", pad, added),))(texts)["tower"]
            assert ours.tolist() == [row + [pad] * (77 - len(row)) for row in cut]
