"""`sdxl-jax serve`: the session behind the page, on a tiny model with random weights; slow: the page in a browser."""

import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import compiling
import numpy as np
import pytest
from command import call
from PIL import Image
from tiny import MODEL, random_model, write_image_tower

from sdxl_jax import serving
from sdxl_jax.commands import parsing
from sdxl_jax.commands.preview import Previews
from sdxl_jax.commands.sample import Sample, load, opened, read_text
from sdxl_jax.commands.serve import Serve, as_sample, command_line, describe, free_port
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.sampling.options import Options
from sdxl_jax.serving.session import Job, Request, Session, Stopped, fields_of, png, read_fields
from sdxl_jax.weights.convert import convert

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL: dict[str, Any] = {"height": 16, "width": 24, "steps": 2}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    convert(random_model(MODEL, 0), path, "orbax", progress=False)
    return path


@pytest.fixture(scope="module")
def model(saved: Path) -> Model:
    """Opened as the command opens it, so that both need the same programs."""
    sample = as_sample(Serve(model=saved))
    return load(sample, opened(sample))[0]


@pytest.fixture
def session(model: Model, saved: Path, tmp_path: Path) -> Session:
    serve = Serve(model=saved)
    return Session(model, tmp_path / "images", lambda request: describe(serve, request, MODEL))


def small(prompt: str = "a red cube", **options: Any) -> Request:
    return Request(prompt, None, Options(**(SMALL | options)))


# The command line of an image


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red cube", None, Options()),
        Request("", "", Options()),
        Request('--it\'s a "$HOME" `date`;\n  of two lines', "-no", Options(guidance=0.1 + 0.2)),
        Request(
            "ein Würfel, 赤",
            "blurred",
            Options(**SMALL, sampler="ddim", timestep_spacing=Spacing.TRAILING, sigmas=Sigmas.KARRAS, seed=2**32 - 1),
        ),
        Request("x", None, Options(first_index=3, guidance_rescale=0.7, handoff=0.5, strength=0.6), Path("a b.png")),
    ],
)
def test_the_shown_command_line_parses_to_the_same_request(request_: Request) -> None:
    serve = Serve(
        model=Path("my model"),
        lora=("a:0.5", "b"),
        embedding=("c",),
        parts_from=(Path("vae"),),
        dtype="bfloat16",
        refiner=Path("refiner"),
        prediction="v_prediction",
        allow_partial=True,
    )
    sample = as_sample(serve, request_)
    program, command, *arguments = shlex.split(command_line(sample))
    assert (program, command) == ("sdxl-jax", "sample")
    assert parsing.parse(Sample, arguments, command) == sample
    assert (sample.prompt, sample.negative_prompt, sample.options) == (
        (request_.prompt,),
        request_.negative,
        request_.options,
    )


def test_the_command_line_leaves_defaults_out() -> None:
    command = command_line(as_sample(Serve(model=Path("run")), small(height=None, width=None)))
    assert command == "sdxl-jax sample run --prompt 'a red cube' --steps 2 --out again"


# The fields


def test_fields_that_nobody_touched_are_the_defaults() -> None:
    fields = fields_of(MODEL) | {"prompt": "a cube"}
    assert (fields["height"], fields["width"]) == MODEL.default_size
    assert fields["guidance"] == 5
    assert read_fields(MODEL, fields, refiner=True) == Request("a cube", None, Options())


def test_fields_hold_all_settings_of_an_image() -> None:
    options = Options(
        height=16,
        width=24,
        steps=7,
        sampler="ddim",
        timestep_spacing=Spacing.LINSPACE,
        sigmas=Sigmas.KARRAS,
        guidance=3.0,
        guidance_rescale=0.5,
        seed=9,
        first_index=2,
        handoff=0.6,
        strength=0.4,
    )
    request = Request("a", "b", options, Path("c.png"))
    assert read_fields(MODEL, fields_of(MODEL, request), refiner=True) == request


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", None, "steps is empty"),
        ("steps", 2.5, "steps=2.5: expected a whole number"),
        ("guidance", "", "is empty"),
    ],
)
def test_a_field_that_is_not_a_number_is_refused_by_name(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_fields(MODEL, fields_of(MODEL) | {name: value})


# Requests


def test_an_image_is_that_of_sample_with_the_same_text(session: Session, tmp_path: Path) -> None:
    """The shown command gives the same image, bit for bit: both are sampled one at a time."""
    results = session.run(small(num_images=2, batch_size=1), Job())
    assert [each.path.name for each in results] == ["000000.png", "000001.png"]
    assert session.results == results
    again = shlex.split(results[1].command)[1:]
    assert again[-2:] == ["--out", "again"]
    outcome = call(*again[:-1], tmp_path / "again")
    assert outcome.code == 0, outcome.err
    path = tmp_path / "again" / "000000.png"
    assert read_text(path) == read_text(results[1].path)
    assert path.read_bytes() == results[1].path.read_bytes() != results[0].path.read_bytes()
    with Image.open(path) as image:
        assert image.size == (24, 16) == results[1].size[::-1]


def test_images_go_after_those_that_the_folder_holds(session: Session) -> None:
    session.folder.mkdir()
    for name in ("000007.png", "sweep.png"):
        (session.folder / name).write_bytes(b"precious")
    (result,) = session.run(small(), Job())
    assert result.path.name == "000008.png"
    assert (session.folder / "000007.png").read_bytes() == b"precious"


def test_a_job_reports_progress_and_previews(model: Model, saved: Path, session: Session) -> None:
    preview = Previews(MODEL, saved).decode
    seen: list[tuple[float, str]] = []

    class Recording(Job):
        def update(self, *arguments: Any) -> None:
            super().update(*arguments)
            seen.append((self.progress, self.status))

    job = Recording()
    previewing = Session(model, session.folder, session._describe, preview=preview)
    previewing.run(small(num_images=2, batch_size=1), job)
    assert [progress for progress, _ in seen] == [0.25, 0.5, 0.75, 1]
    assert [status for _, status in seen][1:3] == [
        "Step 2 of 2, images 1 to 1; decoding",
        "Step 1 of 2, images 2 to 2",
    ]
    assert job.preview is not None
    with Image.open(io.BytesIO(job.preview)) as image:
        assert image.size == (24, 16) == job.preview_size[::-1]


def test_stop_ends_a_job_between_steps_and_the_next_request_runs(session: Session) -> None:
    class Impatient(Job):
        steps = 0

        def update(self, *arguments: Any) -> None:
            self.steps += 1
            if self.steps == 2:
                session.stop()
            super().update(*arguments)

    job = Impatient()
    with pytest.raises(Stopped):
        session.run(small(steps=50), job)
    assert job.steps == 2
    assert session.results == []
    assert len(session.run(small(), Job())) == 1


def test_a_request_waits_for_another_and_can_be_stopped_meanwhile(session: Session) -> None:
    began, may_end = threading.Event(), threading.Event()

    class Slow(Job):
        def update(self, *arguments: Any) -> None:
            began.set()
            assert may_end.wait(60)
            super().update(*arguments)

    first = threading.Thread(target=lambda: session.run(small(), Slow()))
    first.start()
    while not began.wait(0.1):
        assert first.is_alive()
    waiting, outcome = Job(), []

    def second() -> None:
        try:
            session.run(small(), waiting)
        except Stopped:
            outcome.append("stopped")

    other = threading.Thread(target=second)
    other.start()
    assert waiting.status == "Waiting for another request"
    waiting.stop()
    may_end.set()
    for thread in (first, other):
        thread.join(60)
    assert outcome == ["stopped"]
    assert len(session.results) == 1


def test_an_invalid_request_is_an_input_error_and_leaves_nothing(session: Session) -> None:
    with pytest.raises(InputError, match=r"height 12 × width 24: expected positive multiples of 8"):
        session.run(small(height=12), Job())
    assert session.results == []
    assert not session.folder.exists()


def test_an_init_image_is_saved_under_its_checksum(session: Session) -> None:
    content = png(np.zeros((16, 24, 3), np.uint8))
    path = session.save_image("../../holiday.png", content)
    assert path.parent == session.folder / "init"
    assert path.read_bytes() == content
    assert session.save_image("same.png", content) == path
    with pytest.raises(
        InputError, match=r"The image notes.txt cannot be read: in no known image format.*Save it again, as PNG or JPEG"
    ):
        session.save_image("notes.txt", b"hello")
    assert list(path.parent.iterdir()) == [path]


def test_truncated_prompts_are_noted(session: Session) -> None:
    assert session.notes(small("a cat")) == []
    assert session.notes(small("cat " * 80)) == ["5 tokens of the prompt beyond the first 75 are ignored"]


def test_options_without_effect_are_noted(session: Session) -> None:
    off = small("a cat", guidance=0.0)._replace(negative="a dog")
    (note,) = session.notes(off)
    assert note.startswith("guidance=0 turns guidance off")
    with pytest.raises(InputError, match="A prompt is not UTF-8 text"):
        session.notes(small("\ud83d"))
    with pytest.raises(InputError, match="Prompt 1 is not UTF-8 text"):
        session.run(small("\ud83d"), Job())


def test_paths_that_are_not_utf_8_can_be_shown(tmp_path: Path) -> None:
    command = command_line(as_sample(Serve(model=Path("it's caf\udce9")), small(height=None, width=None)))
    assert command.startswith(r"sdxl-jax sample $'it\x27s caf\xe9' --prompt 'a red cube'")
    done = subprocess.run(
        ["bash", "-c", f"printf %s {command.split(' --prompt')[0][16:]}"], capture_output=True, check=True
    )
    assert done.stdout == b"it's caf\xe9"


# The command


def test_a_port_that_is_taken_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"The server cannot listen on --host 127\.0\.0\.1 --port"):
            free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match=r"--port 70000 is out of range\. Give 0 to 65535"):
        free_port("127.0.0.1", 70000)
    assert free_port("127.0.0.1", 0) > 0


def test_without_nicegui_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sdxl_jax.serving.page", None)
    monkeypatch.setitem(sys.modules, "nicegui", None)
    monkeypatch.delitem(sys.modules, "sdxl_jax.serving.page")
    monkeypatch.delattr(serving, "page", raising=False)  # if another test has imported it
    outcome = call("serve", "absent")
    assert outcome.code == 2
    assert "pip install -e '.[serve]'" in outcome.err


# The page


@pytest.fixture
def address(saved: Path, tmp_path: Path, compiled: Path) -> Iterator[str]:
    """The address of `sdxl-jax serve`, run as a process."""
    pytest.importorskip("nicegui")
    environment = compiling.environment(compiled)
    environment.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI listens elsewhere when it sees it
    command = [sys.executable, "-m", "sdxl_jax", "serve", saved, "--port", "0", "--out", tmp_path / "images"]
    command += ["--preview-autoencoder", saved]
    command += ["--image-encoder", write_image_tower(tmp_path / "clip_vision.safetensors", 8)]
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path
        )
        try:
            deadline = time.monotonic() + 120
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", (tmp_path / "log").read_text())):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
            yield found.group()
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0, (tmp_path / "log").read_text()
            assert "Traceback" not in (tmp_path / "log").read_text()
        finally:
            server.kill()
            server.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_page_samples_stops_and_shows_errors(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=flags, headless=True, accept_downloads=True
        )
        page = browser.new_page()
        page.set_default_timeout(120_000)
        loaded: list[str] = []
        page.on("request", lambda request: loaded.append(request.url))
        page.on("websocket", lambda socket: loaded.append(socket.url))
        page.goto(address)
        prompt, generate = page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Generate")
        prompt.fill("a red cube, it's old")
        assert page.get_by_label("Height").input_value() == str(MODEL.default_size[0])
        for name, value in SMALL.items():
            page.get_by_label(name.capitalize()).fill(str(value))
        generate.click()
        page.get_by_test_id("image").wait_for()
        shown = page.locator(".sdxl-command code").inner_text()
        sample = parsing.parse(Sample, shlex.split(shown)[2:], "sample")
        assert (sample.prompt, sample.options) == (("a red cube, it's old",), Options(**SMALL))
        page.screenshot(path=tmp_path / "generated.png")
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        assert read_text(Path(download.value.path())) == read_text(tmp_path / "images" / "000000.png")

        image = {"name": "photo.png", "mimeType": "image/png", "buffer": png(np.zeros((40, 30, 3), np.uint8))}
        page.get_by_text("Image prompts").click()
        page.locator("input[type=file]").last.set_input_files(files=[image])
        page.get_by_label("Strength of photo.png").fill("0.6")
        generate.click()
        page.locator(".sdxl-command code", has_text="--image-prompt").wait_for()
        again = parsing.parse(Sample, shlex.split(page.locator(".sdxl-command code").inner_text())[2:], "sample")
        (prompt_file,) = (tmp_path / "images" / "init").iterdir()
        assert again.image_prompt == (f"{prompt_file}:0.6",)
        page.screenshot(path=tmp_path / "image_prompt.png")

        page.get_by_label("Height").fill("12")
        generate.click()
        message = page.get_by_text("height 12 × width 24: expected positive multiples of 8")
        message.wait_for()
        page.screenshot(path=tmp_path / "refused.png")

        page.get_by_label("Height").fill("16")
        page.get_by_label("Steps").fill("1000")
        generate.click()
        page.get_by_text(re.compile(r"Step \d+ of 1000")).wait_for()
        page.get_by_test_id("preview").wait_for()
        assert not message.is_visible()
        page.screenshot(path=tmp_path / "preview.png")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped.").wait_for()
        assert len(list((tmp_path / "images").glob("*.png"))) == 2
        browser.close()
    # Everything is loaded from this server.
    assert {urlparse(url).netloc for url in loaded if not url.startswith(("data:", "blob:"))} == {
        urlparse(address).netloc
    }
    # Under a host name of somebody else (DNS rebinding) the page does not open.
    other = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(OSError, match="400"):
        urllib.request.urlopen(other)
    assert sorted(os.listdir(tmp_path / "images")) == ["000000.png", "000001.png", "init"]
