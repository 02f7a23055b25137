"""Names of parts of the UNet, for options. No jax, which the command line imports only after its arguments are read."""

import enum


class UNetPart(enum.Enum):
    """A part of the UNet in which `perturbed` rows lose their self-attention."""

    DOWN = "down"
    """All levels of the way down."""
    MIDDLE = "mid"
    """The middle: the default, and that of diffusers' `StableDiffusionXLPAGPipeline`."""
    UP = "up"
    """All levels of the way up."""
