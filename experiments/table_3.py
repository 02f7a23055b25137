"""Table 3 of the paper: how well autoencoders reconstruct images.

    python experiments/table_3.py MODEL… --images FOLDER                     # e.g. COCO2017's val2017
    python experiments/table_3.py a.safetensors b.safetensors --images photos --count 100 --out runs/table_3

The paper reconstructs the 5,000 images of COCO2017's validation set at 256×256. So does this, with any autoencoders (a
whole model, an autoencoder alone, a training run; two halves as ENCODER+DECODER) and any folder of images, each resized
to cover 256×256 and cropped at the centre. The paper's "LPIPS" is not LPIPS: the same scale on the cards of Stable
Diffusion's autoencoders is called PSIM, which is `psim` here, as far as is known; both are in the table. rFID needs
2,048 images or more.

Ends with OUT/table.md, OUT/results.json and OUT/figure.png: a few images and their reconstructions. Resumes: what is
reconstructed in OUT is kept.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import results
from PIL import Image

from sdxl_jax.evaluation.image_sets import open_images
from sdxl_jax.evaluation.reconstruction import evaluate_autoencoder
from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png

PAPER = [
    {"autoencoder": "SDXL-VAE", "psnr": 24.7, "ssim": 0.73, "psim (the paper's LPIPS)": 0.88, "rfid": 4.4},
    {"autoencoder": "SD-VAE 1.x", "psnr": 23.4, "ssim": 0.69, "psim (the paper's LPIPS)": 0.96, "rfid": 5.0},
    {"autoencoder": "SD-VAE 2.x", "psnr": 24.5, "ssim": 0.71, "psim (the paper's LPIPS)": 0.92, "rfid": 4.7},
]
"""Podell et al., arXiv:2307.01952, table 3."""
SHOWN = 4


def main() -> None:
    began, options = time.monotonic(), arguments()
    rows, columns = [], []
    for number, model in enumerate(options.models):
        folder = options.out / "reconstructions" / f"{number:02d}_{Path(model).stem}"
        first, *others = model.split("+")
        found = evaluate_autoencoder(
            first, options.images, side=options.size, count=options.count, out=folder, parts_from=others
        )
        row: dict[str, str | float | int | None] = {"autoencoder": Path(model).stem}
        for score in found.scores:
            row[score.name] = score.value
        rows.append({**row, "N": found.scores[0].images, "resize": found.scores[0].resize})
        columns.append(folder)
    notes = list(dict.fromkeys(found.notes)) if options.models else []
    print(results.write(options.out, "Table 3: autoencoders", PAPER, rows, notes, began))
    figure(options, columns)


def figure(options: argparse.Namespace, folders: list[Path]) -> None:
    """A row for each of the first images: the image, and its reconstruction by every autoencoder."""
    from sdxl_jax.evaluation.image_sets import Squares

    squares = Squares(open_images(options.images, "the folder"), SHOWN, options.size)
    images, captions = [], []
    for number in range(SHOWN):
        images += [squares.pixels(number), *(np.asarray(Image.open(each / f"{number:06d}.png")) for each in folders)]
        captions += ["original", *(Path(model).stem for model in options.models)]
    save_png(contact_sheet(images, captions, 1 + len(folders)), options.out / "figure.png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a model, an autoencoder, a training run")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--count", type=int, help="number of images, the first by name; default: all")
    parser.add_argument("--size", type=int, default=256, help="side of the squares in pixels; default 256")
    parser.add_argument("--out", type=Path, default=Path("runs/table_3"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
