"""Merged LoRA files against diffusers: the same files, `load_lora_weights`, `set_adapters`, `fuse_lora`.

The files are diffusers' own (`save_lora_weights` of PEFT adapters, on attention, feed-forward and convolutions), the
same in the older spellings, and kohya's in both spellings of the UNet. What diffusers 0.42 does not read as sd-scripts
means it is left out of the files, or written in another way, for diffusers alone:

- Where a kohya file's alphas differ, those of attention and of text layers are lost: diffusers looks them up under
  names such as `….attn1.processor.to_q_lora.down.weight`, which no module has (PEFT warns), and uses the most frequent
  alpha. Its copy of such a file therefore has up · alpha / rank in the place of up, and no alpha: the same change.
- `add_embedding` in diffusers' spelling of a kohya file is not loaded (it becomes `add.embedding.linear`).
- `text_projection` is given the most frequent rank of the tower's layers; where the file has another, it is an error.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import Agree
from safetensors.numpy import load_file, save_file

from sdxl_jax.adapters import changes, dora, kinds
from sdxl_jax.adapters.changes import Resolved
from sdxl_jax.arrays import flatten, unflatten
from sdxl_jax.conditioning.text import Tower
from sdxl_jax.model import Model, ModelConfig
from sdxl_jax.models import unet
from sdxl_jax.models.clip import Activation, ClipTextConfig
from sdxl_jax.models.layers import sinusoidal_embedding
from sdxl_jax.models.unet import UNetConfig
from sdxl_jax.weights import lora, names
from sdxl_jax.weights.adapter_files.export import write
from sdxl_jax.weights.adapter_files.names import Spelling, layers_of
from sdxl_jax.weights.adapter_files.reading import read, resolve
from sdxl_jax.weights.names import Dialect, Naming

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
torch.set_num_threads(1)
# Said whenever a second LoRA is loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

# A merged weight is a sum of the weight and of products of at most four pairs, in float32 and in another order: some
# roundings of 6e-8 each of the largest of them.
TOLERANCE = 1e-6

SDXL = ModelConfig(
    unet=UNetConfig((16, 32), 2, (0, 2), 2, (2, 2), 40, 48, groups=8),
    text=(
        Tower("text_encoder", ClipTextConfig(16, 2, 2, 32, Activation.QUICK_GELU, None, 60, 2), 2),
        Tower("text_encoder_2", ClipTextConfig(24, 2, 2, 48, Activation.GELU, 24, 60, 2), 0),
    ),
)
SD1 = ModelConfig(
    unet=UNetConfig((16, 32), 1, (1, 0), 1, (2, 2), 16, None, conv_projection=True, groups=8),
    text=SDXL.text[:1],
    micro=None,
)
KINDS = {"SDXL": SDXL, "SD 1.x": SD1}
EACH_KIND = ["SDXL", pytest.param("SD 1.x", marks=pytest.mark.slow)]

UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
UNET_LAYERS += ["conv_in", "conv_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
UNET_LAYERS += ["time_emb_proj", "linear_1", "linear_2"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def pipeline(config: ModelConfig) -> Any:
    """diffusers' pipeline of the tiny model, always with the same weights."""
    torch.manual_seed(0)
    size, text = config.unet, []
    for tower in config.text:
        clip = tower.clip
        described = transformers.CLIPTextConfig(
            vocab_size=clip.vocabulary,
            hidden_size=clip.width,
            intermediate_size=clip.mlp_width,
            num_hidden_layers=clip.layers,
            num_attention_heads=clip.heads,
            projection_dim=clip.projection_dim or clip.width,
            bos_token_id=1,
            eos_token_id=2,
        )
        with_projection = clip.projection_dim is not None
        text.append(
            (transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel)(described)
        )
    attends = [depth > 0 for depth in size.transformer_depth]
    more: dict[str, Any] = {}
    if size.vector_dim is not None:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        more["projection_class_embeddings_input_dim"] = size.vector_dim
    network = diffusers.UNet2DConditionModel(
        block_out_channels=size.block_channels,
        layers_per_block=size.resnets_per_block,
        norm_num_groups=size.groups,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        transformer_layers_per_block=[*(max(depth, 1) for depth in size.transformer_depth[:-1]), size.middle_depth],
        attention_head_dim=size.heads,
        cross_attention_dim=size.context_dim,
        use_linear_projection=not size.conv_projection,
        **more,
    )
    parts = {"vae": None, "tokenizer": None, "scheduler": None, "unet": network, "text_encoder": text[0]}
    if len(text) == 2:
        return diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=text[1], tokenizer_2=None)
    missing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**parts, **missing)


def tables(config: ModelConfig, pipe: Any) -> Iterator[tuple[str, names.Table]]:
    """(part, the table of its state dict's names)."""
    yield "unet", names.table(config.unet, Naming(Dialect.DIFFUSERS))
    for tower in config.text:
        prefixed = hasattr(getattr(pipe, tower.name), "text_model")  # transformers 5 has it in one of the classes
        yield tower.name, names.table(tower.clip, Naming(Dialect.TRANSFORMERS if prefixed else Dialect.TRANSFORMERS_5))


def parameters(config: ModelConfig, pipe: Any) -> dict[str, Any]:
    """A pipeline's weights as our parameters, whether LoRA layers wrap them or not."""
    params = {}
    for part, table in tables(config, pipe):
        state = {name: value.numpy().copy() for name, value in getattr(pipe, part).state_dict().items()}
        plain = {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}
        params[part] = names.from_tensors(table, plain)
    return params


def adapters(pipe: Any, seed: int) -> dict[str, Any]:
    """PEFT adapters on every part of a pipeline: random, of several ranks and alphas. Returns their metadata."""
    torch.manual_seed(seed)
    unet = {"rank_pattern": {"attn2.to_k": 2, "conv1": 3}, "alpha_pattern": {"to_q": 1, "attn2.to_v": 5, "proj_out": 2}}
    pipe.unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=UNET_LAYERS, init_lora_weights=False, **unet)
    )
    for part in ("text_encoder", "text_encoder_2"):
        if tower := getattr(pipe, part, None):
            layers = TEXT_LAYERS + (["text_projection"] if part == "text_encoder_2" else [])
            text = {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"layers.1.mlp.fc1": 3}}
            tower.add_adapter(
                peft.LoraConfig(r=3, lora_alpha=2, target_modules=layers, init_lora_weights=False, **text)
            )
    found = [part for part in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, part, None) is not None]
    return {part: getattr(pipe, part).peft_config["default"].to_dict() for part in found}


def diffusers_file(folder: Path, config: ModelConfig, seed: int, with_metadata: bool = True) -> Path:
    """What diffusers saves."""
    pipe = pipeline(config)
    metadata = adapters(pipe, seed)
    layers = {f"{part}_lora_layers": peft.get_peft_model_state_dict(getattr(pipe, part)) for part in metadata}
    settings = {f"{part}_lora_adapter_metadata": value for part, value in metadata.items()} if with_metadata else {}
    pipe.save_lora_weights(folder, **layers, **settings, weight_name=f"{seed}.safetensors")
    return folder / f"{seed}.safetensors"


def old_file(folder: Path, config: ModelConfig) -> Path:
    """The spellings that diffusers wrote in 2023, with attention alone in the UNet."""
    tensors = load_file(diffusers_file(folder, config, 5, with_metadata=False))
    renamed = {}
    for name, value in tensors.items():
        side = "down" if "lora_A" in name else "up"
        module = name.partition(".lora_")[0]
        if found := re.fullmatch(r"(unet\..*attn\d)\.(to_\w+)(\.0)?", module):
            renamed[f"{found[1]}.processor.{found[2]}_lora.{side}.weight"] = value
        elif module.startswith("text_encoder") and not module.endswith("text_projection"):
            module = re.sub(r"^(text_encoder(?:_2)?)\.(?!text_model)", r"\1.text_model.", module)
            renamed[f"{module}.lora_linear_layer.{side}.weight"] = value
    save_file(renamed, folder / "old.safetensors")
    return folder / "old.safetensors"


def kohya_files(folder: Path, config: ModelConfig, dialect: Dialect, mixed: bool) -> tuple[Path, Path]:
    """(the file, what diffusers is given in its place: see above). mixed: several ranks and alphas in a part."""
    rng = np.random.default_rng(7)
    prefixes = ["lora_unet_", *(["lora_te_"] if len(config.text) == 1 else ["lora_te1_", "lora_te2_"])]
    networks: list[Any] = [config.unet, *(tower.clip for tower in config.text)]
    ours, theirs = {}, {}
    for prefix, network in zip(prefixes, networks, strict=True):
        naming = Naming(dialect if prefix == "lora_unet_" else Dialect.TRANSFORMERS)
        for number, entry in enumerate(names.table(network, naming).entries):
            unread = (dialect is Dialect.DIFFUSERS and "add_embedding" in entry.name) or (
                mixed and "text_projection" in entry.name
            )
            if not entry.places[0].path.endswith("kernel") or unread:
                continue
            module = prefix + entry.name.removesuffix(".weight").replace(".", "_")
            rank, alpha = (1 + number % 4, [1.0, 2.5, 8.0][number % 3]) if mixed else (2, 3.0)
            outputs, inputs, *kernel = entry.shape
            down = rng.standard_normal((rank, inputs, *kernel), np.float32)
            up = rng.standard_normal((outputs, rank, *([1] * len(kernel))), np.float32)
            ours |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
            ours[f"{module}.alpha"] = np.array(alpha, np.float32)
            theirs |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up * np.float32(alpha / rank)}
    save_file(ours, folder / "kohya.safetensors")
    save_file(theirs, folder / "folded.safetensors")
    return folder / "kohya.safetensors", folder / ("folded.safetensors" if mixed else "kohya.safetensors")


class Merged(NamedTuple):
    before: dict[str, Any]
    """By path, as `ours` and `theirs`."""
    ours: Model
    theirs: dict[str, Any]


def merge(config: ModelConfig, ours: list[tuple[Path, float]], theirs: list[Path] | None = None) -> Merged:
    """Both ways. theirs: files for diffusers, where they are others."""
    pipe = pipeline(config)
    before = parameters(config, pipe)
    model = Model(config, jax.tree.map(jnp.asarray, before))
    for path, scale in ours:
        model = lora.add(model, path, scale)
    for number, path in enumerate(theirs or [path for path, _ in ours]):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora{number}")
    pipe.set_adapters([f"lora{number}" for number in range(len(ours))], [scale for _, scale in ours])
    pipe.fuse_lora()
    return Merged(flatten(before), model, flatten(parameters(config, pipe)))


def compare(agree: Agree, what: str, merged: Merged) -> None:
    """Every parameter on its own; the worst goes into the table."""
    ours = {path: np.asarray(value) for path, value in flatten(merged.ours.params).items()}
    changed = {path for path, value in merged.theirs.items() if not np.array_equal(value, merged.before[path])}
    assert changed == {path for path, value in ours.items() if not np.array_equal(value, merged.before[path])}
    for part in {"unet", *(tower.name for tower in merged.ours.config.text)}:
        assert any(path.startswith(f"{part}/") for path in changed), part
    errors = {
        path: np.abs(ours[path] - merged.theirs[path]).max() / np.abs(merged.theirs[path]).max() for path in changed
    }
    worst = max(errors, key=lambda path: errors[path])
    agree(f"LoRA, {what}", ours[worst], merged.theirs[worst], TOLERANCE)


Files = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """files(kind, seed): a file that diffusers saved."""
    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, seed: int) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = diffusers_file(tmp_path_factory.mktemp("lora"), KINDS[kind], seed)
        return made[kind, seed]

    return make


@pytest.mark.parametrize(
    "scales", [*(pytest.param(alone, marks=pytest.mark.slow) for alone in ((1.0,), (0.5,))), (0.8, -0.4)], ids=str
)
@pytest.mark.parametrize("kind", EACH_KIND)
def test_merged_weights_are_those_of_diffusers(
    agree: Agree, files: Files, kind: str, scales: tuple[float, ...]
) -> None:
    given = [(files(kind, seed), scale) for seed, scale in enumerate(scales, start=1)]
    what = f"{kind}, {' and '.join(f'× {scale:g}' for scale in scales)}"
    compare(agree, what, merge(KINDS[kind], given))


@pytest.mark.parametrize("kind", EACH_KIND)
def test_files_without_metadata_and_old_spellings_are_read_as_diffusers_does(
    agree: Agree, tmp_path: Path, kind: str
) -> None:
    plain = diffusers_file(tmp_path, KINDS[kind], 3, with_metadata=False)
    compare(agree, f"{kind}, without metadata", merge(KINDS[kind], [(plain, 0.7)]))
    compare(agree, f"{kind}, spellings of 2023", merge(KINDS[kind], [(old_file(tmp_path, KINDS[kind]), 0.7)]))


@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "several ranks and alphas"])
@pytest.mark.parametrize(
    ("kind", "dialect"),
    [("SDXL", Dialect.ORIGINAL), ("SDXL", Dialect.DIFFUSERS), ("SD 1.x", Dialect.DIFFUSERS)],
    ids=lambda value: getattr(value, "value", value),
)
def test_kohya_files_are_merged_as_by_diffusers(
    agree: Agree, tmp_path: Path, kind: str, dialect: Dialect, mixed: bool
) -> None:
    ours, theirs = kohya_files(tmp_path, KINDS[kind], dialect, mixed)
    merged = merge(KINDS[kind], [(ours, 0.6)], [theirs])
    compare(agree, f"{kind}, kohya, {dialect.value} names, {'several ranks' if mixed else 'one rank'}", merged)


@pytest.mark.slow
def test_kohya_and_diffusers_files_add_up(agree: Agree, files: Files, tmp_path: Path) -> None:
    kohya, _ = kohya_files(tmp_path, SDXL, Dialect.ORIGINAL, mixed=False)
    compare(agree, "SDXL, kohya × 0.3 and diffusers × 0.9", merge(SDXL, [(kohya, 0.3), (files("SDXL", 1), 0.9)]))


@pytest.mark.parametrize("kind", EACH_KIND)
def test_what_is_removed_leaves_the_original_weights(agree: Agree, files: Files, kind: str) -> None:
    merged = merge(KINDS[kind], [(files(kind, 1), 0.8), (files(kind, 2), 0.4)])
    model = lora.remove(lora.remove(merged.ours, "1.safetensors"), "2.safetensors")
    ours = flatten(model.params)
    # Four roundings of 6e-8, of weights and sums that are no more than a few times as large as the weights.
    errors = {
        path: np.abs(ours[path] - value).max() / np.abs(value).max()
        for path, value in merged.before.items()
        if np.any(value)
    }
    worst = max(errors, key=lambda path: errors[path])
    agree(f"LoRA, {kind}, added and removed", ours[worst], merged.before[worst], TOLERANCE)


# ---- the other way: files of ours ------------------------------------------------------------------------------------

OUTPUT_TOLERANCE = 1e-5
"""Of a whole UNet, whose weights differ by some roundings."""


def ours(before: dict[str, Any], several_alphas: bool, axis: dora.Axis | None) -> Resolved:
    """An adapter of every linear layer and convolution, ranks 1 to 3. before: the base's parameters by path."""
    layers, rng, flat = layers_of(SDXL), np.random.default_rng(0), {}
    kernels = [path for path in layers if path.endswith("kernel") and "text_projection" not in path]
    for number, path in enumerate(kernels):
        alpha = [1.0, 2.5, 8.0][number % 3] if several_alphas else 2.0
        shape = before[path].shape[layers[path] is not None :]
        settings = kinds.Settings(rank=1 + number % 3, alpha=alpha, magnitude=axis)
        for name, each in kinds.abstract(settings, path, shape, layers[path]).items():
            values = 0.2 * rng.standard_normal(each.shape)
            if name == "alpha":
                values = np.full(each.shape, alpha)
            elif name == "magnitude" and axis is not None:
                stacked = before[path] if layers[path] is not None else before[path][None]
                values = (1 + values) * np.stack([dora.norm(one, axis) for one in stacked]).reshape(each.shape)
            flat[f"{path}/{name}"] = values.astype(np.float32)
    return changes.untree(unflatten(flat), layers)


class Inputs(NamedTuple):
    """Of the UNet: the six numbers of the conditioning are 0."""

    latent: np.ndarray
    timestep: np.ndarray
    context: np.ndarray
    pooled: np.ndarray


def inputs() -> Inputs:
    rng = np.random.default_rng(1)
    shapes = {"latent": (2, 8, 8, 4), "context": (2, 7, 40), "pooled": (2, 24)}
    random = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return Inputs(timestep=np.array([10, 500]), **random)


def our_output(params: Any, given: Inputs) -> np.ndarray:
    numbers = np.asarray(sinusoidal_embedding(jnp.zeros((2, 6)), 4)).reshape(2, -1)
    arrays = given.latent, given.timestep, given.context, np.concatenate([given.pooled, numbers], -1)
    return np.asarray(jax.jit(functools.partial(unet.apply, SDXL.unet))(params, *map(jnp.asarray, arrays)))


def their_output(pipe: Any, given: Inputs) -> np.ndarray:
    added = {"text_embeds": torch.tensor(given.pooled), "time_ids": torch.zeros(2, 6)}
    latent = torch.tensor(given.latent).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = pipe.unet(
            latent, torch.tensor(given.timestep), torch.tensor(given.context), added_cond_kwargs=added
        ).sample
    return found.permute(0, 2, 3, 1).numpy()


def loaded(path: Path, spelling: Spelling, several_alphas: bool, axis: dora.Axis | None) -> tuple[Any, Any, Model]:
    """(our parameters of the base, diffusers' pipeline with a file of ours, our model with it)."""
    pipe = pipeline(SDXL)
    before = parameters(SDXL, pipe)
    write(path, ours(flatten(before), several_alphas, axis), SDXL, spelling)
    model = lora.add(Model(SDXL, before), path)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    return before, pipe, model


@pytest.mark.parametrize(
    ("spelling", "several_alphas"),
    [(Spelling.KOHYA, False), pytest.param(Spelling.PEFT, True, marks=pytest.mark.slow)],
    ids=["kohya", "peft"],
)
def test_weights_with_a_file_of_ours_are_those_of_diffusers(
    agree: Agree, tmp_path: Path, spelling: Spelling, several_alphas: bool
) -> None:
    before, pipe, model = loaded(tmp_path / "ours.safetensors", spelling, several_alphas, None)
    pipe.fuse_lora()
    merged = Merged(flatten(before), model, flatten(parameters(SDXL, pipe)))
    compare(agree, f"file of ours in diffusers, {spelling.value}", merged)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spelling", "several_alphas", "axis"),
    [(Spelling.KOHYA, False, None), (Spelling.PEFT, True, None), (Spelling.PEFT, True, dora.Axis.OUT)],
    ids=["kohya", "peft", "peft, DoRA"],
)
def test_the_unet_with_a_file_of_ours_is_that_of_diffusers(
    agree: Agree, tmp_path: Path, spelling: Spelling, several_alphas: bool, axis: dora.Axis | None
) -> None:
    given = inputs()
    without = their_output(pipeline(SDXL), given)
    _, pipe, model = loaded(tmp_path / "ours.safetensors", spelling, several_alphas, axis)
    theirs = their_output(pipe, given)
    assert np.abs(theirs - without).max() > 0.1 * np.abs(theirs).max()
    what = f"LoRA, file of ours in diffusers, {spelling.value}{', DoRA along the outputs' if axis else ''}, UNet"
    agree(what, our_output(model.params["unet"], given), theirs, OUTPUT_TOLERANCE)


@pytest.mark.slow
def test_a_dora_of_peft_is_read_as_peft_computes_it(agree: Agree, tmp_path: Path) -> None:
    pipe = pipeline(SDXL)
    before = parameters(SDXL, pipe)
    torch.manual_seed(2)
    pattern = {"rank_pattern": {"attn2.to_k": 2, "conv1": 3}, "alpha_pattern": {"to_q": 1}}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": UNET_LAYERS, "init_lora_weights": False, **pattern}
    pipe.unet.add_adapter(peft.LoraConfig(use_dora=True, **settings))
    for name, value in pipe.unet.named_parameters():
        if "magnitude" in name:
            value.data *= 1 + 0.3 * torch.randn_like(value)
    layers, config = peft.get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config, weight_name="peft.safetensors"
    )
    params = lora.add(Model(SDXL, before), tmp_path / "peft.safetensors").params["unet"]
    agree("LoRA, PEFT's DoRA, UNet", our_output(params, inputs()), their_output(pipe, inputs()), OUTPUT_TOLERANCE)
    # Written again: the same tensors.
    write(tmp_path / "again.safetensors", resolve(read(tmp_path / "peft.safetensors"), SDXL), SDXL, Spelling.PEFT)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("peft", "again"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(value, other[name]) for name, value in one.items())
