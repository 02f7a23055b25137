"""Models, LoRAs, embeddings and compiled programs in a bucket, against a server of the protocol on loopback."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket_server
import command
import compiling
import foreign
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import Outcome
from etils import epath
from foreign import BASE
from orbax.checkpoint import v1 as ocp
from PIL import Image
from safetensors.numpy import save_file
from test_open import assert_holds, component, make_run, with_variants

from sdxl_jax.arrays import flatten
from sdxl_jax.commands import parsing, sample
from sdxl_jax.compilation import compilation_cache
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files import buckets, paths
from sdxl_jax.files.paths import located
from sdxl_jax.model import Model
from sdxl_jax.training import programs
from sdxl_jax.weights import lora
from sdxl_jax.weights.convert import Layout, convert
from sdxl_jax.weights.formats.checkpoints import COMMITTED
from sdxl_jax.weights.load import load_model
from sdxl_jax.weights.open import OpenOptions, open_model

pytestmark = pytest.mark.usefixtures("quick_compilation", "cache_home")

WHAT = "the model"


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that were copied to the local disk, in order."""
    names, download = list[str](), buckets.download

    def recording(path: Any, *arguments: Any) -> None:
        names.append(str(path))
        download(path, *arguments)

    monkeypatch.setattr(buckets, "download", recording)
    return names


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    foreign.single_file(home / "base.safetensors", BASE)
    foreign.diffusers_folder(home / "base", BASE)
    (home / "base/LICENSE.md").write_text("terms")
    make_run(home / "run", BASE)
    return home


def place(target: str) -> epath.Path:
    path = located(target, WHAT)
    assert paths.in_bucket(path)
    return path


def upload(source: Path, target: str, *, committed: bool = True) -> str:
    """A file or folder to the bucket; its Orbax checkpoints with the marker of complete ones."""
    files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    for file in files:
        name = "" if file == source else f"/{file.relative_to(source).as_posix()}"
        buckets.upload(file, place(f"{target}{name}"), WHAT)
        if committed and file.name == "_CHECKPOINT_METADATA":
            (place(f"{target}{name}").parent / COMMITTED).write_text("complete")
    return target


def objects(target: str) -> list[str]:
    return sorted(buckets.files(place(target), WHAT))


def call(*arguments: object, code: int = 0) -> Outcome:
    outcome = command.call(*arguments)
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.out + outcome.err
    return outcome


# Converting


@pytest.mark.parametrize(
    "layout", [Layout.ORBAX, Layout.SINGLE_FILE, pytest.param(Layout.DIFFUSERS, marks=pytest.mark.slow)]
)
def test_a_model_goes_to_the_bucket_and_comes_back_with_every_byte(
    layout: Layout, home: Path, bucket: str, tmp_path: Path
) -> None:
    target = f"{bucket}/models/base" + (".safetensors" if layout is Layout.SINGLE_FILE else "")
    call("convert", home / "base.safetensors", target, "--to", layout.value)
    call("convert", target, tmp_path / "back.safetensors", "--to", "single-file")
    there = foreign.contents(home / "base.safetensors")
    back = foreign.contents(tmp_path / "back.safetensors")
    lost = there.keys() - back.keys()  # diffusers' layout has no place for them, locally neither
    assert back == {name: value for name, value in there.items() if name not in lost}
    assert not lost or layout is Layout.DIFFUSERS
    assert_holds(open_model(target), BASE)


@pytest.mark.slow
def test_what_stands_in_the_bucket_is_what_stands_in_a_local_folder(home: Path, bucket: str, tmp_path: Path) -> None:
    convert(home / "base", tmp_path / "new", "diffusers", progress=False)
    written = convert(str(home / "base"), f"{bucket}/new", "diffusers", progress=False)
    local = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert set(objects(f"{bucket}/new")) == local
    assert {"LICENSE.md", "README.md", "model_index.json"} < local
    for name in local:
        content = buckets.read_bytes(place(f"{bucket}/new/{name}"), WHAT)
        assert content == (tmp_path / "new" / name).read_bytes()
    assert written.parts == ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.slow
def test_licences_in_a_bucket_go_along(home: Path, bucket: str, tmp_path: Path) -> None:
    target = upload(home / "base", f"{bucket}/base")
    convert(target, tmp_path / "new", "orbax", progress=False)
    assert (tmp_path / "new/LICENSE.md").read_text() == "terms"
    assert "Source: `base`" in (tmp_path / "new/README.md").read_text()


@pytest.mark.parametrize("layout", list(Layout))
def test_an_interrupted_conversion_leaves_nothing_in_the_bucket(
    layout: Layout, home: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"{bucket}/new.safetensors"
    send, sent = buckets.upload, list[str]()

    def ends_before_the_last(source: Path, path: Any, *arguments: Any) -> None:
        sent.append(path.name)
        if path.name in (COMMITTED, "model_index.json", "new.safetensors"):
            assert len(sent) > 1
            raise KeyboardInterrupt
        send(source, path, *arguments)

    monkeypatch.setattr(buckets, "upload", ends_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        convert(home / "base.safetensors", target, layout, progress=False)
    assert objects(bucket) == []


@pytest.mark.parametrize("layout", ["orbax", "diffusers"])
def test_a_killed_conversion_is_not_taken_for_a_model(layout: str, home: Path, bucket: str) -> None:
    """What is sent last is what makes it one."""
    convert(home / "base.safetensors", f"{bucket}/new", layout, progress=False)
    last = {"orbax": COMMITTED, "diffusers": "model_index.json"}[layout]
    buckets.delete(place(f"{bucket}/new/{last}"), WHAT)
    with pytest.raises(InputError, match="There is no model at gs://"):
        open_model(f"{bucket}/new")


def test_what_is_at_the_destination_stays(home: Path, bucket: str) -> None:
    upload(home / "base.safetensors", f"{bucket}/base.safetensors")
    upload(home / "base", f"{bucket}/base")
    place(f"{bucket}/notes.md").write_text("my own notes")
    before = objects(bucket)
    given = ("convert", home / "base.safetensors")
    for target, layout, expected in (
        ("base.safetensors", "single-file", "exists already"),
        ("base", "orbax", "exists already"),
        ("notes.safetensors", "single-file", r"notes.md exists already, and is not a model card"),
    ):
        assert expected in call(*given, f"{bucket}/{target}", "--to", layout, code=2).err
    assert objects(bucket) == before


# Opening


def test_a_file_is_copied_once_and_again_when_it_is_replaced(
    home: Path, bucket: str, tmp_path: Path, copied: list[str], cache_home: Path
) -> None:
    target = upload(home / "base.safetensors", f"{bucket}/base.safetensors")
    for _ in range(2):
        assert_holds(open_model(target), BASE)
    assert copied == [target]
    upload(foreign.single_file(tmp_path / "new.safetensors", BASE, np.dtype("float16")), target)
    assert_holds(open_model(target), BASE, np.float16)
    assert copied == [target, target]
    (copy,) = [path for path in cache_home.rglob("*") if path.is_file()]
    assert copy.name == "base.safetensors", "the copy of what it was before is removed"
    copy.write_bytes(copy.read_bytes()[:100])  # as a power cut may leave it
    assert_holds(open_model(target), BASE, np.float16)


def test_only_the_weights_that_are_asked_for_are_copied(bucket: str, tmp_path: Path, copied: list[str]) -> None:
    folder = with_variants(tmp_path / "variants", "fp16", "")
    target = upload(folder, f"{bucket}/variants")
    local, found = (open_model(path, OpenOptions(variant="fp16")) for path in (folder, target))
    assert copied
    assert all(".fp16." in name for name in copied)
    for path, leaf in local.leaves.items():
        assert found.leaves[path].read().tobytes() == leaf.read().tobytes(), path


def test_one_network_is_opened_and_takes_another_ones_place(home: Path, bucket: str, tmp_path: Path) -> None:
    other = upload(component(tmp_path / "unet", BASE.unet), f"{bucket}/unet")
    opened = open_model(home / "base", parts_from=[other])
    assert opened.provenance.parts_from == ("unet",)
    assert_holds(opened, BASE)


@pytest.mark.slow
def test_a_run_directory_is_opened_at_its_last_complete_checkpoint(home: Path, bucket: str) -> None:
    target = upload(home / "run", f"{bucket}/run")
    assert_holds(open_model(target), BASE, unet=4)
    assert_holds(open_model(f"{target}/checkpoints/2"), BASE, unet=2)
    assert open_model(target).provenance.name == "run"
    buckets.delete(place(f"{target}/checkpoints/4/{COMMITTED}"), WHAT)
    assert_holds(open_model(target), BASE, unet=2)
    with pytest.raises(InputError, match=r"has no checkpoint of step 4\. Give one of its newest: 2"):
        open_model(f"{target}/checkpoints/4")


def test_a_run_whose_checkpoints_orbax_wrote_to_the_bucket_is_opened(home: Path, bucket: str) -> None:
    target = upload(home / "run", f"{bucket}/run")
    state = {"step": np.array(6), "ema": {"unet": foreign.part_params(BASE.unet, seed=6)}}
    ocp.save(f"{target}/checkpoints/6", state)
    assert_holds(open_model(target), BASE, unet=6)


@pytest.mark.slow
def test_a_local_run_with_its_checkpoints_in_a_bucket_is_opened(home: Path, bucket: str, tmp_path: Path) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    upload(home / "run", f"{bucket}/arrays")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "frozen")
    saved = json.loads((run / "config.json").read_text())
    saved["config"]["checkpoint"]["directory"] = f"{bucket}/arrays"
    (run / "config.json").write_text(json.dumps(saved))
    assert_holds(open_model(run), BASE, unet=4)


@pytest.mark.slow
def test_load_model_takes_a_bucket(home: Path, bucket: str) -> None:
    target = f"{bucket}/base.orbax"
    convert(home / "base", target, "orbax", progress=False)
    one, other = (flatten(load_model(path, progress=False).params) for path in (home / "base", target))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)


# Sampling


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, with a LoRA, an embedding and another autoencoder to go with it."""
    home = tmp_path_factory.mktemp("parts")
    model = tiny.random_model(tiny.MODEL, 0)
    convert(model, home / "model", "orbax", progress=False)
    autoencoder = tiny.random_model(tiny.MODEL, 1).params["vae"]
    convert(Model(tiny.MODEL, {"vae": autoencoder}), home / "vae", "orbax", progress=False)
    rng = np.random.default_rng(0)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A": (2, 16), "lora_B": (16, 2)}
    save_file(
        {f"{name}.{side}.weight": rng.standard_normal(shape, np.float32) for side, shape in factors.items()},
        home / "style.safetensors",
    )
    vectors = {key: rng.standard_normal((1, 8), np.float32) for key in ("clip_l", "clip_g")}
    save_file(vectors, home / "token.safetensors")
    return home


def sampled(parts: Path | str, out: Path) -> np.ndarray:
    given = ("--height", 24, "--width", 32, "--steps", 2, "--prompt", "a <fox>", "--out", out)
    extras = ("--lora", f"{parts}/style.safetensors:0.5", "--embedding", f"{parts}/token.safetensors:<fox>")
    call("sample", f"{parts}/model", "--parts-from", f"{parts}/vae", *extras, *given)
    with Image.open(out / "000000.png") as image:
        return np.asarray(image)


@pytest.mark.slow
def test_an_image_from_the_bucket_is_that_from_the_local_disk(parts: Path, bucket: str, tmp_path: Path) -> None:
    expected = sampled(parts, tmp_path / "local")
    for name in ("model", "vae"):
        convert(parts / name, f"{bucket}/{name}", "orbax", progress=False)
    for name in ("style", "token"):
        upload(parts / f"{name}.safetensors", f"{bucket}/{name}.safetensors")
    assert np.array_equal(sampled(bucket, tmp_path / "bucket"), expected)
    text = sample.read_text(tmp_path / "bucket/000000.png")
    assert (text["model"], text["parts_from"]) == (f"{bucket}/model", json.dumps([f"{bucket}/vae"]))
    again = sample._parsed(
        [f"{bucket}/model", "--from-png", str(tmp_path / "bucket/000000.png"), "--out", str(tmp_path / "again")]
    )
    assert again.parts_from == (located(f"{bucket}/vae", WHAT),)
    assert again.lora == (f"{bucket}/style.safetensors:0.5",)


def test_the_png_text_names_a_refiner_in_the_bucket_and_its_checksum(home: Path, bucket: str) -> None:
    target = upload(home / "base.safetensors", f"{bucket}/base.safetensors")
    named = parsing.path_of_printable(target)
    assert (str(named), paths.in_bucket(named)) == (target, True)
    expected = hashlib.sha256((home / "base.safetensors").read_bytes()).hexdigest()
    text = sample._shared_text(sample.Sample(model=named, out=home, refiner=named))
    assert (text["refiner"], text["refiner_sha256"]) == (target, expected)


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("gs://b/x.safetensors", "gs://b/x.safetensors", 1.0), ("gs://b/x.safetensors:0.8", "gs://b/x.safetensors", 0.8)],
)
def test_a_lora_in_a_bucket_may_have_a_scale(text: str, path: str, scale: float) -> None:
    found = lora.parse_option(text)
    assert (str(found[0]), found[1]) == (path, scale)


# Compiled programs


@pytest.fixture
def _settings(tmp_path: Path) -> Iterator[None]:
    before = jax.config.values["jax_persistent_cache_enable_xla_caches"]
    with compiling.quick(tmp_path / "previous"):
        yield
    jax.config.update("jax_persistent_cache_enable_xla_caches", before)


@pytest.mark.usefixtures("_settings")
def test_compiled_programs_are_kept_in_the_bucket(bucket: str) -> None:
    compilation_cache.use(f"{bucket}/cache")

    def compiled() -> list[str]:
        jax.clear_caches()
        assert jax.jit(lambda x: jnp.cos(x) + 41)(0.0) == 42
        return [name for name in objects(f"{bucket}/cache") if name.endswith("-cache")]

    first = compiled()
    assert first
    assert compiled() == first


def test_aot_programs_are_kept_in_the_bucket(bucket: str) -> None:
    folder = programs.folder(f"{bucket}/cache")
    kept = programs.Programs(folder, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), {})
    lowered = jax.jit(lambda x: jnp.sin(x) + 1).lower(0.0)
    assert kept.read(lowered) is None
    with compiling.full():
        kept.write(lowered, lowered.compile())
    assert (kept.count(), len(objects(f"{bucket}/cache"))) == (1, 1)
    program = kept.read(lowered)
    assert program is not None
    assert program(0.0) == 1


# What is refused


COMMANDS = {
    "convert's source": ("convert", "{path}", "new", "--to", "orbax"),
    "convert's destination": ("convert", "{home}/base", "{path}", "--to", "orbax"),
    "the model": ("sample", "{path}", "--prompt", "x", "--out", "out"),
    "the refiner": ("sample", "{home}/base", "--refiner", "{path}", "--prompt", "x", "--out", "out"),
    "other parts": ("sample", "{home}/base", "--parts-from", "{path}", "--prompt", "x", "--out", "out"),
    "a LoRA": ("sample", "{home}/base", "--lora", "{path}", "--prompt", "x", "--out", "out"),
    "the cache": ("sample", "{home}/base", "--compilation-cache", "{path}", "--prompt", "x", "--out", "out"),
}


def refused(name: str, path: str, home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, code: int = 2) -> str:
    """The message, on one line. Nothing is written."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    outcome = call(*(word.format(path=path, home=home) for word in COMMANDS[name]), code=code)
    assert outcome.err.count("error: ") == 1
    assert not list(folder.iterdir())
    return outcome.err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_bucket_that_does_not_exist_is_refused_before_work_starts(
    name: str, home: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(name, "gs://no-such-bucket/x/y", home, tmp_path / "empty", monkeypatch)
    assert "there is no bucket no-such-bucket" in message
    assert "gcloud storage buckets create" in message


@pytest.mark.parametrize("name", list(COMMANDS))
def test_other_schemes_are_refused(name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused(name, "s3://bucket/x.safetensors", home, tmp_path / "empty", monkeypatch)
    assert "s3://bucket/x.safetensors. Expected" in message


@pytest.mark.parametrize("name", ["convert's source", "a LoRA"])
def test_missing_objects_are_refused(
    name: str, home: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{bucket}/x.safetensors"
    assert f"There is no{'thing at' if name != 'a LoRA' else ' file'} {path}" in refused(
        name, path, home, tmp_path / "empty", monkeypatch
    )


def test_a_missing_package_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_is_installed", lambda module: False)
    message = refused("the model", "gs://bucket/x", home, tmp_path / "empty", monkeypatch)
    assert "pip install 'sdxl_jax[gcs]'" in message


def test_missing_credentials_are_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.auth.exceptions import DefaultCredentialsError

    def none() -> Any:
        raise DefaultCredentialsError("Your default credentials were not found")

    monkeypatch.setattr(buckets, "_client", none)
    message = refused("the model", "gs://bucket/x", home, tmp_path / "empty", monkeypatch)
    assert "gcloud auth application-default login" in message


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server answers."""
    monkeypatch.setattr(buckets, "TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(buckets, "DEADLINE_SECONDS", 1.0)
    buckets._client.cache_clear()
    with bucket_server.in_environment("http://127.0.0.1:9"):
        yield
    buckets._client.cache_clear()


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize(
    "name",
    ["the model", *(pytest.param(each, marks=pytest.mark.slow) for each in ("convert's destination", "the cache"))],
)
def test_a_bucket_that_does_not_answer_ends_the_command_with_1(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    message = refused(name, "gs://bucket/x/y", home, tmp_path / "empty", monkeypatch, code=1)
    assert "did not answer" in message
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("found", [False, InputError("There is nothing at it"), OSError("a client's own error")])
def test_what_looks_like_a_missing_model_is_the_bucket_that_stopped_answering(
    found: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gcsfs reports a folder that it cannot ask for as one that does not exist."""

    def stops(path: Any) -> bool:
        monkeypatch.setattr(buckets, "check", no_answer)
        if isinstance(found, Exception):
            raise found
        return found

    def no_answer(path: Any, what: str) -> None:
        raise MachineError("the bucket did not answer")

    monkeypatch.setattr(type(place(bucket)), "is_file", stops)
    with pytest.raises(MachineError, match="did not answer"):
        open_model(f"{bucket}/model")


_READER = """
import sys
from sdxl_jax.errors import MachineError
from sdxl_jax.files import buckets
from sdxl_jax.weights.open import open_model

buckets.TIMEOUT_SECONDS, buckets.DEADLINE_SECONDS = 2.0, 2.0
leaf = next(iter(open_model("gs://bucket/model").leaves.values()))
print("opened", flush=True)
sys.stdin.readline()
if sys.argv[1] == "tensorstore":  # the part of a read that follows gcsfs's
    import tensorstore
    from orbax.checkpoint._src.serialization import tensorstore_utils
    spec = {"driver": "gcs", "bucket": "bucket", "path": "model/"}
    try:
        tensorstore.KvStore.open(spec, context=tensorstore_utils.get_ts_context()).result().read("x").result()
    except Exception as error:
        print(error)
else:
    try:
        leaf.read()
    except MachineError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("client", "expected"), [("both", "did not answer"), ("tensorstore", "All 6 retry attempts failed")]
)
def test_a_server_that_dies_ends_the_reading_of_a_checkpoint(client: str, expected: str, home: Path) -> None:
    """By the clients' own patience, a minute or less of each."""
    buckets._client.cache_clear()
    with bucket_server.serving() as url, bucket_server.in_environment(url):
        from google.cloud import storage

        storage.Client(project="project").create_bucket("bucket")
        convert(home / "base", "gs://bucket/model", "orbax", progress=False)
        reader = subprocess.Popen(
            [sys.executable, "-c", _READER, client], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None
        assert reader.stdout.readline() == "opened\n"
    buckets._client.cache_clear()
    began = time.monotonic()
    out, _ = reader.communicate("\n", timeout=300)
    assert expected in out
    assert time.monotonic() - began < 120
