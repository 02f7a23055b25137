"""The web page, of NiceGUI: fields on the left, the current image on the right, the images before it below.

NiceGUI was chosen over Gradio because its pages load everything from this server, it has no telemetry, and its
dependencies do not conflict with those of jax and transformers: docs/guides/serve.md.

Everybody who opens the page sees the same images; each browser has its own fields. Changes reach the browser over a web
socket, and a timer reads the job's progress, which runs in another thread.
"""

import base64
import contextlib
import functools
import secrets
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from nicegui import app, events, run, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, Response

from sdxl_jax.conditioning.classes import caption
from sdxl_jax.errors import InputError
from sdxl_jax.samplers.presets import PRESETS
from sdxl_jax.samplers.steps import SAMPLERS, Sigmas, Spacing
from sdxl_jax.serving.session import Job, Result, Session, Stopped, fields_of, fields_of_preset, read_fields

LOOPBACK = ("127.0.0.1", "localhost", "::1")
REFRESH_SECONDS = 0.2
"""Interval at which a browser's page is brought up to date."""
RECONNECT_SECONDS = 60.0
"""Time in which a browser may reconnect; compiling can keep all cores busy."""
SHUTDOWN_SECONDS = 2
"""Time that the shutdown waits for browsers that are still connected."""
INIT_IMAGE_BYTES = 64 * 2**20

_NUMBERS = {
    "class": ("Class", 1),
    "height": ("Height", 8),
    "width": ("Width", 8),
    "steps": ("Steps", 1),
    "num_images": ("Images", 1),
    "guidance": ("Guidance", 0.5),
    "guidance_rescale": ("Guidance rescale", 0.05),
    "seed": ("Seed", 1),
    "first_index": ("First image's number", 1),
    "handoff": ("Refiner from", 0.05),
    "strength": ("Strength", 0.05),
    "noise_augmentation": ("Noise", 0.05),
}
"""Labels of fields, and the step of their arrow keys. The page has no limits of its own: a value out of range is
answered by a message, not changed to another."""
_HINTS = {
    "height": "Pixels, a multiple of 8",
    "width": "Pixels, a multiple of 8",
    "steps": "Higher: slower, finer",
    "guidance": "Scale of classifier-free guidance, up to 1000. Up to 1 it is off, and steps cost half",
    "guidance_rescale": "0 to 1. Higher: less over-exposure by strong guidance",
    "seed": "0 to 4294967295",
    "first_index": "Image k of a seed is always the same: this is the first k",
    "handoff": "Fraction of the denoising schedule, 0 to 1, after which the refiner takes over",
    "strength": "Fraction of the denoising schedule to run, 0 to 1. Higher: less of the init image remains",
    "noise_augmentation": "Noise added to the images' embeddings, 0 to 1. Higher: less of the images remains",
}


def serve(session: Session, title: str, host: str, port: int) -> None:
    """Serves the page until SIGTERM or Ctrl-C, which also stop running jobs."""
    if host in LOOPBACK:  # or any website could reach it under a name of its own (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    @app.get("/images/{number}.png")
    def image(number: int) -> Response:
        if not 0 <= number < len(session.results):
            return Response(status_code=404)
        return FileResponse(session.results[number].path, media_type="image/png")

    app.on_shutdown(session.stop)
    address = f"[{host}]" if ":" in host else host
    app.on_startup(lambda: print(f"http://{address}:{port} serves {title}; Ctrl-C stops it", flush=True))
    # The server re-raises the signal that stopped it. Both signals are a normal end, after which callers clean up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        ui.run(
            lambda: Page(session, title),
            host=host,
            port=port,
            title="sdxl-jax",
            favicon="🖌",
            dark=None,
            reload=False,
            show=False,
            show_welcome_message=False,
            reconnect_timeout=RECONNECT_SECONDS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )


_STYLE = """
.sdxl-command pre { white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 2.5rem; }
.sdxl-upload .q-uploader__list, .sdxl-upload .q-uploader__subtitle { display: none; }
.sdxl-image img { height: auto; border-radius: 4px; }
"""


class Page:
    """One browser's page: its fields, its job, and the images of all."""

    def __init__(self, session: Session, title: str):
        self._session, self._config = session, session.model.config
        self._job: Job | None = None
        self._fields: dict[str, Any] = {}
        self._init_image: Any = None
        self._image_prompts: list[tuple[Path, Any]] = []
        self._shown: int | None = None
        self._listed = 0
        ui.add_css(_STYLE)
        ui.colors(primary="#3f78b0")
        with ui.header().classes("items-baseline py-2"):
            ui.label("sdxl-jax").classes("text-lg font-bold")
            ui.label(title).classes("text-sm opacity-80")
        with ui.row().classes("w-full gap-6 items-start"):
            with ui.column().classes("w-96 max-w-full gap-2"):
                self._make_fields()
            with ui.column().classes("grow basis-80 min-w-0 gap-3"):
                self._make_output()
        self._fill(fields_of(self._config))
        self._show(len(session.results) - 1)
        ui.timer(REFRESH_SECONDS, self._refresh)

    # Elements

    def _make_fields(self) -> None:
        if self._config.text:
            for name, label in (("prompt", "Prompt"), ("negative_prompt", "Negative prompt")):
                self._fields[name] = ui.textarea(label).props("outlined autogrow").classes("w-full")
        if (classes := self._config.unet.classes) is not None:
            self._number("class", f"0 to {classes.number - 1}; empty: no class")
        with ui.row().classes("w-full items-center no-wrap"):
            self._generate_button = ui.button("Generate", icon="brush", on_click=self._generate).classes("grow")
            self._stop_button = ui.button("Stop", icon="stop", color="negative", on_click=self.stop)
        # Before the fields that it sets, so that those of a request are filled in after it.
        presets = {None: "as the model's files say"} | {name: name for name in PRESETS}
        self._select("preset", "Few-step preset", presets)
        self._fields["preset"].on_value_change(self._set_preset)
        self._pairs(("height", "width"), ("steps", "num_images"))
        with ui.row().classes("w-full items-center no-wrap"):
            self._number("seed")
            with ui.button(icon="casino", on_click=self._random_seed).props("flat round"):
                ui.tooltip("Another seed")
        self._pairs(("guidance", "guidance_rescale"))
        self._select("sampler", "Sampler", {name: name for name in SAMPLERS})
        with ui.grid(columns=2).classes("w-full gap-2"):
            spacings = {None: "the sampler's own"} | {each.value: each.value for each in Spacing}
            self._select("timestep_spacing", "Timestep spacing", spacings)
            self._select("sigmas", "Noise levels", {each.value: each.value for each in Sigmas})
        if self._session.refiner is not None:
            self._number("handoff")
        with ui.expansion("Start from an image", icon="image").classes("w-full"):
            self._upload = self._make_upload(self._upload_init_image)
            with ui.row().classes("w-full items-center no-wrap"):
                self._number("strength")
                ui.button(icon="delete", on_click=lambda: self._set_init_image(None)).props("flat round")
            self._init_label = ui.label().classes("text-sm opacity-70")
        if self._session.takes_image_prompts:
            with ui.expansion("Image prompts", icon="collections").classes("w-full"):
                self._prompt_upload = self._make_upload(self._upload_image_prompt)
                ui.label("With the prompt above, or alone where it is empty.").classes("text-sm opacity-70")
                self._prompt_list = ui.column().classes("w-full gap-1")
                self._number("noise_augmentation")
        with ui.expansion("More", icon="tune").classes("w-full"):
            self._number("first_index")

    def _make_upload(self, on_upload: Any) -> Any:
        upload = ui.upload(
            label="PNG, JPEG, …",
            auto_upload=True,
            max_files=1,
            max_file_size=INIT_IMAGE_BYTES,
            on_upload=on_upload,
            on_rejected=lambda: self._show_message(
                f"The image is larger than {INIT_IMAGE_BYTES >> 20} MiB. Give a smaller one"
            ),
        )
        return upload.props("flat bordered").classes("w-full sdxl-upload")

    def _pairs(self, *pairs: tuple[str, str]) -> None:
        with ui.grid(columns=2).classes("w-full gap-2"):
            for name in (name for pair in pairs for name in pair):
                self._number(name)

    def _number(self, name: str, hint: str | None = None) -> None:
        label, step = _NUMBERS[name]
        self._fields[name] = ui.number(label, step=step).props("outlined dense").classes("grow w-full")
        if hint := hint or _HINTS.get(name):
            with self._fields[name]:
                ui.tooltip(hint).props("delay=600")

    def _select(self, name: str, label: str, choices: dict[Any, str]) -> None:
        self._fields[name] = ui.select(choices, label=label).props("outlined dense").classes("w-full")

    def _make_output(self) -> None:
        self._message = ui.label().classes("w-full p-3 rounded bg-negative text-white whitespace-pre-wrap break-words")
        self._note = ui.label().classes("text-sm opacity-70")
        with ui.column().classes("w-full gap-1") as self._progress:
            self._status = ui.label().classes("text-sm")
            self._bar = ui.linear_progress(0, show_value=False).props("instant-feedback")
        self._empty = ui.label("No images yet.").classes("opacity-60")
        self._image = ui.html(sanitize=False).classes("w-full sdxl-image")
        self._command = ui.code(language="bash").classes("w-full sdxl-command")
        with ui.row().classes("gap-2") as self._actions:
            ui.button("Download", icon="download", on_click=self._download).props("outline dense padding='xs sm'")
            ui.button("Use these settings", icon="replay", on_click=self._use).props("outline dense padding='xs sm'")
            self._summary = ui.label().classes("text-sm opacity-70 self-center")
        self._history = ui.row().classes("w-full gap-2")

    # Events

    async def _generate(self) -> None:
        if self._job is not None:
            return
        self._show_message("")
        self._job = job = Job()
        try:
            request = read_fields(self._config, self._values(), self._session.refiner is not None)
            self._note.text = ". ".join(self._session.notes(request))
            results = await run.io_bound(self._session.run, request, job)
            if results and not self._history.is_deleted:
                self._show(self._session.results.index(results[0]))
        except Stopped:
            self._note.text = "Stopped."
        except InputError as error:
            self._show_message(str(error))
        except Exception as error:
            traceback.print_exc()
            self._show_message(
                f"The request failed: {type(error).__name__}: {error}. The server's terminal has the traceback"
            )
        finally:
            self._job = None
            if not self._history.is_deleted:  # the browser may be gone by now
                self._refresh()

    def stop(self) -> None:
        if self._job is not None:
            self._job.stop()

    def _refresh(self) -> None:
        """Brings the page up to date with its job, and with the results of others."""
        job = self._job
        self._generate_button.set_enabled(job is None)
        self._stop_button.set_visibility(job is not None)
        self._progress.set_visibility(job is not None)
        self._message.set_visibility(bool(self._message.text))
        self._note.set_visibility(bool(self._note.text))
        self._extend_history()
        has_preview = job is not None and job.preview is not None
        result = None if self._shown is None else self._session.results[self._shown]
        for element in (self._command, self._actions):
            element.set_visibility(result is not None and not has_preview)
        self._empty.set_visibility(result is None and not has_preview)
        if job is not None:
            self._status.text, self._bar.value = job.status, job.progress
        if job is not None and job.preview is not None:
            source = f"data:image/png;base64,{base64.b64encode(job.preview).decode()}"
            self._set_image("preview", source, job.preview_size)
        elif result is not None:
            self._set_image("image", f"/images/{self._shown}.png", result.size)
        else:
            self._image.content = ""

    def _set_image(self, name: str, source: str, size: tuple[int, int]) -> None:
        """Scaled so that width and height fit the window."""
        width = f"min(100%, {65 * size[1] / size[0]:.1f}vh)"
        self._image.content = f'<img data-testid="{name}" alt="{name}" src="{source}" style="width: {width}">'

    def _show(self, number: int) -> None:
        """Shows a result by its number; −1: none."""
        if number < 0:
            return
        self._shown, result = number, self._session.results[number]
        self._command.content = result.command
        self._summary.text = self._settings(result)
        self._refresh()

    def _extend_history(self) -> None:
        """Adds the results that are not in the history yet, the newest first."""
        for number in range(self._listed, len(self._session.results)):
            result = self._session.results[number]
            with self._history:
                image = ui.image(f"/images/{number}.png").classes("h-24 cursor-pointer rounded")
            height, width = result.size
            image.style(f"width: {6 * min(3, width / height):.2f}rem")
            image.props("no-spinner loading=lazy").move(target_index=0)
            image.on("click", functools.partial(self._show, number), args=[])
            with image:
                shown = caption((result.request.prompt or "")[:200], result.request.class_)
                ui.tooltip(f"{shown} · {self._settings(result)}")
        self._listed = len(self._session.results)

    def _download(self) -> None:
        if self._shown is not None:
            ui.download(f"/images/{self._shown}.png", self._session.results[self._shown].path.name)

    def _use(self) -> None:
        if self._shown is not None:
            self._fill(fields_of(self._config, self._session.results[self._shown].request))

    def _values(self) -> dict[str, Any]:
        names = ("prompt", "negative_prompt", "class", "handoff", "noise_augmentation")  # there may be no field
        values = dict.fromkeys(names)
        values |= {name: each.value for name, each in self._fields.items()} | {"init_image": self._init_image}
        return values | {"image_prompts": [(path, strength.value) for path, strength in self._image_prompts]}

    def _fill(self, values: dict[str, Any]) -> None:
        for name, each in self._fields.items():
            each.value = values[name]
        self._set_init_image(values["init_image"])
        if self._session.takes_image_prompts:
            self._prompt_list.clear()
            self._image_prompts = []
            for path, strength in values["image_prompts"]:
                self._add_image_prompt(path, strength, path.name)

    def _set_preset(self, event: events.ValueChangeEventArguments) -> None:
        try:
            values = fields_of_preset(self._config, event.value)
        except InputError as error:
            self._show_message(str(error))
            return
        for name, value in values.items():
            self._fields[name].value = value

    def _random_seed(self) -> None:
        self._fields["seed"].value = secrets.randbelow(2**32)

    async def _upload_init_image(self, event: events.UploadEventArguments) -> None:
        if (path := await self._uploaded(event)) is not None:
            self._set_init_image(path, event.file.name)
        self._upload.reset()

    async def _upload_image_prompt(self, event: events.UploadEventArguments) -> None:
        if (path := await self._uploaded(event)) is not None:
            self._add_image_prompt(path, 1.0, event.file.name)
        self._prompt_upload.reset()

    async def _uploaded(self, event: events.UploadEventArguments) -> Path | None:
        """The uploaded image as a file; None, with a message, if it is not an image."""
        content = await event.file.read()
        try:
            path = self._session.save_image(event.file.name, content)
        except InputError as error:
            self._show_message(str(error))
            return None
        self._show_message("")
        return path

    def _add_image_prompt(self, path: Path, strength: float, name: str) -> None:
        with self._prompt_list, ui.row().classes("w-full items-center no-wrap") as row:
            field = ui.number(f"Strength of {name}", value=strength, step=0.1).props("outlined dense").classes("grow")
            entry = (path, field)

            def remove() -> None:
                self._image_prompts.remove(entry)
                row.delete()

            ui.button(icon="delete", on_click=remove).props("flat round")
        self._image_prompts.append(entry)

    def _set_init_image(self, path: Any, name: str | None = None) -> None:
        self._init_image = path
        self._init_label.text = "No init image" if path is None else f"Init image: {name or path.name}"

    def _show_message(self, message: str) -> None:
        self._message.text = message
        self._note.text = ""

    def _settings(self, result: Result) -> str:
        """A result's settings in short; the command line has all of them."""
        values = fields_of(self._config, result.request)
        values |= dict(zip(("height", "width"), result.size, strict=True))
        return (
            "{height}×{width} · {sampler}, {steps} steps · guidance {guidance:g} · seed {seed}, image {first_index}"
        ).format(**values)
