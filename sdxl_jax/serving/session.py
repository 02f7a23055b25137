"""What stands after the page: one drawing at a time, which can be stopped and looked at, and the images so far.

    what the fields hold ── wanted ── Wanted ── Studio.draw ── Drawn, a PNG file each
                                                 │    ▲
                                        Drawing.told  Drawing.stop, from the page, between steps

A drawing runs in a thread of its own, and the page reads its `Drawing` while it does. A second one waits its turn.

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
from PIL import Image

from sdxl_jax.conditioning.text import Tokenizer
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models.layers import Compute
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.sampling import init_images
from sdxl_jax.sampling.contact_sheet import save_png
from sdxl_jax.sampling.generate import StepState, generate
from sdxl_jax.sampling.options import Options
from sdxl_jax.sampling.plan import HANDOFF, IMAGE_STRENGTH


class Request(NamedTuple):
    """What is to be drawn."""

    prompt: str
    negative: str | None
    options: Options
    init_image: Path | None = None


class Result(NamedTuple):
    """An image, and what draws it again."""

    path: Path
    """PNG, with what it was made with as its text."""
    request: Request
    """This image alone."""
    size: tuple[int, int]
    """Height and width in pixels."""
    command: str
    """The command line that draws it."""


class Described(NamedTuple):
    command: str
    text: dict[str, str]
    """For the PNG."""


Describe = Callable[[Request], Described]
"""How one image is said: as a command line, and in its file."""

Look = Callable[[StepState], np.ndarray]
"""Images, uint8 [images, height, width, 3], as the network now sees them finished."""


class Stopped(Exception):
    """Somebody pressed stop."""


class Job:
    """A drawing as the page sees it, from another thread."""

    def __init__(self) -> None:
        self.status = "Waiting for another drawing"
        self.share = 0.0
        """0..1, of all steps of all images."""
        self.preview: bytes | None = None
        """PNG of the first image of those that come into being."""
        self.size = (1, 1)
        """Its height and width."""
        self._stop = threading.Event()

    def stop(self) -> None:
        """Ends it after the step that is being made."""
        self._stop.set()
        self.status = "Stopping after this step"

    def check(self) -> None:
        """Raises Stopped if it was."""
        if self._stop.is_set():
            raise Stopped

    def told(self, seen: StepState, options: Options, look: Look | None) -> None:
        """Takes down how far it is. Raises Stopped."""
        jax.block_until_ready(seen.x0)  # or the steps would be told before they are made
        self.check()
        first, last = (seen.first - options.first_index + number for number in (1, seen.images))
        images = "" if last - first + 1 == options.num_images else f", images {first} to {last}"
        self.status = f"Step {seen.step} of {seen.steps}{images}{'' if seen.step < seen.steps else '; decoding'}"
        self.share = (first - 1 + seen.images * seen.step / seen.steps) / options.num_images
        if look is not None:
            image = look(seen._replace(x0=seen.x0[:1], images=1))[0]
            self.preview, self.size = png(image), image.shape[:2]


def png(image: np.ndarray) -> bytes:
    """An image, uint8 [height, width, 3], as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


class Session:
    """A model, and the images that were drawn with it since it was opened."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        describe: Describe,
        refiner: Model | None = None,
        compute: Compute = Compute(),
        look: Look | None = None,
    ):
        """folder: where the images go, 000000.png and so on, after those that are there.

        look: what shows images while they come into being; None: nothing is seen before the end.
        """
        self.model, self.folder, self.refiner, self.compute = model, folder, refiner, compute
        self.results: list[Result] = []
        """Oldest first."""
        self._describe, self._turn = describe, threading.Lock()
        self._jobs: set[Job] = set()
        self._look = look

    def draw(self, request: Request, job: Job) -> list[Result]:
        """The images, written. Raises InputError, and Stopped if the drawing was; then there are none."""
        self._jobs.add(job)
        try:
            with self._turn:
                job.check()
                return self._draw(request, job)
        finally:
            self._jobs.discard(job)

    def stop(self) -> None:
        """Stops all drawings, also those that wait."""
        for job in list(self._jobs):
            job.stop()

    def _draw(self, request: Request, job: Job) -> list[Result]:
        job.status = "Preparing; the first image of a size takes longer"
        image = None if request.init_image is None else init_images.read(request.init_image)
        made = generate(
            self.model,
            [request.prompt],
            negative_prompts=[request.negative],
            refiner=self.refiner,
            init_image=image,
            callback=lambda seen: job.told(seen, request.options, self._look),
            compute=self.compute,
            options=request.options,
        )
        return [self._keep(image, one) for image, one in zip(made.images, each(request), strict=True)]

    def _keep(self, image: np.ndarray, request: Request) -> Result:
        described = self._describe(request)
        numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.png") if path.stem.isdecimal()]
        path = self.folder / f"{max(numbers, default=-1) + 1:06d}.png"
        save_png(Image.fromarray(image), path, described.text)
        self.results.append(Result(path, request, image.shape[:2], described.command))
        return self.results[-1]

    def keep_init_image(self, name: str, content: bytes) -> Path:
        """Writes an image to start from where commands find it again. Raises InputError if it is none."""
        digest = hashlib.sha256(content).hexdigest()
        path = self.folder / "init" / f"{digest[:16]}{Path(name).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        try:
            init_images.read(path)
        except InputError:
            path.unlink()
            raise InputError(f"{name} is no image that can be read. Give a PNG or JPEG") from None
        return path

    def notes(self, request: Request) -> list[str]:
        """What is not as somebody may expect, though nothing is wrong."""
        tokenizer = Tokenizer.of(self.model.config.text)
        given = {"prompt": request.prompt, "negative prompt": request.negative or ""}
        beyond = {name: tokenizer.truncated([text], False)[0] for name, text in given.items()}
        return [
            f"{count} tokens of the {name} are beyond the 75 that are read" for name, count in beyond.items() if count
        ] + request.options.notes(self.model.config, request.negative)


def each(request: Request) -> list[Request]:
    """One for each image."""
    options = request.options
    return [
        request._replace(options=dataclasses.replace(options, num_images=1, first_index=options.first_index + number))
        for number in range(options.num_images)
    ]


# Fields


def fields_of(config: ModelConfig, request: Request | None = None) -> dict[str, Any]:
    """What the page's fields hold for some image, or at first. `wanted` reads them."""
    prompt, negative, options, init_image = request or Request("", None, Options())
    height, width = config.default_size
    settled = options.resolved(config)

    def either(value: Any, other: Any) -> Any:
        return other if value is None else value

    return {
        "prompt": prompt,
        "negative_prompt": negative or "",
        "height": either(options.height, height),
        "width": either(options.width, width),
        "sampler": settled.sampler,
        "timestep_spacing": None if options.timestep_spacing is None else options.timestep_spacing.value,
        "sigmas": (settled.sigmas or Sigmas.SCHEDULE).value,
        "steps": options.steps,
        "guidance": settled.guidance,
        "guidance_rescale": options.guidance_rescale,
        "seed": options.seed,
        "first_index": options.first_index,
        "num_images": options.num_images,
        "handoff": either(options.handoff, HANDOFF),
        "strength": either(options.strength, IMAGE_STRENGTH),
        "init_image": init_image,
    }


def read_fields(config: ModelConfig, given: dict[str, Any], refiner: bool = False) -> Request:
    """What the fields say. What is as it would be anyway is left to be so, and not said in the command line.

    Raises InputError for a field that is empty or no number; `generate` does for the rest.
    """
    image = given["init_image"]
    height, width = _whole("height", given["height"]), _whole("width", given["width"])
    own = image is None and (height, width) == tuple(config.default_size)
    spacing, own_sampler = given["timestep_spacing"], Options().resolved(config).sampler
    sampler = None if given["sampler"] == own_sampler else given["sampler"]
    own_sigmas = Options(sampler=sampler).resolved(config).sigmas
    options = Options(
        height=None if own else height,
        width=None if own else width,
        sampler=sampler,
        timestep_spacing=None if spacing is None else Spacing(spacing),
        sigmas=None if Sigmas(given["sigmas"]) is own_sigmas else Sigmas(given["sigmas"]),
        steps=_whole("steps", given["steps"]),
        guidance=_unless("guidance", given["guidance"], Options().resolved(config).guidance),
        guidance_rescale=_number("guidance_rescale", given["guidance_rescale"]),
        seed=_whole("seed", given["seed"]),
        first_index=_whole("first_index", given["first_index"]),
        num_images=_whole("num_images", given["num_images"]),
        handoff=_unless("handoff", given["handoff"], HANDOFF) if refiner else None,
        strength=None if image is None else _unless("strength", given["strength"], IMAGE_STRENGTH),
    )
    return Request(given["prompt"] or "", given["negative_prompt"] or None, options, image)


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
        raise InputError(f"{name}={number:g}, expected a whole number")
    return int(number)
