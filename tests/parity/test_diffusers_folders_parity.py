"""What `weights.formats.diffusers` writes, in the hands of diffusers and transformers: the same modules and tokens.

Modules are built without memory for their weights, so full size costs nothing.
"""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MODEL

from sdxl_jax.conditioning.text import ContextState, Tokenizer, Tower
from sdxl_jax.diffusion import schedule
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, ModelConfig, abstract
from sdxl_jax.models import clip, layers
from sdxl_jax.weights.formats import diffusers as folders
from sdxl_jax.weights.formats import diffusers_fields

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

MODELS = {"SDXL base": SDXL_BASE, "SDXL refiner": SDXL_REFINER, "SD 1.x": SD1, "SD 2.x": SD2}
# No exclamation mark: where "!" is the padding, transformers takes it for padding in a prompt too and gives 0; our
# tokenizer gives 256.
PROMPTS = ["a cat", "", "Two cafés, 3 o'clock", "x" * 300, "a cat<|endoftext|> and a dog", "日本 🙂 naïve don't"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {name: tmp_path_factory.mktemp("model") for name in MODELS}
    for name, config in MODELS.items():
        folders.write_folder(config, roots[name])
    return roots


def parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build(directory: Path, device: str = "meta") -> Any:
    """The module that config.json describes; on the meta device, without its weights."""
    fields = json.loads((directory / "config.json").read_text())
    with torch.device(device):
        if "_class_name" in fields:
            kind = getattr(diffusers, fields["_class_name"])
            return kind.from_config(kind.load_config(directory))
        (name,) = fields["architectures"]
        return getattr(transformers, name)(transformers.CLIPTextConfig.from_pretrained(directory))


@pytest.mark.parametrize("name", MODELS)
def test_modules_built_from_our_files_have_our_parameters(name: str, written: dict[str, Path]) -> None:
    config: ModelConfig = folders.as_diffusers_has_it(MODELS[name])
    for part, ours in abstract(config).items():
        assert parameters(build(written[name] / part)) == layers.count(ours), part


@pytest.mark.parametrize("name", MODELS)
def test_modules_built_from_our_files_compute_what_we_configure(name: str, written: dict[str, Path]) -> None:
    """What a count of parameters does not show."""
    config = folders.as_diffusers_has_it(MODELS[name])
    theirs = build(written[name] / "unet")
    heads = [
        block.attentions[0].transformer_blocks[0].attn1.heads if hasattr(block, "attentions") else None
        for block in theirs.down_blocks
    ]
    given = zip(config.unet.heads, config.unet.transformer_depth, strict=True)
    assert heads == [count if depth else None for count, depth in given]
    assert theirs.mid_block.attentions[0].transformer_blocks[0].attn1.heads == config.unet.heads[-1]
    size = theirs.config.sample_size
    assert (size * config.vae.downsampling,) * 2 == config.default_size
    assert build(written[name] / "vae").config.scaling_factor == config.vae.scale
    for tower in config.text:
        description = build(written[name] / tower.name).config
        assert (description.num_attention_heads, description.hidden_act, description.eos_token_id) == (
            tower.clip.heads,
            tower.clip.activation.value,
            tower.clip.end_token,
        )


@pytest.mark.parametrize("name", MODELS)
def test_pipeline_takes_the_entries_of_our_index(name: str, written: dict[str, Path]) -> None:
    index = json.loads((written[name] / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"])
    accepted = inspect.signature(pipeline).parameters
    given = {key for key in index if not key.startswith("_")}
    assert given <= set(accepted)
    needed = {key for key, parameter in accepted.items() if parameter.default is inspect.Parameter.empty}
    assert needed <= given


TINY = replace(MODEL, unet=replace(MODEL.unet, middle_depth=2))
TINY_TOWER = Tower("text_encoder", clip.ClipTextConfig(16, 3, 2, 16), 0, ContextState.PENULTIMATE_NORMED)
TINY_SD2 = replace(
    TINY,
    unet=replace(TINY.unet, vector_dim=None),
    text=(TINY_TOWER,),
    micro=None,
    unconditional=SD2.unconditional,
    schedule=schedule.ScheduleConfig(zero_terminal_snr=True),
    prediction=Prediction.V,
)


@pytest.mark.parametrize("config", [TINY, TINY_SD2], ids=["SDXL", "SD 2.x"])
def test_pipeline_loads_and_its_own_files_are_read(config: ModelConfig, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    folders.write_folder(config, ours)
    parts = [path.parent for path in ours.glob("*/config.json")]
    assert len(parts) == 2 + len(config.text)
    for part in parts:
        module, ours_says = build(part, "cpu"), (part / "config.json").read_text()
        module.save_pretrained(part)
        (part / "config.json").write_text(ours_says)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(ours, local_files_only=True)
    assert type(pipeline).__name__ == json.loads((ours / "model_index.json").read_text())["_class_name"]
    assert pipeline.vae_scale_factor == config.vae.downsampling
    pipeline.save_pretrained(theirs)
    assert folders.read_model_config(theirs) == folders.as_diffusers_has_it(config)
    assert folders.unused_components(theirs) == ()


@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_give_our_tokens(name: str, written: dict[str, Path]) -> None:
    config = MODELS[name]
    ours = Tokenizer.of(config.text)(PROMPTS)
    for tower in config.text:
        directory = written[name] / tower.name.replace("text_encoder", "tokenizer")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
        assert tokenizer.model_max_length == 77
        theirs = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77)["input_ids"]
        np.testing.assert_array_equal(ours[tower.name], theirs)


def test_added_tokens_get_the_numbers_of_their_rows(tmp_path: Path) -> None:
    words = ("<cat-toy>", "<Höhle>")
    tower = replace(SD1.text[0], clip=clip.ClipTextConfig(vocabulary=49410), added_tokens=words)
    folders.write_folder(replace(SD1, text=(tower,)), tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 49410
    assert tokenizer("a <cat-toy> <Höhle>")["input_ids"] == [49406, 320, 49408, 49409, 49407]

    # Saved by transformers in its own way, and read again.
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "vocab.json").unlink()
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()
    assert folders.read_model_config(tmp_path).text == (tower,)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_scheduler_built_from_our_file_has_our_schedule(zero_terminal_snr: bool) -> None:
    config = schedule.ScheduleConfig(zero_terminal_snr=zero_terminal_snr)
    fields = folders.scheduler_fields(config, Prediction.V)
    scheduler = getattr(diffusers, fields["_class_name"]).from_config(fields)
    # diffusers computes it in float32.
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), schedule.make(config).alpha_bar, rtol=2e-5, atol=1e-7)
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("known", "kind"),
    [
        (diffusers_fields._UNET, "UNet2DConditionModel"),
        (diffusers_fields._VAE, "AutoencoderKL"),
        (diffusers_fields._CLIP, "CLIPTextConfig"),
        (diffusers_fields._SCHEDULER, "EulerDiscreteScheduler"),
    ],
)
def test_our_defaults_are_those_of_the_constructors(known: Any, kind: str) -> None:
    if kind == "CLIPTextConfig":
        defaults = transformers.CLIPTextConfig().to_dict()
    else:
        signature = inspect.signature(getattr(diffusers, kind)).parameters
        defaults = {name: parameter.default for name, parameter in signature.items()}
        if kind != "EulerDiscreteScheduler":
            unknown = defaults.keys() - {*known.read, *known.only, *known.skipped.split()}
            assert not unknown, "fields that this version of diffusers has and we do not know"
    ours = {**known.read, **{name: accepted[0] for name, accepted in known.only.items()}}
    for name, value in ours.items():
        if name == "use_flow_sigmas":  # of other schedulers
            continue
        theirs = list(defaults[name]) if isinstance(defaults[name], tuple) else defaults[name]
        assert theirs == value, name
