"""`sdxl-jax serve`: a web page to sample on, and the command line that repeats each of its images.

The model is opened as `sample` opens it, and an image's file has the PNG text that `sample` would write, so that
`--from-png` reads it. The command line that the page shows is the shortest one with which `sample` gives the image.

The page is for the user of this machine. It listens on the loopback interface unless --host names another; then
everybody who reaches that address can sample, and see all images: there is no password, and no encryption.
"""

import os
import shlex
import socket
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field
from dataclasses import fields as fields_of
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from sdxl_jax.commands import parsing
from sdxl_jax.commands.parsing import OpenFlags
from sdxl_jax.commands.sample import COMMAND, Sample, Task, load, opened, texts_of, use_compilation_cache
from sdxl_jax.errors import InputError
from sdxl_jax.files.paths import AnyPath
from sdxl_jax.files.text import printable
from sdxl_jax.mesh import MeshConfig

if TYPE_CHECKING:
    from sdxl_jax.model import ModelConfig
    from sdxl_jax.models.layers import Compute
    from sdxl_jax.serving.session import Description, EncodeImage, Preview, Request


@dataclass(frozen=True)
class Serve(OpenFlags):
    """Sample images from a model on a web page. Only this machine can open it, unless --host says otherwise."""

    model: tyro.conf.Positional[AnyPath]
    """A run directory, an Orbax checkpoint, a diffusers directory, or a .safetensors file; local or gs://…."""
    out: Path | None = None
    """Folder for the images, numbered after those that it has. Default: temporary, removed when the server ends."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of weights and activations. bfloat16 halves their memory."""
    quantize: Literal["int8"] | None = None
    """int8: the kernels of UNet and text encoders in eight bits, a half of bfloat16's memory. Default: none."""
    refiner: AnyPath | None = None
    """Refiner model, for the last steps."""
    embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE:TOKEN: a textual inversion, and its token in prompts. Default: the file's own token, or its name."""
    image_encoder: AnyPath | None = None
    """CLIP's image tower for image prompts, that of the model's last text encoder; SDXL: OpenCLIP's ViT-bigG. Default:
    none, and no image prompts."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0: everybody who reaches this machine can sample; there is no password."""
    port: int = 7860
    """Port to listen on, 1 to 65535; 0: any free port."""
    preview_autoencoder: AnyPath | None = None
    """TAESD decoder for previews. Default: a linear map from latent pixels to colours."""
    compilation_cache: str | None = "user"
    """Folder for compiled programs, which later commands reuse. user: one in your cache folder. None: no folder."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Device mesh: images of a batch are split over data, weights are sharded over fsdp."""


def run(arguments: list[str]) -> None:
    serve = parsing.parse(Serve, arguments, "serve")
    try:
        from sdxl_jax.serving import page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "nicegui":
            raise
        raise InputError("The page needs NiceGUI, which is not installed. Do: pip install -e '.[serve]'") from error
    port = free_port(serve.host, serve.port)  # before the model is read, which takes longer
    use_compilation_cache(serve.compilation_cache)
    from sdxl_jax.models.layers import Compute, Dtype
    from sdxl_jax.serving.session import Session

    with _folder(serve.out) as folder:
        sample = as_sample(serve)
        weights, compute = opened(sample), Compute(dtype=Dtype(serve.dtype))
        # First what may not fit: the model takes longer.
        config = weights[0].config
        preview, encode_image = _preview(serve, config), _image_encoder(serve, config, compute)
        model, refiner = load(sample, weights)
        session = Session(
            model,
            Path(folder),
            lambda each: describe(serve, each, model.config),
            refiner,
            compute,
            preview,
            encode_image,
        )
        page.serve(session, printable(serve.model), serve.host, port)


def _folder(out: Path | None) -> AbstractContextManager[str]:
    if out is None:
        return tempfile.TemporaryDirectory(prefix="sdxl-jax-serve-")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file. Give a folder, new or existing")
    return nullcontext(str(out))


def _preview(serve: Serve, config: "ModelConfig") -> "Preview | None":
    from sdxl_jax.commands.preview import Previews

    try:
        return Previews(config, serve.preview_autoencoder).decode
    except InputError:
        if serve.preview_autoencoder is not None:
            raise
        return None  # another latent space than SDXL's: no previews


def _image_encoder(serve: Serve, config: "ModelConfig", compute: "Compute") -> "EncodeImage | None":
    if serve.image_encoder is None:
        return None
    import jax

    from sdxl_jax.sampling import image_prompts
    from sdxl_jax.weights.clip_vision import open_tower

    tower = open_tower(serve.image_encoder)
    image_prompts.check_width(config, tower.config.projection_dim)
    params = jax.device_put(tower.load(jax.numpy.dtype(serve.dtype)))
    return lambda image: image_prompts.encode_images(tower.config, params, [image], compute)[0]


def free_port(host: str, port: int) -> int:
    """The port if it is free, or any free one for 0. Raises InputError."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port} is out of range. Give 0 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT counts as free
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise InputError(
            f"The server cannot listen on --host {host} --port {port} ({error}). Give another port, e.g. --port 0 for "
            "any free one, or an address of this machine"
        ) from error


# The command line that repeats an image


def as_sample(serve: Serve, request: "Request | None" = None) -> Sample:
    """The options with which `sample` opens the same model and, for a request, gives the same image."""
    shared = {each.name: getattr(serve, each.name) for each in fields_of(OpenFlags)}
    shared |= {name: getattr(serve, name) for name in ("model", "dtype", "quantize", "refiner", "embedding", "mesh")}
    out = Path("again")  # `sample` refuses a folder of other images, such as the server's own
    if request is None:
        return Sample(**shared, out=out)
    return Sample(
        **shared,
        out=out,
        prompt=() if request.prompt is None else (request.prompt,),
        class_=() if request.class_ is None else (request.class_,),
        negative_prompt=request.negative,
        options=request.options,
        init_image=request.init_image,
        image_prompt=tuple(f"{path}:{strength}" for path, strength in request.image_prompts),
        image_encoder=serve.image_encoder if request.image_prompts else None,
    )


def describe(serve: Serve, request: "Request", config: "ModelConfig") -> "Description":
    """A request for one image as a command line and as PNG text."""
    from sdxl_jax.serving.session import Description

    sample = as_sample(serve, request)
    (text,) = texts_of(
        sample, [Task(request.prompt, request.negative, request.options, request.class_, index=0)], config
    )
    return Description(command_line(sample), text)


def command_line(sample: Sample) -> str:
    """The shell command with these options, without those that are at their defaults."""
    arguments = ["sdxl-jax", "sample", str(sample.model)]
    for part in (sample, sample.options):
        for each in fields_of(part):
            default = each.default if each.default is not MISSING else None
            value = getattr(part, each.name)
            if each.name in ("model", "out", "options", *COMMAND) or value == default:
                continue
            arguments += _arguments(each.name, value, repeated=default == ())
    return " ".join(map(_quoted, [*arguments, "--out", str(sample.out)]))


def _quoted(word: str) -> str:
    """A word quoted for a shell. Bytes of a path that are not UTF-8, which a page cannot show, become $'\\xe9'."""
    if word == printable(word):
        return shlex.quote(word)
    plain = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{''.join(plain)}'"


def _arguments(name: str, value: Any, repeated: bool) -> list[str]:
    """A field as arguments of the command line. repeated: one flag per value."""
    flag = parsing.flag(name)
    if isinstance(value, bool):
        return [flag]
    if isinstance(value, tuple) and repeated:
        return [word for one in value for word in _arguments(name, one, False)]
    words = parsing.words(value)
    # A word that begins with a dash would be parsed as an option.
    return [f"{flag}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [flag, *words]
