"""Sampling on four simulated devices, run as a process: prints the largest difference from one device, as a
share of the largest latent, for each mesh. Run by test_program.py."""

import json
from typing import Any

import jax
import numpy as np
from tiny import MODEL, random_model

from sdxl_jax import sharding
from sdxl_jax.sampling.generate import Generated, generate
from sdxl_jax.sharding import MeshConfig

MESHES = {
    "data 4": MeshConfig(data=4),
    "fsdp 4": MeshConfig(data=1, fsdp=4),
    "data 2 × tensor 2": MeshConfig(data=2, tensor=2),
}
PROMPTS = ["a red cube", "two green birds", "a fish"]


def main() -> dict[str, float]:
    model = random_model(MODEL, 0)

    def sample(mesh: MeshConfig | None, **options: Any) -> Generated:
        placed = model
        if mesh is not None:
            placed = model._replace(params=sharding.put(sharding.make_mesh(mesh), model.params))
        settings: dict[str, Any] = {"height": 16, "width": 24, "steps": 3, "sampler": "dpmpp_2m_sde", "batch_size": 3}
        return generate(placed, PROMPTS, **settings, **options)

    single = sample(None)
    largest = np.abs(single.latents).max()
    found = {
        name: float(np.abs(sample(mesh).latents - single.latents).max() / largest) for name, mesh in MESHES.items()
    }
    stepwise = sample(MESHES["data 4"], callback=lambda seen: None)
    return {**found, "stepwise": float(np.abs(stepwise.latents - single.latents).max() / largest)}


if __name__ == "__main__":
    assert jax.device_count() == 4
    print(json.dumps(main()))
