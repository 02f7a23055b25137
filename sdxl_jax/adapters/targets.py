"""New adapters of a model: to which of its parameters, with which settings. The configuration of their training.

training.trainable ── which parameters ──┐
Layers (preset) ──────── which layers ───┴── settings of each kernel ── abstract tree, to make or to restore
"""

import dataclasses
import enum
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from sdxl_jax.adapters import dora, kinds
from sdxl_jax.adapters.kinds import Kind, Settings
from sdxl_jax.arrays import BaseDtype, Parameter
from sdxl_jax.errors import InputError, check_pattern, check_ranges


class Layers(enum.Enum):
    """Which layers have an adapter, among those that `training.trainable` matches. Of SDXL's UNet:"""

    ATTENTION = "attention"
    """Queries, keys, values and outputs of attention: 560 layers."""
    ATTENTION_FEED_FORWARD = "attention_feed_forward"
    """And the feed-forwards: 700."""
    LINEAR = "linear"
    """And the projections into and out of the transformers: 722."""
    BLOCKS = "blocks"
    """And the residual blocks and changes of size between levels, with their convolutions: 788."""
    ALL = "all"
    """Every linear layer and convolution that `training.trainable` matches: of the whole UNet, 794."""


_ATTENTION = r"/attn[12]/to_(q|k|v|out)/kernel$|/layers/(q|k|v|out)_proj/kernel$"
_FEED_FORWARD = r"/ff/proj_(in|out)/kernel$|/layers/fc[12]/kernel$"
_PROJECTIONS = r"/attentions_\d+/proj_(in|out)/kernel$"
_RESIDUAL = r"^unet/(down_blocks_\d+|mid_block|up_blocks_\d+)/.*kernel$"
_PATTERNS = {
    Layers.ATTENTION: _ATTENTION,
    Layers.ATTENTION_FEED_FORWARD: f"{_ATTENTION}|{_FEED_FORWARD}",
    Layers.LINEAR: f"{_ATTENTION}|{_FEED_FORWARD}|{_PROJECTIONS}",
    Layers.BLOCKS: f"{_ATTENTION}|{_FEED_FORWARD}|{_RESIDUAL}",
    Layers.ALL: r"/kernel$",
}


class FileDtype(enum.Enum):
    """Dtype of the tensors in adapter files."""

    FLOAT32 = "float32"
    """4 bytes per parameter."""
    FLOAT16 = "float16"
    """2 bytes; what most programs write."""
    BFLOAT16 = "bfloat16"
    """2 bytes, with fewer digits and a wider range."""


class Spelling(enum.Enum):
    """How an adapter file that is written names its modules."""

    KOHYA = "kohya"
    """sd-scripts': what ComfyUI, A1111, Forge, sd-scripts and diffusers read."""
    PEFT = "peft"
    """diffusers' own, of PEFT's LoRA layers: plain LoRA, and DoRA along the outputs."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """Training of an adapter (LoRA and its kin) beside a frozen model. `training.trainable` says of which parts and
    parameters; everything here holds for those."""

    layers: Layers = Layers.ATTENTION
    """Which of their layers have an adapter. More layers learn more, with a larger file."""
    conv_rank: int | None = None
    """Rank of convolutions larger than 1×1; None: as `rank`."""
    conv_alpha: float | None = None
    """Alpha of convolutions larger than 1×1; None: as `alpha`."""
    biases_and_norms: bool = False
    """Biases and norms that `training.trainable` matches are trained too, as differences. diffusers does not read
    them; A1111 and Forge those of norms alone, and do not load a file with the bias of a layer that has no adapter."""
    init_from: str | None = None
    """An adapter file, or an earlier run, whose adapter is trained on; None: a new one. Its kind, layers and rank must
    be those given here."""
    base_dtype: BaseDtype = BaseDtype.FLOAT32
    """Dtype of the frozen UNet and text encoders: bfloat16 halves their memory and rounds them to 3 digits, int8
    quarters it and rounds each weight by up to a 254th of its output channel's largest."""
    file_dtype: FileDtype = FileDtype.FLOAT16
    """Dtype of the tensors in the files that are written."""
    file_spelling: Spelling = Spelling.KOHYA
    """How the files name their modules: as most programs read them, or as diffusers does. `sdxl-jax lora convert`
    writes the other."""
    trigger_phrase: str | None = None
    """Words that call what is learnt, written to the files (modelspec.trigger_phrase); None: data.trigger, or the new
    token of textual_inversion."""
    up_rate: float = 1.0
    """LoRA+: the learning rate of the up factors is multiplied by it (Hayou et al. 2024, arXiv:2402.12354, find 16).
    Higher: learns faster."""
    rank_dropout: float = 0.0
    """Share of ranks that a step leaves out of each layer, 0 to below 1; the others are scaled up. Higher: less
    overfitting, slower learning."""
    module_dropout: float = 0.0
    """Share of layers whose change a step leaves out, 0 to below 1. Higher: less overfitting, slower learning."""
    norm_limit: float | None = None
    """Largest Frobenius norm of a layer's change ΔW; a longer one is scaled back to it after each step. sd-scripts:
    scale_weight_norms, 1. Lower: weaker changes. None: no limit."""

    def check(self) -> None:
        """Raises InputError for numbers out of range, and for settings that would have no effect."""
        super().check()
        if self.conv_alpha is not None:
            kinds.check_alpha(self.conv_alpha, "adapter.conv_alpha")
        check_ranges(
            [("adapter.conv_rank", self.conv_rank, 1, math.inf)],
            below_high=True,
        )
        factors = [("adapter.up_rate", self.up_rate, 0, math.inf), ("adapter.norm_limit", self.norm_limit, 0, math.inf)]
        check_ranges(factors, above_low=True, below_high=True)
        dropouts = ("rank_dropout", "module_dropout")
        check_ranges([(f"adapter.{name}", getattr(self, name), 0, 1) for name in dropouts], below_high=True)
        self._check_spelling()
        is_lokr, is_low_rank = self.kind is Kind.LOKR, self.kind is not Kind.DIFFERENCE
        for name, given, has_effect, remedy in (
            ("factor", self.factor is not None, is_lokr, "adapter.kind=lokr"),
            ("full_matrix", self.full_matrix, is_lokr, "adapter.kind=lokr"),
            ("decompose_both", self.decompose_both, is_lokr, "adapter.kind=lokr"),
            *((name, self._is_given(name), is_low_rank, "another adapter.kind") for name in _OF_RANKS),
            ("up_rate", self.up_rate != 1, self.kind is Kind.LORA, "adapter.kind=lora"),
            ("module_dropout", bool(self.module_dropout), self.magnitude is None, "adapter.magnitude=None"),
        ):
            if given and not has_effect:
                raise InputError(
                    f"adapter.{name} has no effect with adapter.kind={self.kind.value}"
                    f"{'' if self.magnitude is None else f' and adapter.magnitude={self.magnitude.value}'}. Leave it "
                    f"out, or set {remedy}"
                )
        for name in _OF_PRODUCTS if self.full_matrix else ():
            if self._is_given(name):
                raise InputError(
                    f"adapter.{name} has no effect with adapter.full_matrix: whole matrices have no rank. Leave one of "
                    "them out"
                )

    def _is_given(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return getattr(self, name) != getattr(AdapterConfig, name)

    def _check_spelling(self) -> None:
        """Raises InputError for what PEFT's LoRA files have no place for."""
        for given, what in (
            (self.kind is not Kind.LORA, f"adapter.kind={self.kind.value}"),
            (self.magnitude is dora.Axis.IN, "adapter.magnitude=in"),
            (self.biases_and_norms, "adapter.biases_and_norms"),
        ):
            if given and self.file_spelling is Spelling.PEFT:
                raise InputError(
                    f"adapter.file_spelling=peft has no place for {what}. Leave it out, or set "
                    "adapter.file_spelling=kohya"
                )

    def of(self, path: str, shape: tuple[int, ...]) -> Settings:
        """The settings of one parameter, whose layers have this shape."""
        if not path.endswith("kernel"):
            return Settings(Kind.DIFFERENCE)
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        if is_window(shape):
            own["rank"] = self.conv_rank or self.rank
            own["alpha"] = self.conv_alpha or self.alpha
        return Settings(**own)


_OF_PRODUCTS = ("middle", "rank_stabilised", "decompose_both", "conv_rank", "conv_alpha", "rank_dropout")
"""Settings of products of narrow factors. A LoKr of whole matrices may have rank and alpha, which are not used."""
_OF_RANKS = ("rank", "alpha", "middle", "rank_stabilised", "conv_rank", "conv_alpha", "rank_dropout")
"""Settings that a whole difference does not have."""


def is_window(shape: tuple[int, ...]) -> bool:
    """Whether a kernel is that of a convolution larger than 1×1."""
    return math.prod(shape[:-2]) > 1


def kernels_and_biases(layers: Layers, paths: Collection[str]) -> list[str]:
    """The parameters of these layers, among those at the paths."""

    def is_chosen(path: str) -> bool:
        module, _, name = path.rpartition("/")
        kernel = f"{module}/kernel"
        return name in ("kernel", "bias") and kernel in paths and bool(re.search(_PATTERNS[layers], kernel))

    return [path for path in paths if is_chosen(path)]


def selected(config: AdapterConfig, paths: Iterable[str], trainable: tuple[str, ...]) -> list[str]:
    """The parameters that get an adapter. Raises InputError for no pattern, and for one that selects none of them."""
    pattern = _PATTERNS[config.layers] + (r"|/(bias|scale)$" if config.biases_and_norms else "")
    paths = [path for path in paths if not path.startswith("vae/")]
    fitting = [path for path in paths if re.search(pattern, path)]
    if not trainable:
        raise InputError(
            "training.trainable=() gives no layer to the adapter, so that nothing would be trained. Give patterns of "
            'paths, e.g. "^unet/", or leave out adapter (None)'
        )
    for each in trainable:
        check_pattern("training.trainable", each)
        if not any(re.search(each, path) for path in fitting):
            raise InputError(
                f'training.trainable has "{each}", which matches no parameter that adapter.layers='
                f"{config.layers.value} selects. Give patterns of paths such as {', '.join(fitting[:2])}, or set "
                "adapter.layers=all for every linear layer and convolution"
            )
    return [path for path in fitting if any(re.search(each, path) for each in trainable)]


def abstract(
    config: AdapterConfig,
    parameters: Mapping[str, Parameter],
    layers: Mapping[str, int | None],
    trainable: tuple[str, ...],
) -> dict[str, Parameter]:
    """The factors of a new adapter by path, "unet/…/kernel/down", none of them made.

    parameters: of the model. layers: of each, how many are stacked; None for one that is not. Raises InputError for
    patterns that select nothing, a rank above a layer's width, and settings of convolutions, or of ranks, where there
    are none.
    """
    found, has_windows, has_ranks = dict[str, Parameter](), False, False
    for path in selected(config, parameters, trainable):
        count = layers[path]
        shape = parameters[path].shape if count is None else parameters[path].shape[1:]
        has_windows |= path.endswith("kernel") and is_window(shape)
        factors = kinds.abstract(config.of(path, shape), path, shape, count)
        has_ranks |= kinds.with_ranks(factors) is not None
        found |= {f"{path}/{name}": factor for name, factor in factors.items()}
    if config.rank_dropout and not has_ranks:
        raise InputError(
            f"adapter.rank_dropout={config.rank_dropout} has no effect: none of the {len(found)} factors has ranks "
            "(whole matrices of a LoKr, differences of biases and norms). Leave it out, set adapter.module_dropout, or "
            "lower adapter.rank"
        )
    if not has_windows and (config.middle or config.conv_rank is not None or config.conv_alpha is not None):
        raise InputError(
            "adapter.middle, conv_rank and conv_alpha are for convolutions larger than 1×1, of which adapter.layers="
            f"{config.layers.value} selects none. Leave them out, or set adapter.layers=blocks"
        )
    return found
