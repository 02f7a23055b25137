"""CLIP score and CMMD through `--clip`, against transformers' `CLIPModel` with random weights."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402 (after the check for torch)
from safetensors.numpy import load_file, save_file  # noqa: E402

from sdxl_jax.conditioning.text import SD1_TEXT, Tokenizer  # noqa: E402
from sdxl_jax.errors import InputError  # noqa: E402
from sdxl_jax.evaluation.clip_models import open_clip  # noqa: E402
from sdxl_jax.evaluation.scores import evaluate  # noqa: E402
from sdxl_jax.weights import names  # noqa: E402
from sdxl_jax.weights.clip_vision import open_tower, write  # noqa: E402
from sdxl_jax.weights.load import load_weights  # noqa: E402
from sdxl_jax.weights.names import Dialect  # noqa: E402
from sdxl_jax.weights.open import open_model  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]
PROMPTS = ["a red balloon over the sea", "two dogs", "", "a painting " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP model on disk."""
    shared = {"num_hidden_layers": 2, "num_attention_heads": 1, "hidden_act": "gelu"}
    text = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 49408, "eos_token_id": 49407, **shared}
    vision = {"hidden_size": 24, "intermediate_size": 48, "image_size": 28, "patch_size": 14, **shared}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    path = tmp_path_factory.mktemp("clip") / "clip"
    model.save_pretrained(path)
    return path


def test_clip_score_is_100_times_the_cosine_of_transformers(folder: Path) -> None:
    """Tolerance 1e-4 of 100: float32, and transformers' own preprocessing."""
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 52, 3), np.uint8)
    found = evaluate(images, prompts=PROMPTS, metrics=["clip_score"], clip=open_clip(folder), batch_size=3)
    model = transformers.CLIPModel.from_pretrained(folder)
    process = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = process([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    tokens = torch.tensor(Tokenizer.of(SD1_TEXT)(PROMPTS)["text_encoder"]).long()
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=pixels)
    cosines = torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
    assert found.scores[0].value == pytest.approx(100 * cosines.clamp(min=0).mean().item(), abs=1e-4)
    assert found.scores[0].convention == "clip, 28 px, 100 · max(cosine, 0)"


def test_an_image_tower_alone_gives_cmmd_but_no_clip_score(folder: Path, tmp_path: Path) -> None:
    write(open_tower(folder), tmp_path / "vision", Dialect.TRANSFORMERS)
    rng = np.random.default_rng(0)
    images, others = rng.integers(0, 256, (2, 5, 28, 28, 3), np.uint8)
    clip = open_clip(tmp_path / "vision")
    found, whole = (evaluate(images, others, metrics=["cmmd"], clip=each) for each in (clip, open_clip(folder)))
    assert found.scores[0].value == pytest.approx(whole.scores[0].value, rel=1e-6) and found.scores[0].value > 0
    with pytest.raises(InputError, match=r"clip_score needs the text tower, too, and --clip vision, 28 px has none"):
        evaluate(images, prompts=["x"] * 5, metrics=["clip_score"], clip=clip)


def test_a_file_in_the_naming_of_open_clip_gives_the_same_score(folder: Path, tmp_path: Path) -> None:
    """Without a config.json: the configuration follows from names and shapes."""
    write(open_tower(folder), tmp_path / "image.safetensors", Dialect.OPENCLIP)
    opened = open_model(folder)
    (tower,) = (tower for tower in opened.config.text if tower.name in opened.parts)
    of_text = names.to_tensors(
        names.table(tower.clip, names.Naming(Dialect.OPENCLIP, "")), load_weights(opened).params[tower.name]
    )
    both = {**load_file(tmp_path / "image.safetensors"), **{name: np.asarray(each) for name, each in of_text.items()}}
    assert {"visual.proj", "text_projection", "token_embedding.weight"} <= set(both)
    save_file({name: np.ascontiguousarray(each) for name, each in both.items()}, tmp_path / "open_clip.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (4, 40, 52, 3), np.uint8)
    one, other = (
        evaluate(images, prompts=PROMPTS, metrics=["clip_score"], clip=open_clip(path)).scores[0].value
        for path in (folder, tmp_path / "open_clip.safetensors")
    )
    assert one == pytest.approx(other, rel=1e-6)
