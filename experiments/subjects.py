"""DreamBooth, measured: does the new token call up the subject, and leave its class alone?

    sdxl-jax quickstart --run-dir runs/quickstart                # the base, about ten minutes
    python experiments/subjects.py dogs/mine:dog cats/mine:cat   # FOLDER:CLASS, a few images of one subject each

Not in the paper. Each subject is trained with three seeds as `sdxl-jax finetune --kind dreambooth` does it: a LoRA
beside images of its class, which the base samples. Then the same noise is sampled with the token ("a photo of zwx dog")
and without it ("a photo of a dog"), and each sample's nearest image is looked for, by the distance of pixels at 32×32,
among the images of all subjects and those of the class. What is measured is the share of samples that are nearest to
the subject: high with the token, low without it.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png (needs matplotlib). The same command again resumes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
from small_model import Images

from sdxl_jax import load_model, text_to_image
from sdxl_jax.data.buckets import Bucket
from sdxl_jax.data.folders import open_folder
from sdxl_jax.data.transforms import centred_crop
from sdxl_jax.evaluation.curve import check_plots
from sdxl_jax.evaluation.prompt_accuracy import hits
from sdxl_jax.finetuning.options import Kind, Options
from sdxl_jax.finetuning.run import CLASS_FOLDER, finetune

PAPER = [{"model": "SDXL", "finding": "fine-tuning is not in the paper"}]
TOKEN, GUIDANCE = "zwx", 3.0


class Subject(NamedTuple):
    folder: Path
    kind: str
    """Its class, in a word."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def prompts(self) -> tuple[str, str]:
        """With the token and without it."""
        return f"a photo of {TOKEN} {self.kind}", f"a photo of a {self.kind}"


def subject(text: str) -> Subject:
    folder, separator, kind = text.rpartition(":")
    if not separator or not folder or not kind:
        raise argparse.ArgumentTypeError(f"{text!r} is not FOLDER:CLASS, e.g. images/rex:dog")
    return Subject(Path(folder), kind)


def images_of(folder: Path, side: int) -> Images:
    """Of a folder, cropped at the centre."""
    source = open_folder(folder, captioned=False)
    return np.stack([centred_crop(source.pixels(image), Bucket(side, side)) for image in range(len(source.sizes))])


def shares(samples: Sequence[Images], name: str, candidates: Images, names: Sequence[str]) -> list[float]:
    """For each set of samples, the share that is nearest to an image with that name. names: of the candidates."""
    return [float(np.mean(hits(each, [name] * len(each), candidates, names))) for each in samples]


def trained(each: Subject, seed: int, options: argparse.Namespace) -> Path:
    """The run of one subject and seed."""
    run = options.out / f"{each.name}_{seed}"
    with_token, without = each.prompts
    chosen = Options(
        prompt=with_token,
        class_prompt=without,
        class_images=options.class_images,
        steps=options.steps,
        size=options.side,
        seed=seed,
        validation_prompt=each.prompts,
    )
    finetune(str(each.folder), str(options.base), Kind.DREAMBOOTH, run, chosen)
    return run


def main() -> None:
    options = arguments()
    began = results.begin(options, ("subjects", "samples", "seeds"))
    check_plots()
    side, rows, strips = options.side, list[dict[str, Any]](), dict[str, Images]()
    subjects = {each.name: images_of(each.folder, side) for each in options.subjects}
    size = {"height": side, "width": side, "guidance": GUIDANCE, "num_images": options.samples, "seed": 1}
    for each in options.subjects:
        strips[f"{each.name}: the images"] = subjects[each.name]
        found = list[list[float]]()
        for seed in range(options.seeds):
            run = trained(each, seed, options)
            of_class = images_of(run / CLASS_FOLDER, side)
            candidates = np.concatenate([*subjects.values(), of_class])
            names = [name for name, images in subjects.items() for _ in images] + ["class"] * len(of_class)
            samples = np.split(text_to_image(load_model(run), each.prompts, progress=True, **size), 2)
            found.append(shares(samples, each.name, candidates, names))
            rows.append({"subject": each.name, "seed": seed, "with token": found[-1][0], "without": found[-1][1]})
            if not seed:
                strips |= {f"{each.name}: {prompt}": one for prompt, one in zip(each.prompts, samples, strict=True)}
        difference = np.array(found) @ [1, -1]
        spread = float(difference.std(ddof=1)) if options.seeds > 1 else None
        mean = dict(zip(("with token", "without"), np.mean(found, axis=0).tolist(), strict=True))
        rows.append({"subject": each.name, **mean, "difference": float(difference.mean()), "± over seeds": spread})
    notes = [f"{options.samples} samples of each prompt; rows without a seed are means", f"{side}×{side}"]
    print(results.write(options.out, "DreamBooth, in small", PAPER, rows, notes, began))
    plot(strips, options.out / "figure.png")


def plot(strips: dict[str, Images], path: Path) -> None:
    """The subjects' images, and samples with and without the token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 * len(strips)))
    grid = figure.add_gridspec(len(strips), 1)
    results.draw_samples(figure, [grid[row, 0] for row in range(len(strips))], strips, 8)
    results.save_figure(figure, path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", type=subject, nargs="+", metavar="FOLDER:CLASS", help="images of one subject")
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="default runs/quickstart")
    parser.add_argument("--side", type=int, default=128, help="of the images, pixels; default 128")
    parser.add_argument("--steps", type=int, default=500, help="of each run; default 500")
    parser.add_argument("--class-images", type=int, default=50, help="of each run; default 50")
    parser.add_argument("--samples", type=int, default=16, help="with the token and without; default 16")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--out", type=Path, default=Path("runs/subjects"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
