"""A blind comparison of two models by people: pairs of images of the same prompt, on a page that does not say which is
whose. Figures 10 to 12 of Podell et al. (arXiv:2307.01952) are such votes over PartiPrompts.

    prompts of each category ── pairs, shuffled ──┬── page.html: images, no names
                                                  └── key.json: which image is whose, for `votes`

Sides and order follow from a seed. Each side has either model equally often. Images are encoded again, as JPEG of
quality 95 without chroma subsampling, so that the page holds neither file names nor what was written in the files.
"""

import base64
import csv
import hashlib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdxl_jax.conditioning.prompts import check_text
from sdxl_jax.errors import InputError
from sdxl_jax.files import atomic
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.files.text import read_text
from sdxl_jax.progress import tqdm
from sdxl_jax.sampling import init_images
from sdxl_jax.weights.formats.local_copies import local_copy

PAGE, KEY = "page.html", "key.json"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_QUALITY = 95


class Prompt(NamedTuple):
    """A line of a file of prompts."""

    number: int
    """Of the line, from 0, without the header."""
    text: str
    category: str
    challenge: str
    """ "" where the file has none."""


class Pair(NamedTuple):
    """Two images of a prompt, one of each model."""

    prompt: Prompt
    image: int
    """Number of the image among those of the prompt."""
    a_is_left: bool


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts with categories, in PartiPrompts' layout: tab-separated, with a header that has Prompt, Category and
    perhaps Challenge. Raises InputError for any other file."""
    rows = list(csv.reader(io.StringIO(read_text(path)), delimiter="\t", quoting=csv.QUOTE_NONE))
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if missing := [name for name in ("prompt", "category") if name not in header]:
        raise InputError(
            f"{path} has no column {' and no column '.join(missing)}. Give a tab-separated file whose first line names "
            "its columns, Prompt and Category among them, as PartiPrompts.tsv"
        )
    prompts = []
    for number, row in enumerate(filter(any, rows[1:])):
        cells = dict(zip(header, (cell.strip() for cell in row), strict=False))
        text, category = cells.get("prompt", ""), cells.get("category", "")
        if not text or not category:
            raise InputError(f"{path}: prompt {number + 1} has no text or no category. Give both, or remove its line")
        check_text(text, f"Prompt {number + 1}")
        prompts.append(Prompt(number, text, category, cells.get("challenge", "")))
    if not prompts:
        raise InputError(f"{path} has no prompts. Give one per line, after the header")
    return prompts


def choose(prompts: Sequence[Prompt], per_category: int | None, seed: int) -> list[Prompt]:
    """So many prompts of each category, at random, in the file's order; None: all. Raises InputError for a category
    that has fewer."""
    if per_category is None:
        return list(prompts)
    rng, chosen = np.random.default_rng((seed, 0)), list[Prompt]()
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.category == category]
        if len(own) < per_category:
            raise InputError(
                f"per_category={per_category}: the category {category} has {len(own)} prompts. Give at most that many"
            )
        chosen += [own[index] for index in rng.choice(len(own), per_category, replace=False)]
    return sorted(chosen)


def make_pairs(prompts: Sequence[Prompt], images: int, seed: int) -> list[Pair]:
    """The pairs in the page's order: by category, shuffled within it. images: of each prompt."""
    rng = np.random.default_rng((seed, 1))
    of_prompts = [(prompt, image) for prompt in prompts for image in range(images)]
    sides = rng.permutation(np.arange(len(of_prompts)) % 2 == 0)
    pairs = [Pair(*each, bool(left)) for each, left in zip(of_prompts, sides, strict=True)]
    categories = sorted({prompt.category for prompt in prompts})
    shuffled = [pairs[index] for index in rng.permutation(len(pairs))]
    return [pair for category in categories for pair in shuffled if pair.prompt.category == category]


class ImageFolder(NamedTuple):
    """The images of prompts in a folder, by their places: of prompt, then of image."""

    folder: AnyPath
    names: Sequence[str]

    def read(self, place: int) -> UInt8[np.ndarray, "height width 3"]:
        return init_images.read(local_copy(self.folder / self.names[place]))


def has_images(folder: AnyPath) -> bool:
    """Whether a path is a folder of images, not a model."""
    return folder.is_dir() and any(path.suffix.lower() in _SUFFIXES for path in folder.iterdir())


def open_folder(folder: AnyPath, every: Sequence[Prompt], chosen: Sequence[Prompt], images: int) -> ImageFolder:
    """The images of the chosen prompts in a folder that has those of the chosen or of all prompts, in their order, as
    `sample` numbers them. images: of each prompt.

    Raises InputError for another number of images, and for one that says that its prompt is another.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    numbered = [name for name in names if Path(name).stem.isdecimal()]
    names = numbered or names  # without contact_sheet.png and its kin
    if len(names) == images * len(every):
        names = [names[prompt.number * images + image] for prompt in chosen for image in range(images)]
    if len(names) != images * len(chosen):
        raise InputError(
            f"{folder} has {len(names)} images. Expected {images * len(chosen)}, {images} of each of the "
            f"{len(chosen)} prompts that were chosen, or {images * len(every)}, of all"
        )
    for place, name in enumerate(names):
        told, prompt = _prompt_of(folder / name), chosen[place // images]
        if told is not None and told != prompt.text:
            raise InputError(
                f"{folder / name} is an image of the prompt {told!r}, expected one of {prompt.text!r}. Give a folder "
                "with images of these prompts, in their order"
            )
    return ImageFolder(folder, names)


def _prompt_of(path: AnyPath) -> str | None:
    """What an image of `sample` says of its prompt."""
    if path.suffix.lower() != ".png":
        return None
    try:
        with path.open("rb") as file, Image.open(file, formats=("PNG",)) as image:
            return image.info.get("prompt")
    except OSError:
        return None  # `read` names the file


def write(out: Path, pairs: Sequence[Pair], a: ImageFolder, b: ImageFolder, key: dict[str, Any]) -> None:
    """Writes page.html and key.json, the key last; atomically. key: what else it should say, with the models' names.

    Raises InputError where the folder has the key of another page, and as reading an image does.
    """
    lines = [
        {
            "prompt": pair.prompt.text,
            "category": pair.prompt.category,
            "challenge": pair.prompt.challenge,
            "image": pair.image,
            "left": "a" if pair.a_is_left else "b",
        }
        for pair in pairs
    ]
    content = {**key, "pairs": lines}
    page = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    text = json.dumps({"page": page, **content}, indent=1, ensure_ascii=False) + "\n"
    if (out / KEY).exists() and (out / KEY).read_text(encoding="utf-8") != text:
        raise InputError(f"{out / KEY} is the key of another page. Give a new folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    places = {prompt: place for place, prompt in enumerate(sorted({pair.prompt for pair in pairs}))}
    images = 1 + max(pair.image for pair in pairs)
    with atomic.replacing(out / PAGE) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(_HEAD.replace("PAGE_ID", page).replace("PAIR_COUNT", str(len(pairs))))
        category = None
        for number, pair in enumerate(tqdm(pairs, "writing the page", disable=None)):
            if pair.prompt.category != category:
                category = pair.prompt.category
                file.write(f"<h2>{html.escape(category)}</h2>\n")
            place = places[pair.prompt] * images + pair.image
            shown = [source.read(place) for source in ((a, b) if pair.a_is_left else (b, a))]
            file.write(_pair(number, pair.prompt.text, shown))
        file.write(_TAIL)
    atomic.write_text(out / KEY, text)


def _pair(number: int, prompt: str, images: Sequence[UInt8[np.ndarray, "_height _width 3"]]) -> str:
    shown = "".join(f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{_jpeg(image)}">' for image in images)
    choices = "".join(
        f'<label><input type="radio" name="pair-{number}" value="{value}">{label}</label>'
        for value, label in (("left", "left"), ("same", "no preference"), ("right", "right"))
    )
    return f"<section><p>{html.escape(prompt)}</p><div>{shown}</div><fieldset>{choices}</fieldset></section>\n"


def _jpeg(image: UInt8[np.ndarray, "height width 3"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode()


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which image is better?</title>
<style>
body { font: 16px/1.4 system-ui, sans-serif; max-width: 1100px; margin: 0 auto; padding: 0 1rem 6rem; color: #222; }
section { margin: 0 0 3rem; }
section p { font-weight: 600; }
section div { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
img { width: 100%; height: auto; border-radius: 4px; }
fieldset { border: 0; display: grid; grid-template-columns: 1fr 1fr 1fr; text-align: center; padding: .6rem 0; }
label { cursor: pointer; }
input { margin-right: .4rem; }
footer { position: fixed; bottom: 0; left: 0; right: 0; background: #f4f4f4; border-top: 1px solid #ccc; padding: .7rem;
  display: flex; gap: 1rem; justify-content: center; align-items: center; }
</style>
<h1>Which image is better?</h1>
<p>Of each pair choose the image that you prefer for its prompt. Votes stay in this browser until you save them to a
file, with the button at the bottom; send that file back.</p>
<script>const page = "PAGE_ID", pairs = PAIR_COUNT;</script>
"""
_TAIL = """<footer>
<span id="count"></span>
<input id="voter" placeholder="Your name, if you like">
<button id="save">Save votes</button>
</footer>
<script>
const store = "votes-" + page;
const votes = JSON.parse(localStorage.getItem(store) || "{}");
const ballot = localStorage.getItem("ballot-" + page) || `${Date.now()}-${Math.random()}`;
localStorage.setItem("ballot-" + page, ballot);
const show = () => document.getElementById("count").textContent = `${Object.keys(votes).length} of ${pairs}`;
for (const [number, choice] of Object.entries(votes)) {
  const input = document.querySelector(`input[name="pair-${number}"][value="${choice}"]`);
  if (input) input.checked = true;
}
document.addEventListener("change", event => {
  if (event.target.type !== "radio") return;
  votes[event.target.name.slice(5)] = event.target.value;
  localStorage.setItem(store, JSON.stringify(votes));
  show();
});
document.getElementById("save").addEventListener("click", () => {
  const voter = document.getElementById("voter").value;
  const content = JSON.stringify({page, ballot, voter, votes}, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], {type: "application/json"}));
  link.download = `votes-${page}${voter ? "-" + voter.replace(/[^A-Za-z0-9]+/g, "_") : ""}.json`;
  link.click();
});
show();
</script>
</html>
"""
