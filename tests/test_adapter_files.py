"""The promises of adapter files: other programs' names and formulas, what is written, arithmetic, and the command.

Other programs are stood for by tables of their rules and by twins of their formulas, in torch's axes: ComfyUI's
`comfy/lora.py` and `comfy/weight_adapter/`, A1111's `extensions-builtin/Lora/networks.py`, LyCORIS' `functional/`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import MODEL, random_model

from sdxl_jax import model as models
from sdxl_jax.adapters import changes, dora, kinds, targets
from sdxl_jax.adapters.changes import Resolved
from sdxl_jax.adapters.kinds import Kind, Settings
from sdxl_jax.adapters.targets import AdapterConfig, Layers
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.diffusion.parameterisation import Prediction
from sdxl_jax.errors import InputError
from sdxl_jax.model import Model
from sdxl_jax.weights import convert, lora, names
from sdxl_jax.weights.adapter_files import readers
from sdxl_jax.weights.adapter_files.arithmetic import Limit, combined, extracted, truncated
from sdxl_jax.weights.adapter_files.export import named, write
from sdxl_jax.weights.adapter_files.listing import listing
from sdxl_jax.weights.adapter_files.metadata import modelspec
from sdxl_jax.weights.adapter_files.names import Spelling, known_modules, layers_of, written_modules
from sdxl_jax.weights.adapter_files.reading import config_of, read, resolve
from sdxl_jax.weights.adapter_files.tensors import parse
from sdxl_jax.weights.lazy import abstract_leaves, in_memory
from sdxl_jax.weights.names import Dialect, Naming

Tensors = dict[str, np.ndarray]

# ---- names -----------------------------------------------------------------------------------------------------------

STACKS = {"input_blocks": {4: 2, 5: 2, 7: 10, 8: 10}, "output_blocks": {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}}
"""SDXL's transformers: block, number of transformer blocks. The middle has one more, of 10."""
LAYERS = [f"attn{n}.to_{side}" for n in (1, 2) for side in ("q", "k", "v", "out.0")] + ["ff.net.0.proj", "ff.net.2"]
TEXT_LAYERS = [*(f"self_attn.{side}_proj" for side in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]


def transformers() -> Iterator[str]:
    """Stability's names of the 722 linear layers."""
    places = {f"{side}.{block}.1": depth for side, blocks in STACKS.items() for block, depth in blocks.items()}
    for place, depth in {**places, "middle_block.1": 10}.items():
        yield from (f"{place}.{name}" for name in ("proj_in", "proj_out"))
        yield from (f"{place}.transformer_blocks.{n}.{layer}" for n in range(depth) for layer in LAYERS)


def text_layers(count: int) -> list[str]:
    return [f"text_model.encoder.layers.{n}.{layer}" for n in range(count) for layer in TEXT_LAYERS]


def written(part: str) -> set[str]:
    """Our names of the kernels in the transformers of a part."""
    found = written_modules(models.SDXL_BASE, Spelling.KOHYA).items()
    inside = {"unet": "/attentions_"}.get(part, "/layers/")
    return {each.module for place, each in found if place.path.startswith(f"{part}/") and inside in place.path
            and place.path.endswith("kernel")}  # fmt: skip


def test_comfyui_and_sd_scripts_find_every_layer_that_we_write() -> None:
    expected = {f"lora_unet_{name.replace('.', '_')}" for name in transformers()}
    assert len(expected) == 722
    assert written("unet") == expected
    for part, prefix, count in (("text_encoder", "lora_te1_", 12), ("text_encoder_2", "lora_te2_", 32)):
        assert written(part) == {prefix + name.replace(".", "_") for name in text_layers(count)}


def test_a1111_finds_every_layer_that_we_write() -> None:
    """Its rules for SDXL: lora_unet_ is diffusion_model_; the second encoder's names become OpenCLIP's, whose queries,
    keys and values are one module, which needs all three and the output."""
    assert {name.replace("lora_unet", "diffusion_model") for name in written("unet")} == {
        f"diffusion_model_{name.replace('.', '_')}" for name in transformers()
    }
    first = {name.replace("lora_te1_text_model", "0_transformer_text_model") for name in written("text_encoder")}
    assert first == {f"0_transformer_{name.replace('.', '_')}" for name in text_layers(12)}
    clip = names.table(models.SDXL_BASE.text[1].clip, Naming(Dialect.OPENCLIP))
    modules = {re.sub(r"[._](weight|in_proj_weight)$", "", entry.name) for entry in clip.entries}
    known = {f"1_model_{name.replace('.', '_')}" for name in modules}
    found: dict[str, set[str]] = {}
    for name in written("text_encoder_2"):
        match = re.fullmatch(r"lora_te2_text_model_encoder_layers_(\d+)_(.+)", name)
        assert match
        layer = match[2].replace("mlp_fc1", "mlp_c_fc").replace("mlp_fc2", "mlp_c_proj").replace("self_attn", "attn")
        split = re.fullmatch(r"(.+_attn)_([qkv]|out)_proj", f"1_model_transformer_resblocks_{match[1]}_{layer}")
        if split:
            found.setdefault(split[1], set()).add(split[2])
        else:
            assert f"1_model_transformer_resblocks_{match[1]}_{layer}" in known, name
    assert found == {f"1_model_transformer_resblocks_{n}_attn": {"q", "k", "v", "out"} for n in range(32)}
    assert found.keys() <= known


LOKR = [{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}, {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}]
A1111_TYPES = [
    {"lora_up.weight", "lora_down.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    *({*one, *two} for one in LOKR[:2] for two in LOKR[2:]),
    {"diff"},
    {"w_norm", "b_norm"},
]
"""The tensors by which A1111 knows a module of the kinds that are trained; a module without any fails the file."""
READS_BIASES = ({"diff"}, {"w_norm", "b_norm"})


@pytest.mark.parametrize("layers", [Layers.ATTENTION, pytest.param(Layers.ALL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [Kind.LORA, *(pytest.param(k, marks=pytest.mark.slow) for k in kinds.TRAINED[1:])])
@pytest.mark.parametrize("trainable", [None, "/(kernel|bias|scale)$", "/(kernel|scale)$", "norm/|norm1/"])
def test_what_a1111_does_not_read_is_said(kind: Kind, layers: Layers, trainable: str | None) -> None:
    """trainable: with biases and norms, those that match."""
    adapter = AdapterConfig(kind=kind, rank=1, layers=layers, biases_and_norms=trainable is not None)
    declared = targets.abstract(adapter, abstract_leaves(MODEL), layers_of(MODEL), (trainable or "^unet/",))
    factors = unflatten({path: np.zeros(each.shape, np.float32) for path, each in declared.items()})
    modules: dict[str, set[str]] = {}
    for name in named(changes.untree(factors, layers_of(MODEL)), MODEL, Spelling.KOHYA):
        module, _, tensor = name.partition(".")
        modules.setdefault(module, set()).add(tensor)
    types = [next((each for each in A1111_TYPES if each <= tensors), None) for tensors in modules.values()]
    biases = [known for known, tensors in zip(types, modules.values(), strict=True) if "diff_b" in tensors]
    said = " ".join(readers.notes(changes.by_parameter(declared), Spelling.KOHYA))
    assert (None in types) == ("A1111 and Forge do not load the file" in said)
    assert any(each not in (None, *READS_BIASES) for each in biases) == ("A1111 and Forge leave out the biases" in said)
    assert (kind is Kind.LORA and trainable is None) == (not said)


def test_what_diffusers_and_comfyui_do_not_read_is_said() -> None:
    def said(spelling: Spelling, **settings: Any) -> str:
        declared = kinds.abstract(Settings(rank=2, **settings), "x", (3, 3, 8, 8))
        return " ".join(readers.notes({"unet/x/kernel": declared}, spelling))

    assert said(Spelling.KOHYA) == ""
    assert said(Spelling.KOHYA, kind=Kind.LOHA) == "diffusers does not read the file: it has the kind loha"
    assert said(Spelling.KOHYA, middle=True).endswith("it has middle factors")
    assert said(Spelling.KOHYA, magnitude=dora.Axis.IN).endswith("it has a DoRA along the inputs")
    assert said(Spelling.KOHYA, magnitude=dora.Axis.OUT).endswith("outputs; it reads this DoRA in PEFT's spelling")
    assert "ComfyUI does not read the UNet's attention" in said(Spelling.PEFT)


def comfyui(sgm: str, diffusers: str) -> list[str]:
    """ComfyUI's names of a module of SDXL's UNet (`model_lora_keys_unet`)."""
    dotted = re.sub(r"(\.to_out)\.0$", r"\1", diffusers.replace(".to_", ".processor.to_"))
    flat = diffusers.replace(".", "_")
    return [f"lora_unet_{sgm.replace('.', '_')}", f"lora_unet_{flat}", f"lycoris_{flat}", f"diffusion_model.{sgm}",
            dotted, f"unet.{dotted}"]  # fmt: skip


def test_every_name_that_comfyui_knows_is_read_as_the_same_layer() -> None:
    known, unet = known_modules(models.SDXL_BASE), models.SDXL_BASE.unet
    ours, theirs = (names.table(unet, Naming(dialect)) for dialect in (Dialect.ORIGINAL, Dialect.DIFFUSERS))
    by_place = {entry.places: entry.name.removesuffix(".weight") for entry in theirs.entries}
    count = 0
    for entry in ours.entries:
        if entry.name.endswith(".weight"):  # kernels and norms
            sgm = entry.name.removesuffix(".weight")
            for name in comfyui(sgm, by_place[entry.places]):
                found = known[name.replace(".processor.", ".")]
                assert (found.part, found.weight.places) == ("unet", entry.places), name
            count += 1
    assert count > 794
    parts = {"text_encoder": ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.", 12)}
    parts["text_encoder_2"] = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.", 32)
    for part, (flat, dotted, generic, layers) in parts.items():
        for number, name in enumerate(text_layers(layers)):
            spelt = [known[each] for each in (flat + name.replace(".", "_"), dotted + name, generic + name)]
            assert {each.part for each in spelt} == {part}
            assert {each.weight.places[0].layer for each in spelt} == {number // len(TEXT_LAYERS)}


def test_the_refiners_only_encoder_is_lora_te() -> None:
    refiner = dataclasses.replace(MODEL, text=MODEL.text[1:])
    known = known_modules(refiner)
    for name in ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"):
        assert known[name].part == "text_encoder_2"
    assert all(
        each.module.startswith("lora_te_")
        for place, each in written_modules(refiner, Spelling.KOHYA).items()
        if place.path.startswith("text_encoder_2")
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.lora_A", ("x", "down")),
        ("x.lora_B.default.weight", ("x", "up")),
        ("x.lora_B.default", ("x", "up")),
        ("x.attn1.processor.to_k_lora.down.weight", ("x.attn1.processor.to_k", "down")),
        ("x.lora_linear_layer.up.weight", ("x", "up")),
        ("x.lora.up.weight", ("x", "up")),
        ("x.lora_mid.weight", ("x", "mid")),
        ("x.lora_magnitude_vector", ("x", "magnitude")),
        ("x.lora_magnitude_vector.default.weight", ("x", "magnitude")),
        ("diffusion_model.out.2.bias.diff", ("diffusion_model.out.2", "bias")),
        ("x.w_norm", ("x", "diff")),
        ("x.b_norm", ("x", "bias")),
        ("x.lora_B.bias", None),
        ("x.oft_blocks", ("x", "blocks")),
        ("x.a1.weight", ("x", "input_up")),
        ("x.b2.weight", ("x", "down")),
        ("x.oft_R.default.weight", None),
        ("x.weight", None),
    ],
)
def test_every_suffix_is_a_factor_of_its_module(name: str, expected: tuple[str, str] | None) -> None:
    assert parse(name) == expected


# ---- formulas --------------------------------------------------------------------------------------------------------

STACKED = "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k"
CONVOLUTION = "lora_unet_output_blocks_1_2_conv"
TE2 = "lora_te2_text_model_encoder_layers_1_mlp_fc1"
NORM = "lora_unet_input_blocks_3_1_norm"
BIASED = "lora_unet_middle_block_1_proj_in"
MODULES = {STACKED: (16, 16), CONVOLUTION: (16, 16, 3, 3), TE2: (16, 8)}
"""One module of each sort, with the shape of torch's weight."""


def kronecker(w1: np.ndarray, w2: np.ndarray) -> np.ndarray:
    return np.kron(w1.reshape(*w1.shape, *([1] * (w2.ndim - 2))), w2)


def tucker(t: np.ndarray, b: np.ndarray, a: np.ndarray) -> np.ndarray:
    return np.einsum("ijkl,jr,ip->prkl", t, b, a)


def twin(tensors: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    """ΔW of one module as ComfyUI computes it, by the suffixes of its tensors."""
    get = tensors.get
    dim: int | None = None
    if "lora_up.weight" in tensors:
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        dim, mid = len(down), get("lora_mid.weight")
        if mid is None:
            delta = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        else:
            delta = np.einsum("mnkl,im,nj->ijkl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    elif "hada_w1_a" in tensors:
        w1a, w1b, w2a, w2b = (tensors[f"hada_w{name}"] for name in ("1_a", "1_b", "2_a", "2_b"))
        dim = len(w1b)
        if "hada_t1" in tensors:
            delta = tucker(tensors["hada_t1"], w1b, w1a) * tucker(tensors["hada_t2"], w2b, w2a)
        else:
            delta = (w1a @ w1b) * (w2a @ w2b)
    else:
        w1, w2 = get("lokr_w1"), get("lokr_w2")
        if w1 is None:
            dim, w1 = len(tensors["lokr_w1_b"]), tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        if w2 is None:
            a, b, t = tensors["lokr_w2_a"], tensors["lokr_w2_b"], get("lokr_t2")
            dim, w2 = len(b), a @ b if t is None else tucker(t, b, a)
        delta = kronecker(w1, w2)
    alpha = get("alpha")
    scale = 1.0 if alpha is None or dim is None else float(alpha) / dim
    return scale * delta.reshape(shape)


def dora_twin(weight: np.ndarray, delta: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """LyCORIS' weight: the norm of W + ΔW along the axis that the scale has."""
    total = weight + delta
    axes = tuple(axis for axis in range(total.ndim) if axis != (0 if scale.ndim == 1 or scale.shape[0] != 1 else 1))
    return total * (scale.reshape(-1, *[1] * (total.ndim - 1)) if scale.ndim == 1 else scale) / np.sqrt(
        (total**2).sum(axes, keepdims=True)
    )  # fmt: skip


def factors_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensors:
    """Random tensors of one module, by their suffixes."""
    rng = np.random.default_rng(seed)
    outputs, inputs, *window = shape
    fan, ones, half = inputs * int(np.prod(window)), [1] * len(window), (outputs // 4, inputs // 4)
    shapes: dict[str, tuple[int, ...]] = {}
    match kind:
        case "lora" | "no alpha":
            shapes = {"lora_down.weight": (3, inputs, *window), "lora_up.weight": (outputs, 3, *ones)}
        case "tucker lora":
            shapes = {"lora_down.weight": (3, inputs, 1, 1), "lora_up.weight": (outputs, 3, 1, 1)}
            shapes["lora_mid.weight"] = (3, 3, *window)
        case "loha":
            shapes = {f"hada_w{n}_{side}": (outputs, 3) if side == "a" else (3, fan) for n in (1, 2) for side in "ab"}
        case "tucker loha":
            shapes = {f"hada_w{n}_{s}": (3, outputs) if s == "a" else (3, inputs) for n in (1, 2) for s in "ab"}
            shapes |= {f"hada_t{n}": (3, 3, *window) for n in (1, 2)}
        case "lokr":
            shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (half[0], 2)}
            shapes["lokr_w2_b"] = (2, half[1] * int(np.prod(window)))
        case "lokr, both":
            shapes = {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (half[0], 2)}
            shapes["lokr_w2_b"] = (2, half[1] * int(np.prod(window)))
        case "lokr, full":
            shapes = {"lokr_w1": (4, 4), "lokr_w2": (*half, *window)}
        case "tucker lokr":
            shapes = {
                "lokr_w1": (4, 4),
                "lokr_w2_a": (2, half[0]),
                "lokr_w2_b": (2, half[1]),
                "lokr_t2": (2, 2, *window),
            }
    found = {name: rng.standard_normal(each, np.float32) for name, each in shapes.items()}
    return found if kind == "no alpha" else found | {"alpha": np.array(5, np.float32)}  # not the rank


def weights_of(model: Model, module: str) -> np.ndarray:
    """A module's weight in torch's axes."""
    target = known_modules(model.config)[module]
    (place,) = target.weight.places
    value = np.asarray(flatten(model.params)[f"{target.part}/{place.path}"])
    return target.weight.theirs(value if place.layer is None else value[place.layer])


@pytest.fixture(scope="module")
def base() -> Model:
    model = random_model(MODEL, 0)
    return model._replace(params=unflatten({path: np.asarray(v) for path, v in flatten(model.params).items()}))


def save(path: Path, module: str, tensors: Tensors, **more: Any) -> Path:
    save_file({f"{module}.{name}": value for name, value in tensors.items()}, path, **more)
    return path


SORTS = [
    (kind, module) for kind in ("lora", "no alpha", "loha", "lokr", "lokr, both", "lokr, full") for module in MODULES
]
SORTS += [(f"tucker {kind}", CONVOLUTION) for kind in ("lora", "loha", "lokr")]


@pytest.mark.parametrize(
    ("kind", "module", "axis"),
    [(*sort, axis) for sort in SORTS for axis in (None, "in", "out")] + [("lora", STACKED, "flat")],
)
def test_every_kind_changes_weights_as_in_lycoris_and_comfyui(
    tmp_path: Path, base: Model, kind: str, module: str, axis: str | None
) -> None:
    shape = MODULES[module]
    tensors = factors_of(kind, shape)
    weight = weights_of(base, module)
    ones = [1] * (len(shape) - 2)
    if axis is not None:
        shapes = {"in": (1, shape[1], *ones), "out": (shape[0], 1, *ones), "flat": (shape[0],)}
        tensors["dora_scale"] = np.random.default_rng(1).uniform(1, 2, shapes[axis]).astype(np.float32)
    file = save(tmp_path / "x.safetensors", module, tensors)
    changed = dora_twin(weight, twin(tensors, shape), tensors["dora_scale"]) if axis else weight + twin(tensors, shape)
    for strength in (1.0, 0.5):
        found = weights_of(lora.add(base, file, strength), module)
        expected = weight + strength * (changed - weight)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    # Other layers of the stack are those of before.
    before, merged = flatten(base.params), flatten(lora.add(base, file).params)
    target = known_modules(MODEL)[module]
    assert [path for path in before if merged[path] is not before[path]] == [
        f"{target.part}/{target.weight.places[0].path}"
    ]
    # Written again: the same tensors, bit for bit.
    again = named(resolve(read(file), MODEL), MODEL, Spelling.KOHYA)
    for name, value in tensors.items():
        np.testing.assert_array_equal(again[f"{module}.{name}"].reshape(value.shape), value)
    assert again.keys() - {f"{module}.alpha"} == {f"{module}.{name}" for name in tensors} - {f"{module}.alpha"}


def cayley(blocks: np.ndarray, limit: float) -> np.ndarray:
    skew = blocks - np.swapaxes(blocks, -1, -2)
    length = np.sqrt((skew**2).sum())
    skew = skew * (limit / length if 0 < limit < length else 1)
    one = np.eye(blocks.shape[-1])
    return (one + skew) @ np.linalg.inv(one - skew)


def whole_twin(tensors: Tensors, weight: np.ndarray) -> np.ndarray:
    """W' of a kind that depends on W, in torch's axes, row by row."""
    flat, outputs = weight.reshape(len(weight), -1).astype(np.float64), len(weight)
    if "oft_blocks" in tensors:
        turns = cayley(tensors["oft_blocks"].astype(np.float64), float(tensors.get("alpha", 0)) * outputs)
        if turns.ndim == 3:
            size = turns.shape[-1]
            flat = np.concatenate([turn.T @ flat[n * size : (n + 1) * size] for n, turn in enumerate(turns)])
        else:
            for stage, turn in enumerate(turns):
                apart, size = 2**stage * turn.shape[-1] // 2, turn.shape[-1]
                pairs = [(first, first + apart) for first in range(outputs) if first // apart % 2 == 0]
                rows = [row for pair in pairs for row in pair]
                mixed = flat[rows].reshape(-1, size, flat.shape[1])
                flat[rows] = np.concatenate([one @ part for one, part in zip(turn, mixed, strict=True)])
        flat = flat * tensors["rescale"].reshape(-1, 1) if "rescale" in tensors else flat
    elif "a1.weight" in tensors:
        a1, a2, b1, b2 = (tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        if len(a1) == 3:  # an old file
            a1, a2, b1, b2 = a2, a1, b2, b1
        turned = np.einsum("oi...,ij->oj...", weight, a1.reshape(len(a1), -1) @ a2.reshape(len(a2), -1))
        delta = turned.reshape(flat.shape) + b1.reshape(len(b1), -1) @ b2.reshape(len(b2), -1)
        flat = flat + float(tensors["alpha"]) / 3 * delta
    elif tensors["on_input"]:
        return weight * (1 + tensors["weight"].reshape(1, -1, *[1] * (weight.ndim - 2)))
    else:
        return weight * (1 + tensors["weight"].reshape(-1, *[1] * (weight.ndim - 1)))
    return flat.reshape(weight.shape)


def whole_factors(kind: str, shape: tuple[int, ...]) -> Tensors:
    rng = np.random.default_rng(0)
    outputs, inputs, *window = shape
    ones = [1] * len(window)
    found: dict[str, Any] = {}
    match kind:
        case "oft" | "oft, limited":
            found = {"oft_blocks": rng.standard_normal((outputs // 4, 4, 4))}
            found |= {"alpha": np.array(0.05), "rescale": rng.uniform(1, 2, (outputs, 1, *ones))} if "," in kind else {}
        case "boft":
            found = {"oft_blocks": rng.standard_normal((3, outputs // 4, 4, 4)), "alpha": np.array(0.0)}
        case "glora" | "glora, old":
            found = {"a1.weight": rng.standard_normal((inputs, 3, *ones)), "alpha": np.array(5.0)}
            found |= {"a2.weight": rng.standard_normal((3, inputs, *ones))}
            found |= {"b1.weight": rng.standard_normal((outputs, 3, *ones))}
            found |= {"b2.weight": rng.standard_normal((3, inputs, *window))}
            if "old" in kind:
                swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
                found = {f"{swapped.get(name[:2], name[:2])}{name[2:]}": value for name, value in found.items()}
                found["alpha"] = found.pop("alpha", found.get("alpha"))
        case _:
            size = inputs if "input" in kind else outputs
            found = {"weight": rng.standard_normal((1, size, *ones) if window else size)}
    tensors = {name: np.asarray(value, np.float32) for name, value in found.items()}
    return tensors | ({"on_input": np.array(int("input" in kind))} if "ia3" in kind else {})


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "kind", ["oft", "oft, limited", "boft", "glora", "glora, old", "ia3 of the input", "ia3 of the output"]
)
def test_kinds_that_depend_on_the_weight_change_it_as_in_lycoris(
    tmp_path: Path, base: Model, kind: str, module: str
) -> None:
    shape = MODULES[module]
    if kind == "glora, old" and module == CONVOLUTION:
        return  # its a2 would be of the window as well, which ComfyUI alone reads
    tensors, weight = whole_factors(kind, shape), weights_of(base, module)
    file = save(tmp_path / "x.safetensors", module, tensors)
    changed = whole_twin(tensors, weight)
    assert np.abs(changed - weight).max() > 0.1 * np.abs(weight).max()
    for strength in (1.0, 0.5):
        found = weights_of(lora.add(base, file, strength), module)
        expected = weight + strength * (changed - weight)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6 * np.abs(expected).max())
    listed = listing(read(file), MODEL)
    own = kind.split()[0].removesuffix(",")
    assert listed["kinds"] == {own: 1} and listed["unmatched"] == []
    resolved = resolve(read(file), MODEL)
    with pytest.raises(InputError, match="depends on the base model"):
        combined([(resolved, 1.0)])
    # Written again: the same tensors, bit for bit; an old GLoRA as a new one.
    again = named(resolved, MODEL, Spelling.KOHYA)
    if kind != "glora, old":
        assert again.keys() == {f"{module}.{name}" for name in tensors}
        for name, value in tensors.items():
            np.testing.assert_array_equal(again[f"{module}.{name}"], value)
    with pytest.raises(InputError, match=rf"has the kind {own}, for which PEFT's"):
        named(resolved, MODEL, Spelling.PEFT)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"oft_blocks": np.zeros((4, 4, 3), np.float32)}, "has blocks .*, but the model's weight there is"),
        ({"oft_blocks": np.zeros((3, 4, 4), np.float32)}, "has blocks .*, but the model's weight there is"),
        ({"oft_blocks": np.zeros((4, 4, 4, 4), np.float32)}, "has stages .*, but the model's weight there is"),
        ({"oft_blocks": np.zeros((4, 4), np.float32)}, "oft_blocks .*which has no place in a layer"),
        ({"a1.weight": np.zeros((16, 3), np.float32)}, "has .*a1.weight, but no down and no input_down and no up"),
        ({"weight": np.zeros(7, np.float32), "on_input": np.array(1)}, "and relative .*, but the model's weight there"),
    ],
)
def test_factors_of_such_kinds_that_do_not_fit_are_refused(tmp_path: Path, change: Tensors, expected: str) -> None:
    file = save(tmp_path / "x.safetensors", STACKED, change)
    with pytest.raises(InputError, match=expected):
        resolve(read(file), MODEL)


def test_differences_of_weights_biases_and_norms_are_added(tmp_path: Path, base: Model) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"{STACKED}.diff": rng.standard_normal((16, 16), np.float32),
        f"{BIASED}.diff_b": rng.standard_normal(16, np.float32),
        f"{NORM}.w_norm": rng.standard_normal(16, np.float32),
        f"{NORM}.b_norm": rng.standard_normal(16, np.float32),
        "diffusion_model.out.2.bias.diff": rng.standard_normal(4, np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = read(tmp_path / "x.safetensors")
    before, after = flatten(base.params), flatten(lora.add(base, file, 0.5).params)
    np.testing.assert_allclose(
        weights_of(lora.add(base, file, 0.5), STACKED),
        weights_of(base, STACKED) + 0.5 * tensors[f"{STACKED}.diff"],
        atol=1e-6,
    )
    paths = {
        "unet/mid_block/attentions_0/proj_in/bias": f"{BIASED}.diff_b",
        "unet/down_blocks_1/attentions_0/norm/scale": f"{NORM}.w_norm",
        "unet/down_blocks_1/attentions_0/norm/bias": f"{NORM}.b_norm",
        "unet/conv_out/bias": "diffusion_model.out.2.bias.diff",
    }
    for path, name in paths.items():
        np.testing.assert_allclose(after[path], before[path] + 0.5 * tensors[name], atol=1e-6)
    again = named(resolve(file, MODEL), MODEL, Spelling.KOHYA)
    assert again.keys() == {*tensors, "lora_unet_out_2.diff_b"} - {"diffusion_model.out.2.bias.diff"}
    assert lora.describe(file).endswith("3 × bias, 2 × difference")


def test_a_replacement_takes_the_weights_place(tmp_path: Path, base: Model) -> None:
    value = np.random.default_rng(0).standard_normal((16, 16, 3, 3), np.float32)
    file = save(tmp_path / "x.safetensors", CONVOLUTION, {"set_weight": value})
    np.testing.assert_array_equal(weights_of(lora.add(base, file, 0.3), CONVOLUTION), value)


def test_what_is_not_a_sum_is_not_removed(tmp_path: Path, base: Model) -> None:
    tensors = factors_of("lora", (16, 16)) | {"dora_scale": np.ones((1, 16), np.float32)}
    model = lora.add(base, save(tmp_path / "x.safetensors", STACKED, tensors))
    with pytest.raises(InputError, match=r"cannot be undone\. Keep the model from before"):
        lora.remove(model, "x.safetensors")


def test_a_weight_is_not_enlarged(tmp_path: Path) -> None:
    """ComfyUI's reshape_weight, where it is the shape that the weight has."""
    tensors = factors_of("lora", MODULES[CONVOLUTION])
    plain = resolve(read(save(tmp_path / "x.safetensors", CONVOLUTION, tensors)), MODEL)
    tensors["reshape_weight"] = np.array(MODULES[CONVOLUTION], np.int64)
    assert_equal_changes(resolve(read(save(tmp_path / "x.safetensors", CONVOLUTION, tensors)), MODEL), plain, 0)
    tensors["reshape_weight"] = np.array((16, 32, 3, 3), np.int64)
    file = read(save(tmp_path / "x.safetensors", CONVOLUTION, tensors))
    with pytest.raises(
        InputError, match=r"enlarged to \(16, 32, 3, 3\) \(reshape_weight\), and the model's is \(16, 16"
    ):
        resolve(file, MODEL)


def test_a_bias_that_the_layer_lacks_and_factors_of_another_shape_are_refused(tmp_path: Path) -> None:
    bad: dict[str, tuple[str, Tensors]] = {
        "has no bias in the model": (STACKED, {"diff_b": np.ones(16, np.float32)}),
        r"up_1 \(16, 3\).*is \(16, 8\)": (TE2, factors_of("loha", (16, 16))),
        r"w2 \(4, 4\).*is \(16, 8\)": (TE2, factors_of("lokr, full", (16, 16))),
        r"magnitude \(1, 5\).*is \(16, 16\)": (STACKED, factors_of("lora", (16, 16)) | {"dora_scale": np.ones((1, 5))}),
        r"diff \(8, 16\).*is \(16, 16\)": (STACKED, {"diff": np.ones((8, 16), np.float32)}),
    }
    for message, (module, tensors) in bad.items():
        file = save(tmp_path / "x.safetensors", module, tensors)
        with pytest.raises(InputError, match=f"{module} has .*{message}.*Nothing was merged"):
            resolve(read(file), MODEL)


# ---- written files ---------------------------------------------------------------------------------------------------


def everything(seed: int = 0, alpha: float | None = 2.0) -> Resolved:
    """Plain LoRA of every linear layer and convolution, ranks 1 to 3. alpha: None for several."""
    layers, leaves = layers_of(MODEL), abstract_leaves(MODEL)
    rng, flat = np.random.default_rng(seed), {}
    for number, path in enumerate(path for path in layers if path.endswith("kernel")):
        settings = kinds.Settings(rank=1 + number % 3, alpha=alpha or float(1 + number % 2))
        shape = leaves[path].shape[layers[path] is not None :]
        for name, each in kinds.abstract(settings, path, shape, layers[path]).items():
            values = np.full(each.shape, each.distribution.mean) if name == "alpha" else rng.standard_normal(each.shape)
            flat[f"{path}/{name}"] = values.astype(np.float32)
    return changes.untree(unflatten(flat), layers)


def settings_of(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_file_comes_back_bit_for_bit_in_both_spellings(tmp_path: Path, dtype: Any) -> None:
    first, peft, last = (tmp_path / f"{name}.safetensors" for name in ("first", "peft", "last"))
    write(first, everything(alpha=None), MODEL, dtype=np.dtype(dtype))
    write(peft, resolve(read(first), MODEL), MODEL, Spelling.PEFT)
    write(last, resolve(read(peft), MODEL), MODEL)
    one, other = load_file(first), load_file(last)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not name.endswith(".alpha"):
            assert value.dtype == other[name].dtype == dtype
        assert value.tobytes() == other[name].astype(dtype).tobytes(), name
    assert any(name.endswith("lora_A.weight") for name in load_file(peft))


def test_the_metadata_is_what_other_programs_look_for(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    write(
        path, everything(), MODEL, metadata={"ss_tag_frequency": "{}", "ss_output_name": "old", "ss_network_dim": "9"}
    )
    found = settings_of(path)
    assert found["ss_base_model_version"].startswith("sdxl_")
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("Dynamic", "2")
    assert found["ss_output_name"] == found["modelspec.title"] == "style"
    assert found["ss_tag_frequency"] == "{}"
    assert json.loads(found["ss_network_args"]) == {}
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.prediction_type"] == "epsilon"
    for prediction, name in ((Prediction.V, "v"), (Prediction.EDM, "edm"), (Prediction.FLOW, "flow")):
        said = modelspec(dataclasses.replace(MODEL, prediction=prediction), "lora")
        assert said["modelspec.prediction_type"] == name
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert "lora_adapter_metadata" not in found


def test_other_kinds_are_marked_as_lycoris(tmp_path: Path) -> None:
    tensors = factors_of("lokr", (16, 16))
    path = save(tmp_path / "x.safetensors", STACKED, tensors)
    write(tmp_path / "y.safetensors", resolve(read(path), MODEL), MODEL)
    found = settings_of(tmp_path / "y.safetensors")
    assert (found["ss_network_module"], found["ss_network_args"]) == ("lycoris.kohya", '{"algo": "lokr"}')
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "5")


def test_what_a_spelling_or_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    scale = {"dora_scale": np.ones((1, 16), np.float32)}
    bad: dict[str, Tensors] = {
        "the kind loha": factors_of("loha", (16, 16)),
        "a DoRA along the inputs": factors_of("lora", (16, 16)) | scale,
        "the kind difference": {"diff": np.ones((16, 16), np.float32)},
    }
    for what, tensors in bad.items():
        resolved = resolve(read(save(tmp_path / "x.safetensors", STACKED, tensors)), MODEL)
        with pytest.raises(InputError, match=f"has {what}, for which PEFT's LoRA files have no place"):
            write(tmp_path / "y.safetensors", resolved, MODEL, Spelling.PEFT)
    large = factors_of("lora", (16, 16)) | {"lora_up.weight": np.full((16, 3), 1e6, np.float32)}
    resolved = resolve(read(save(tmp_path / "x.safetensors", STACKED, large)), MODEL)
    with pytest.raises(InputError, match=r"lora_up\.weight has values up to 1e\+06; float16 cannot hold them"):
        write(tmp_path / "y.safetensors", resolved, MODEL, dtype=np.dtype(np.float16))
    assert not (tmp_path / "y.safetensors").exists()


def test_the_published_model_that_a_file_fits_is_found(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    for width, config in {2048: models.SDXL_BASE, 1280: None}.items():
        tensors = {"lora_down.weight": np.ones((1, width), np.float32), "lora_up.weight": np.ones((640, 1), np.float32)}
        file = read(save(tmp_path / "x.safetensors", name, tensors))
        if config is not None:
            assert config_of(file) == config
        else:
            with pytest.raises(InputError, match=r"1280 wide, as in the SDXL refiner.*give that: --model"):
                config_of(file)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def deltas(resolved: Resolved) -> dict[tuple[str, int | None], np.ndarray]:
    return {
        (path, layer): np.asarray(kinds.delta(changes.float32(factors)))
        for path, rows in resolved.items()
        for layer, factors in rows
    }


def assert_equal_changes(one: Resolved, other: Resolved, tolerance: float = 1e-5) -> None:
    first, second = deltas(one), deltas(other)
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, rtol=0, atol=tolerance * np.abs(value).max(), err_msg=str(key))


def test_an_extracted_lora_is_the_one_that_was_merged(base: Model) -> None:
    given = everything()
    # Weights of zero: the difference has all digits.
    zeros = base._replace(params=unflatten({path: np.zeros_like(v) for path, v in flatten(base.params).items()}))
    tuned = zeros._replace(params=changes.merged(zeros.params, given, 1.0))
    found = extracted(in_memory(zeros), in_memory(tuned), Limit(rank=3), progress=False)
    assert_equal_changes(given, found.resolved)
    assert min(found.energy.values()) > 1 - 1e-9
    assert {float(f["alpha"]) for rows in found.resolved.values() for _, f in rows} == {3.0}
    exact = extracted(in_memory(zeros), in_memory(tuned), Limit(energy=1.0), progress=False)
    ranks = {(path, layer): kinds.rank_of(f) for path, rows in exact.resolved.items() for layer, f in rows}
    assert ranks == {(path, layer): kinds.rank_of(f) for path, rows in given.items() for layer, f in rows}
    few = extracted(in_memory(zeros), in_memory(tuned), Limit(rank=1), progress=False)
    assert all(kinds.rank_of(factors) == 1 for rows in few.resolved.values() for _, factors in rows)
    assert 0.3 < min(few.energy.values()) < 0.99
    wide = extracted(in_memory(zeros), in_memory(tuned), Limit(rank=16), progress=False)
    assert wide.narrower > 0


def test_biases_and_norms_are_extracted_when_asked_and_counted_otherwise(base: Model) -> None:
    flat = flatten(base.params)
    changed = {path: value + np.float32(0.5) for path, value in flat.items() if path.endswith(("bias", "scale"))}
    changed |= {"text_encoder/token_embedding/embedding": np.zeros((50000, 8), np.float32)}  # a word was added
    kernel = "unet/conv_in/kernel"
    tuned = base._replace(params=unflatten({**flat, **changed, kernel: flat[kernel] * np.float32(1.5)}))
    models_ = in_memory(base), in_memory(tuned)
    without = extracted(*models_, Limit(rank=2), progress=False)
    paths = {path for path in changed if path.endswith(("bias", "scale")) and not path.startswith("vae")}
    assert (without.resolved.keys(), without.left_out) == ({kernel}, len(paths))
    found = extracted(*models_, Limit(energy=1.0), differences_too=True, progress=False)
    assert found.resolved.keys() == {kernel, *paths}
    merged = flatten(changes.merged(base.params, found.resolved, 1.0))
    for path in (kernel, *paths):
        np.testing.assert_allclose(merged[path], flatten(tuned.params)[path], rtol=0, atol=1e-5)


def test_the_kept_energy_and_the_nearest_matrix_are_those_of_the_singular_values() -> None:
    for shape in ((12, 20), (20, 12), (3, 3, 4, 12)):
        weight = np.random.default_rng(0).standard_normal(shape, np.float32)
        flat = weight.reshape(-1, shape[-1])
        left, values, right = np.linalg.svd(flat.astype(np.float64), full_matrices=False)
        (down, up), kept = truncated(weight, Limit(rank=5))
        np.testing.assert_allclose(
            (down @ up).reshape(flat.shape), left[:, :5] * values[:5] @ right[:5], rtol=0, atol=1e-5
        )
        share = np.cumsum(values**2) / np.sum(values**2)
        assert kept == pytest.approx(share[4])
        (_, up), kept = truncated(weight, Limit(energy=0.8))
        assert share[len(up) - 2] < 0.8 <= kept == pytest.approx(share[len(up) - 1])
        assert truncated(weight, Limit(rank=2, energy=0.8))[0][1].shape == (2, shape[-1])


def test_merging_adds_ranks_and_is_exact() -> None:
    one, other = everything(1), everything(2, alpha=None)
    merged = combined([(one, 0.5), (other, -2.0)], progress=False)
    found, (first, second) = deltas(merged.resolved), (deltas(one), deltas(other))
    for key, value in found.items():
        expected = 0.5 * first[key] - 2 * second[key]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    path = "unet/conv_in/kernel"
    ranks = [kinds.rank_of(each[path][0][1]) for each in (one, other, merged.resolved)]
    assert ranks[2] == (ranks[0] or 0) + (ranks[1] or 0)


def test_resizing_to_the_same_rank_changes_nothing_and_loha_and_lokr_become_lora(tmp_path: Path) -> None:
    given = everything()
    assert_equal_changes(given, combined([(given, 1.0)], Limit(rank=3), progress=False).resolved)
    for kind in ("loha", "lokr", "lokr, full", "lora"):
        resolved = resolve(read(save(tmp_path / "x.safetensors", CONVOLUTION, factors_of(kind, (16, 16, 3, 3)))), MODEL)
        for limit in (None, Limit(energy=1.0)):
            found = combined([(resolved, 1.0)], limit, progress=False).resolved
            ((_, factors),) = found["unet/up_blocks_0/upsample/conv/kernel"]
            assert kinds.kind_of(factors) is kinds.Kind.LORA
            assert_equal_changes(resolved, found, 1e-4)


def test_differences_are_added_and_do_not_join_a_product_without_a_limit(tmp_path: Path) -> None:
    difference = {"diff": np.random.default_rng(0).standard_normal((16, 16), np.float32)}
    one = resolve(read(save(tmp_path / "x.safetensors", STACKED, difference)), MODEL)
    other = resolve(read(save(tmp_path / "y.safetensors", STACKED, factors_of("lora", (16, 16)))), MODEL)
    path = "unet/down_blocks_1/attentions_0/transformer_blocks/attn2/to_k/kernel"
    twice = combined([(one, 1.0), (one, 0.5)], progress=False).resolved
    np.testing.assert_allclose(twice[path][0][1]["diff"], 1.5 * one[path][0][1]["diff"], rtol=1e-6)
    with pytest.raises(InputError, match="a whole difference in one file and a low-rank change in another"):
        combined([(one, 1.0), (other, 1.0)], progress=False)
    both = combined([(one, 1.0), (other, 1.0)], Limit(energy=1.0), progress=False).resolved
    np.testing.assert_allclose(deltas(both)[path, 1], deltas(one)[path, 1] + deltas(other)[path, 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (Limit(), "Neither a rank nor a share of energy"),
        (Limit(rank=0), "rank=0. Give 1 or more"),
        (Limit(energy=0.0), "energy=0. Give a share above 0"),
        (Limit(energy=1.5), "energy=1.5"),
    ],
)
def test_limits_out_of_range_are_refused(base: Model, limit: Limit, message: str) -> None:
    with pytest.raises(InputError, match=message):
        combined([(everything(), 1.0)], limit, progress=False)
    with pytest.raises(InputError, match=message):
        extracted(in_memory(base), in_memory(base), limit, progress=False)


def test_models_without_a_difference_or_of_another_shape_are_refused(base: Model) -> None:
    with pytest.raises(InputError, match="nothing to extract"):
        extracted(in_memory(base), in_memory(base), Limit(rank=2), progress=False)
    wider = dataclasses.replace(MODEL.unet, block_channels=(8, 32), heads=(1, 4))
    config = dataclasses.replace(MODEL, unet=wider)
    empty = {path: np.broadcast_to(np.float32(0), each.shape) for path, each in abstract_leaves(config).items()}
    other = Model(config, unflatten(empty))
    with pytest.raises(InputError, match=r"different architectures: \d+ parameters"):
        extracted(in_memory(base), in_memory(other), Limit(rank=2), progress=False)
    with pytest.raises(InputError, match=r"parts unet and vae\. Give two models that both have a UNet"):
        parts = [base._replace(params={part: base.params[part]}) for part in ("unet", "vae")]
        extracted(in_memory(parts[0]), in_memory(parts[1]), Limit(rank=2), progress=False)
    broken = base._replace(params=unflatten({p: v * np.float32(np.nan) for p, v in flatten(base.params).items()}))
    with pytest.raises(InputError, match="non-finite"):
        extracted(in_memory(base), in_memory(broken), Limit(rank=2), progress=False)


def test_a_dora_is_not_merged_with_others(tmp_path: Path) -> None:
    tensors = factors_of("lora", (16, 16)) | {"dora_scale": np.ones((1, 16), np.float32)}
    resolved = resolve(read(save(tmp_path / "x.safetensors", STACKED, tensors)), MODEL)
    with pytest.raises(InputError, match=r"rescaled \(DoRA, IA³\).*extract an adapter from the two"):
        combined([(resolved, 1.0)], progress=False)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, base: Model) -> Path:
    """A folder with the tiny model, one that was trained from it, and a LoRA."""
    folder = tmp_path_factory.mktemp("lora-command")
    embedding = {
        "bundle_emb.fox.clip_l": np.ones((1, 8), np.float32),
        "bundle_emb.fox.clip_g": np.ones((1, 8), np.float32),
    }
    write(folder / "style.safetensors", everything(), MODEL, metadata={"ss_tag_frequency": "{}"}, bundled=embedding)
    convert.convert(base, folder / "base.safetensors", "single-file", progress=False)
    tuned = lora.add(base, folder / "style.safetensors")
    convert.convert(tuned, folder / "tuned.safetensors", "single-file", progress=False)
    return folder


def test_list_says_what_a_file_holds(files: Path) -> None:
    done = command.call("lora", "list", files / "style.safetensors", "--model", files / "base.safetensors")
    assert done.code == 0
    assert "115 modules of unet, 12 of text_encoder, 13 of text_encoder_2, ranks 1 to 3" in done.out
    assert "changed     115 of 115 layers of unet, 12 of 12 layers of text_encoder, 13 of 13" in done.out
    assert "lora × 140" in done.out and "alphas      2 × 140" in done.out and "embeddings  fox" in done.out
    assert "metadata    ss_tag_frequency: {}" in done.out
    # Without the model: it fits none that is published.
    (found,) = json.loads(command.call("lora", "list", files / "style.safetensors", "--json").out)
    assert found["model"] is None and "--model" in found["problem"]
    assert found["kinds"] == {"lora": 140}


def test_extract_resize_merge_and_convert_write_files_that_do_the_same(files: Path, tmp_path: Path) -> None:
    given = resolve(read(files / "style.safetensors"), MODEL)
    model = ["--model", files / "base.safetensors"]
    out = {name: tmp_path / f"{name}.safetensors" for name in ("extracted", "resized", "merged", "peft")}
    models_ = [files / "base.safetensors", files / "tuned.safetensors"]
    runs = {
        "extracted": ["extract", *models_, "--rank", 4, "--dtype", "float32"],
        "resized": ["resize", files / "style.safetensors", "--energy", 1, *model],
        "merged": ["merge", f"{files / 'style.safetensors'}:0.25", f"{out['peft']}:0.75", *model],
        "peft": ["convert", files / "style.safetensors", "--to", "peft", *model],
    }
    for name in ("extracted", "resized", "peft", "merged"):
        done = command.call("lora", *runs[name], "--out", out[name])
        assert done.code == 0, done.err
        assert f"{out[name]}: " in done.out
        assert ("energy kept" in done.out) == (name in ("extracted", "resized"))
        found = resolve(read(out[name]), MODEL)
        # Extracted from weights about 1, whose rounding is a part of the difference.
        assert_equal_changes(given, found, 1e-3 if name == "extracted" else 1e-5)
    assert read(out["resized"]).embeddings == read(out["merged"]).embeddings == ("fox",)
    assert settings_of(out["resized"])["ss_tag_frequency"] == "{}"
    assert settings_of(out["merged"])["modelspec.merged_from"] == "style.safetensors × 0.25, peft.safetensors × 0.75"
    assert read(out["peft"]).embeddings == ()


def test_a_file_that_exists_is_replaced_only_when_asked(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"mine")
    arguments = ["lora", "convert", files / "style.safetensors", "--model", files / "base.safetensors", "--out"]
    refused = command.call(*arguments, out)
    assert refused.code == 2 and "exists already. Give another file, or --overwrite" in refused.err
    assert out.read_bytes() == b"mine"
    assert command.call(*arguments, out, "--overwrite").code == 0
    assert read(out).ranks == [1, 2, 3]
    other = command.call(*arguments, tmp_path / "x.bin")
    assert other.code == 2 and "is not a .safetensors file" in other.err


def test_wrong_commands_are_refused(files: Path, tmp_path: Path) -> None:
    for arguments, message in {
        (): "needs a command: list, extract, merge, resize, convert",
        ("lsit",): "Known, nearest first: list",
        ("list",): "needs a file",
        ("merge", "--out", str(tmp_path / "y.safetensors")): "needs files",
        ("resize", "x.safetensors", "--out", str(tmp_path / "y.safetensors")): "Give --rank 32",
    }.items():
        done = command.call("lora", *arguments)
        assert done.code == 2 and message in done.err, arguments
    assert command.call("lora", "--help").code == 0
