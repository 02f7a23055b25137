"""Image prompts, from files to latents: against transformers' image tower and processor, and diffusers' pipeline.

diffusers has no image prompts of this kind, but takes embeddings: `prompt_embeds` and `pooled_prompt_embeds`. Models,
steps and tolerances are those of `pipelines.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import Note
from PIL import Image
from pipelines import STEPS, Sampled, build, check_agreement, sdxl
from reference import from_torch, randomise, torch, transformers
from test_stages_parity import fixed_noise, photograph

from sdxl_jax.model import SDXL_BASE
from sdxl_jax.sampling.generate import generate
from sdxl_jax.sampling.image_prompts import ImagePrompt, encode_images
from sdxl_jax.weights.clip_vision import open_tower
from sdxl_jax.weights.load import load_model

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

SIZE, PROMPT, NEGATIVE, STRENGTHS = (72, 40), "a cat on a mat", "blurry, ugly", (0.7, 0.4)


def tower(folder: Path) -> Any:
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=52,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
            hidden_act="gelu",
            projection_dim=40,
        )
    )
    randomise(model.eval(), 3)
    model.save_pretrained(folder)
    return model


@pytest.mark.slow
def test_image_prompts_with_text_and_alone(tmp_path: Path, note: Note) -> None:
    source = build(SDXL_BASE, sdxl, tmp_path)
    theirs, images = tower(tmp_path / "image_encoder"), [photograph((61, 90), 1), photograph((40, 33), 2)]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    noise = np.random.default_rng(0).standard_normal((2, SIZE[0] // 8, SIZE[1] // 8, 4), np.float32)
    with torch.no_grad():
        pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
        embedded = theirs(pixels).image_embeds
        pooled = (embedded * torch.tensor(STRENGTHS)[:, None]).sum(0, keepdim=True)
        context, negative, _, negative_pooled = source.pipeline.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    last: dict[str, Any] = {}

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        last.update(tensors)
        return {}

    with fixed_noise(source.pipeline, noise):
        made = source.pipeline(
            prompt_embeds=torch.cat([context, torch.zeros_like(context)]),
            pooled_prompt_embeds=pooled.repeat(2, 1),
            negative_prompt_embeds=negative.repeat(2, 1, 1),
            negative_pooled_prompt_embeds=negative_pooled.repeat(2, 1),
            height=SIZE[0],
            width=SIZE[1],
            num_inference_steps=STEPS,
            callback_on_step_end=keep,
        ).images
    expected = Sampled(np.stack([np.asarray(image) for image in made]), from_torch(last["latents"]))
    found = open_tower(tmp_path / "image_encoder")
    embeddings = encode_images(found.config, found.load(), images)
    np.testing.assert_allclose(embeddings, embedded.numpy(), rtol=1e-4, atol=1e-5 * float(embedded.abs().max()))
    ours = generate(
        load_model(source.path, progress=False),
        [PROMPT, None],
        negative_prompts=[NEGATIVE] * 2,
        image_prompts=[ImagePrompt(*each) for each in zip(embeddings, STRENGTHS, strict=True)],
        height=SIZE[0],
        width=SIZE[1],
        steps=STEPS,
        init_noise=noise,
    )
    check_agreement("image prompts, with text and alone", Sampled(*ours), expected, note)
