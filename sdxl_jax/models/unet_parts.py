"""Names of parts of the UNet, for options. No jax, which the command line imports only after its arguments are read."""

import enum
from collections.abc import Sequence

from sdxl_jax.errors import InputError


class UNetPart(enum.Enum):
    """A part of the UNet in which `perturbed` rows lose their self-attention."""

    DOWN = "down"
    """All levels of the way down."""
    MIDDLE = "mid"
    """The middle: the default, and that of diffusers' `StableDiffusionXLPAGPipeline`."""
    UP = "up"
    """All levels of the way up."""


SDXL_BLOCKS = tuple(
    f"^unet/({names})/"
    for names in (
        "time_embedding|add_embedding",
        "conv_in",
        *(f"down_blocks_0/{name}" for name in ("resnets_0", "resnets_1", "downsample")),
        *(f"down_blocks_1/{name}" for name in ("(resnets|attentions)_0", "(resnets|attentions)_1", "downsample")),
        *(f"down_blocks_2/(resnets|attentions)_{number}" for number in (0, 1)),
        *(f"mid_block/{name}" for name in ("resnets_0", "attentions_0", "resnets_1")),
        *(
            f"up_blocks_{level}/({names})"
            for level in (0, 1)
            for names in ("(resnets|attentions)_0", "(resnets|attentions)_1", "(resnets|attentions)_2|upsample")
        ),
        *(f"up_blocks_2/resnets_{number}" for number in (0, 1, 2)),
        "conv_norm_out|conv_out",
    )
)
"""Patterns of the paths of SDXL base's 23 blocks, in the order of sd-scripts' block learning rates: timestep and
conditioning, 9 of the way down, 3 of the middle, 9 of the way up, the last convolution."""


def block_rates(factors: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """Factors of the learning rate for SDXL base's 23 blocks, as `optimiser.rates` has them. Of blocks with 1 nothing
    needs to be trained. Raises InputError for another number of factors."""
    if len(factors) != len(SDXL_BLOCKS):
        raise InputError(
            f"SDXL has {len(SDXL_BLOCKS)} blocks with learning rates of their own, and {len(factors)} factors are "
            "given. Give 1 for timestep and conditioning, 9 for the way down, 3 for the middle, 9 for the way up, and "
            "1 for the last convolution"
        )
    return tuple((pattern, factor) for pattern, factor in zip(SDXL_BLOCKS, factors, strict=True) if factor != 1)
