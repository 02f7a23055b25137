"""Makes `pictures.zip`, the small captioned image set of the quickstart.

Source: the npm package `@lobehub/fluent-emoji-3d` (Microsoft's Fluent Emoji as 256 x 256 WebP images with
transparency, named by code point). Each subject is trimmed to its visible part, laid on a pastel canvas whose aspect
ratio lies near one of three buckets, and stored as JPEG at one of many sizes; some subjects have a second, much smaller
image. `PICTURES.md` describes the origin of the images and their licence.

Run: `python -m sdxl_jax.quickstart.make_images PATH_TO_PACKAGE OUT.zip`
(PATH_TO_PACKAGE is the unpacked package, the folder with `assets/`). Needs Pillow with WebP.
"""

import io
import json
import math
import random
import sys
import zipfile
from pathlib import Path

from PIL import Image

SEED = 7
MARGIN = 0.035  # free space on each side of the subject after any crop, as a fraction of the subject's side
ALPHA_FLOOR = 8  # alpha at or below this counts as empty when trimming
MAIN_SIDES = (128, 256)  # long side of the main images, smallest and largest
SMALL_SIDES = (36, 56)  # the same for the second, small images
SMALL_PER_BUCKET = 12
JPEG_QUALITY = 93
FIXED_TIME = (1980, 1, 1, 0, 0, 0)

BUCKETS = {"wide": (96, 160), "square": (128, 128), "tall": (160, 96)}  # height, width

BACKGROUNDS = {
    "animal": (253, 240, 200),
    "food": (200, 226, 250),
    "vehicle": (206, 240, 212),
    "plant": (252, 216, 224),
    "object": (224, 214, 248),
    "outdoors": (158, 198, 240),
}

# Bucket -> (file in the package's assets/, caption, kind). The caption also gives the image its file name.
SUBJECTS: dict[str, list[tuple[str, str, str]]] = {
    "wide": [
        ("1f3ce-fe0f.webp", "a red racing car", "vehicle"),
        ("1f68c.webp", "an orange and white bus", "vehicle"),
        ("1f6b2.webp", "a bicycle", "vehicle"),
        ("1f6a4.webp", "a speedboat on the water", "vehicle"),
        ("1f422.webp", "a green turtle", "animal"),
        ("1f99b.webp", "a grey hippopotamus", "animal"),
        ("1f405.webp", "a striped tiger", "animal"),
        ("1f985.webp", "an eagle in flight", "animal"),
        ("1f32e.webp", "a taco", "food"),
        ("1f968.webp", "a salted pretzel", "food"),
        ("1f35b.webp", "a bowl of curry", "food"),
        ("1f36e.webp", "a caramel custard", "food"),
        ("2601-fe0f.webp", "a white cloud", "outdoors"),
        ("1f5fb.webp", "a snow-capped mountain", "outdoors"),
        ("1f576-fe0f.webp", "a pair of sunglasses", "object"),
        ("1f45e.webp", "a brown leather shoe", "object"),
        ("1f4f7.webp", "a photo camera", "object"),
        ("1f452.webp", "a straw hat", "object"),
        ("1f455.webp", "a green shirt", "object"),
        ("1f6cf-fe0f.webp", "a blue bed", "object"),
    ],
    "square": [
        ("1f433.webp", "a spouting whale", "animal"),
        ("1f98b.webp", "an orange butterfly", "animal"),
        ("1f438.webp", "a frog face", "animal"),
        ("1f43c.webp", "a panda face", "animal"),
        ("1f99c.webp", "a colourful parrot", "animal"),
        ("1f419.webp", "an octopus", "animal"),
        ("1f349.webp", "a slice of watermelon", "food"),
        ("1f369.webp", "a chocolate doughnut", "food"),
        ("1f347.webp", "a bunch of grapes", "food"),
        ("1f9c1.webp", "a cupcake with sprinkles", "food"),
        ("1f682.webp", "a steam locomotive", "vehicle"),
        ("1f680.webp", "a flying rocket", "vehicle"),
        ("1f681.webp", "a helicopter", "vehicle"),
        ("1f335.webp", "a green cactus", "plant"),
        ("1f341.webp", "a red maple leaf", "plant"),
        ("1f308.webp", "a rainbow", "outdoors"),
        ("1fa90.webp", "a planet with rings", "outdoors"),
        ("26c4.webp", "a snowman with a scarf", "outdoors"),
        ("1f381.webp", "a yellow gift box", "object"),
        ("2602-fe0f.webp", "an open umbrella", "object"),
    ],
    "tall": [
        ("1f9a9.webp", "a pink flamingo", "animal"),
        ("1f989.webp", "a brown owl", "animal"),
        ("1f98e.webp", "a green lizard", "animal"),
        ("1f37f.webp", "a box of popcorn", "food"),
        ("1f9c3.webp", "a carton of apple juice", "food"),
        ("1f353.webp", "a ripe strawberry", "food"),
        ("1f34d.webp", "a pineapple", "food"),
        ("1f339.webp", "a red rose", "plant"),
        ("1f384.webp", "a christmas tree", "plant"),
        ("1f33b.webp", "a yellow sunflower", "plant"),
        ("1fab4.webp", "a plant in a pot", "plant"),
        ("1f68a.webp", "a red tram", "vehicle"),
        ("1f9f3.webp", "a blue suitcase", "object"),
        ("1f4a1.webp", "a light bulb", "object"),
        ("1f6a6.webp", "a traffic light", "object"),
        ("1fa91.webp", "a wooden chair", "object"),
        ("1f9ef.webp", "a fire extinguisher", "object"),
        ("1f388.webp", "a red balloon", "outdoors"),
        ("1f5fc.webp", "a red steel tower", "outdoors"),
        ("1f525.webp", "an orange flame", "outdoors"),
    ],
}


def trimmed(path: Path) -> Image.Image:
    """The emoji cut to the bounding box of its visible pixels."""
    image = Image.open(path).convert("RGBA")
    visible = image.getchannel("A").point([255 * (alpha > ALPHA_FLOOR) for alpha in range(256)])
    return image.crop(visible.getbbox())


def canvas_size(width: int, height: int, bucket_aspect: float, jitter: float) -> tuple[int, int]:
    """Width and height of the canvas for a subject, at the subject's own scale.

    The aspect ratio lies between the subject's and the bucket's, changed a little by `jitter`. The canvas is just large
    enough that no crop of the bucket's aspect ratio (and of full width or full height) can reach the subject.
    """
    aspect = (width / height) ** 0.3 * bucket_aspect**0.7 * jitter
    aspect = min(max(aspect, bucket_aspect / 1.14), bucket_aspect * 1.14)
    padded_width, padded_height = width * (1 + 2 * MARGIN), height * (1 + 2 * MARGIN)
    # A crop window may slide by the left-over length, so the part inside every window is twice the window less the
    # canvas.
    if aspect < bucket_aspect:  # the crop takes the full width and cuts above and below
        crop_height = max(padded_width / bucket_aspect, padded_height / (2 - bucket_aspect / aspect))
        canvas_width = crop_height * bucket_aspect
    else:  # it takes the full height and cuts left and right
        crop_width = max(padded_height * bucket_aspect, padded_width / (2 - aspect / bucket_aspect))
        canvas_width = crop_width / bucket_aspect * aspect
    return math.ceil(canvas_width), math.ceil(canvas_width / aspect)


def compose(subject: Image.Image, size: tuple[int, int], background: tuple[int, int, int]) -> Image.Image:
    """The subject in the middle of a plain canvas."""
    canvas = Image.new("RGB", size, background)
    canvas.paste(subject, ((size[0] - subject.width) // 2, (size[1] - subject.height) // 2), subject)
    return canvas


def jpeg(canvas: Image.Image, long_side: int) -> bytes:
    """The canvas reduced to the given long side (never enlarged), as JPEG without chroma subsampling."""
    scale = min(1.0, long_side / max(canvas.size))
    size = (round(canvas.width * scale), round(canvas.height * scale))
    out = io.BytesIO()
    canvas.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return out.getvalue()


def spread(limits: tuple[int, int], count: int, rng: random.Random) -> list[int]:
    """`count` evenly spaced whole numbers from the first limit to the last, in random order."""
    first, last = limits
    values = [round(first + (last - first) * i / (count - 1)) for i in range(count)]
    rng.shuffle(values)
    return values


def make_images(assets: Path) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    """All JPEG files by name, and the metadata lines sorted by file name."""
    files: dict[str, bytes] = {}
    captions: dict[str, str] = {}
    rng = random.Random(SEED)
    for bucket, (bucket_height, bucket_width) in BUCKETS.items():
        subjects = SUBJECTS[bucket]
        main_sides = spread(MAIN_SIDES, len(subjects), rng)
        small_sides = spread(SMALL_SIDES, SMALL_PER_BUCKET, rng)
        small = dict(zip(rng.sample(range(len(subjects)), SMALL_PER_BUCKET), small_sides, strict=True))
        for index, (asset, caption, kind) in enumerate(subjects):
            subject = trimmed(assets / asset)
            size = canvas_size(*subject.size, bucket_width / bucket_height, rng.uniform(0.95, 1.05))
            canvas = compose(subject, size, BACKGROUNDS[kind])
            stem = "-".join(caption.split()[1:])  # without the article
            sides = {f"{stem}.jpg": main_sides[index]}
            if index in small:
                sides[f"{stem}-small.jpg"] = small[index]
            for name, side in sides.items():
                files[name] = jpeg(canvas, side)
                captions[name] = caption
    return files, [{"file_name": name, "text": captions[name]} for name in sorted(captions)]


def write_zip(out: Path, files: dict[str, bytes]) -> None:
    """A stored zip with fixed times, the same bytes for the same files."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, FIXED_TIME)
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, files[name])


def licence_text() -> str:
    """The licence of the images: the last fenced block of PICTURES.md."""
    notes = Path(__file__).with_name("PICTURES.md").read_text(encoding="utf-8")
    return notes.rsplit("```", 2)[1].removeprefix("text").strip() + "\n"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m sdxl_jax.quickstart.make_images PATH_TO_PACKAGE OUT.zip")
    files, metadata = make_images(Path(sys.argv[1]) / "assets")
    files["metadata.jsonl"] = "".join(json.dumps(line) + "\n" for line in metadata).encode()
    files["LICENSE"] = licence_text().encode()
    write_zip(Path(sys.argv[2]), files)
    print(f"{len(metadata)} images, {Path(sys.argv[2]).stat().st_size} bytes")


if __name__ == "__main__":
    main()
