"""The initial weights of a run: everything that a file records about their training is compared, and only named fields
may change."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

from sdxl_jax.config import MEANING, TrainConfig, TrainingConfig, blocking_differences
from sdxl_jax.data.settings import DataConfig
from sdxl_jax.diffusion.continuous import EdmConfig
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.jsontree import to_json
from sdxl_jax.model import ModelConfig, UnconditionalKind
from sdxl_jax.samplers.defaults import SamplingDefaults
from sdxl_jax.samplers.steps import Spacing
from sdxl_jax.training.initial import _meaning_differences, _sampling_differences, check_initial
from sdxl_jax.weights.convert import convert
from sdxl_jax.weights.lazy import part_configs
from sdxl_jax.weights.open import open_model

V = dataclasses.replace(
    tiny.MODEL,
    prediction=Prediction.V,
    schedule=dataclasses.replace(tiny.MODEL.schedule, zero_terminal_snr=True),
)


def change(config: ModelConfig, field: str) -> ModelConfig:
    """With another value of one field."""
    values: dict[str, Any] = {
        "prediction": Prediction.EPSILON if config.prediction is Prediction.V else Prediction.V,
        "schedule": dataclasses.replace(config.schedule, beta_end=0.02),
        "unconditional": UnconditionalKind.EMPTY,
        "distilled": True,
        "noise": EdmConfig(sigma_data=1.0),
    }
    return dataclasses.replace(config, **{field: values[field]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "v.safetensors"
    convert(tiny.random_model(V, 0), path, "single-file", progress=False)
    return path


def start(path: Path, model: ModelConfig, **options: Any) -> None:
    check_initial(TrainingConfig(init_from=(str(path),), **options), model, tuple(part_configs(model)))


def test_model_of_the_same_meaning_is_taken(saved: Path) -> None:
    start(saved, V)
    assert _meaning_differences(open_model(saved), V) == []


@pytest.mark.parametrize("field", MEANING)
def test_model_of_another_meaning_is_refused_unless_the_field_is_named(saved: Path, field: str) -> None:
    other = change(V, field)
    with pytest.raises(
        InputError, match=rf"trained with a different {field}.*Set model\.{field} .*init-changes {field}$"
    ):
        start(saved, other)
    start(saved, other, init_changes=(field,))
    with pytest.raises(InputError, match=field):
        start(saved, other, init_changes=tuple(name for name in MEANING if name != field))


def test_schedule_is_compared_though_the_prediction_is_the_same(saved: Path) -> None:
    plain = dataclasses.replace(V, schedule=tiny.MODEL.schedule)
    with pytest.raises(InputError, match=r"schedule.zero_terminal_snr: True -> False \(there -> in this run\)"):
        start(saved, plain)


def test_parts_without_the_unet_mean_the_same_under_any_noise(saved: Path) -> None:
    start(saved, change(tiny.MODEL, "schedule"), init_parts=("vae", "text_encoder"))


def test_network_that_does_not_say_how_it_was_trained_is_taken(saved: Path) -> None:
    """Such as the directory of a UNet alone: its noise schedule is unknown, so nothing is compared."""
    assert _meaning_differences(open_model(saved), tiny.MODEL) != []
    assert _meaning_differences(dataclasses.replace(open_model(saved), noise_is_known=False), tiny.MODEL) == []


def test_other_sampling_defaults_are_found_and_do_not_refuse_the_run(saved: Path) -> None:
    weights = open_model(saved)
    assert _sampling_differences(weights, V) == []
    turbo = dataclasses.replace(V, sampling=SamplingDefaults("euler_ancestral", Spacing.LEADING))
    start(saved, turbo)
    assert _sampling_differences(weights, turbo) == ["sampler: None -> euler_ancestral", "spacing: None -> leading"]
    old, new = ({"model": {"sampling": to_json(sampling)}} for sampling in (None, turbo.sampling))
    assert blocking_differences(old, new) == [], "a resumed run may set it"


def test_unknown_name_in_init_changes_is_refused() -> None:
    training = TrainingConfig(init_from=("unused",), init_changes=("shedule",))
    with pytest.raises(
        InputError,
        match=r"training\.init_changes has shedule, which is not one of its names\. Known, nearest first: schedule, ",
    ):
        TrainConfig(data=DataConfig("unused"), training=training).check()
