"""LPIPS and `psim` against a twin in torch: values and gradients, with random weights.

1e-5 of the maximum, gradients too: the images are small, so that no ReLU of a few ten thousand is so near to 0 that
rounding alone decides which way it goes. On larger ones a gradient differs by 1e-3 where one does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_data
from agreement import Agree
from reference import torch

from sdxl_jax.arrays import Params, flatten, unflatten
from sdxl_jax.models import initialisers, lpips
from sdxl_jax.models.lpips import Backbone

_POOLED_BEFORE = {Backbone.VGG: {2: 2, 4: 2, 7: 2, 10: 2}, Backbone.ALEX: {1: 3, 2: 3}}
"""Window of the max pooling before a convolution of that number; the stride is 2."""
_COMPARED = {Backbone.VGG: (1, 3, 6, 9, 12), Backbone.ALEX: (0, 1, 2, 3, 4)}


def random(backbone: Backbone) -> Params:
    """The initial values, with biases, and w ≥ 0."""
    generator = np.random.default_rng(0)
    params = {}
    for path, leaf in flatten(lpips.abstract(backbone)).items():
        params[path] = initialisers.sample(leaf, 0, path)
        if path.endswith("bias"):
            params[path] = generator.normal(0, 0.1, leaf.shape).astype(np.float32)
        if path.endswith("scale"):
            params[path] = generator.uniform(0, 1, leaf.shape).astype(np.float32)
    return unflatten(params)


def twin(backbone: Backbone, params: Params, x: Any, y: Any) -> tuple[Any, Any]:
    """(LPIPS, psim) of images [batch, 3, height, width]."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    functional = torch.nn.functional

    def features(image: Any) -> list[Any]:
        hidden, found = (image - shift[:, None, None]) / scale[:, None, None], []
        for number in range(_COMPARED[backbone][-1] + 1):
            if number in _POOLED_BEFORE[backbone]:
                hidden = functional.max_pool2d(hidden, _POOLED_BEFORE[backbone][number], 2)
            leaves = params["backbone"][f"conv_{number}"]
            kernel = torch.from_numpy(np.array(leaves["kernel"])).permute(3, 2, 0, 1)
            size = kernel.shape[-1]
            stride, padding = (4, 2) if size == 11 else (1, size // 2)
            bias = torch.from_numpy(np.array(leaves["bias"]))
            hidden = functional.conv2d(hidden, kernel, bias, stride, padding).relu()
            found += [hidden] if number in _COMPARED[backbone] else []
        return found

    distance, similarity = torch.zeros(len(x)), torch.zeros(len(x))
    for number, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        a, b = (each / (each.square().sum(1, keepdim=True).sqrt() + 1e-10) for each in (a, b))
        weights = torch.from_numpy(np.array(params[f"layer_{number}"]["scale"]))
        distance = distance + ((a - b).square() * weights[:, None, None]).sum(1).mean((1, 2))
        similarity = similarity + (a * b).sum(1).mean((1, 2))
    return distance, 5 - similarity


def images(side: int) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(1).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    return x, np.clip(x + np.random.default_rng(2).normal(0, 0.3, x.shape).astype(np.float32), -1, 1)


@pytest.mark.parametrize(("backbone", "side"), [(Backbone.VGG, 18), (Backbone.ALEX, 67)])
def test_lpips_and_its_gradient_match_torch(backbone: Backbone, side: int, agree: Agree) -> None:
    params = random(backbone)
    x, y = images(side)
    ours_x, ours_y = jnp.asarray(x), jnp.asarray(y)
    theirs_x, theirs_y = (torch.from_numpy(each).permute(0, 3, 1, 2).requires_grad_() for each in (x, y))

    distance, similarity = twin(backbone, params, theirs_x, theirs_y)
    distance.sum().backward()

    def total(x: jax.Array, y: jax.Array, params: Params) -> tuple[jax.Array, list[jax.Array]]:
        found = lpips.lpips(backbone, params, x, y)
        return found.sum(), [found] + ([lpips.psim(params, x, y)] if backbone is Backbone.VGG else [])

    gradients, ours = jax.jit(jax.grad(total, (0, 1), has_aux=True))(ours_x, ours_y, params)
    agree(f"LPIPS {backbone.value}", ours[0], distance.detach(), 1e-5)
    for name, gradient, given in zip("xy", gradients, (theirs_x, theirs_y), strict=True):
        assert given.grad is not None
        agree(f"LPIPS {backbone.value}: gradient of {name}", gradient, given.grad.permute(0, 2, 3, 1), 1e-5)
    if backbone is Backbone.VGG:
        agree("psim", ours[1], similarity.detach(), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", list(Backbone))
def test_lpips_with_the_published_weights_matches_torch(
    backbone: Backbone, agree: Agree, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = real_data.metric_params(f"lpips_{backbone.value}", monkeypatch)
    x, y = images(64)
    with torch.no_grad():
        theirs, _ = twin(backbone, params, *(torch.from_numpy(each).permute(0, 3, 1, 2) for each in (x, y)))
    ours = jax.jit(lambda params, x, y: lpips.lpips(backbone, params, x, y))(params, x, y)
    agree(f"published LPIPS {backbone.value}", ours, theirs, 1e-5)
