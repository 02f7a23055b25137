"""The promises of sdxl_jax.data.plots: one chart of sizes, buckets and examples, or an error that says why not."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_jax.__main__ import main
from sdxl_jax.data import inspection, plots
from sdxl_jax.data.build.build import build
from sdxl_jax.data.pipeline import BucketedDataset
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.data.sources import OnRefused
from sdxl_jax.errors import InputError

CAPTIONS = ("a costs $1 and b costs $2", "кот, 猫, 🐈", "$", "<&> \x07", "word " * 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, (height, width) in enumerate([(20, 26)] * 5 + [(33, 17)] * 2 + [(300, 8)]):
        Image.new("RGB", (width, height), (number * 20, 99, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % len(CAPTIONS)])
    return folder


@pytest.fixture
def config(folder: Path) -> DataConfig:
    return DataConfig(folder=str(folder), buckets=((16, 16), (32, 16), (16, 32)), batch_size=3)


def test_share_discarded_counts_images_with_either_side_below_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.array([[256, 256], [255, 4000], [4000, 255], [1, 1], [300, 256]], np.int32)
    for chunk in (1_000_000, 2):
        monkeypatch.setattr(plots, "_CHUNK", chunk)
        assert plots.share_discarded(sizes, 256) == 3 / 5
        assert plots.share_discarded(sizes, 1) == 0
    assert plots.share_discarded(sizes[:0], 256) == 0


def test_size_histogram_has_each_image_in_the_bin_of_its_height_and_width(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.array([[256, 512], [256, 512], [255, 512], [1, 200_000_000]], np.int32)
    for chunk in (1_000_000, 3):
        monkeypatch.setattr(plots, "_CHUNK", chunk)
        counts = plots.size_histogram(sizes)
        assert counts.sum() == 4
        assert counts[8 * 16, 9 * 16] == 2  # a side equal to the minimum lies above its line
        assert counts[8 * 16 - 1, 9 * 16] == 1
        assert counts[0, -1] == 1


@pytest.mark.parametrize(
    "suffix", [plots.SUFFIXES[0], *(pytest.param(each, marks=pytest.mark.slow) for each in plots.SUFFIXES[1:])]
)
def test_a_folder_is_drawn_whatever_its_captions_hold(config: DataConfig, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"data{suffix}"
    plots.plot(inspection.open_dataset(config), path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
    assert "matplotlib.pyplot" not in sys.modules


def test_a_shard_set_is_drawn_like_its_folder(folder: Path, tmp_path: Path) -> None:
    build(str(folder), tmp_path / "shards", workers=0, progress=False)
    settings = {"buckets": ((16, 16), (32, 16)), "batch_size": 3}
    pixels = []
    for source in (folder, tmp_path / "shards"):
        plots.plot(inspection.open_dataset(DataConfig(folder=str(source), **settings)), tmp_path / "data.png")
        pixels.append(np.asarray(Image.open(tmp_path / "data.png")))
    below_title = slice(150, None)
    np.testing.assert_array_equal(pixels[0][below_title], pixels[1][below_title])
    assert pixels[0].std() > 10


def test_the_sheet_shows_the_first_examples_of_the_fullest_buckets(config: DataConfig) -> None:
    settings = DataConfig(folder=config.folder, buckets=config.buckets, batch_size=3, on_refused=OnRefused.SKIP)
    dataset = BucketedDataset(settings, lambda captions: {})
    sheet = plots._sheet(dataset, [bucket for bucket in dataset.report() if bucket.images])
    assert [(bucket.height, bucket.width, len(examples)) for bucket, examples in sheet] == [(16, 16, 3), (32, 16, 3)]
    for bucket, examples in sheet:
        assert all(each.example.image.shape == (bucket.height, bucket.width, 3) for each in examples)


def test_another_suffix_or_a_folder_is_refused(tmp_path: Path) -> None:
    for name in ("data.jpg", "data"):
        with pytest.raises(InputError, match=r"ends in \.png, \.pdf or \.svg"):
            plots.check(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        plots.check(tmp_path / "folder.png")


def test_without_matplotlib_the_error_says_what_to_install(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plots.plot(inspection.open_dataset(config), tmp_path / "data.png")
    assert not list(tmp_path.iterdir())


def test_the_command_draws_and_prints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(folder), "--plot", str(tmp_path / "data.PNG")]) == 0
    assert "8 images found, 7 usable" in capsys.readouterr().out
    assert (tmp_path / "data.PNG").exists()
