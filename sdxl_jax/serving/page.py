"""The page, of NiceGUI: fields on the left, what is drawn on the right, what was drawn below it.

NiceGUI was chosen over Gradio because all that its pages load comes from this server, it measures nobody's use, and
what it needs does not meet with what jax and transformers need: docs/guides/serve.md.

Everybody who opens the page sees the same images; the fields are one's own. The browser is told of changes over a
web socket, and a timer looks at the drawing, which is made in another thread.
"""

import base64
import contextlib
import functools
import secrets
import signal
import sys
import traceback
from typing import Any

from nicegui import app, events, run, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, Response

from sdxl_jax.errors import InputError
from sdxl_jax.samplers.steps import SAMPLERS, Sigmas, Spacing
from sdxl_jax.serving.session import Job, Result, Session, Stopped, fields_of, read_fields

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LOOK_SECONDS = 0.2
"""How often a browser is told of a drawing."""
PATIENCE_SECONDS = 60.0
"""How long a browser may be out of touch; compiling can keep all cores busy."""
GRACE_SECONDS = 2
"""How long browsers that are still connected may hold up the end."""
INIT_IMAGE_BYTES = 64 * 2**20

_NUMBERS = {
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
}
"""Labels of fields, and by how much the arrow keys change them. Limits are not the page's: what is out of range is
answered by a message, and not by another number."""
_HINTS = {
    "height": "Pixels, a multiple of 8",
    "width": "Pixels, a multiple of 8",
    "steps": "More: slower, finer",
    "guidance": "How closely to the prompt, up to 1000; 0 to 1 is none, and costs half",
    "guidance_rescale": "0 to 1. More: less over-exposed where guidance is strong",
    "seed": "0 to 4294967295",
    "first_index": "Image k of a seed is always the same: this is the first k",
    "handoff": "Share of the way, 0 to 1, after which the refiner takes over",
    "strength": "Share of the way, 0 to 1, that is gone again. More: less is left of the image",
}


def serve(session: Session, title: str, host: str, port: int) -> None:
    """Serves the page until the process is told to end; what is being drawn then is stopped."""
    if host in LOOPBACK:  # or any page on the web could reach it under a name of its own (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    @app.get("/images/{number}.png")
    def picture(number: int) -> Response:
        if not 0 <= number < len(session.results):
            return Response(status_code=404)
        return FileResponse(session.results[number].path, media_type="image/png")

    app.on_shutdown(session.stop)
    shown = f"[{host}]" if ":" in host else host
    app.on_startup(lambda: print(f"http://{shown}:{port} draws with {title}; Ctrl-C ends it", flush=True))
    # The server passes on the signal that ended it. Both are how it is meant to end, and what is above us tidies up.
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
            reconnect_timeout=PATIENCE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )


_STYLE = """
.sdxl-command pre { white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 2.5rem; }
.sdxl-upload .q-uploader__list, .sdxl-upload .q-uploader__subtitle { display: none; }
.sdxl-image img { height: auto; border-radius: 4px; }
"""


class Page:
    """One browser's view: its fields, its drawing, and everybody's images."""

    def __init__(self, session: Session, title: str):
        self._session, self._config = session, session.model.config
        self._job: Job | None = None
        self._fields: dict[str, Any] = {}
        self._init_image: Any = None
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
                self._make_canvas()
        self._fill(fields_of(self._config))
        self._show(len(session.results) - 1)
        ui.timer(LOOK_SECONDS, self._look)

    # What is on it

    def _make_fields(self) -> None:
        self._fields["prompt"] = ui.textarea("Prompt").props("outlined autogrow").classes("w-full")
        self._fields["negative_prompt"] = ui.textarea("Negative prompt").props("outlined autogrow").classes("w-full")
        with ui.row().classes("w-full items-center no-wrap"):
            self._draw_button = ui.button("Draw", icon="brush", on_click=self._draw).classes("grow")
            self._stop_button = ui.button("Stop", icon="stop", color="negative", on_click=self.stop)
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
            self._upload = ui.upload(
                label="PNG, JPEG, …",
                auto_upload=True,
                max_files=1,
                max_file_size=INIT_IMAGE_BYTES,
                on_upload=self._take_init_image,
                on_rejected=lambda: self._say(f"The image is larger than {INIT_IMAGE_BYTES >> 20} MiB"),
            )
            self._upload.props("flat bordered").classes("w-full sdxl-upload")
            with ui.row().classes("w-full items-center no-wrap"):
                self._number("strength")
                ui.button(icon="delete", on_click=lambda: self._set_init_image(None)).props("flat round")
            self._init_label = ui.label().classes("text-sm opacity-70")
        with ui.expansion("More", icon="tune").classes("w-full"):
            self._number("first_index")

    def _pairs(self, *pairs: tuple[str, str]) -> None:
        with ui.grid(columns=2).classes("w-full gap-2"):
            for name in (name for pair in pairs for name in pair):
                self._number(name)

    def _number(self, name: str) -> None:
        label, step = _NUMBERS[name]
        self._fields[name] = ui.number(label, step=step).props("outlined dense").classes("grow w-full")
        if name in _HINTS:
            with self._fields[name]:
                ui.tooltip(_HINTS[name]).props("delay=600")

    def _select(self, name: str, label: str, choices: dict[Any, str]) -> None:
        self._fields[name] = ui.select(choices, label=label).props("outlined dense").classes("w-full")

    def _make_canvas(self) -> None:
        self._message = ui.label().classes("w-full p-3 rounded bg-negative text-white whitespace-pre-wrap break-words")
        self._note = ui.label().classes("text-sm opacity-70")
        with ui.column().classes("w-full gap-1") as self._progress:
            self._status = ui.label().classes("text-sm")
            self._bar = ui.linear_progress(0, show_value=False).props("instant-feedback")
        self._empty = ui.label("Nothing is drawn yet.").classes("opacity-60")
        self._picture = ui.html(sanitize=False).classes("w-full sdxl-image")
        self._command = ui.code(language="bash").classes("w-full sdxl-command")
        with ui.row().classes("gap-2") as self._actions:
            ui.button("Download", icon="download", on_click=self._download).props("outline dense padding='xs sm'")
            ui.button("Take these settings", icon="replay", on_click=self._take).props("outline dense padding='xs sm'")
            self._summary = ui.label().classes("text-sm opacity-70 self-center")
        self._history = ui.row().classes("w-full gap-2")

    # What happens

    async def _draw(self) -> None:
        if self._job is not None:
            return
        self._say("")
        self._job = job = Job()
        try:
            request = read_fields(self._config, self._values(), self._session.refiner is not None)
            self._note.text = ". ".join(self._session.notes(request))
            results = await run.io_bound(self._session.draw, request, job)
            if results and not self._history.is_deleted:
                self._show(self._session.results.index(results[0]))
        except Stopped:
            self._note.text = "Stopped."
        except InputError as error:
            self._say(str(error))
        except Exception as error:
            traceback.print_exc()
            self._say(f"Drawing failed: {type(error).__name__}. The terminal of the server tells more")
        finally:
            self._job = None
            if not self._history.is_deleted:  # the browser may be gone by now
                self._look()

    def stop(self) -> None:
        if self._job is not None:
            self._job.stop()

    def _look(self) -> None:
        """Brings the page up to date with the drawing, and with what others drew."""
        job = self._job
        self._draw_button.set_enabled(job is None)
        self._stop_button.set_visibility(job is not None)
        self._progress.set_visibility(job is not None)
        self._message.set_visibility(bool(self._message.text))
        self._note.set_visibility(bool(self._note.text))
        self._list()
        shows_preview = job is not None and job.preview is not None
        shown = None if self._shown is None else self._session.results[self._shown]
        for element in (self._command, self._actions):
            element.set_visibility(shown is not None and not shows_preview)
        self._empty.set_visibility(shown is None and not shows_preview)
        if job is not None:
            self._status.text, self._bar.value = job.status, job.share
        if job is not None and job.preview is not None:
            self._set_image("preview", f"data:image/png;base64,{base64.b64encode(job.preview).decode()}", job.size)
        elif shown is not None:
            self._set_image("image", f"/images/{self._shown}.png", shown.size)
        else:
            self._picture.content = ""

    def _set_image(self, name: str, source: str, size: tuple[int, int]) -> None:
        """Enlarged or made smaller, so that width and height fit the window."""
        width = f"min(100%, {65 * size[1] / size[0]:.1f}vh)"
        self._picture.content = f'<img data-testid="{name}" alt="{name}" src="{source}" style="width: {width}">'

    def _show(self, number: int) -> None:
        """An image of those that were drawn; none for −1."""
        if number < 0:
            return
        self._shown, results = number, self._session.results[number]
        self._command.content = results.command
        self._summary.text = self._said(results)
        self._look()

    def _list(self) -> None:
        """Adds the images that are not in the list yet, the newest first."""
        for number in range(self._listed, len(self._session.results)):
            results = self._session.results[number]
            with self._history:
                image = ui.image(f"/images/{number}.png").classes("h-24 cursor-pointer rounded")
            height, width = results.size
            image.style(f"width: {6 * min(3, width / height):.2f}rem")
            image.props("no-spinner loading=lazy").move(target_index=0)
            image.on("click", functools.partial(self._show, number), args=[])
            with image:
                ui.tooltip(f"{results.request.prompt[:200]} · {self._said(results)}")
        self._listed = len(self._session.results)

    def _download(self) -> None:
        if self._shown is not None:
            ui.download(f"/images/{self._shown}.png", self._session.results[self._shown].path.name)

    def _take(self) -> None:
        if self._shown is not None:
            self._fill(fields_of(self._config, self._session.results[self._shown].request))

    def _values(self) -> dict[str, Any]:
        absent = {"handoff": None}  # without a refiner
        return absent | {name: each.value for name, each in self._fields.items()} | {"init_image": self._init_image}

    def _fill(self, values: dict[str, Any]) -> None:
        for name, each in self._fields.items():
            each.value = values[name]
        self._set_init_image(values["init_image"])

    def _random_seed(self) -> None:
        self._fields["seed"].value = secrets.randbelow(2**32)

    async def _take_init_image(self, event: events.UploadEventArguments) -> None:
        content = await event.file.read()
        try:
            self._set_init_image(self._session.keep_init_image(event.file.name, content), event.file.name)
            self._say("")
        except InputError as error:
            self._upload.reset()
            self._say(str(error))

    def _set_init_image(self, path: Any, name: str | None = None) -> None:
        self._init_image = path
        self._init_label.text = "No image: from noise alone" if path is None else f"From {name or path.name}"
        self._upload.reset()

    def _say(self, message: str) -> None:
        self._message.text = message
        self._note.text = ""

    def _said(self, results: Result) -> str:
        """Its settings in short; the command line says all."""
        said = fields_of(self._config, results.request)
        said |= dict(zip(("height", "width"), results.size, strict=True))
        return (
            "{height}×{width} · {sampler}, {steps} steps · guidance {guidance:g} · seed {seed}, image {first_index}"
        ).format(**said)
