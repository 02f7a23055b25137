"""Figures 2, 3, 5 and 13 of the paper, each by one command with the paper's prompts and settings.

    python experiments/figures.py 2 IMAGES                                   # the sizes of a data set, and what is lost
    python experiments/figures.py 3 MODEL --out runs/figure_3                # four original sizes, one noise
    python experiments/figures.py 5 MODEL --out runs/figure_5                # four crops, one noise
    python experiments/figures.py 13 MODEL … --captions FOLDER --clip CLIP   # FID against CLIP score over guidance

Each prints the `sdxl-jax` command that it runs; whatever follows `--` is appended to it, e.g. `-- --dtype bfloat16`.
IMAGES is what training reads, MODEL anything that `sdxl-jax sample` opens. For a model that was trained at other sizes
give --side, the side of its images: original sizes and crops are the paper's fractions of it. A model of classes is
given --class in place of the paper's prompts.

Ends with OUT/figure.png, OUT/table.md and OUT/results.json. In the table are, of figure 2, the share of images that
each minimum size would discard; of 3 and 5, the high frequencies of the images, as a ratio to those of the first
column; of 13, the points of the curves.

Figures 3 and 5: DDIM, 50 steps, guidance 8 (appendix on conditioning). Figure 13: the paper gives neither scales nor
number of images; here are those of Stable Diffusion 1's own curve, 1.5 to 8, 50 steps; 10,000 captions, where FOLDER
has as many. It has captioned images as training reads them; one caption of each is used, so that COCO's val2017, whose
annotations are written beside its images first, has 5,000.
"""

import argparse
import contextlib
import io
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import results
from cifar10 import high_frequencies
from PIL import Image

from sdxl_jax.__main__ import main as run
from sdxl_jax.data.inspection import open_dataset
from sdxl_jax.data.plots import PAPER_MINIMUM_PX, share_discarded
from sdxl_jax.data.settings import DataConfig

PROMPTS = {
    "3": (
        "A robot painted as graffiti on a brick wall. a sidewalk is in front of the wall, and grass is growing out of "
        "cracks in the concrete.",
        "Panda mad scientist mixing sparkling chemicals, artstation.",
    ),
    "5": (
        "An astronaut riding a pig, highly realistic dslr photo, cinematic shot.",
        "A capybara made of lego sitting in a realistic, natural field.",
    ),
}
SIDES = {"3": 512, "5": 1024}
"""Of the paper's images, in pixels."""
PAPER: dict[str, list[results.Row]] = {
    "2": [{"smaller than, pixels": PAPER_MINIMUM_PX, "discarded": 0.39}],
    "3": [{"finding": "images; no number is given"}],
    "5": [{"finding": "images; no number is given"}],
    "13": [{"finding": "curves of SD 1.5, SD 2.1 and SDXL; no table is given"}],
}
MINIMA = (64, 128, 256, 512, 1024)
"""Minimum sizes whose loss figure 2 tells, in pixels."""
AS_THE_PAPER = ("--sampler", "ddim", "--steps", "50")


def command(options: argparse.Namespace) -> list[str]:
    """The arguments of `sdxl-jax`. Raises SystemExit for arguments that do not fit the figure."""
    figure, given, out = options.figure, options.given, folder(options)
    if figure == "13":
        missing = [name for name in ("captions", "clip") if getattr(options, name) is None]
        if missing:
            sys.exit(f"error: figure 13 needs --{' and --'.join(missing)}")
        of = ["--captions", str(options.captions), "--clip", str(options.clip), "--resize", "clean"]
        of += [] if options.prompts is None else ["--prompts", str(options.prompts)]
        of += [] if options.side is None else ["--height", str(options.side), "--width", str(options.side)]
        return ["evaluate", "curve", *given, "--out", str(out), *of, *AS_THE_PAPER, "--json", *options.more]
    if len(given) != 1:
        sys.exit(f"error: figure {figure} is of one {'data set' if figure == '2' else 'model'}, not of {len(given)}")
    if figure == "2":
        return ["data", "inspect", *given, "--plot", str(out / "figure.png"), *options.more]
    prompts = [word for number in options.classes for word in ("--class", str(number))]
    if not prompts:
        prompts = [word for prompt in options.prompt or PROMPTS[figure] for word in ("--prompt", prompt)]
    side = options.side or SIDES[figure]
    size = ["--height", str(side), "--width", str(side)]
    many = [*AS_THE_PAPER, "--guidance", "8", "--num-images", "4" if figure == "3" else "1"]
    option, values = _sweep(figure, side)
    sweep = ["--sweep", f"{option}={';'.join(values)}", "--out", str(out / "images")]
    return ["sample", *given, *prompts, *size, *many, *sweep, *options.more]


def folder(options: argparse.Namespace) -> Path:
    return options.out or Path("runs") / f"figure_{options.figure}"


def _sweep(figure: str, side: int) -> tuple[str, list[str]]:
    """An option of `sdxl-jax sample`, and its values: the columns of the figure."""
    if figure == "3":
        return "original-size", [f"{side // part}x{side // part}" for part in (8, 4, 2, 1)]
    quarter, half = side // 4, side // 2
    return "crop", ["0,0", f"0,{quarter}", f"{quarter},0", f"{half},{half}"]


def rows_of_sizes(options: argparse.Namespace) -> list[results.Row]:
    """Of figure 2: what each minimum size would discard."""
    sizes = open_dataset(DataConfig(folder=options.given[0]), captioned=False).source.sizes
    return [
        {"smaller than, pixels": least, "discarded": share_discarded(sizes, least), "N": len(sizes)} for least in MINIMA
    ]


def rows_of_images(options: argparse.Namespace) -> list[results.Row]:
    """Of figures 3 and 5: the images of each column, which `sdxl-jax sample` has written one column after the other."""
    files = sorted((folder(options) / "images").glob("[0-9]*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    option, values = _sweep(options.figure, options.side or SIDES[options.figure])
    energies = [high_frequencies(column) for column in np.split(images, len(values))]
    return [
        {option: value, "high frequencies": energy / energies[0], "N": len(images) // len(values)}
        for value, energy in zip(values, energies, strict=True)
    ]


def rows_of_curve(printed: str) -> list[results.Row]:
    """Of figure 13. printed: by `sdxl-jax evaluate curve --json`."""
    return [
        {
            "model": point["model"],
            "guidance": point["guidance"],
            **{score["name"]: score["value"] for score in point["scores"]},
            "N": point["scores"][0]["images"],
        }
        for point in json.loads(printed)
    ]


def draw(options: argparse.Namespace) -> int:
    """Runs the command, and writes what every experiment writes. Returns the command's exit status."""
    began, out, words, printed = time.monotonic(), folder(options), command(options), io.StringIO()
    print(shlex.join(["sdxl-jax", *words]), file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(printed) if options.figure == "13" else contextlib.nullcontext():
        status = run(words)
    if status:
        return status
    if options.figure == "13":
        rows = rows_of_curve(printed.getvalue())
        shutil.copyfile(out / "curve.png", out / "figure.png")
    elif options.figure == "2":
        rows = rows_of_sizes(options)
    else:
        rows = rows_of_images(options)
        shutil.copyfile(out / "images" / "sweep.png", out / "figure.png")
    name = f"Figure {options.figure}"
    print(results.write(out, name, PAPER[options.figure], rows, [shlex.join(["sdxl-jax", *words])], began))
    return 0


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if given is None else given)
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("2", "3", "5", "13"), help="number of the paper's figure")
    parser.add_argument("given", nargs="+", help="the data set of figure 2; the model, or models, of the others")
    parser.add_argument("--prompt", action="append", help="figures 3 and 5: in place of the paper's; may be repeated")
    parser.add_argument(
        "--class", dest="classes", type=int, action="append", default=[], help="figures 3 and 5: in place of prompts"
    )
    parser.add_argument("--side", type=int, help="of the images; default 512, 1024, and of figure 13 the model's own")
    parser.add_argument("--captions", type=Path, help="figure 13: folder of captioned images")
    parser.add_argument("--clip", type=Path, help="figure 13: CLIP with both towers")
    parser.add_argument("--prompts", type=int, help="figure 13: number of captions; default: all")
    parser.add_argument("--out", type=Path, help="folder of the results; default runs/figure_N")
    options = parser.parse_args(own)
    options.more = more
    return options


if __name__ == "__main__":
    sys.exit(draw(arguments()))
