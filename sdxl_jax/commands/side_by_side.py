"""`sdxl-jax evaluate side-by-side`: a blind page with pairs of images of two models, and its votes as a table."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from sdxl_jax.commands import evaluate, parsing, sample
from sdxl_jax.commands.evaluate import SamplingFlags
from sdxl_jax.errors import InputError, check_ranges
from sdxl_jax.files import atomic
from sdxl_jax.files.paths import AnyPath

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sdxl_jax.evaluation.side_by_side import ImageFolder, Prompt


@dataclass(frozen=True, kw_only=True)
class SideBySide(SamplingFlags):
    """Write a page on which people compare images of two models without knowing which is whose, or count their votes.
    Sampling resumes."""

    a: tyro.conf.Positional[AnyPath | None] = None
    """The first model, as for sdxl-jax sample, or a folder with its images."""
    b: tyro.conf.Positional[AnyPath | None] = None
    """The second model, or folder."""
    out: Path
    """Folder for page.html, which is all that voters get, key.json, and the images of models in a/ and b/."""
    prompts: Path | None = None
    """Tab-separated prompts with categories: a header with Prompt, Category and perhaps Challenge, as PartiPrompts."""
    per_category: int | None = 5
    """Prompts of each category, chosen at random. None: all."""
    shuffle_seed: int = 0
    """Seed of the choice of prompts, of their order, and of the sides. Whoever knows it can tell A from B."""
    votes: tuple[Path, ...] = ()
    """Files that the page has saved, to count: with --out, and without models."""
    plot: Path | None = None
    """PNG for a plot of the counted votes. Needs matplotlib."""
    compilation_cache: str | None = "user"
    """Folder for compiled programs, which later commands reuse. user: one in your cache folder. None: no folder."""


def run(arguments: list[str]) -> None:
    options = parsing.parse(SideBySide, arguments, "evaluate side-by-side")
    check_ranges(
        [
            ("per_category", options.per_category, 1, math.inf),
            ("shuffle_seed", options.shuffle_seed, 0, 2**32 - 1),
            ("num_images", options.options.num_images, 1, math.inf),
        ]
    )
    if options.votes:
        _count(options)
    else:
        _write(options)


def _count(options: SideBySide) -> None:
    if options.a is not None or options.prompts is not None:
        raise InputError("--votes counts the votes of a page that is there. Leave out the models and --prompts")
    from sdxl_jax.evaluation import curve, votes

    if options.plot is not None:
        curve.check_plots()
    key = votes.read_key(options.out)
    counts = votes.count(key, votes.read_votes(key, options.votes))
    text = votes.table(key, counts)
    atomic.write_text(options.out / "votes.md", text)
    if options.plot is not None:
        votes.plot(key, counts, options.plot)
    print(text, end="")


def _write(options: SideBySide) -> None:
    if options.a is None or options.b is None or options.prompts is None:
        raise InputError(
            "sdxl-jax evaluate side-by-side needs two models or folders of images, and --prompts FILE. To count votes, "
            "give --votes FILE instead"
        )
    if options.plot is not None:
        raise InputError("--plot has no effect without --votes FILE. Give both, or leave it out")
    from sdxl_jax.evaluation import side_by_side

    every = side_by_side.read_prompts(options.prompts)
    chosen = side_by_side.choose(every, options.per_category, options.shuffle_seed)
    a, b = (_images(options, path, name, every, chosen) for path, name in ((options.a, "a"), (options.b, "b")))
    pairs = side_by_side.make_pairs(chosen, options.options.num_images, options.shuffle_seed)
    named = {"a": str(options.a), "b": str(options.b), "shuffle_seed": options.shuffle_seed}
    side_by_side.write(options.out, pairs, a, b, named)
    page, key = (options.out / name for name in (side_by_side.PAGE, side_by_side.KEY))
    print(f"{len(pairs)} pairs in {page}, {page.stat().st_size / 2**20:.1f} MiB; {key} says which image is whose")


def _images(
    options: SideBySide, path: AnyPath, name: str, every: "Sequence[Prompt]", chosen: "Sequence[Prompt]"
) -> "ImageFolder":
    """The images of A or B: those of a folder, or sampled."""
    from sdxl_jax.evaluation import side_by_side

    if side_by_side.has_images(path):
        return side_by_side.open_folder(path, every, chosen, options.options.num_images)
    sample.use_compilation_cache(options.compilation_cache)
    print(f"sampling {name}: {path}", file=sys.stderr)
    given = [sample.PromptSettings(prompt.text, options.negative_prompt, options.options) for prompt in chosen]
    evaluate.sample_into(options.out / name, options, path, given)
    return side_by_side.open_folder(options.out / name, every, chosen, options.options.num_images)
