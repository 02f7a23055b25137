"""`sdxl-jax sample`: images of prompts into a folder, each with all that it takes to make it again.

What an image was made with stands in its PNG text, one entry an option, in the words of the command line; so
`--from-png` is a matter of reading it back, and whoever looks at the file can repeat the command. Files that took part
are named with their checksum, and another file in their place is refused.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.commands.parsing import OpenFlags
from sdxl_jax.conditioning.prompts import check_text
from sdxl_jax.errors import InputError, fault, nearest_first
from sdxl_jax.files import text as texts
from sdxl_jax.sampling.options import Options
from sdxl_jax.sharding import MeshConfig

if TYPE_CHECKING:
    import numpy as np

    from sdxl_jax.model import Model, ModelConfig
    from sdxl_jax.sampling.generate import Generated
    from sdxl_jax.weights.lazy import Weights


@dataclass(frozen=True)
class Sample(OpenFlags):
    """Draw images of prompts with a model: text to image, image to image, inpainting, base and refiner."""

    model: tyro.conf.Positional[Path]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file."""
    out: Path
    """Folder for 000000.png and so on, in order of prompts, then images."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to draw. May be given several times."""
    prompts_file: Path | None = None
    """Prompts that are drawn after those of --prompt: one a line, or JSON lines, {"prompt": "a cat", "steps": 20, …}
    with any of the options below."""
    negative_prompt: str | None = None
    """What guidance leads away from; without guidance it has no effect. Absent is not the same as empty."""
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations. bfloat16 halves their memory."""
    refiner: Path | None = None
    """A refiner, which takes over for the last steps (--handoff) or goes over the whole (--refine-strength)."""
    init_image: Path | None = None
    """Image to start from: image to image; with --mask inpainting."""
    mask: Path | None = None
    """Image of the init image's size: white is repainted."""
    outpaint: tuple[int, int, int, int] | None = None
    """TOP RIGHT BOTTOM LEFT: pixels by which the init image is enlarged; what is new is painted."""
    background: str = "white"
    """What lies after an init image's transparency: white, black, or #rrggbb."""
    init_noise: Path | None = None
    """NPY file, standard normal float32 [images, height/8, width/8, 4], in place of the seeded noise."""
    embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:TOKEN; a textual inversion. TOKEN is what prompts call it, default: the file's own or its name."""
    from_png: Path | None = None
    """An image that this command has made: its prompt and settings, which other options then change."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """OPTION=VALUE,VALUE,…: draw every prompt with each of these values, e.g. original-size=64x64,512x512, also into a
    labelled grid, sweep.png. Values that have commas are separated by semicolons. Twice: every pair."""
    contact_sheet: bool = False
    """Also write all images into one, contact_sheet.png."""
    save_latents: bool = False
    """Also write latents.npy, float32 [images, height/8, width/8, 4], scaled as the UNet sees them."""
    preview: Path | None = None
    """PNG file that shows the images while they come into being, after every step."""
    preview_autoencoder: Path | None = None
    """TAESD's decoder for --preview. Default: a coarse guess at each latent pixel's colour."""
    overwrite: bool = False
    """Write over other images in the folder."""
    one_program: bool = False
    """Compile text encoders, loop and decoder as one program: a little faster, and no progress within it."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs for the next time."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged: data, each takes images of a batch; fsdp, they share the weights."""


COMMAND = ("out", "overwrite", "prompts_file", "from_png", "sweep", "contact_sheet", "save_latents", "preview")
"""Fields of `Sample` that say where things go, and nothing of an image."""
COMMAND += ("preview_autoencoder", "compilation_cache", "mesh", "one_program")
FILES = ("refiner", "init_image", "mask", "init_noise")
"""Fields that name a file or folder that an image depends on, besides the model's own."""


class PromptSettings(NamedTuple):
    """One prompt with all that it is drawn with."""

    prompt: str
    negative: str | None
    options: Options


class Task(NamedTuple):
    """The same, as one of several."""

    prompt: str
    negative: str | None
    options: Options
    index: int
    """Of its first image among those of all prompts; a sweep draws every value from the same noise."""
    label: tuple[str, ...] = ()
    """Of a sweep: the values that are swept."""


def run(arguments: list[str]) -> None:
    from sdxl_jax.sampling.plan import prepare

    sample = _parsed(arguments)
    tasks = _tasks(sample)
    _check_files(sample)
    noise, init = _read_noise(sample), _read_init(sample)
    keep_programs(sample.compilation_cache)
    weights = opened(sample)
    for options in dict.fromkeys(task.options for task in tasks):
        prepare(weights[0].config, weights[1] and weights[1].config, options, *init)
    for note in dict.fromkeys(note for each in tasks for note in each.options.notes(weights[0].config, each.negative)):
        print(f"note: {note}", file=sys.stderr)
    texts = list(texts_of(sample, tasks, weights[0].config))
    _check_out(sample, texts)
    models = load(sample, weights)
    _say_truncated(models[0], tasks)
    made = _draw(sample, models, tasks, noise, *init)
    _write(sample, tasks, texts, made)


def keep_programs(folder: Path | None) -> None:
    """Of a command that compiles: `--compilation-cache`."""
    if folder is not None:
        from sdxl_jax.training import compilation

        compilation.use_cache(folder.resolve())


def _parsed(arguments: list[str]) -> Sample:
    """With what an image of `--from-png` was made with as defaults."""
    sample = parsing.parse(Sample, arguments, "sample")
    if sample.from_png is None:
        return sample
    text = read_text(sample.from_png)
    where = f"--from-png {sample.from_png}"
    given = {name: value for name, value in text.items() if name in parsing.fields(Options)}
    given |= {"num_images": 1, "first_index": text["index"]}
    kept: dict[str, Any] = {"options": parsing.from_mapping(Options(), given, where)}
    kept["prompt"] = () if sample.prompt else (text["prompt"],)
    for name in ("negative_prompt", "dtype", "background", "variant", "prediction"):
        kept[name] = text.get(name, parsing.fields(Sample)[name])
    for name in ("lora", "embedding"):
        kept[name] = () if getattr(sample, name) else tuple(json.loads(text.get(name, "[]")))
    kept["parts_from"] = () if sample.parts_from else tuple(map(Path, json.loads(text.get("parts_from", "[]"))))
    if "outpaint" in text:
        kept["outpaint"] = tuple(map(int, text["outpaint"].split()))
    for name in FILES:
        if name not in text or getattr(sample, name) is not None:
            continue
        kept[name] = parsing.hidden(text[name])
        if (known := text.get(f"{name}_sha256")) and _digest(kept[name]) != known:
            raise InputError(
                f"{where} was made with another {parsing.flag(name)} {kept[name]} than what is there now. Put that "
                "file back, or give another"
            )
    return parsing.parse(Sample, arguments, "sample", default=dataclasses.replace(sample, **kept))


def _tasks(sample: Sample) -> list[Task]:
    given = [PromptSettings(prompt, sample.negative_prompt, sample.options) for prompt in sample.prompt]
    if sample.prompts_file is not None:
        given += _read_prompts(sample.prompts_file, sample)
    if not given:
        raise InputError("There is nothing to draw. Give --prompt TEXT, once or several times, or --prompts-file FILE")
    tasks, index = [], 0
    for number, each in enumerate(given, 1):
        check_text(each.prompt, f"Prompt {number}")
        check_text(each.negative or "", f"The negative prompt of prompt {number}")
        tasks.append(Task(*each, index=index))
        index += each.options.num_images
    for spoken in sample.sweep:
        tasks = [_changed(task, name, value) for name, value in _swept(spoken) for task in tasks]
    return tasks


def _read_prompts(path: Path, sample: Sample) -> Iterator[PromptSettings]:
    lines = texts.lines(texts.read_text(path))
    as_json = any(line.lstrip().startswith("{") for line in lines)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not as_json:
            yield PromptSettings(line, sample.negative_prompt, sample.options)
            continue
        where = f"{path}, line {number}"
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f'{where} is no JSON ({error}). Give {{"prompt": "…"}} on every line, or on none'
            ) from error
        if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
            raise InputError(f'{where} has no prompt. Give {{"prompt": "…", …}}')
        prompt = given.pop("prompt")
        negative = next((given.pop(name) for name in ("negative_prompt", "negative-prompt") if name in given), None)
        negative = sample.negative_prompt if negative is None else str(negative)
        yield PromptSettings(prompt, negative, parsing.from_mapping(sample.options, given, where))


def _swept(spoken: str) -> list[tuple[str, str]]:
    name, found, values = spoken.partition("=")
    known = [*parsing.fields(Options), "negative_prompt"]
    if not found or not values:
        raise InputError(f"--sweep {spoken!r}: expected OPTION=VALUE,VALUE,…, e.g. guidance=1,3,5")
    if name.replace("-", "_") not in known:
        raise InputError(
            f"--sweep {spoken!r}: there is no option {name!r}. Known, nearest first: {nearest_first(name, known)}"
        )
    separator = ";" if ";" in values or "crop" in name else ","
    return [(name, value.strip()) for value in values.split(separator)]


def _changed(task: Task, name: str, value: str) -> Task:
    label = (*task.label, f"{name} {value}")
    if name.replace("-", "_") == "negative_prompt":
        check_text(value, f"--sweep {name}")
        return task._replace(negative=value, label=label)
    options = parsing.from_mapping(task.options, {name: value}, f"--sweep {name}={value}")
    return task._replace(options=options, label=label)


# What an image says of itself


def texts_of(sample: Sample, tasks: Sequence[Task], config: "ModelConfig") -> Iterator[dict[str, str]]:
    """The PNG text of each image."""
    shared = _shared_text(sample)
    for task in tasks:
        options = task.options.resolved(config)
        settings = {name: " ".join(parsing.words(value)) for name, value in vars(options).items() if value is not None}
        settings |= {**shared, "prompt": task.prompt}
        if task.negative is not None:
            settings["negative_prompt"] = task.negative
        for number in range(options.num_images):
            yield settings | {"index": str(options.first_index + task.index + number)}


def _shared_text(sample: Sample) -> dict[str, str]:
    """What the text of all images has in common; the files that took part are read for it."""
    settings = {"model": parsing.shown(sample.model), "dtype": sample.dtype}
    for name in FILES:
        if (path := getattr(sample, name)) is not None:
            settings[name] = parsing.shown(path)
            if path.is_file():
                settings[f"{name}_sha256"] = _digest(path)
    for name in ("lora", "embedding", "parts_from"):
        if value := getattr(sample, name):
            settings[name] = json.dumps([str(each) for each in value])
    for name in ("variant", "prediction"):
        if (value := getattr(sample, name)) is not None:
            settings[name] = value
    if sample.init_image is not None:
        settings["background"] = sample.background
    if sample.outpaint is not None:
        settings["outpaint"] = " ".join(map(str, sample.outpaint))
    return settings


def read_text(path: Path) -> dict[str, str]:
    """The text of an image that `sample` has made. Raises InputError for any other."""
    try:
        text = _png_text(path)
    except OSError as error:
        raise fault(error)(
            f"--from-png {path} cannot be read ({error}). Give a PNG that sdxl-jax sample has made"
        ) from error
    if not {"prompt", "index", "sampler", "steps"} <= text.keys():
        raise InputError(f"--from-png {path} says nothing of how it was made. Give a PNG that sdxl-jax sample has made")
    return text


def _png_text(path: Path) -> dict[str, str]:
    """All text of a PNG. Raises OSError for any other file."""
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        image.load()  # text may stand after the pixels
        return {str(name): value for name, value in image.info.items() if isinstance(value, str)}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:  # of a refiner, gigabytes
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: of a name that no file can have
        raise fault(error)(f"{path} cannot be read ({error})") from error


# What is checked and read before the model


def _check_out(sample: Sample, texts: list[dict[str, str]]) -> None:
    """Refuses to write over other images. The same command may write the same once more."""
    out = sample.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, new or old")
    if sample.overwrite or not out.is_dir():
        return
    for path in sorted(out.glob("[0-9][0-9][0-9][0-9][0-9][0-9].png")):
        number = int(path.stem)
        try:
            same = number < len(texts) and _png_text(path) == texts[number]
        except OSError:
            same = False
        if not same:
            raise InputError(f"--out {out} holds other images, e.g. {path.name}. Give a new folder, or --overwrite")


def _check_files(sample: Sample) -> None:
    for name in ("mask", "outpaint"):
        if getattr(sample, name) is not None and sample.init_image is None:
            raise InputError(f"{parsing.flag(name)} needs an --init-image. Give both")
    if sample.mask is not None and sample.outpaint is not None:
        raise InputError("--mask and --outpaint are both given. --outpaint makes its own mask; give one of them")
    if sample.preview_autoencoder is not None and sample.preview is None:
        raise InputError("--preview-autoencoder has no effect without --preview FILE")
    if sample.one_program and sample.preview is not None:
        raise InputError("--preview cannot look into --one-program. Leave one of them out")


def _read_noise(sample: Sample) -> "np.ndarray | None":
    if sample.init_noise is None:
        return None
    import numpy as np

    try:
        noise = np.load(sample.init_noise)
    except (OSError, ValueError, EOFError) as error:
        raise fault(error)(
            f"--init-noise {sample.init_noise} is no readable NPY file ({error}). Give one that numpy.save wrote"
        ) from error
    if not isinstance(noise, np.ndarray) or not np.issubdtype(noise.dtype, np.floating):
        kind = f"of {noise.dtype}" if isinstance(noise, np.ndarray) else "an NPZ archive"
        raise InputError(f"--init-noise {sample.init_noise} is {kind}. Give an NPY file of float32")
    if sample.from_png is not None:
        row = sample.options.first_index
        noise = noise[row : row + 1]
    return noise


def _read_init(sample: Sample) -> "tuple[np.ndarray | None, np.ndarray | None]":
    """(init image, mask)."""
    from sdxl_jax.sampling import init_images

    background = init_images.parse_background(sample.background)
    if sample.init_image is None:
        return None, None
    image = init_images.read(sample.init_image, background)
    if sample.outpaint is not None:
        return init_images.outpaint(image, *sample.outpaint)
    return image, None if sample.mask is None else init_images.read_mask(sample.mask, image.shape[:2])


def opened(sample: Sample) -> "tuple[Weights, Weights | None]":
    """Model, with its LoRAs, and refiner: found and understood, not read yet."""
    import jax.numpy as jnp

    from sdxl_jax.weights import lora
    from sdxl_jax.weights.lazy import cast
    from sdxl_jax.weights.load import say
    from sdxl_jax.weights.open import open_model

    halved = sample.dtype == "bfloat16"
    open_options = sample.open_options()
    loras = [(lora.read(path), scale) for path, scale in map(lora.parse_option, sample.lora)]
    weights = open_model(sample.model, open_options, sample.parts_from)
    for read, scale in loras:
        weights = lora.merge(weights, read, scale)
        print(f"merged {read.name} × {scale:g}: {lora.describe(read)}", file=sys.stderr)
        say(lora.notes(read))
    refiner = None if sample.refiner is None else open_model(sample.refiner, open_options)
    if not halved:
        return weights, refiner
    return cast(weights, jnp.dtype(jnp.bfloat16)), refiner and cast(refiner, jnp.dtype(jnp.bfloat16))


def load(sample: Sample, weights: "tuple[Weights, Weights | None]") -> "tuple[Model, Model | None]":
    """What is `opened`, read. The refiner shares the model's text encoder if it can."""
    from sdxl_jax import sharding
    from sdxl_jax.weights import textual_inversion
    from sdxl_jax.weights.load import load_weights

    mesh = sharding.make_mesh(sample.mesh)
    model = load_weights(weights[0], mesh)
    for embedding in sample.embedding:
        model = textual_inversion.add(model, *_file_and_token(embedding))
    return model, None if weights[1] is None else _sharing(model, load_weights(weights[1], mesh))


def _sharing(model: "Model", refiner: "Model") -> "Model":
    """Without its text encoder, where that is the model's last, bit for bit: one set of text states serves both."""
    import jax
    import jax.numpy as jnp

    ours, theirs = model.config.text[-1], refiner.config.text[-1]
    if len(refiner.config.text) != 1 or ours.name not in model.params or theirs.name not in refiner.params:
        return refiner
    one, other = model.params[ours.name], refiner.params[theirs.name]
    if jax.tree.structure(one) != jax.tree.structure(other):
        return refiner
    same = all(
        a.shape == b.shape and bool(jnp.array_equal(a, b))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )
    if not same:
        return refiner
    return refiner._replace(params={name: part for name, part in refiner.params.items() if name != theirs.name})


def _file_and_token(value: str) -> tuple[Path, str | None]:
    """FILE or FILE:TOKEN. A file that is there is a file, whatever colons are in its name."""
    file, found, token = value.rpartition(":")
    return (Path(value), None) if not found or Path(value).exists() else (Path(file), token)


def _say_truncated(model: "Model", tasks: list[Task]) -> None:
    from sdxl_jax.conditioning.prompts import LongPrompts
    from sdxl_jax.conditioning.text import Tokenizer

    tokenizer, told = Tokenizer.of(model.config.text), set()
    for number, task in enumerate(tasks, 1):
        if task.options.long_prompts is not LongPrompts.TRUNCATE:
            continue
        weighted = task.options.prompt_weights
        for what, prompt in ((f"prompt {number}", task.prompt), ("the negative prompt", task.negative)):
            (beyond,) = tokenizer.truncated([prompt or ""], weighted)
            if beyond and (said := f"warning: {beyond} tokens of {what} are beyond the 75 that are read") not in told:
                told.add(said)
                print(f"{said}; --long-prompts chunks reads them", file=sys.stderr)


# Drawing


def _draw(
    sample: Sample,
    models: "tuple[Model, Model | None]",
    tasks: list[Task],
    noise: "np.ndarray | None",
    init_image: "np.ndarray | None",
    mask: "np.ndarray | None",
) -> "list[Generated]":
    """Neighbours with the same options are drawn together."""
    from sdxl_jax.commands.preview import Previews
    from sdxl_jax.models.layers import Compute, Dtype
    from sdxl_jax.sampling.generate import generate

    made = []
    total = max(task.index + task.options.num_images for task in tasks)
    callback = None
    if sample.preview is not None:
        looking = Previews(models[0].config, sample.preview_autoencoder)
        callback = functools.partial(looking.write, sample.preview)
    for (options, _), group in itertools.groupby(tasks, key=lambda task: (task.options, task.label)):
        members = list(group)
        first, count = members[0].index, sum(task.options.num_images for task in members)
        rows = noise if noise is None or len(noise) != total else noise[first : first + count]
        made.append(
            generate(
                models[0],
                [task.prompt for task in members],
                negative_prompts=[task.negative for task in members],
                refiner=models[1],
                init_image=init_image,
                mask=mask,
                init_noise=rows,
                compute=Compute(dtype=Dtype(sample.dtype)),
                one_program=sample.one_program,
                progress=True,
                callback=callback,
                options=dataclasses.replace(options, first_index=options.first_index + first),
            )
        )
    return made


def _write(sample: Sample, tasks: list[Task], texts: list[dict[str, str]], made: "list[Generated]") -> None:
    import numpy as np
    from PIL import Image

    from sdxl_jax.sampling.contact_sheet import contact_sheet, save_png

    images = [image for each in made for image in each.images]
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        save_png(Image.fromarray(image), sample.out / f"{number:06d}.png", text)
    if sample.save_latents:
        if len({each.latents.shape[1:] for each in made}) > 1:
            raise InputError("--save-latents: the images have different sizes. Draw those of one size at a time")
        np.save(sample.out / "latents.npy", np.concatenate([each.latents for each in made]))
    captions = [task.prompt for task in tasks for _ in range(task.options.num_images)]
    if sample.contact_sheet:
        columns = min(8, max(1, round(len(images) ** 0.5)))
        save_png(contact_sheet(images, captions, columns), sample.out / "contact_sheet.png")
    if sample.sweep:
        _write_sweep(sample, tasks, images)
    print(f"{len(images)} images in {parsing.shown(sample.out)}")


def _write_sweep(sample: Sample, tasks: list[Task], images: "list[np.ndarray]") -> None:
    """A row for each image (and each value of a second sweep), a column for each value of the first."""
    from sdxl_jax.sampling.contact_sheet import labelled_grid, save_png

    labels = [task.label for task in tasks for _ in range(task.options.num_images)]
    firsts = list(dict.fromkeys(label[0] for label in labels))
    columns = [[image for image, label in zip(images, labels, strict=True) if label[0] == first] for first in firsts]
    prompts = [
        "\n".join([*label[1:], task.prompt])
        for task, label in ((task, task.label) for task in tasks for _ in range(task.options.num_images))
        if label[0] == firsts[0]
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    save_png(labelled_grid(rows, firsts, prompts), sample.out / "sweep.png")
