"""`data build --runner beam`: the files, names and bytes of a local build, whoever reads which piece.

Several workers, as processes of their own (DirectRunner, multi_processing), read from and write to a bucket.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from test_bucket_data import SOURCES, as_tars, built, cache_home, content, files, upload  # noqa: F401

from sdxl_jax.commands import data
from sdxl_jax.data.build.build import build
from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.files.paths import located

WORKERS = ["--runner", "DirectRunner", "--direct_running_mode", "multi_processing", "--direct_num_workers", "2"]
ONE = ["--runner", "DirectRunner"]


def with_beam(source: object, target: object, arguments: list[str], **options) -> None:
    build(str(source), located(str(target), "target"), pipeline=arguments, progress=False, **options)


def test_beam_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sdxl_jax\[beam\]'"):
        with_beam(as_tars(tmp_path / "tars"), tmp_path / "shards", ONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--", "--runner", "DirectRunner"], "without --runner beam"),
        (["--runner", "beam", "--workers", "2"], "no effect"),
    ],
)
def test_options_that_have_no_effect_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        data.run(["build", str(tmp_path), str(tmp_path / "shards"), *options])


@pytest.fixture
def beam(monkeypatch):
    pytest.importorskip("apache_beam")
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # which the runner's child processes would parse


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_several_workers_build_the_bytes_of_a_local_build_from_and_to_a_bucket(beam, bucket, tmp_path, capsys, kind):
    source = upload(SOURCES[kind](tmp_path / "source"), f"{bucket}/source")
    built(source, tmp_path / "local")
    with_beam(source, f"{bucket}/shards", WORKERS)
    local = files(tmp_path / "local")
    assert content(f"{bucket}/shards") == local
    described = json.loads(local["shards.json"])
    counted = ", ".join(f"{name} {described[name]}" for name in ("captions", "duplicates", "images", "refused"))
    assert f"counted by the pipeline: {counted}" in capsys.readouterr().out
    assert described["refused"] and described["duplicates"]


@pytest.mark.slow
def test_a_local_folder_is_built_in_a_local_folder_without_duplicates(beam, tmp_path):
    source = as_tars(tmp_path / "tars")
    build(str(source), tmp_path / "local", workers=0, progress=False, drop_duplicates=True)
    with_beam(source, tmp_path / "shards", WORKERS, drop_duplicates=True)
    assert files(tmp_path / "shards") == files(tmp_path / "local")


@pytest.mark.slow
def test_an_interrupted_pipeline_is_resumed(beam, bucket, tmp_path, monkeypatch, capsys):
    """By local processes here: both leave the same."""
    source = as_tars(tmp_path / "tars")
    built(source, tmp_path / "local")
    monkeypatch.setattr("sdxl_jax.data.build.beam._complete", lambda *_: None)
    with pytest.raises(MachineError, match="ended before the index was written"):
        with_beam(source, f"{bucket}/shards", ONE)
    assert "parts/00002/columns.npz" in content(f"{bucket}/shards") and "shards.json" not in content(f"{bucket}/shards")
    monkeypatch.setattr("sdxl_jax.data.build.destinations._write_part", None)
    built(source, f"{bucket}/shards")
    assert content(f"{bucket}/shards") == files(tmp_path / "local")


@pytest.mark.slow
def test_what_is_wrong_with_the_source_is_reported_as_by_a_local_build(beam, bucket, tmp_path):
    (tmp_path / "source").mkdir()
    for name in ("a.jpg", "a.txt"):
        (tmp_path / "source" / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"(?s)has no usable image.*a\.jpg"):
        with_beam(tmp_path / "source", f"{bucket}/shards", ONE)
    assert content(f"{bucket}/shards") == {}
    with_beam(as_tars(tmp_path / "tars"), f"{bucket}/shards", ONE)
    assert len(json.loads(content(f"{bucket}/shards")["shards.json"])["fingerprint"]) == 32
