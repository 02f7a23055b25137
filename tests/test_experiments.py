"""The promises of experiments/: each can be trained as it stands, and ends in a table and JSON that say what they are
of."""

import json
import sys
import time
from pathlib import Path

import pytest
import real_data

from sdxl_jax.training.objectives import objective_of

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import appendix_j  # pyright: ignore[reportMissingImports] (experiments/, put on the path above)
import results  # pyright: ignore[reportMissingImports] (the same)
import table_3  # pyright: ignore[reportMissingImports] (the same)


def test_results_are_a_table_and_json(tmp_path: Path) -> None:
    rows = [{"model": "a|b", "rfid": 4.123456, "N": 5000}, {"model": "c", "N": 2, "seed": None}]
    text = results.write(tmp_path / "out", "A table", table_3.PAPER, rows, ["said"], time.monotonic())
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "| model | rfid | N | seed |" in text and "| a\\|b | 4.1235 | 5000 | – |" in text and "- said" in text
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["rows"] == rows and found["paper"] == table_3.PAPER
    assert set(found) >= {"name", "versions", "commit", "hardware", "seconds"}


@pytest.mark.parametrize("name", appendix_j.RUNS)
def test_the_runs_of_appendix_j_can_be_trained(name: str, tmp_path: Path) -> None:
    config = appendix_j.config(tmp_path, appendix_j.RUNS[name], 100, 0)
    objective_of(config).config.check()
    assert config.training.steps == {"A1": 100, "B": 100, "A2": 380}[name]
    assert config.discriminator is not None
    assert config.discriminator.start_step == config.training.steps // 25  # 4 %, as 20,001 of 500,000


def test_the_rows_of_the_paper_are_pairs_without_and_with_the_average() -> None:
    for raw, averaged in zip(appendix_j.PAPER[::2], appendix_j.PAPER[1::2], strict=True):
        assert (raw["run"], raw["EMA"], averaged["EMA"]) == (averaged["run"], "no", "yes")
        assert averaged["rfid"] < raw["rfid"] and averaged["psim"] < raw["psim"]


@pytest.mark.slow
def test_table_3_of_taesdxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inception", "lpips_alex", "lpips_vgg"):
        real_data.metric_params(name, monkeypatch)
    halves = ("taesdxl/taesdxl_encoder.safetensors", "taesdxl/taesdxl_decoder.safetensors")
    images, *model = real_data.files("coco363/val2017", *halves)
    given = ["table_3.py", "+".join(map(str, model)), "--images", str(images), "--count", "4", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", given)
    table_3.main()
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["N"] == 4 and 20 < row["psnr"] < 28 and 1 < row["psim"] < 1.6 and row["rfid"] > 0
    assert (tmp_path / "figure.png").stat().st_size > 100_000
