"""How parameters begin: as Flax's initialisers would have them, the same however they are cut up."""

import logging
import math
import re
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from sdxl_jax import model, processors
from sdxl_jax.arrays import flatten
from sdxl_jax.models import clip, initialisers, taesd, unet, vae
from sdxl_jax.models.initialisers import Distribution, Parameter, sample

TRUNCATION = 0.87962566103423978
"""Standard deviation of a standard normal distribution that is truncated at two."""
KERNEL = Parameter((3, 700, 300), Distribution(deviation=0.5, bound=2.0))

UNET = unet.UNetConfig((16, 32), 1, (1, 2), 1, (1, 2), 12, 24, groups=8)
VAE = vae.VaeConfig((16, 32), 1, groups=8)
TOWER = clip.ClipTextConfig(24, 3, 2, 48, projection_dim=20, vocabulary=60, end_token=50)
UNET_ZEROS = r"(^conv_out|/conv2|attentions_\d/proj_out)/kernel$"
NETWORKS = {
    "UNet": (unet.abstract(UNET), UNET_ZEROS),
    "UNet with convolutions around transformers": (
        unet.abstract(unet.UNetConfig((16,), 1, (1,), 1, (2,), 12, None, True, groups=8)),
        UNET_ZEROS,
    ),
    "VAE": (vae.abstract(VAE), r"/conv2/kernel$"),
    "tiny VAE": (vae.abstract(taesd.TinyVaeConfig(8, (1, 1), (1, 1))), "nothing"),
    "tower": (clip.abstract(TOWER), "nothing"),
}


def fan_in(path: str, parameter: Parameter) -> int:
    stacked = "/transformer_blocks/" in path or path.startswith("layers/")
    return math.prod(parameter.shape[stacked:-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_begins_as_its_kind(name: str) -> None:
    """Mean, standard deviation and bounds of what is made. Kernels are LeCun normal: Flax's default."""
    params, zeros = NETWORKS[name]
    found = set()
    for path, parameter in flatten(params).items():
        values, kind = sample(parameter, 0, path), path.split("/")[-1]
        if kind == "bias" or re.search(zeros, path):
            assert not values.any(), path
        elif kind == "scale":
            assert (values == 1).all(), path
        else:
            within = {"embedding": 0.02, "position_embedding": 0.01}
            deviation = within.get(kind) or 1 / math.sqrt(fan_in(path, parameter))
            bound = math.inf if kind in within else 2 / TRUNCATION
            error = 6 / math.sqrt(values.size)  # six standard errors of the mean; of the deviation fewer are as much
            assert abs(values.mean()) < error * deviation, path
            assert values.std() == pytest.approx(deviation, rel=error), path
            assert np.abs(values).max() <= bound * deviation * (1 + 1e-6), path
        found.add(kind)
    assert found >= {"kernel", "bias"}


@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (initialisers.lecun_normal, nn.initializers.lecun_normal(), (64, 700)),
        (initialisers.lecun_normal, nn.initializers.lecun_normal(), (3, 3, 20, 256)),
        (initialisers.normal(0.02), nn.initializers.normal(0.02), (64, 700)),
    ],
    ids=["linear", "convolution", "embedding"],
)
def test_distributions_are_those_of_flax(ours: Any, theirs: Any, shape: tuple[int, ...]) -> None:
    """The largest difference of two empirical distributions of n values; Kolmogorov and Smirnov's bound at 1e-6."""
    made = sample(Parameter(shape, ours(None, shape).distribution), 0, "kernel").ravel()
    reference = np.asarray(theirs(jax.random.key(0), shape)).ravel()
    both = np.sort(np.concatenate([made, reference]))
    shares = [np.searchsorted(np.sort(values), both, side="right") / len(values) for values in (made, reference)]
    assert np.abs(shares[0] - shares[1]).max() < math.sqrt(-math.log(0.5e-6) / len(made))
    assert made.std() == pytest.approx(reference.std(), rel=0.02)
    assert np.abs(made).max() == pytest.approx(np.abs(reference).max(), rel=0.2)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(None), slice(150, 300)),
        (slice(1, 2), slice(0, 700), slice(0, 300)),
        (slice(0, 3), slice(500, 513), slice(127, 129)),
    ],
)
def test_a_part_of_an_array_has_the_digits_of_the_whole(index: tuple[slice, ...]) -> None:
    np.testing.assert_array_equal(sample(KERNEL, 3, "unet/a", index), sample(KERNEL, 3, "unet/a")[index])


def test_a_part_makes_only_the_tiles_that_it_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[int]()
    normal = initialisers._normal
    monkeypatch.setattr(initialisers, "_normal", lambda *given: made.append(given[1]) or normal(*given))
    sample(KERNEL, 0, "unet/a", (slice(2, 3), slice(0, 512), slice(0, 128)))
    assert made == [512 * 128]


def test_digits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(KERNEL, 0, "unet/a")
    monkeypatch.setattr(processors, "usable", lambda: 7)
    np.testing.assert_array_equal(sample(KERNEL, 0, "unet/a"), expected)


def test_paths_seeds_and_tiles_have_values_of_their_own() -> None:
    flat = Parameter((256, 256), Distribution(deviation=1.0))
    one = sample(flat, 0, "unet/a")
    others = [sample(flat, 0, "unet/b"), sample(flat, 1, "unet/a"), np.roll(one, 128, axis=1)]
    for other in others:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 6 / 256  # six standard errors


def test_digits_are_those_of_earlier_versions() -> None:
    """A change is one of every new run's digits: it belongs into the changelog."""
    values = sample(Parameter((2, 3), Distribution(deviation=1.0, bound=2.0)), 0, "unet/conv_in/kernel")
    digits = [[1.13571215, -0.38764516, 1.13044143], [0.42924130, -1.03056514, -1.06538272]]
    np.testing.assert_allclose(values, digits, rtol=1e-6)  # logarithms may round otherwise elsewhere


def test_a_layer_that_declares_nothing_is_named() -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3, name="new", kernel_init=initialisers.zeros)(x)

    with pytest.raises(AssertionError, match="new/bias has another initialiser"):
        initialisers.abstract(Network(), jax.ShapeDtypeStruct((1, 2), np.float32))


def test_a_model_is_initialised_without_compiling(caplog: pytest.LogCaptureFixture) -> None:
    with jax.log_compiles(), caplog.at_level(logging.DEBUG, "jax"):
        params = model.init(tiny.MODEL, 0)
        assert not [record for record in caplog.records if "ompil" in record.getMessage()]
        jax.jit(lambda x: x + len(caplog.records) + 0.125)(1.0)
        assert [record for record in caplog.records if "ompil" in record.getMessage()], "compilations are logged"
    assert flatten(params).keys() == flatten(model.abstract(tiny.MODEL)).keys()
