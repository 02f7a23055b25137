"""The text towers of CLIP: OpenAI's L, OpenCLIP's H and bigG, and smaller ones of the same shape.

A causal transformer over 77 tokens, pre-norm, with learned positions. SDXL reads the states *before* the last layer,
not normed, from L and bigG, and the projected pooled state of bigG; SD 1.x the normed last states of L; SD 2.x the
normed states before the last layer of H. Sources: Radford et al. (arXiv:2103.00020), transformers `modeling_clip.py`.
"""

import enum
import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Int

from sdxl_jax.arrays import Params
from sdxl_jax.models import initialisers
from sdxl_jax.models.attention import dot_product_attention, stack
from sdxl_jax.models.layers import Compute, dense, gelu, layer_norm, looked_up, variables


class Activation(enum.Enum):
    GELU = "gelu"
    """The exact (erf) GELU: OpenCLIP's H and bigG."""
    QUICK_GELU = "quick_gelu"
    """x · sigmoid(1.702 x): OpenAI's L."""


@dataclass(frozen=True)
class ClipTextConfig:
    """What a tower's weights depend on. The defaults are CLIP-L's."""

    width: int = 768
    """Features of a token."""
    layers: int = 12
    """Transformer layers."""
    heads: int = 12
    """Attention heads."""
    mlp_width: int = 3072
    """Hidden features of the feed-forward."""
    activation: Activation = Activation.QUICK_GELU
    """The feed-forward's nonlinearity."""
    projection_dim: int | None = None
    """Features of the projected pooled state, None for no projection."""
    vocabulary: int = 49408
    """Rows of the token embedding; added tokens make it larger."""
    end_token: int = 49407
    """The token whose first position is pooled."""
    tokens: int = 77
    """Length of the context."""


CLIP_L = ClipTextConfig()
CLIP_H = ClipTextConfig(1024, 24, 16, 4096, Activation.GELU, 1024)
CLIP_BIGG = ClipTextConfig(1280, 32, 20, 5120, Activation.GELU, 1280)


class TextStates(NamedTuple):
    """A tower's states for a batch of prompts. hidden_states[-2] is the state before the last layer."""

    penultimate: Float[jax.Array, "batch tokens features"]
    """hidden_states[-2], not normed: the context of SDXL."""
    penultimate_normed: Float[jax.Array, "batch tokens features"]
    """hidden_states[-2] after the final norm: the context of SD 2.x."""
    last: Float[jax.Array, "batch tokens features"]
    """The last layer's states after the final norm: the context of SD 1.x."""
    pooled: Float[jax.Array, "batch features"]
    """`last` at the first end-of-text token."""
    projected: Float[jax.Array, "batch projection"] | None
    """`pooled` times the text projection: the pooled vector of SDXL. None without a projection."""


@runtime_checkable
class LayerConfig(Protocol):
    """What the layers of a tower of text or of images depend on."""

    @property
    def width(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def mlp_width(self) -> int: ...

    @property
    def activation(self) -> Activation: ...


class ClipLayer(nn.Module):
    """Self-attention and feed-forward, each after its norm, around a residual; every projection has a bias."""

    config: LayerConfig
    compute: Compute
    causal: bool = True
    """Of text: a token sees itself and those before it."""

    @nn.compact
    def __call__(
        self,
        states: tuple[Float[jax.Array, "batch tokens features"], Float[jax.Array, "batch tokens features"]],
        _: None,
    ) -> tuple[tuple[Float[jax.Array, "batch tokens features"], Float[jax.Array, "batch tokens features"]], None]:
        """Carries (states, states before this layer), so that a scan ends with the penultimate states."""
        before = hidden = states[0]
        config, compute = self.config, self.compute

        def project(
            name: str, inputs: Float[jax.Array, "batch tokens features"]
        ) -> Float[jax.Array, "batch tokens heads dim"]:
            flat = dense(config.width, name, compute)(inputs)
            return rearrange(flat, "batch tokens (heads dim) -> batch tokens heads dim", heads=config.heads)

        normed = layer_norm("layer_norm1", compute)(hidden)
        query, key, value = (project(name, normed) for name in ("q_proj", "k_proj", "v_proj"))
        mixed = dot_product_attention(query, key, value, compute.attention, causal=self.causal)
        mixed = rearrange(mixed, "batch tokens heads dim -> batch tokens (heads dim)")
        hidden = hidden + dense(config.width, "out_proj", compute)(mixed)

        normed = layer_norm("layer_norm2", compute)(hidden)
        inner = dense(config.mlp_width, "fc1", compute)(normed)
        match config.activation:
            case Activation.GELU:
                inner = gelu(inner)
            case Activation.QUICK_GELU:
                inner = inner * nn.sigmoid(1.702 * inner)
        return (hidden + dense(config.width, "fc2", compute)(inner), before), None


class ClipText(nn.Module):
    config: ClipTextConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Int[jax.Array, "batch tokens"]) -> TextStates:
        config, compute = self.config, self.compute
        # Standard deviations of CLIP's own initialisation (its model.py: 0.02 for tokens, 0.01 for positions).
        table = nn.Embed(
            config.vocabulary,
            config.width,
            name="token_embedding",
            dtype=compute.activations,
            embedding_init=initialisers.normal(0.02),
        )
        positions = self.param(
            "position_embedding", initialisers.normal(0.01), (config.tokens, config.width), jnp.float32
        )
        hidden = looked_up(table, tokens) + positions[: tokens.shape[1]].astype(compute.activations)
        layers = stack(ClipLayer, config.layers, compute)(config, compute, name="layers")
        (last, penultimate), _ = layers((hidden, hidden), None)
        final_norm = layer_norm("final_layer_norm", compute)
        penultimate_normed, last = final_norm(penultimate), final_norm(last)
        # The first end-of-text, found by its number: the largest number would be a token added later.
        end = jnp.argmax(tokens == config.end_token, axis=1)
        pooled = last[jnp.arange(len(tokens)), end]
        projected = None
        if config.projection_dim is not None:
            projected = dense(config.projection_dim, "text_projection", compute, use_bias=False)(pooled)
        states = TextStates(penultimate, penultimate_normed, last, pooled, projected)
        return jax.tree.map(lambda x: x.astype(jnp.float32), states)


def apply(
    config: ClipTextConfig,
    params: Params,
    tokens: Int[jax.Array, "batch tokens"],
    compute: Compute = Compute(),
    adapters: Params | None = None,
) -> TextStates:
    """The states of a batch of prompts, float32. tokens: 0..vocabulary−1, with start, end and padding; beyond it where
    adapters has rows for them. adapters: changes of the parameters (`adapters.kinds`, `adapters.embeddings`)."""
    return ClipText(config, compute).apply(variables(params, adapters), tokens)  # pyright: ignore[reportReturnType]


@functools.cache
def abstract(config: ClipTextConfig) -> Params:
    """The parameters and how they begin (`initialisers.Parameter`)."""
    return initialisers.abstract(ClipText(config), jax.ShapeDtypeStruct((1, config.tokens), jnp.int32))
