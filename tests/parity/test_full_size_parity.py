"""Networks of the published sizes against diffusers and transformers, in float32: billions of random parameters.

Each network is computed in two processes, one after the other, so that no more than one copy of its weights is in
memory and all memory is given back. The first builds torch's network from the config.json that we write, gives it
random weights and saves it as its library does; the second loads that directory with `load_model`. Figures of a run are
in docs/full-size.md.

The tolerance is that of the tiny networks, `agreement.TOLERANCE`, 2e-5: sums are ten times as long here, but their
rounding errors mostly cancel, and the largest difference seen is 3e-6. It may not be much wider: in the base UNet an
eps of 1e-5 for 1e-6 at the entry of the transformers moves the result by 1e-4, the tanh form of GELU by 4e-5.
"""

import functools
import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree

from sdxl_jax import load_model
from sdxl_jax.arrays import MicroConditioning
from sdxl_jax.conditioning import micro
from sdxl_jax.conditioning.text import END_OF_TEXT
from sdxl_jax.model import SD1, SD2, SDXL_BASE, SDXL_REFINER, Model, ModelConfig
from sdxl_jax.models import clip, layers, unet, vae
from sdxl_jax.weights.formats import diffusers as folders
from sdxl_jax.weights.names import PartConfig

pytestmark = [pytest.mark.slow, pytest.mark.parity_full_size]

MEMORY_GIB = 24
"""What each process may take, weights and all."""
OWN_MEMORY_GIB = 2
"""What our process may take on top of the weights: less than a second copy of the larger networks."""

Arrays = Mapping[str, np.ndarray]
Compute = Callable[[Path, Arrays], Arrays]
"""The outputs, by name, of the network in a directory."""


class Measured(NamedTuple):
    """What a process found, and what it took."""

    outputs: Arrays
    peak_gib: float
    seconds: float


def _measured(compute: Compute, directory: Path, inputs: Arrays) -> Measured:
    start = time.perf_counter()
    outputs = compute(directory, inputs)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Measured(outputs, peak_kib / 2**20, time.perf_counter() - start)


def _apart(compute: Compute, directory: Path, inputs: Arrays) -> Measured:
    """In a fresh process. Raises what `compute` raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measured, compute, directory, inputs).result()


# ---- torch's process -------------------------------------------------------------------------------------------------


def _build(directory: Path) -> Any:
    """torch's network of a config.json, every parameter random; its weights are put beside, in shards."""
    import reference  # torch, which our own process does without

    reference.torch.set_num_threads(2)
    fields = json.loads((directory / "config.json").read_text())
    if "_class_name" in fields:
        kind = getattr(reference.diffusers, fields["_class_name"])
        model = kind.from_config(kind.load_config(directory))
    else:
        kind = getattr(reference.transformers, fields["architectures"][0])
        model = kind(reference.transformers.CLIPTextConfig.from_pretrained(directory))
    reference.randomise(model, 0)
    model.save_pretrained(directory, max_shard_size="4GB")
    return model.eval().requires_grad_(False)


def _torch_unet(directory: Path, inputs: Arrays) -> Arrays:
    import reference

    arguments = reference.UNetInputs(**{"pooled": None, "numbers": None, **inputs})
    latent = reference.to_torch(inputs["latent"])
    return {"prediction": reference.from_torch(reference.run_unet(_build(directory), arguments, latent))}


def _torch_vae(directory: Path, inputs: Arrays) -> Arrays:
    import reference

    model = _build(directory)
    posterior = model.encode(reference.to_torch(inputs["image"])).latent_dist
    decoded = model.decode(reference.to_torch(inputs["latent"]) / model.config.scaling_factor).sample
    outputs = {"mean": posterior.mean, "log variance": posterior.logvar, "decoded": decoded}
    return {name: reference.from_torch(value) for name, value in outputs.items()}


def _torch_tower(directory: Path, inputs: Arrays) -> Arrays:
    import reference

    model, tokens = _build(directory), reference.torch.from_numpy(inputs["tokens"]).long()
    inner = getattr(model, "text_model", model)
    states = model(tokens, output_hidden_states=True)
    penultimate = states.hidden_states[-2]
    outputs = {"penultimate": penultimate, "penultimate normed": inner.final_layer_norm(penultimate)}
    outputs |= {"last": states.last_hidden_state, "pooled": inner(tokens).pooler_output}
    if "text_embeds" in states:
        outputs["projected"] = states.text_embeds
    return {name: reference.from_torch(value) for name, value in outputs.items()}


# ---- our process -----------------------------------------------------------------------------------------------------


def _load(directory: Path, config: Any) -> Model:
    model = load_model(directory, progress=False)
    (part,) = model.params.values()
    assert layers.count(part) == PARAMETERS[config]
    return model


def _our_unet(config: ModelConfig, directory: Path, inputs: Arrays) -> Arrays:
    model = _load(directory, config.unet)
    assert model.config.unet == config.unet
    vector = None
    if config.micro is not None:
        numbers = inputs["numbers"]
        sizes = MicroConditioning(numbers[:, :2], numbers[:, 2:4], numbers[:, 4:6], numbers[:, 4].astype(np.float32))
        vector = micro.vector(config.micro, jnp.asarray(inputs["pooled"]), sizes)
    arguments = {name: jnp.asarray(inputs[name]) for name in ("latent", "timestep", "context")}
    apply = jax.jit(functools.partial(unet.apply, config.unet))
    return {"prediction": np.asarray(apply(model.params["unet"], **arguments, vector=vector))}


def _our_vae(config: ModelConfig, directory: Path, inputs: Arrays) -> Arrays:
    model = _load(directory, config.vae)
    assert model.config.vae == config.vae
    posterior = jax.jit(functools.partial(vae.encode, config.vae))(model.params["vae"], inputs["image"])
    decoded = jax.jit(functools.partial(vae.decode, config.vae))(model.params["vae"], inputs["latent"])
    outputs = {"mean": posterior.mean, "log variance": posterior.log_variance, "decoded": decoded}
    return jax.tree.map(np.asarray, outputs)


def _our_tower(config: clip.ClipTextConfig, directory: Path, inputs: Arrays) -> Arrays:
    model = _load(directory, config)
    ((name, params),) = model.params.items()
    assert {tower.name: tower.clip for tower in model.config.text}[name] == config
    states = jax.jit(functools.partial(clip.apply, config))(params, inputs["tokens"])
    named = {name.replace("_", " "): value for name, value in states._asdict().items() if value is not None}
    return jax.tree.map(np.asarray, named)


# ---- the two of them -------------------------------------------------------------------------------------------------

PARAMETERS: dict[PartConfig, int] = {
    unet.SDXL_BASE: 2_567_463_684,
    unet.SDXL_REFINER: 2_259_526_660,
    unet.SD1: 859_520_964,
    unet.SD2: 865_910_724,
    vae.SDXL_VAE: 83_653_863,
    clip.CLIP_L: 123_060_480,
    clip.CLIP_H: 354_032_640,
    clip.CLIP_BIGG: 694_659_840,
}
"""As torch counts them."""

UNETS = {"SDXL base": SDXL_BASE, "SDXL refiner": SDXL_REFINER, "SD 1.x": SD1, "SD 2.x": SD2}
TOWERS = {"CLIP-L": clip.CLIP_L, "CLIP-H": clip.CLIP_H, "CLIP-bigG": clip.CLIP_BIGG}


@pytest.fixture
def same(agree: Agree, tmp_path: Path) -> Callable[..., None]:
    """same(name, config, inputs, torch's, ours) asserts that both compute the same of a network in a directory."""
    for module in ("torch", "diffusers", "transformers"):
        pytest.importorskip(module)

    def check(name: str, config: PartConfig, inputs: Arrays, theirs: Compute, ours: Compute, **options: Any) -> None:
        directory = tmp_path / "network"
        folders.write_component(config, directory, **options)
        try:
            expected, given = (_apart(compute, directory, inputs) for compute in (theirs, ours))
        finally:
            shutil.rmtree(directory)
        took = f"torch's process {expected.peak_gib:.1f} GiB, ours {given.peak_gib:.1f} GiB, {given.seconds:.0f} s"
        assert max(expected.peak_gib, given.peak_gib) < MEMORY_GIB, took
        assert given.peak_gib < 4 * PARAMETERS[config] / 2**30 + OWN_MEMORY_GIB, took
        for output in expected.outputs:
            agree(f"full-size {name}: {output} ({took})", given.outputs[output], expected.outputs[output])
        assert given.outputs.keys() == expected.outputs.keys()

    return check


@pytest.mark.parametrize("name", UNETS)
def test_full_size_unet_matches_diffusers(name: str, same: Callable[..., None]) -> None:
    """On latents of a 256×192 image, two thirds through the noise."""
    config, rng = UNETS[name], np.random.default_rng(0)
    inputs = {
        "latent": rng.standard_normal((1, 32, 24, config.unet.in_channels), np.float32),
        "timestep": np.array([667]),
        "context": rng.standard_normal((1, 77, config.unet.context_dim or 0), np.float32),
    }
    if config.micro is not None:
        inputs["pooled"] = rng.standard_normal((1, 1280), np.float32)
        inputs["numbers"] = np.array([[1023, 333, 0, 64, 1024, 768]])
        if config.micro.numbers is micro.Numbers.SIZE_CROP_AESTHETIC:
            inputs["numbers"] = np.array([[1023, 333, 0, 64, 6]])
    ours = functools.partial(_our_unet, config)
    same(f"UNet {name}", config.unet, inputs, _torch_unet, ours, micro=config.micro)


def test_full_size_vae_matches_diffusers(same: Callable[..., None]) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.uniform(-1, 1, (1, 256, 192, 3)).astype(np.float32),
        "latent": rng.standard_normal((1, 32, 24, 4), np.float32),
    }
    same("VAE SDXL", vae.SDXL_VAE, inputs, _torch_vae, functools.partial(_our_vae, SDXL_BASE))


@pytest.mark.parametrize("name", TOWERS)
def test_full_size_text_tower_matches_transformers(name: str, same: Callable[..., None]) -> None:
    """A short prompt, padded as each of the two ways has it, and one of full length."""
    tokens = np.random.default_rng(0).integers(1, END_OF_TEXT - 1, (3, 77)).astype(np.int32)
    tokens[:, 0] = END_OF_TEXT - 1
    tokens[0, 9:] = END_OF_TEXT
    tokens[1, 9], tokens[1, 10:] = END_OF_TEXT, 0
    tokens[2, 76] = END_OF_TEXT
    ours = functools.partial(_our_tower, TOWERS[name])
    same(name, TOWERS[name], {"tokens": tokens}, _torch_tower, ours)
