"""Adapters in the networks: beside each kernel, at one place (models/layers), without the changed kernel.

The reference is the same network with the changes merged into its parameters.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
import tiny

from sdxl_jax.adapters import changes, dora, kinds
from sdxl_jax.adapters.kinds import Kind, Settings
from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.conditioning import text
from sdxl_jax.models import attention, clip, initialisers, layers, unet
from sdxl_jax.models.layers import Compute, Remat
from sdxl_jax.weights.adapter_files.names import layers_of

MODEL = dataclasses.replace(
    layouts.MODEL,
    unet=dataclasses.replace(layouts.MODEL.unet, block_channels=(8, 8), transformer_depth=(0, 2), heads=(1, 2)),
)
"""Convolutions of strides 1 and 2, of windows 3×3 and 1×1; a stack of two transformer blocks."""
LAYERS = layers_of(MODEL)
PARAMS = jax.tree.map(np.asarray, tiny.random_model(MODEL, 0).params)
# The products are the same sums in another order: some roundings of 6e-8 each, which the norms and the depth of the
# network enlarge. A factor that is left out, or misplaced, changes the outputs by some tenths.
TOLERANCE = 2e-5

KINDS = (
    Settings(rank=2),
    Settings(rank=2, middle=True),
    Settings(Kind.LOHA, rank=2),
    Settings(Kind.LOHA, rank=2, middle=True),
    Settings(Kind.LOKR, rank=1, decompose_both=True),
    Settings(Kind.LOKR, rank=1, factor=2, middle=True),
    Settings(Kind.LOKR, full_matrix=True),
    Settings(Kind.DIFFERENCE),
    Settings(rank=2, magnitude=dora.Axis.IN),
    Settings(rank=2, magnitude=dora.Axis.OUT),
    Settings(Kind.LOHA, rank=2, magnitude=dora.Axis.IN),
)


def adapters_of(part: str, every: tuple[Settings, ...], seed: int = 1) -> Params:
    """Random adapters of every kernel, whose kinds follow each other, and differences of every bias and norm."""
    rng, found = np.random.default_rng(seed), dict[str, Any]()
    for number, (path, leaf) in enumerate(flatten({part: PARAMS[part]}).items()):
        if path.endswith(("kernel", "bias", "scale")):
            count = LAYERS[path]
            shape = leaf.shape if count is None else leaf.shape[1:]
            own = every[number % len(every)] if path.endswith("kernel") else Settings(Kind.DIFFERENCE)
            for name, factor in kinds.abstract(own, path, shape, count).items():
                value = 0.3 * rng.standard_normal(factor.shape).astype(np.float32)
                if name == "magnitude":
                    value = 1 + np.abs(value)
                found[f"{path}/{name}"] = np.full(factor.shape, 3.0, np.float32) if name == "alpha" else value
    return unflatten(found)[part]


def merged(part: str, adapters: Params) -> Params:
    return changes.merged({part: PARAMS[part]}, changes.untree({part: adapters}, LAYERS), 1.0)[part]


def inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(2)
    latent, context, vector = (
        jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 4, 4, 4), (2, 3, 8), (2, 32))
    )
    return latent, jnp.array([3, 700]), context, vector


@functools.partial(jax.jit, static_argnames="compute")
def predict(params: Params, adapters: Params | None = None, compute: Compute = Compute()) -> Any:
    return unet.apply(MODEL.unet, params, *inputs(), compute=compute, adapters=adapters)


def assert_close(found: Any, expected: Any, plain: Any) -> None:
    largest = np.abs(expected).max()
    assert np.abs(expected - plain).max() > 0.1 * largest, "the adapters do change the output"
    assert np.abs(found - expected).max() <= TOLERANCE * largest


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(KINDS)))])
def test_adapters_beside_the_kernels_of_the_unet_are_the_merged_weights(first: int) -> None:
    """Neighbouring kernels have different kinds; each kind is at every kernel once, over all tests."""
    adapters = adapters_of("unet", KINDS[first:] + KINDS[:first])
    assert_close(predict(PARAMS["unet"], adapters), predict(merged("unet", adapters)), predict(PARAMS["unet"]))


def test_adapters_of_a_text_encoder_are_the_merged_weights() -> None:
    (tower,) = MODEL.text
    tokens = {tower.name: jnp.arange(154).reshape(2, 77)}

    @jax.jit
    def encode(params: Params, adapters: Params | None = None) -> Any:
        return text.encode(
            MODEL.text, {tower.name: params}, tokens, adapters=None if adapters is None else {tower.name: adapters}
        )

    params, adapters = PARAMS[tower.name], adapters_of(tower.name, KINDS)
    found, expected, plain = encode(params, adapters), encode(merged(tower.name, adapters)), encode(params)
    assert_close(found.context, expected.context, plain.context)
    assert_close(found.pooled, expected.pooled, plain.pooled)


def test_keys_and_values_of_the_text_have_their_adapters() -> None:
    adapters, context = adapters_of("unet", (KINDS[0], KINDS[8])), inputs()[2]
    project = jax.jit(unet.project_text)
    found = flatten(project(PARAMS["unet"], context, adapters=adapters))
    expected, plain = flatten(project(merged("unet", adapters), context)), flatten(project(PARAMS["unet"], context))
    assert len(found) == 2 * 4, "keys and values of the transformers of both levels"
    for path, value in found.items():
        assert_close(value, expected[path], plain[path])


@pytest.mark.parametrize("remat", [Remat.NONE, pytest.param(Remat.BLOCK, marks=pytest.mark.slow)])
def test_without_an_adapter_the_program_is_that_of_plain_layers(remat: Remat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equation by equation, with the gradient: of Flax's own layers, and a scan that knows no adapters."""
    compute = Compute(remat=remat)

    def program() -> str:
        jax.clear_caches()

        def loss(params: Params) -> Any:
            return jnp.sum(unet.apply(MODEL.unet, params, *inputs(), compute=compute) ** 2)

        return str(jax.make_jaxpr(jax.value_and_grad(loss))(PARAMS["unet"]))

    ours = program()
    initial: dict[str, Any] = {"kernel_init": initialisers.lecun_normal, "bias_init": initialisers.zeros}

    def dense(features: int, name: str, compute: Compute, **options: Any) -> nn.Dense:
        return nn.Dense(features, name=name, dtype=compute.activations, **{**initial, **options})

    def conv(features: int, name: str, compute: Compute, size: int = 3, **options: Any) -> nn.Conv:
        options = {"padding": (size - 1) // 2, "conv_general_dilated": layers._convolve, **initial, **options}
        return nn.Conv(features, (size, size), name=name, dtype=compute.activations, **options)

    for module in (layers, attention, unet):
        monkeypatch.setattr(module, "conv", conv)
    for module in (layers, attention, clip):
        monkeypatch.setattr(module, "dense", dense)
    scan: Any = nn.scan

    def without_adapters(*given: Any, variable_axes: dict[str, int], **options: Any) -> Any:
        known = {name: axis for name, axis in variable_axes.items() if name != layers.ADAPTERS}
        assert len(known) < len(variable_axes)
        return scan(*given, variable_axes=known, **options)

    monkeypatch.setattr(attention.nn, "scan", without_adapters)
    assert program() == ours
