"""`sdxl-jax sample`: images of prompts into a folder, each with the settings that reproduce it.

An image's settings are in its PNG text, one entry per option, in the words of the command line: `--from-png` reads them
back, and whoever opens the file can repeat the command. Input files are named with their checksum, and another file in
their place is refused.
"""

import dataclasses
import hashlib
import json
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.commands.parsing import OpenFlags
from sdxl_jax.conditioning.prompts import check_text
from sdxl_jax.errors import InputError, fault, nearest_first
from sdxl_jax.files import text as texts
from sdxl_jax.files.paths import AnyPath, located
from sdxl_jax.files.text import printable
from sdxl_jax.mesh import MeshConfig
from sdxl_jax.sampling.options import Options

if TYPE_CHECKING:
    from sdxl_jax.model import Model, ModelConfig
    from sdxl_jax.weights.lazy import Weights


@dataclass(frozen=True)
class Sample(OpenFlags):
    """Sample images from a model: text to image, image to image, inpainting, base and refiner."""

    model: tyro.conf.Positional[AnyPath]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file; local or gs://…."""
    out: Path
    """Folder for the images, 000000.png and so on, in order of prompts, then images."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text prompt."""
    prompts_file: Path | None = None
    """File of further prompts: one per line, or JSON lines, {"prompt": "a cat", "steps": 20, …}, with any of the
    sampling options per line."""
    class_: Annotated[tuple[int, ...], tyro.conf.arg(name="class"), tyro.conf.UseAppendAction] = ()
    """Number of the class to sample, from 0, of a class-conditional model. Given several times: every prompt, if there
    are any, with each of them. Default: no class."""
    negative_prompt: str | None = None
    """Negative prompt: guidance leads away from it; no effect without guidance. Absent is not the same as empty."""
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations. bfloat16 halves their memory."""
    quantize: Literal["int8"] | None = None
    """int8: the kernels of UNet and text encoders in eight bits, a half of bfloat16's memory. Default: none."""
    refiner: AnyPath | None = None
    """Refiner model, for the last steps (--handoff) or for the finished latent (--refine-strength)."""
    init_image: Path | None = None
    """Image to start from, for image to image; with --mask, for inpainting."""
    mask: Path | None = None
    """Mask image for inpainting, of the init image's size: white is repainted."""
    outpaint: tuple[int, int, int, int] | None = None
    """TOP RIGHT BOTTOM LEFT: pixels to add on each side of the init image, and to paint."""
    background: str = "white"
    """Colour behind an init image's transparency: white, black, or #rrggbb."""
    image_prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:STRENGTH: an image that the model is conditioned on, besides the text prompt or alone. Given several
    times, their embeddings are added, each times its strength (1). Needs --image-encoder."""
    image_encoder: AnyPath | None = None
    """CLIP's image tower for --image-prompt, that of the model's last text encoder; SDXL: OpenCLIP's ViT-bigG. A
    directory with config.json, or a .safetensors file such as clip_vision_g.safetensors."""
    init_noise: Path | None = None
    """NPY file with the initial noise, in place of the seeded one: normal float32 [images, height/8, width/8, 4]."""
    embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:TOKEN: a textual inversion, or the run that trained it, and its token in prompts. Default: the
    file's own token, or its name."""
    from_png: Path | None = None
    """Repeat an image of this command: read prompt and settings from its PNG text. Other options override them."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """OPTION=VALUE,VALUE,…: sample every prompt with each value, e.g. original-size=64x64,512x512, and write a labelled
    grid, sweep.png. Separate values that contain commas by semicolons. Given twice: every pair of values."""
    contact_sheet: bool = False
    """Also write all images into one, contact_sheet.png."""
    save_latents: bool = False
    """Also write latents.npy, float32 [images, height/8, width/8, 4], scaled as the UNet sees them."""
    preview: Path | None = None
    """Preview PNG of the unfinished images, rewritten after every step."""
    preview_autoencoder: AnyPath | None = None
    """TAESD decoder for --preview. Default: a linear map from latent pixels to colours."""
    overwrite: bool = False
    """Overwrite other images in the folder."""
    one_program: bool = False
    """Compile text encoders, sampling loop and decoder as one program: slightly faster, no progress per step."""
    compilation_cache: str | None = "user"
    """Folder for compiled programs, which later commands reuse. user: one in your cache folder. None: no folder."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Device mesh: images of a batch are split over data, weights are sharded over fsdp."""


COMMAND = ("out", "overwrite", "prompts_file", "from_png", "sweep", "contact_sheet", "save_latents", "preview")
"""Fields of `Sample` that an image does not depend on."""
COMMAND += ("preview_autoencoder", "compilation_cache", "mesh", "one_program")
FILES = ("refiner", "init_image", "mask", "image_encoder", "init_noise")
"""Fields that name a file or folder that an image depends on, besides the model's own."""


class PromptSettings(NamedTuple):
    """One prompt with its negative prompt and options."""

    prompt: str
    negative: str | None
    options: Options
    class_: int | None = None
    """None: no class."""


class Task(NamedTuple):
    """`PromptSettings` as one of several: the images of one prompt, with one value of each sweep."""

    prompt: str | None
    """None: the image prompts alone."""
    negative: str | None
    options: Options
    class_: int | None
    index: int
    """Number of its first image among those of all prompts; a sweep uses the same noise for every value."""
    label: tuple[str, ...] = ()
    """Of a sweep: its option and value, one per sweep."""


def run(arguments: list[str]) -> None:
    sample = _parsed(arguments)
    tasks = _tasks(sample)
    _check_files(sample)
    from sdxl_jax.commands import sample_images
    from sdxl_jax.sampling.plan import check_prompts, prepare

    noise, init = sample_images.read_noise(sample), sample_images.read_init(sample)
    image_prompts = sample_images.ImagePrompts(sample)
    use_compilation_cache(sample.compilation_cache)
    weights = opened(sample)
    for options in dict.fromkeys(task.options for task in tasks):
        prepare(weights[0].config, weights[1] and weights[1].config, options, *init, image_prompts.width)
    check_prompts(
        weights[0].config,
        (text for task in tasks for text in (task.prompt, task.negative)),
        (task.class_ for task in tasks),
    )
    for note in dict.fromkeys(note for each in tasks for note in each.options.notes(weights[0].config, each.negative)):
        print(f"note: {note}", file=sys.stderr)
    texts = list(texts_of(sample, tasks, weights[0].config))
    _check_out(sample, texts)
    encoded = image_prompts.encode()  # before the model is loaded: the image encoder is large
    models = load(sample, weights)
    _warn_of_truncated_prompts(models[0], tasks)
    generated = sample_images.generate(sample, models, tasks, noise, *init, encoded)
    sample_images.write(sample, tasks, texts, generated)


def use_compilation_cache(folder: str | None) -> None:
    """Sets the persistent compilation cache of `--compilation-cache`."""
    from sdxl_jax.compilation import compilation_cache

    compilation_cache.use(folder)


def _parsed(arguments: list[str]) -> Sample:
    """The options; with `--from-png`, its settings are the defaults."""
    sample = parsing.parse(Sample, arguments, "sample")
    if sample.from_png is None:
        return sample
    text = read_text(sample.from_png)
    where = f"--from-png {sample.from_png}"
    given = {name: value for name, value in text.items() if name in parsing.fields(Options)}
    given |= {"num_images": 1, "first_index": text["index"]}
    settings: dict[str, Any] = {"options": parsing.from_mapping(Options(), given, where)}
    settings["prompt"] = () if sample.prompt or "prompt" not in text else (text["prompt"],)
    settings["class_"] = () if sample.class_ or "class" not in text else (_class(text["class"], where),)
    for name in ("negative_prompt", "background", "variant"):
        settings[name] = text.get(name, parsing.fields(Sample)[name])
    for name in ("dtype", "quantize", "prediction", "weights"):
        settings[name] = _choice(text, name, where)
    for name in ("lora", "embedding", "image_prompt", "parts_from"):
        settings[name] = () if getattr(sample, name) else _list_of_texts(text, name, where)
    settings["parts_from"] = tuple(located(path, "parts_from") for path in settings["parts_from"])
    if "outpaint" in text:
        settings["outpaint"] = _outpaint(text["outpaint"], where)
    for name in FILES:
        if name not in text or getattr(sample, name) is not None:
            continue
        settings[name] = parsing.path_of_printable(text[name])
        if (digest := text.get(f"{name}_sha256")) and _digest(settings[name]) != digest:
            raise InputError(
                f"{where} was made with a different {parsing.flag(name)}: {settings[name]} has changed since. Restore "
                f"that file, or give another with {parsing.flag(name)}"
            )
    digests = [_digest(path) for path, _ in map(file_and_strength, settings["image_prompt"])]
    if digests and digests != list(_list_of_texts(text, "image_prompt_sha256", where)):
        raise InputError(
            f"{where} was made with different image prompts: {', '.join(settings['image_prompt'])} have changed since. "
            "Restore the files, or give others with --image-prompt"
        )
    return parsing.parse(Sample, arguments, "sample", default=dataclasses.replace(sample, **settings))


def _choice(text: dict[str, str], name: str, where: str) -> Any:
    """The value of a field with a few choices, from PNG text."""
    value, kind = text.get(name), typing.get_type_hints(Sample)[name]
    if value is None:
        return parsing.fields(Sample)[name]
    if value not in [choice for each in typing.get_args(kind) for choice in (typing.get_args(each) or (each,))]:
        raise InputError(f"{where}: {name} is {json.dumps(value)}, expected {parsing.expected_value(kind)}")
    return value


def _list_of_texts(text: dict[str, str], name: str, where: str) -> tuple[str, ...]:
    """A field that may be given several times, from PNG text: a JSON list."""
    value = text.get(name, "[]")
    try:
        items = json.loads(value)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: {name} is {json.dumps(value)}, expected a JSON list ({error})") from error
    if not isinstance(items, list) or not all(isinstance(each, str) for each in items):
        raise InputError(f"{where}: {name} is {json.dumps(value)}, expected a JSON list of texts")
    return tuple(items)


def _class(value: str, where: str) -> int:
    """Raises InputError for anything but the number of a class."""
    if not value.isdecimal():
        raise InputError(f"{where}: class is {json.dumps(value)}, expected a whole number")
    return int(value)


def _outpaint(value: str, where: str) -> tuple[int, ...]:
    sides = value.split()
    if len(sides) != 4 or not all(side.isdecimal() for side in sides):
        raise InputError(f"{where}: outpaint is {json.dumps(value)}, expected 4 whole numbers, TOP RIGHT BOTTOM LEFT")
    return tuple(map(int, sides))


def _tasks(sample: Sample) -> list[Task]:
    given = [PromptSettings(prompt, sample.negative_prompt, sample.options) for prompt in sample.prompt]
    if sample.prompts_file is not None:
        given += read_prompts(sample.prompts_file, sample)
    images_alone = bool(sample.image_prompt) and not given
    of_classes = bool(sample.class_) or any(
        name == "class" for sweep in sample.sweep for name, _ in _parse_sweep(sweep)
    )
    if images_alone or (of_classes and not given):
        given = [PromptSettings("", sample.negative_prompt, sample.options)]
    if not given:
        raise InputError(
            "There is no prompt. Give --prompt TEXT, once or several times, or --prompts-file FILE; for a "
            "class-conditional model, --class N"
        )
    given = [each._replace(class_=label) for each in given for label in _classes_of(each, sample)]
    tasks, index = [], 0
    for number, each in enumerate(given, 1):
        check_text(each.prompt, f"Prompt {number}")
        check_text(each.negative or "", f"The negative prompt of prompt {number}")
        task = Task(*each, index=index)
        tasks.append(task._replace(prompt=None) if images_alone else task)
        index += each.options.num_images
    for sweep in sample.sweep:
        tasks = [_with_value(task, name, value) for name, value in _parse_sweep(sweep) for task in tasks]
    return tasks


def _classes_of(settings: PromptSettings, sample: Sample) -> tuple[int | None, ...]:
    """Those of `--class`, unless a line of a file has its own."""
    return (sample.class_ or (None,)) if settings.class_ is None else (settings.class_,)


def read_prompts(path: Path, sample: Sample) -> Iterator[PromptSettings]:
    """The prompts of a `--prompts-file`; each with the options of its line, and otherwise those of `sample`."""
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
                f'{where} is not JSON ({error}). Give {{"prompt": "…"}} on every line, or on none'
            ) from error
        label = given.pop("class", None) if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(given.get("prompt", None if label is None else ""), str):
            raise InputError(f'{where} is not a JSON object with a prompt. Give {{"prompt": "…", …}}')
        if label is not None and type(label) is not int:
            raise InputError(f"{where}: class is {json.dumps(label)}, expected a whole number")
        prompt = given.pop("prompt", "")
        negative = next((given.pop(name) for name in ("negative_prompt", "negative-prompt") if name in given), None)
        negative = sample.negative_prompt if negative is None else str(negative)
        yield PromptSettings(prompt, negative, parsing.from_mapping(sample.options, given, where), label)


def _parse_sweep(sweep: str) -> list[tuple[str, str]]:
    """(option, value) of each value of a sweep."""
    name, found, values = sweep.partition("=")
    known = [*parsing.fields(Options), "negative_prompt", "class"]
    if not found or not values:
        raise InputError(f"--sweep {sweep!r}: expected OPTION=VALUE,VALUE,…, e.g. guidance=1,3,5")
    if name.replace("-", "_") not in known:
        nearest = ", ".join(nearest_first(name, known))
        raise InputError(f"--sweep {sweep!r}: there is no option {name!r}. Known, nearest first: {nearest}")
    separator = ";" if ";" in values or "crop" in name else ","
    return [(name, value.strip()) for value in values.split(separator)]


def _with_value(task: Task, name: str, value: str) -> Task:
    label = (*task.label, f"{name} {value}")
    if name.replace("-", "_") == "negative_prompt":
        check_text(value, f"--sweep {name}")
        return task._replace(negative=value, label=label)
    if name == "class":
        return task._replace(class_=_class(value, f"--sweep {name}={value}"), label=label)
    options = parsing.from_mapping(task.options, {name: value}, f"--sweep {name}={value}")
    return task._replace(options=options, label=label)


# PNG text


def texts_of(sample: Sample, tasks: Sequence[Task], config: "ModelConfig") -> Iterator[dict[str, str]]:
    """The PNG text of each image."""
    shared = _shared_text(sample)
    for task in tasks:
        options = task.options.resolved(config)
        settings = {name: " ".join(parsing.words(value)) for name, value in vars(options).items() if value is not None}
        settings |= shared
        if task.prompt is not None:
            settings["prompt"] = task.prompt
        if task.negative is not None:
            settings["negative_prompt"] = task.negative
        if task.class_ is not None:
            settings["class"] = str(task.class_)
        for number in range(options.num_images):
            yield settings | {"index": str(options.first_index + task.index + number)}


def _shared_text(sample: Sample) -> dict[str, str]:
    """The part of the PNG text that all images share. Reads the input files, for their checksums."""
    settings = {"model": printable(sample.model), "dtype": sample.dtype}
    for name in FILES:
        if (path := getattr(sample, name)) is not None:
            settings[name] = printable(path)
            if path.is_file():
                settings[f"{name}_sha256"] = _digest(path)
    for name in ("lora", "embedding", "image_prompt", "parts_from"):
        if value := getattr(sample, name):
            settings[name] = json.dumps([str(each) for each in value])
    if sample.image_prompt:
        digests = [_digest(path) for path, _ in map(file_and_strength, sample.image_prompt)]
        settings["image_prompt_sha256"] = json.dumps(digests)
    for name in ("variant", "prediction", "quantize"):
        if (value := getattr(sample, name)) is not None:
            settings[name] = value
    if sample.weights != "averaged":
        settings["weights"] = sample.weights
    if sample.init_image is not None:
        settings["background"] = sample.background
    if sample.outpaint is not None:
        settings["outpaint"] = " ".join(map(str, sample.outpaint))
    return settings


def read_text(path: Path) -> dict[str, str]:
    """The PNG text of an image of `sample`. Raises InputError for other images."""
    try:
        text = _png_text(path)
    except OSError as error:
        raise fault(error)(
            f"--from-png {path} cannot be read ({error}). Give a PNG that sdxl-jax sample has written"
        ) from error
    required = ("image_prompt" if "image_prompt" in text else "prompt", "index", "sampler", "steps")
    if missing := [name for name in required if name not in text]:
        raise InputError(
            f"--from-png {path} has no settings in its PNG text: {', '.join(missing)} missing. Give a PNG that "
            "sdxl-jax sample has written"
        )
    return text


def _png_text(path: Path) -> dict[str, str]:
    """All text chunks of a PNG. Raises OSError for any other file."""
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as image:
        image.load()  # text chunks may follow the pixels
        return {str(name): value for name, value in image.info.items() if isinstance(value, str)}


def _digest(path: AnyPath) -> str:
    from sdxl_jax.weights.formats.local_copies import local_copy

    try:
        with local_copy(path).open("rb") as file:  # not read at once: a refiner has gigabytes
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise fault(error)(f"{path} cannot be read ({error}). Give a file that exists and is readable") from error


# Checked and read before the model


def _check_out(sample: Sample, texts: list[dict[str, str]]) -> None:
    """Refuses to overwrite other images. The same command may write the same images again."""
    out = sample.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, new or existing")
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
        raise InputError("--mask and --outpaint are both given. --outpaint makes its own mask, so give one of them")
    if sample.image_prompt and sample.image_encoder is None:
        raise InputError(
            f"--image-prompt {sample.image_prompt[0]} needs CLIP's image tower, which is not a part of the model. Give "
            "it with --image-encoder PATH; for SDXL that is OpenCLIP's ViT-bigG, e.g. clip_vision_g.safetensors of "
            "Stability's control-lora repository"
        )
    if sample.image_encoder is not None and not sample.image_prompt:
        raise InputError("--image-encoder has no effect without --image-prompt FILE. Give both, or leave it out")
    if sample.preview_autoencoder is not None and sample.preview is None:
        raise InputError("--preview-autoencoder has no effect without --preview FILE. Give both, or leave it out")
    if sample.one_program and sample.preview is not None:
        raise InputError("--one-program has no steps that --preview could show. Leave one of them out")


def opened(sample: Sample) -> "tuple[Weights, Weights | None]":
    """Model, with its LoRAs, and refiner: opened, with their tensors not read yet."""
    import jax.numpy as jnp

    from sdxl_jax.weights import lora
    from sdxl_jax.weights.eight_bits import quantised
    from sdxl_jax.weights.lazy import cast
    from sdxl_jax.weights.load import say
    from sdxl_jax.weights.open import open_model

    open_options = sample.open_options()
    loras = [(lora.read(path), scale) for path, scale in map(lora.parse_option, sample.lora)]
    weights = open_model(sample.model, open_options, sample.parts_from)
    for read, scale in loras:
        weights = lora.merge(weights, read, scale)
        print(f"merged {read.name} × {scale:g}: {lora.describe(read)}", file=sys.stderr)
        say(lora.notes(read))
    refiner = None if sample.refiner is None else open_model(sample.refiner, open_options)

    def stored(weights: "Weights") -> "Weights":
        weights = weights if sample.dtype == "float32" else cast(weights, jnp.dtype(jnp.bfloat16))
        return weights if sample.quantize is None else quantised(weights)

    return stored(weights), refiner and stored(refiner)


def load(sample: Sample, weights: "tuple[Weights, Weights | None]") -> "tuple[Model, Model | None]":
    """The models of `opened`, loaded. The refiner shares the model's text encoder if they are equal."""
    import jax

    from sdxl_jax import sharding
    from sdxl_jax.weights import textual_inversion
    from sdxl_jax.weights.load import load_weights

    mesh = sharding.make_mesh(sample.mesh, jax.local_devices())
    model = load_weights(weights[0], mesh)
    for embedding in sample.embedding:
        model = textual_inversion.add(model, *_file_and_token(embedding))
    return model, None if weights[1] is None else _without_shared_text(model, load_weights(weights[1], mesh))


def _without_shared_text(model: "Model", refiner: "Model") -> "Model":
    """The refiner without its text encoder, if that equals the model's last bit for bit: they share the text states."""
    import jax
    import jax.numpy as jnp

    last, own = model.config.text[-1], refiner.config.text[-1]
    if len(refiner.config.text) != 1 or last.name not in model.params or own.name not in refiner.params:
        return refiner
    one, other = model.params[last.name], refiner.params[own.name]
    if jax.tree.structure(one) != jax.tree.structure(other):
        return refiner
    equal = all(
        a.shape == b.shape and bool(jnp.array_equal(a, b))
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )
    if not equal:
        return refiner
    return refiner._replace(params={name: part for name, part in refiner.params.items() if name != own.name})


def _file_and_token(value: str) -> tuple[str, str | None]:
    """FILE or FILE:TOKEN. A local file that exists is a file, whatever colons are in its name."""
    file, found, token = value.rpartition(":")
    is_file = not found or token.startswith("//") or Path(value).exists()
    return (value, None) if is_file else (file, token)


def file_and_strength(value: str) -> tuple[Path, float]:
    """FILE or FILE:STRENGTH of an image prompt. Raises InputError for a strength that is not a finite number."""
    file, strength = _file_and_token(value)
    try:
        number = 1.0 if strength is None else float(strength)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"--image-prompt {value}: there is no such file, and it is not FILE:STRENGTH with a number for the "
            "strength. Give e.g. photo.jpg:0.8"
        )
    return Path(file), number


def _warn_of_truncated_prompts(model: "Model", tasks: list[Task]) -> None:
    from sdxl_jax.conditioning.prompts import LongPrompts
    from sdxl_jax.conditioning.text import Tokenizer

    tokenizer, printed = Tokenizer.of(model.config.text), set()
    for number, task in enumerate(tasks, 1):
        if task.options.long_prompts is not LongPrompts.TRUNCATE:
            continue
        weighted = task.options.prompt_weights
        for what, prompt in ((f"prompt {number}", task.prompt), ("the negative prompt", task.negative)):
            (count,) = tokenizer.truncated([prompt or ""], weighted)
            warning = f"warning: {count} tokens of {what} beyond the first 75 are ignored"
            if count and warning not in printed:
                printed.add(warning)
                print(f"{warning}; --long-prompts chunks encodes them too", file=sys.stderr)
