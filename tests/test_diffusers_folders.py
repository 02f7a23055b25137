"""Configurations of diffusers directories: read, written, refused with the name of the field or file at fault.

That diffusers and transformers build the same modules from what is written is tested in `parity/`.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL

from sdxl_jax.conditioning.text import ContextState
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.diffusion.schedule import BetaSchedule, ScheduleConfig
from sdxl_jax.errors import InputError
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig, UnconditionalKind
from sdxl_jax.models.clip import CLIP_BIGG, CLIP_H, CLIP_L
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.models.vae import SD_VAE, SDXL_VAE
from sdxl_jax.samplers.defaults import FinalSigma, SamplingDefaults
from sdxl_jax.samplers.steps import Sigmas, Spacing
from sdxl_jax.sampling.options import Options
from sdxl_jax.weights.formats import diffusers, diffusers_fields, diffusers_sampling

ZERO_SNR = ScheduleConfig(zero_terminal_snr=True)


def inpainting(config: ModelConfig) -> ModelConfig:
    return replace(config, unet=replace(config.unet, in_channels=9))


def added(config: ModelConfig, *words: str) -> ModelConfig:
    """With added tokens in the last tower."""
    *others, last = config.text
    clip = replace(last.clip, vocabulary=49408 + len(words))
    return replace(config, text=(*others, replace(last, clip=clip, added_tokens=words)))


MODELS = {
    "SDXL base": (SDXL_BASE, "StableDiffusionXLPipeline"),
    "SDXL refiner": (SDXL_REFINER, "StableDiffusionXLImg2ImgPipeline"),
    "SDXL inpainting": (inpainting(SDXL_BASE), "StableDiffusionXLInpaintPipeline"),
    "SDXL refiner inpainting": (inpainting(SDXL_REFINER), "StableDiffusionXLInpaintPipeline"),
    "SDXL v": (replace(SDXL_BASE, schedule=ZERO_SNR, prediction=Prediction.V), "StableDiffusionXLPipeline"),
    "SDXL without zeros": (replace(SDXL_BASE, unconditional=UnconditionalKind.EMPTY), "StableDiffusionXLPipeline"),
    "SDXL of bigG alone": (
        replace(SDXL_BASE, text=SDXL_BASE.text[1:], unet=replace(SDXL_BASE.unet, context_dim=1280)),
        "StableDiffusionXLPipeline",
    ),
    "SDXL in landscape": (replace(SDXL_BASE, default_size=(768, 1280)), "StableDiffusionXLPipeline"),
    "SDXL with words": (added(SDXL_BASE, "<cat-toy>", "<Höhle>"), "StableDiffusionXLPipeline"),
    "SD 1.x": (SD1, "StableDiffusionPipeline"),
    "SD 1.x inpainting": (inpainting(SD1), "StableDiffusionInpaintPipeline"),
    "SD 1.x linear": (
        replace(SD1, schedule=ScheduleConfig(500, 0.0001, 0.02, BetaSchedule.LINEAR), prediction=Prediction.X0),
        "StableDiffusionPipeline",
    ),
    "SD 2.x": (SD2, "StableDiffusionPipeline"),
    "SD 2.x v": (replace(SD2, prediction=Prediction.V, default_size=(768, 768)), "StableDiffusionPipeline"),
    "tiny": (replace(MODEL, unet=replace(MODEL.unet, middle_depth=2)), "StableDiffusionXLPipeline"),
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ("SDXL base", "SD 1.x", "SDXL with words"):
        folders[name] = tmp_path_factory.mktemp("written") / "model"
        diffusers.write_folder(MODELS[name][0], folders[name])
    return folders


@pytest.fixture
def folder(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a written directory, to damage."""
    return lambda name: Path(shutil.copytree(written[name], tmp_path / "copy"))


# What should be read


def official(tmp_path: Path, vae: str = "vae") -> Path:
    """The official files of SDXL base, put together as on the hub."""
    root = Path(os.environ.get("SDXL_JAX_TEST_DATA", ""))
    configs, tokenizers = root / "sdxl_official_configs", root / "clip_tokenizer"
    if not (configs / "model_index.json").is_file() or not (tokenizers / "tokenizer" / "vocab.json").is_file():
        pytest.skip("SDXL_JAX_TEST_DATA names no folder with sdxl_official_configs/ and clip_tokenizer/")
    shutil.copy(configs / "model_index.json", tmp_path)
    for name in ("unet", "scheduler", "text_encoder", "text_encoder_2"):
        (tmp_path / name).symlink_to(configs / name)
    (tmp_path / "vae").symlink_to(configs / vae)
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).symlink_to(tokenizers / name)
    return tmp_path


@pytest.mark.parametrize("vae", ["vae", "vae_1_0"])
def test_official_files_are_sdxl_base(vae: str, tmp_path: Path) -> None:
    directory = official(tmp_path, vae)
    assert diffusers.read_model_config(directory) == SDXL_BASE
    assert diffusers.unused_components(directory) == ()


def test_written_files_say_what_the_official_ones_say(tmp_path: Path, written: dict[str, Path]) -> None:
    directory = official(tmp_path)
    ours = written["SDXL base"]
    for name in ("tokenizer", "tokenizer_2"):
        vocabularies = [json.loads((root / name / "vocab.json").read_text()) for root in (ours, directory)]
        assert vocabularies[0] == vocabularies[1], name
        assert (ours / name / "merges.txt").read_text() == (directory / name / "merges.txt").read_text(), name
    files = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    for name in files:
        given, expected = (json.loads((root / name).read_text()) for root in (ours, directory))
        differing = {key for key, value in given.items() if value != expected.get(key, value) and key[0] != "_"}
        assert not differing, name


@pytest.mark.parametrize("name", MODELS)
def test_model_returns_from_a_directory(name: str, tmp_path: Path) -> None:
    config, pipeline = MODELS[name]
    diffusers.write_folder(config, tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == pipeline
    assert diffusers.read_model_config(tmp_path) == diffusers.as_diffusers_has_it(config)
    assert diffusers.unused_components(tmp_path) == ()


def test_only_a_tower_that_diffusers_cannot_express_is_changed() -> None:
    for config in (SDXL_BASE, SDXL_REFINER, SD1):
        assert diffusers.as_diffusers_has_it(config) == config
    (tower,) = diffusers.as_diffusers_has_it(SD2).text
    assert tower == replace(
        SD2.text[0], clip=replace(CLIP_H, layers=23, projection_dim=None), context=ContextState.LAST
    )


@pytest.mark.parametrize("config", [CLIP_L, CLIP_BIGG, SDXL_VAE, SD_VAE, SDXL_BASE.unet, SD1.unet])
def test_component_returns_from_its_own_folder(config: Any, tmp_path: Path) -> None:
    diffusers.write_component(config, tmp_path / "part")
    fields = json.loads((tmp_path / "part" / "config.json").read_text())
    readers = {
        "unet": diffusers_fields.unet_config,
        "vae": diffusers_fields.vae_config,
        "text_encoder": diffusers_fields.clip_config,
    }
    kind = diffusers_fields.component_kind(fields)
    assert kind is not None
    assert readers[kind](fields, "config.json") == config


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "unet"),
        ({"_class_name": "AutoencoderKL"}, "vae"),
        ({"_class_name": "ControlNetModel"}, None),
        ({"_class_name": ["my_pipeline", "Mine"]}, None),
        ({"architectures": ["CLIPTextModel"]}, "text_encoder"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "text_encoder"),
        ({"architectures": ["StableDiffusionSafetyChecker"], "model_type": "clip"}, None),
        ({"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}, None),
        ({"model_type": "clip_text_model"}, "text_encoder"),
        ({}, None),
    ],
)
def test_component_is_known_by_its_class(fields: dict[str, Any], kind: str | None) -> None:
    assert diffusers_fields.component_kind(fields) == kind


def test_missing_fields_have_the_defaults_of_the_constructors() -> None:
    # SD 1.x's first files said little.
    unet = diffusers_fields.unet_config({"cross_attention_dim": 768}, "unet")
    assert unet == SD1.unet
    assert diffusers_fields.vae_config({}, "vae").scale == 0.18215
    tower = diffusers_fields.clip_config({}, "tower")
    assert (tower.width, tower.heads, tower.layers, tower.vocabulary, tower.projection_dim) == (512, 8, 12, 49408, None)
    schedule, prediction = diffusers_fields.schedule_config({"_class_name": "PNDMScheduler"}, "scheduler")
    assert (schedule, prediction) == (ScheduleConfig(1000, 0.0001, 0.02, BetaSchedule.LINEAR), Prediction.EPSILON)
    assert diffusers_fields.schedule_config({"_class_name": "LCMScheduler"}, "scheduler")[0] == ScheduleConfig()


def test_heads_and_depths_may_be_one_number() -> None:
    fields = diffusers_fields.unet_fields(SDXL_REFINER.unet)
    given = {**fields, "transformer_layers_per_block": 4, "layers_per_block": [2, 2, 2, 2]}
    assert diffusers_fields.unet_config(given, "unet") == SDXL_REFINER.unet
    given = {**fields, "attention_head_dim": 64, "num_attention_heads": [6, 12, 24, 24]}
    assert diffusers_fields.unet_config(given, "unet") == SDXL_REFINER.unet
    assert diffusers_fields.unet_config({**fields, "attention_head_dim": 4}, "unet").heads == (4, 4, 4, 4)


def test_fields_that_change_nothing_are_skipped() -> None:
    skipped = {"upcast_attention": True, "_anything": 3, "decay": 0.9999, "use_ema_warmup": True, "new_field": None}
    assert diffusers_fields.unet_config({**diffusers_fields.unet_fields(SD1.unet), **skipped}, "unet") == SD1.unet
    skipped = {"force_upcast": False, "sample_size": 512}
    assert diffusers_fields.vae_config({**diffusers_fields.vae_fields(SD_VAE), **skipped}, "vae") == SD_VAE
    skipped = {"attention_dropout": 0.1, "torch_dtype": "float16", "initializer_range": 0.01, "top_k": 50}
    assert diffusers_fields.clip_config({**diffusers_fields.clip_fields(CLIP_L), **skipped}, "tower") == CLIP_L
    fields = diffusers_fields.scheduler_fields(ScheduleConfig(), Prediction.V)
    given = {**fields, "_class_name": "UniPCMultistepScheduler", "solver_order": 2, "use_karras_sigmas": True}
    assert diffusers_fields.schedule_config(given, "scheduler") == (ScheduleConfig(), Prediction.V)


def test_a_consistency_model_is_known_by_its_scheduler_there_and_back() -> None:
    for distilled in (False, True):
        fields = diffusers_fields.scheduler_fields(ScheduleConfig(), Prediction.EPSILON, distilled)
        assert diffusers_fields.is_distilled(fields) == distilled
        assert diffusers_fields.schedule_config(fields, "scheduler") == (ScheduleConfig(), Prediction.EPSILON)


def said(
    name: str, zero_terminal_snr: bool = False, distilled: bool = False, **fields: Any
) -> tuple[SamplingDefaults, tuple[str, ...]]:
    found, notes = diffusers_sampling.read({"_class_name": name, **fields}, "file", zero_terminal_snr, distilled)
    return found or SamplingDefaults(), notes


OFFICIAL = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
TRAILING, EXPONENTIAL, END = Spacing.TRAILING, Sigmas.EXPONENTIAL, FinalSigma.SIGMA_MIN


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("EulerDiscreteScheduler", {}, SamplingDefaults()),
        ("EulerAncestralDiscreteScheduler", {}, SamplingDefaults("euler_ancestral")),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, SamplingDefaults(spacing=TRAILING)),
        ("EulerDiscreteScheduler", {"steps_offset": 0}, SamplingDefaults(steps_offset=0)),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, SamplingDefaults(sigmas=Sigmas.KARRAS)),
        ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}, SamplingDefaults("heun", sigmas=EXPONENTIAL)),
        ("EulerDiscreteScheduler", {"set_alpha_to_one": True}, SamplingDefaults(set_alpha_to_one=True)),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, SamplingDefaults("unipc", final_sigma=END)),
        ("DPMSolverMultistepScheduler", {}, SamplingDefaults("dpmpp_2m")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, SamplingDefaults("dpmpp_2m_sde")),
    ],
)
def test_what_a_scheduler_says_of_sampling_returns_from_its_file(
    name: str, fields: dict[str, Any], expected: SamplingDefaults
) -> None:
    found, notes = said(name, **OFFICIAL | fields)
    assert (found, notes) == (expected, ())
    written = diffusers_fields.scheduler_fields(ScheduleConfig(), Prediction.EPSILON, sampling=found)
    assert written["_class_name"] == name
    assert said(written.pop("_class_name"), **written) == (expected, ())


def test_a_scheduler_says_by_its_class_what_it_leaves_out() -> None:
    linspace = SamplingDefaults(spacing=Spacing.LINSPACE, steps_offset=0, set_alpha_to_one=True)
    assert said("EulerDiscreteScheduler")[0] == linspace
    ddim, (note,) = said("DDIMScheduler")
    assert ddim == SamplingDefaults("ddim", steps_offset=0, set_alpha_to_one=True)
    assert note.startswith("file has clip_sample=true, by leaving it out, which is not followed: ")


def test_zero_terminal_snr_is_trailing_unless_the_file_says_otherwise_and_then_that_is_said() -> None:
    own = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
    assert said("DDIMScheduler", True, **own) == (SamplingDefaults(), ())
    assert said("DDIMScheduler", True, timestep_spacing="trailing", **own) == (SamplingDefaults(), ())
    found, notes = said("DDIMScheduler", True, timestep_spacing="leading", **own)
    assert found.spacing is Spacing.LEADING
    assert "the last timestep, where the schedule has zero SNR, is not visited" in notes[0]


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("PNDMScheduler", "_class_name", "PNDMScheduler"),
        ("EulerDiscreteScheduler", "interpolation_type", "log_linear"),
        ("EulerDiscreteScheduler", "sigma_max", 80.0),
        ("EulerDiscreteScheduler", "use_beta_sigmas", True),
        ("EulerDiscreteScheduler", "a_new_field", 3),
        ("DDIMScheduler", "thresholding", True),
        ("DDIMScheduler", "clip_sample", True),
        ("DDPMScheduler", "variance_type", "fixed_large"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "solver_type", "heun"),
        ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"),
        ("UniPCMultistepScheduler", "solver_type", "bh1"),
        ("UniPCMultistepScheduler", "lower_order_final", False),
        ("LCMScheduler", "original_inference_steps", 100),
    ],
)
def test_what_is_not_followed_of_sampling_is_said_by_its_name(name: str, field: str, value: Any) -> None:
    fields = {**OFFICIAL, field: value}
    (note,) = diffusers_sampling.read({"_class_name": name, **fields}, "file", False, False)[1]
    assert note.startswith(f"file has {field}={json.dumps(value)}, ")


def test_fields_that_the_class_does_not_read_are_passed_over() -> None:
    others = {"thresholding": True, "solver_order": 3, "interpolation_type": "log_linear", "lower_order_final": False}
    assert said("EulerAncestralDiscreteScheduler", **OFFICIAL, **others)[1] == ()
    assert said("DPMSolverMultistepScheduler", **OFFICIAL, lower_order_final=False)[1] == (), "it ends at zero"


@pytest.mark.parametrize(
    ("field", "value"),
    [("timestep_spacing", "last"), ("steps_offset", -1), ("set_alpha_to_one", 1), ("final_sigmas_type", "max")],
)
def test_what_no_scheduler_can_say_of_sampling_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"file has {field}=.*expected .*Correct the file"):
        said("EulerDiscreteScheduler", **{field: value})


def test_a_model_of_which_nothing_is_said_is_sampled_as_what_it_is() -> None:
    def usual(**changes: Any) -> tuple[Any, ...]:
        options = Options().resolved(replace(SDXL_BASE, **changes))
        return options.sampler, options.timestep_spacing, options.sigmas, options.guidance

    assert usual() == ("euler", Spacing.LEADING, Sigmas.SCHEDULE, 5)
    assert usual(schedule=ZERO_SNR, prediction=Prediction.V) == ("ddim", Spacing.TRAILING, Sigmas.SCHEDULE, 5)
    assert usual(distilled=True) == ("lcm", None, Sigmas.SCHEDULE, 1)
    karras = SamplingDefaults(sigmas=Sigmas.KARRAS)
    assert usual(sampling=karras)[2] is Sigmas.KARRAS
    other = Options(sampler="ddim").resolved(replace(SDXL_BASE, sampling=karras))
    assert other.sigmas is Sigmas.SCHEDULE, "ddim visits whole timesteps, and diffusers' does not look at that field"


def test_a_directory_says_how_it_is_sampled(folder: Callable[[str], Path]) -> None:
    directory = folder("SDXL base")
    assert diffusers.read_model_config(directory).sampling is None
    file = directory / "scheduler" / "scheduler_config.json"
    turbo = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | turbo))
    config = diffusers.read_model_config(directory)
    assert config.sampling == SamplingDefaults("euler_ancestral", Spacing.TRAILING)
    assert diffusers.unfollowed(directory) == ()
    options = Options().resolved(config)
    assert (options.sampler, options.timestep_spacing) == ("euler_ancestral", Spacing.TRAILING)
    given = Options(sampler="ddim", timestep_spacing=Spacing.LEADING).resolved(config)
    assert (given.sampler, given.timestep_spacing) == ("ddim", Spacing.LEADING), "what the user says comes first"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "PNDMScheduler"}))
    assert "which is not implemented: euler is used" in diffusers.unfollowed(directory)[0]
    assert diffusers.read_model_config(directory).sampling == SamplingDefaults(spacing=Spacing.TRAILING)


def test_tower_of_a_whole_clip_has_the_projection() -> None:
    nested = {name: value for name, value in diffusers_fields.clip_fields(CLIP_BIGG).items() if name != "architectures"}
    fields = {"architectures": ["CLIPModel"], "text_config": nested, "projection_dim": 1280, "vision_config": {"a": 1}}
    assert diffusers_fields.clip_config(fields, "tower") == CLIP_BIGG
    assert diffusers_fields.clip_config({**fields, "text_config_dict": {"eos_token_id": 2}}, "tower") == CLIP_BIGG


@pytest.mark.parametrize(("given", "expected"), [(2, 49407), (49407, 49407), (7, 7)])
def test_end_token_of_the_official_files_is_end_of_text(given: int, expected: int) -> None:
    fields = {**diffusers_fields.clip_fields(CLIP_L), "eos_token_id": given}
    assert diffusers_fields.clip_config(fields, "tower").end_token == expected


def test_aesthetic_score_is_seen_in_the_width_of_the_vector(folder: Callable[[str], Path]) -> None:
    directory = folder("SDXL base")
    edit(directory / "unet" / "config.json", projection_class_embeddings_input_dim=2560)
    config = diffusers.read_model_config(directory)
    assert config.micro == SDXL_REFINER.micro


def test_size_missing_from_the_unet_is_that_of_diffusers(folder: Callable[[str], Path]) -> None:
    directory = folder("SD 1.x")
    edit(directory / "unet" / "config.json", sample_size=None)
    assert diffusers.read_model_config(directory).default_size == (512, 512)
    edit(directory / "unet" / "config.json", sample_size=[48, 96])
    assert diffusers.read_model_config(directory).default_size == (384, 768)


def test_unused_components_are_listed(folder: Callable[[str], Path]) -> None:
    directory = folder("SD 1.x")
    edit(
        directory / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=[None, None],
    )
    assert diffusers.unused_components(directory) == ("feature_extractor", "safety_checker")
    assert diffusers.read_model_config(directory) == SD1


# Tokenizers


def test_padding_is_that_of_the_file_that_transformers_heeds(folder: Callable[[str], Path]) -> None:
    directory = folder("SD 1.x")

    def pad() -> int:
        return diffusers.read_model_config(directory).text[0].pad_token

    special, settings = (
        directory / "tokenizer" / f"{name}.json" for name in ("special_tokens_map", "tokenizer_config")
    )
    assert pad() == 49407
    edit(special, pad_token={"content": "!", "lstrip": False})
    assert pad() == 0, "the special tokens overrule the settings"
    edit(settings, added_tokens_decoder={})
    assert pad() == 49407, "unless the settings list the added tokens"
    edit(settings, pad_token="!")
    assert pad() == 0
    settings.unlink()
    special.unlink()
    assert pad() == 49407, "CLIP's own"


def as_one_file(tokenizer: Path, **settings: Any) -> None:
    """Rewrites a tokenizer's folder as transformers 5 would save it."""
    vocabulary = json.loads((tokenizer / "vocab.json").read_text())
    merges = [line.split() for line in (tokenizer / "merges.txt").read_text().splitlines()[1:]]
    words = (
        json.loads((tokenizer / "added_tokens.json").read_text()) if (tokenizer / "added_tokens.json").exists() else {}
    )
    tokens = [{"id": 49407, "content": "<|endoftext|>"}, *({"id": i, "content": word} for word, i in words.items())]
    pad = json.loads((tokenizer / "tokenizer_config.json").read_text())["pad_token"]
    shutil.rmtree(tokenizer)
    tokenizer.mkdir()
    whole = {"model": {"vocab": vocabulary, "merges": merges}, "added_tokens": tokens, "padding": None}
    (tokenizer / "tokenizer.json").write_text(json.dumps(whole))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad, **settings}))


@pytest.mark.parametrize("name", ["SDXL base", "SDXL with words"])
def test_tokenizer_may_be_one_file(name: str, folder: Callable[[str], Path]) -> None:
    directory = folder(name)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        as_one_file(directory / tokenizer)
    assert diffusers.read_model_config(directory) == MODELS[name][0]


def test_added_tokens_may_stand_in_the_settings(folder: Callable[[str], Path]) -> None:
    directory = folder("SDXL with words")
    (directory / "tokenizer_2" / "added_tokens.json").unlink()
    words = {"49408": {"content": "<cat-toy>"}, "49409": {"content": "<Höhle>"}, "0": {"content": "!"}}
    edit(directory / "tokenizer_2" / "tokenizer_config.json", added_tokens_decoder=words)
    assert diffusers.read_model_config(directory) == MODELS["SDXL with words"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "vocab_size=49410 has room for the ids 49408 to 49409"),
        ({"<a>": 49408}, "vocab_size=49410"),
        ({"<a>": 49408, "<b>": 49410}, "'<b>' with id 49410"),
        ({"<a>": 49408, "<b>": 49409, "<c>": 49410}, "added tokens"),
        ({"<a>": 49408, "<b>": 49408}, "added tokens"),
        ({"<a>": "first"}, "added tokens"),
        ({"<a>": 49408, "<b>": 49409, "cat</w>": 3}, "cat</w>"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(
    words: dict[str, int], message: str, folder: Callable[[str], Path]
) -> None:
    directory = folder("SDXL with words")
    (directory / "tokenizer_2" / "added_tokens.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=message) as caught:
        diffusers.read_model_config(directory)
    assert str(directory / "tokenizer_2") in str(caught.value)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_another_vocabulary_is_refused(file: str, folder: Callable[[str], Path]) -> None:
    path = folder("SD 1.x") / "tokenizer" / file
    path.write_text(path.read_text().replace("cat</w>", "feline</w>"))
    with pytest.raises(InputError, match="not CLIP's own") as caught:
        diffusers.read_model_config(path.parent.parent)
    assert str(path.parent) in str(caught.value)


def test_files_that_number_added_tokens_differently_are_refused(folder: Callable[[str], Path]) -> None:
    directory = folder("SDXL with words")
    words = {"49408": {"content": "<Höhle>"}, "49409": {"content": "<cat-toy>"}}
    edit(directory / "tokenizer_2" / "tokenizer_config.json", added_tokens_decoder=words)
    with pytest.raises(InputError, match=r"added tokens, .* with id .* has room for"):
        diffusers.read_model_config(directory)


def test_unknown_padding_is_refused(folder: Callable[[str], Path]) -> None:
    directory = folder("SD 1.x")
    edit(directory / "tokenizer" / "special_tokens_map.json", pad_token="<pad>")
    with pytest.raises(InputError, match="<pad>"):
        diffusers.read_model_config(directory)


# What must be refused

UNET_REFUSED: dict[str, Any] = {
    "act_fn": "mish",
    "addition_embed_type": "text_image",
    "attention_type": "gated",
    "center_input_sample": True,
    "class_embed_type": "timestep",
    "class_embeddings_concat": True,
    "conv_in_kernel": 5,
    "conv_out_kernel": 5,
    "cross_attention_norm": "layer_norm",
    "downsample_padding": 0,
    "dropout": 0.1,
    "dual_cross_attention": True,
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_proj",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_only_cross_attention": True,
    "mid_block_scale_factor": 1.4,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-6,
    "only_cross_attention": True,
    "resnet_out_scale_factor": 1.4,
    "resnet_skip_time_act": True,
    "resnet_time_scale_shift": "scale_shift",
    "reverse_transformer_layers_per_block": [4, 2, 1],
    "time_embedding_act_fn": "silu",
    "time_embedding_dim": 512,
    "time_embedding_type": "fourier",
    "timestep_post_act": "silu",
    # fields that are read, with values that do not do
    "transformer_layers_per_block": [1, [2, 2], 10],
    "down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": [2, 2, 1],
    "cross_attention_dim": [2048, 768, 2048],
    "attention_head_dim": [5, 10],
    "block_out_channels": 320,
    "norm_num_groups": None,
    "in_channels": "4",
    "projection_class_embeddings_input_dim": None,
}
VAE_REFUSED: dict[str, Any] = {
    "act_fn": "relu",
    "in_channels": 4,
    "out_channels": 4,
    "shift_factor": 0.1,
    "latents_mean": 0.5,
    "latents_std": ["1"],
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "down_block_types": ["AttnDownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "scaling_factor": None,
    "layers_per_block": 0,
}
CLIP_REFUSED: dict[str, Any] = {
    "layer_norm_eps": 1e-6,
    "hidden_act": "relu",
    "max_position_embeddings": 248,
    "hidden_size": None,
    "eos_token_id": [1, 2],
}
SCHEDULER_REFUSED: dict[str, Any] = {
    "trained_betas": [0.1, 0.2],
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "flow_prediction",
    "timestep_type": "continuous",
    "use_flow_sigmas": True,
    "beta_start": "small",
    "num_train_timesteps": 0,
    "_class_name": "FlowMatchHeunDiscreteScheduler",
}
PARTS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "unet": (diffusers_fields.unet_config, diffusers_fields.unet_fields(SDXL_BASE.unet), UNET_REFUSED),
    "vae": (diffusers_fields.vae_config, diffusers_fields.vae_fields(SDXL_VAE), VAE_REFUSED),
    "tower": (diffusers_fields.clip_config, diffusers_fields.clip_fields(CLIP_L), CLIP_REFUSED),
    "scheduler": (
        diffusers_fields.schedule_config,
        diffusers_fields.scheduler_fields(ScheduleConfig(), Prediction.EPSILON),
        SCHEDULER_REFUSED,
    ),
}


@pytest.mark.parametrize(
    ("part", "field"), [(part, field) for part, (_, _, refused) in PARTS.items() for field in refused]
)
def test_what_is_not_implemented_is_refused_by_name(part: str, field: str) -> None:
    read, fields, refused = PARTS[part]
    read(fields, "part/config.json")
    with pytest.raises(InputError) as caught:
        read({**fields, field: refused[field]}, "part/config.json")
    message = str(caught.value)
    assert message.startswith("part/config.json has ")
    assert f"{field}={json.dumps(refused[field])}" in message


def test_every_field_with_one_meaning_has_a_test_above() -> None:
    tables = {
        "unet": diffusers_fields._UNET,
        "vae": diffusers_fields._VAE,
        "tower": diffusers_fields._CLIP,
        "scheduler": diffusers_fields._SCHEDULER,
    }
    for part, known in tables.items():
        assert known.only.keys() <= PARTS[part][2].keys()


@pytest.mark.parametrize(
    ("part", "field", "nearest"),
    [
        ("unet", "cross_attention_dims", "cross_attention_dim"),
        ("vae", "scaling_facto", "scaling_factor"),
        ("tower", "hidden_siz", "hidden_size"),
    ],
)
def test_unknown_field_is_refused_with_its_nearest_name(part: str, field: str, nearest: str) -> None:
    read, fields, _ = PARTS[part]
    read({**fields, field: None}, "part/config.json")
    with pytest.raises(InputError, match=f"{field}=3, .* Nearest known names: {nearest},"):
        read({**fields, field: 3}, "part/config.json")


@pytest.mark.parametrize(
    "path",
    [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder_2/config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/merges.txt",
    ],
)
def test_missing_file_is_named(path: str, folder: Callable[[str], Path]) -> None:
    directory = folder("SDXL base")
    (directory / path).unlink()
    with pytest.raises(InputError, match=r"is missing\. Download the model's whole directory") as caught:
        diffusers.read_model_config(directory)
    assert str(directory / path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[1]", "not a JSON object"), (b"\xff", "is not UTF-8 text")]
)
def test_broken_file_is_named(content: str | bytes, message: str, folder: Callable[[str], Path]) -> None:
    path = folder("SD 1.x") / "unet" / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        diffusers.read_model_config(path.parent.parent)
    assert str(path) in str(caught.value)


def test_tokenizer_file_of_another_form_is_named(folder: Callable[[str], Path]) -> None:
    path = folder("SD 1.x") / "tokenizer" / "tokenizer.json"
    path.write_text('{"model": {"vocab": {}}}')
    with pytest.raises(InputError, match="not of the form that transformers writes") as caught:
        diffusers.read_model_config(path.parent.parent)
    path.unlink()
    edit(path.with_name("tokenizer_config.json"), added_tokens_decoder={"first": "<a>"})
    with pytest.raises(InputError, match="not of the form that transformers writes") as caught:
        diffusers.read_model_config(path.parent.parent)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", ["mine", "Pipeline"], None])
def test_other_pipelines_are_refused(name: Any, folder: Callable[[str], Path]) -> None:
    directory = folder("SD 1.x")
    edit(directory / "model_index.json", _class_name=name)
    with pytest.raises(InputError, match=r"is not implemented.*StableDiffusionPipeline"):
        diffusers.read_model_config(directory)


def test_other_classes_of_components_are_refused(folder: Callable[[str], Path]) -> None:
    directory = folder("SD 1.x")
    edit(directory / "vae" / "config.json", _class_name="AsymmetricAutoencoderKL")
    with pytest.raises(InputError, match='describes "AsymmetricAutoencoderKL"; implemented is AutoencoderKL'):
        diffusers.read_model_config(directory)


def test_parts_that_do_not_fit_together_are_refused(folder: Callable[[str], Path]) -> None:
    directory = folder("SDXL base")
    edit(directory / "model_index.json", text_encoder=[None, None])
    with pytest.raises(InputError, match=r"do not fit together.*context_dim=2048") as caught:
        diffusers.read_model_config(directory)
    assert str(directory) in str(caught.value)


def with_tower(config: ModelConfig, index: int = 0, **changes: Any) -> ModelConfig:
    towers = list(config.text)
    towers[index] = replace(towers[index], **changes)
    return replace(config, text=tuple(towers))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_tower(SDXL_BASE, name="text_encoder_3"), "text_encoder_3"),
        (replace(SDXL_BASE, text=SDXL_BASE.text[::-1]), "vector_dim|projection_dim|names"),
        (
            with_tower(SDXL_BASE, context=ContextState.LAST),
            "text_encoder has context=last.*They need context=penultimate",
        ),
        (with_tower(SDXL_BASE, context=ContextState.PENULTIMATE_NORMED), "penultimate_normed"),
        (with_tower(SDXL_BASE, clip=replace(CLIP_L, projection_dim=768)), "text_encoder has projection_dim=768"),
        (with_tower(SDXL_BASE, added_tokens=("<a>",)), "1 added tokens"),
        (with_tower(SDXL_BASE, clip=replace(CLIP_L, vocabulary=50000)), "vocabulary=50000 and 0 added"),
        (with_tower(SD1, context=ContextState.PENULTIMATE), "context=penultimate, .*They need context=last"),
        (replace(SD1, unconditional=UnconditionalKind.ZEROS), "unconditional=zeros"),
        (replace(SD1, default_size=(500, 512)), "default_size=.*multiples of 8"),
        (replace(SD1, unet=replace(SD1.unet, in_channels=8)), "in_channels=8.*4 or 9"),
        (MODEL, "transformer_depth ends with 2 and model.unet.middle_depth is 1"),
        (replace(SD1, unet=replace(SD1.unet, context_dim=1024)), "context_dim=1024"),
    ],
)
def test_what_diffusers_cannot_express_is_not_written(config: ModelConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        diffusers.write_folder(config, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_zero_terminal_snr_is_written_for_ddim(tmp_path: Path) -> None:
    diffusers.write_folder(MODELS["SDXL v"][0], tmp_path)
    fields = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert fields["_class_name"] == "DDIMScheduler"
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert fields["timestep_spacing"] == "trailing"
    assert fields["rescale_betas_zero_snr"] is True


def test_a_unet_of_one_level_is_written() -> None:
    config = UNetConfig((32,), 1, (1,), 1, (2,), 16, None)
    assert diffusers_fields.unet_config(diffusers_fields.unet_fields(config), "unet") == config
