"""The session behind the page: runs one request at a time, with progress, previews and a stop, and keeps the results.

    fields ── read_fields ── Request ── Session.run ── Result, one PNG file per image
                                          │    ▲
                                 Job.update    Job.stop, from the page, between steps

A request runs in a thread of its own, and the page reads its `Job` meanwhile. A second request waits for the first.

Not here: the page, and anything of NiceGUI.
"""

import dataclasses
import hashlib
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.sampling import init_images
from sdxl_jax.sampling.contact_sheet import save_png
from sdxl_jax.sampling.generate import StepState, generate
from sdxl_jax.sampling.image_prompts import ImagePrompt
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import HANDOFF, IMAGE_STRENGTH


class Request(NamedTuple):
    """One set of settings: prompt, negative prompt, options, init image, image prompts."""

    prompt: str | None
    """None: the image prompts alone."""
    negative: str | None
    options: Options
    init_image: Path | None = None
    image_prompts: tuple[tuple[Path, float], ...] = ()
    """Files, each with its strength."""
    class_: int | None = None
    """Of a class-conditional model; None: no class."""


class Result(NamedTuple):
    """One image of a request, with what repeats it."""

    path: Path
    """PNG, with the settings as its text."""
    request: Request
    """Of this image alone."""
    size: tuple[int, int]
    """Height and width in pixels."""
    command: str
    """The command line that repeats it."""


class Description(NamedTuple):
    """A request for one image, in words."""

    command: str
    """The command line that repeats it."""
    text: dict[str, str]
    """PNG text."""


Describe = Callable[[Request], Description]

Preview = Callable[[StepState], UInt8[np.ndarray, "images height width 3"]]
"""Preview images of the latents after a step."""


EncodeImage = Callable[[UInt8[np.ndarray, "height width 3"]], Float[np.ndarray, " projection"]]
"""The embedding of an image prompt."""


class Stopped(Exception):
    """The job was stopped by the user."""


class Job:
    """A running request: its progress, which the page reads from another thread, and its stop."""

    def __init__(self) -> None:
        self.status = "Waiting for another request"
        self.progress = 0.0
        """0..1, of all steps of all images."""
        self.preview: bytes | None = None
        """PNG of the first image of the current batch."""
        self.preview_size = (1, 1)
        """Its height and width in pixels."""
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ends the job after the current step."""
        self._stop.set()
        self.status = "Stopping after this step"

    def check(self) -> None:
        """Raises Stopped if `stop` was called."""
        if self._stop.is_set():
            raise Stopped

    def update(self, state: StepState, options: Options, preview: Preview | None) -> None:
        """Records the progress after a step. Raises Stopped."""
        jax.block_until_ready(state.x0)  # or progress would run ahead of the devices
        self.check()
        first, last = (state.first - options.first_index + number for number in (1, state.images))
        images = "" if last - first + 1 == options.num_images else f", images {first} to {last}"
        self.status = f"Step {state.step} of {state.steps}{images}{'' if state.step < state.steps else '; decoding'}"
        self.progress = (first - 1 + state.images * state.step / state.steps) / options.num_images
        if preview is not None:
            image = preview(state._replace(x0=state.x0[:1], images=1))[0]
            self.preview, self.preview_size = png(image), image.shape[:2]


def png(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


class Session:
    """A model, and the results of all requests since the server was started."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        describe: Describe,
        refiner: Model | None = None,
        compute: Compute = Compute(),
        preview: Preview | None = None,
        encode_image: EncodeImage | None = None,
    ):
        """folder: for the images, 000000.png and so on, numbered after those that it has. preview: None for none.
        encode_image: None: there are no image prompts."""
        self.model, self.folder, self.refiner, self.compute = model, folder, refiner, compute
        self.results: list[Result] = []
        """Oldest first."""
        self._describe, self._running = describe, threading.Lock()
        self._jobs: set[Job] = set()
        self._preview, self._encode_image = preview, encode_image

    @property
    def takes_image_prompts(self) -> bool:
        return self._encode_image is not None

    def run(self, request: Request, job: Job) -> list[Result]:
        """Samples and saves the images of a request, once the requests before it are done.

        Raises InputError, and Stopped if the job was stopped; then there are no results.
        """
        self._jobs.add(job)
        try:
            with self._running:
                job.check()
                return self._run(request, job)
        finally:
            self._jobs.discard(job)

    def stop(self) -> None:
        """Stops all jobs, also those that wait."""
        for job in list(self._jobs):
            job.stop()

    def _run(self, request: Request, job: Job) -> list[Result]:
        job.status = "Preparing; the first image of a size takes longer"
        init_image = None if request.init_image is None else init_images.read(request.init_image)
        image_prompts = list[ImagePrompt]()
        for path, strength in request.image_prompts:
            assert self._encode_image is not None, "without an encoder the page has no image prompts"
            image_prompts.append(ImagePrompt(self._encode_image(init_images.read(path)), strength))
        generated = generate(
            self.model,
            [request.prompt],
            negative_prompts=[request.negative],
            classes=[request.class_],
            image_prompts=image_prompts,
            refiner=self.refiner,
            init_image=init_image,
            callback=lambda state: job.update(state, request.options, self._preview),
            compute=self.compute,
            options=request.options,
        )
        return [self._save(image, one) for image, one in zip(generated.images, one_by_one(request), strict=True)]

    def _save(self, image: UInt8[np.ndarray, "height width 3"], request: Request) -> Result:
        description = self._describe(request)
        numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.png") if path.stem.isdecimal()]
        path = self.folder / f"{max(numbers, default=-1) + 1:06d}.png"
        save_png(Image.fromarray(image), path, description.text)
        self.results.append(Result(path, request, image.shape[:2], description.command))
        return self.results[-1]

    def save_image(self, name: str, content: bytes) -> Path:
        """Saves an uploaded init image or image prompt under its checksum, for `sample` to find it. Raises InputError
        if it is not an image."""
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / "init" / f"{digest[:16]}{Path(name).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        try:
            init_images.read(path)
        except InputError as error:
            path.unlink()
            raise InputError(str(error).replace(f"The image {path} ", f"The image {name} ")) from None
        return path

    def notes(self, request: Request) -> list[str]:
        """Notes on what the user may not expect, though nothing is wrong: truncated prompts, options without effect."""
        tokenizer = Tokenizer.of(self.model.config.text)
        given = {"prompt": request.prompt or "", "negative prompt": request.negative or ""}
        truncated = {name: tokenizer.truncated([text], False)[0] for name, text in given.items()}
        return [
            f"{count} tokens of the {name} beyond the first 75 are ignored"
            for name, count in truncated.items()
            if count
        ] + request.options.notes(self.model.config, request.negative)


def one_by_one(request: Request) -> list[Request]:
    """A request for each of a request's images."""
    options = request.options
    return [
        request._replace(options=dataclasses.replace(options, num_images=1, first_index=options.first_index + number))
        for number in range(options.num_images)
    ]


# Fields


def fields_of(config: ModelConfig, request: Request | None = None) -> dict[str, Any]:
    """The values of the page's fields for a request, or their defaults. `read_fields` is the reverse."""
    prompt, negative, options, init_image, image_prompts, label = request or Request("", None, Options())
    height, width = options.default_size(config)
    resolved = options.resolved(config)

    def either(value: Any, other: Any) -> Any:
        return other if value is None else value

    return {
        "prompt": prompt or "",
        "negative_prompt": negative or "",
        "height": either(options.height, height),
        "width": either(options.width, width),
        "sampler": resolved.sampler,
        "timestep_spacing": None if options.timestep_spacing is None else options.timestep_spacing.value,
        "sigmas": (resolved.sigmas or Sigmas.SCHEDULE).value,
        "steps": resolved.steps,
        "guidance": resolved.guidance,
        "guidance_rescale": options.guidance_rescale,
        "seed": options.seed,
        "first_index": options.first_index,
        "num_images": options.num_images,
        "handoff": either(options.handoff, HANDOFF),
        "strength": either(options.strength, IMAGE_STRENGTH),
        "init_image": init_image,
        "noise_augmentation": options.noise_augmentation or 0.0,
        "image_prompts": image_prompts,
        "class": label,
        "preset": options.preset,
    }


def fields_of_preset(config: ModelConfig, preset: str | None) -> dict[str, Any]:
    """The values that a preset gives to fields, as soon as it is chosen; of None, those of the model."""
    values = fields_of(config, Request("", None, Options(preset=preset)))
    return {name: values[name] for name in ("height", "width", "sampler", "sigmas", "steps", "guidance")}


def read_fields(config: ModelConfig, given: dict[str, Any], refiner: bool = False) -> Request:
    """The request of the fields' values. Options at their defaults are None, so that the command line leaves them out.

    Without a prompt, image prompts are alone. Raises InputError for a field that is empty or not a number; `generate`
    checks the rest.
    """
    image, image_prompts = given["init_image"], tuple(given["image_prompts"])
    height, width = _whole("height", given["height"]), _whole("width", given["width"])
    chosen = Options(preset=given["preset"])
    is_default_size = image is None and (height, width) == tuple(chosen.default_size(config))
    spacing, default = given["timestep_spacing"], chosen.resolved(config)
    sampler = None if given["sampler"] == default.sampler else given["sampler"]
    default_sigmas = dataclasses.replace(chosen, sampler=sampler).resolved(config).sigmas
    steps = _whole("steps", given["steps"])
    options = Options(
        height=None if is_default_size else height,
        width=None if is_default_size else width,
        sampler=sampler,
        timestep_spacing=None if spacing is None else Spacing(spacing),
        sigmas=None if Sigmas(given["sigmas"]) is default_sigmas else Sigmas(given["sigmas"]),
        steps=None if steps == default.steps else steps,
        guidance=_unless("guidance", given["guidance"], default.guidance),
        guidance_rescale=_number("guidance_rescale", given["guidance_rescale"]),
        seed=_whole("seed", given["seed"]),
        first_index=_whole("first_index", given["first_index"]),
        num_images=_whole("num_images", given["num_images"]),
        handoff=_unless("handoff", given["handoff"], HANDOFF) if refiner else None,
        strength=None if image is None else _unless("strength", given["strength"], IMAGE_STRENGTH),
        noise_augmentation=_unless("noise_augmentation", given["noise_augmentation"], 0.0) if image_prompts else None,
        preset=given["preset"],
    )
    prompt = given["prompt"] or (None if image_prompts else "")
    checked = tuple((path, _number("strength of an image prompt", strength)) for path, strength in image_prompts)
    label = None if given["class"] is None else _whole("class", given["class"])
    return Request(prompt, given["negative_prompt"] or None, options, image, checked, label)


def _unless(name: str, value: Any, default: float | None) -> float | None:
    number = _number(name, value)
    return None if number == default else number


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float):
        raise InputError(f"{name} is empty. Give a number")
    return float(value)


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise InputError(f"{name}={number:g}: expected a whole number")
    return int(number)
