"""`sdxl-jax serve`: a page on which images are drawn, and how an image of it is said as a command line.

The model is opened as `sample` opens it, and an image's file has the text that `sample` would write, so that
`--from-png` reads it; the command line that the page shows is the shortest that `sample` reads as the same.

The page is for whoever sits at this machine. It listens on the loopback interface unless --host names another; then
everybody who reaches that address can draw, and see what was drawn: there is no password, and no encryption.
"""

import os
import shlex
import socket
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.commands.parsing import OpenFlags
from sdxl_jax.commands.sample import COMMAND, Sample, Task, keep_programs, load, opened, texts_of
from sdxl_jax.errors import InputError
from sdxl_jax.sharding import MeshConfig

if TYPE_CHECKING:
    import numpy as np

    from sdxl_jax.model import ModelConfig
    from sdxl_jax.sampling.generate import StepState
    from sdxl_jax.serving.session import Described, Request


@dataclass(frozen=True)
class Serve(OpenFlags):
    """Draw images on a web page. It is for this machine alone, unless --host says otherwise."""

    model: tyro.conf.Positional[Path]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file."""
    out: Path | None = None
    """Folder that keeps the images, after those that it holds. Default: they go when the server ends."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations. bfloat16 halves their memory."""
    refiner: Path | None = None
    """A refiner, which takes over for the last steps."""
    embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:TOKEN; a textual inversion. TOKEN is what prompts call it, default: the file's own or its name."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0: whoever reaches this machine may draw; there is no password."""
    port: int = 7860
    """Port to listen on, 1 to 65535. 0: one that is free."""
    preview_autoencoder: Path | None = None
    """TAESD's decoder for the images that come into being. Default: a coarse guess at each latent pixel's colour."""
    compilation_cache: Path | None = None
    """Folder that keeps compiled programs for the next time."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged: data, each takes images of a batch; fsdp, they share the weights."""


def run(arguments: list[str]) -> None:
    serve = parsing.parse(Serve, arguments, "serve")
    try:
        from sdxl_jax.serving import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "nicegui":
            raise
        raise InputError("The page needs NiceGUI, which is not installed. Do: pip install -e '.[serve]'") from error
    port = free_port(serve.host, serve.port)  # before the model is read, which takes longer
    keep_programs(serve.compilation_cache)
    from sdxl_jax.models.layers import Compute, Dtype
    from sdxl_jax.serving import session

    with _folder(serve.out) as folder:
        sample = as_sample(serve)
        model, refiner = load(sample, opened(sample))
        compute = Compute(dtype=Dtype(serve.dtype))
        look = _look(serve, model.config)
        ours = session.Session(
            model, Path(folder), lambda each: describe(serve, each, model.config), refiner, compute, look
        )
        page.serve(ours, parsing.shown(serve.model), serve.host, port)


def _folder(out: Path | None) -> AbstractContextManager[str]:
    if out is None:
        return tempfile.TemporaryDirectory(prefix="sdxl-jax-serve-")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, new or old")
    return nullcontext(str(out))


def _look(serve: Serve, config: "ModelConfig") -> "Callable[[StepState], np.ndarray] | None":
    from sdxl_jax.commands.preview import Previews

    try:
        return Previews(config, serve.preview_autoencoder).look
    except InputError:
        if serve.preview_autoencoder is not None:
            raise
        return None  # of another latent space than SDXL's; then images are seen when they are finished


def free_port(host: str, port: int) -> int:
    """The port, if one can listen on it; for 0 one on which one can. Raises InputError."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port}, expected 0 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: just left is free
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise InputError(
            f"Nothing can listen on --host {host} --port {port} ({error}). Give another port, e.g. --port 0 for any"
        ) from error


# How an image is said


def as_sample(serve: Serve, request: "Request | None" = None) -> Sample:
    """The same model, and the same image, for `sample`."""
    shared = {each.name: getattr(serve, each.name) for each in fields_of(OpenFlags)}
    shared |= {name: getattr(serve, name) for name in ("model", "dtype", "refiner", "embedding", "mesh")}
    out = Path("again")  # `sample` refuses a folder of other images, such as our own
    if request is None:
        return Sample(**shared, out=out)
    return Sample(
        **shared,
        out=out,
        prompt=(request.prompt,),
        negative_prompt=request.negative,
        options=request.options,
        init_image=request.init_image,
    )


def describe(serve: Serve, request: "Request", config: "ModelConfig") -> "Described":
    from sdxl_jax.serving.session import Described

    sample = as_sample(serve, request)
    (text,) = texts_of(sample, [Task(request.prompt, request.negative, request.options, index=0)], config)
    return Described(command_line(sample), text)


def command_line(sample: Sample) -> str:
    """The shell command that `sample` reads as this: what is as it would be anyway is left out."""
    spoken = ["sdxl-jax", "sample", str(sample.model)]
    for part in (sample, sample.options):
        for each in fields_of(part):
            default = each.default if each.default is not MISSING else None
            value = getattr(part, each.name)
            if each.name in ("model", "out", "options", *COMMAND) or value == default:
                continue
            spoken += _spoken(each.name, value, repeated=default == ())
    return " ".join(map(_quoted, [*spoken, "--out", str(sample.out)]))


def _quoted(word: str) -> str:
    """For a shell. Bytes of a path that are not UTF-8, which a page cannot show, as $'\\xe9'."""
    if word == parsing.shown(word):
        return shlex.quote(word)
    plain = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(plain)}'"


def _spoken(name: str, value: Any, repeated: bool) -> list[str]:
    flag = parsing.flag(name)
    if isinstance(value, bool):
        return [flag]
    if isinstance(value, tuple) and repeated:
        return [word for one in value for word in _spoken(name, one, False)]
    words = parsing.words(value)
    # A word that begins with a dash would be read as an option.
    return [f"{flag}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [flag, *words]
