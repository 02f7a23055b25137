"""What `sdxl-jax finetune` can be asked for. No jax, so that `--help` is quick; what is chosen for the rest is in
`choices`."""

import enum
import math
from dataclasses import dataclass

from sdxl_jax.errors import InputError, check_ranges


class Kind(enum.Enum):
    """What of the base is trained."""

    LORA = "lora"
    """An adapter of the UNet's attention, beside the frozen base: a small file."""
    FULL = "full"
    """The whole UNet: a model of its own."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's own choices."""

    prompt: str | None = None
    """Caption of the images that have none."""
    trigger: str | None = None
    """Word for what is learnt: put before each caption that does not have it; the caption of images without any."""
    steps: int | None = None
    """Updates. Default: 100 per image, at least 500 and at most 1500, and no less than 10 epochs."""
    learning_rate: float | None = None
    """Learning rate. Default: 1e-4 for an adapter; 1e-6 for the whole UNet, 1e-5 from 1000 images on; higher for UNets
    with fewer than 320 channels, in proportion."""
    rank: int | None = None
    """Rank of the adapter, and its alpha. Default: 8 for up to 10 images, 16 for up to 50, 32 for more."""
    batch_size: int | None = None
    """Images per step, over all devices. Default: 1 per device, 4 for a UNet with fewer than 1024 channels."""
    size: int | None = None
    """Side in pixels of a square with as many pixels as the images are trained at. Default: the base's own."""
    validation_prompt: tuple[str, ...] = ()
    """Prompt to sample while training, five times; may be repeated. Default: up to 4 captions."""
    seed: int = 0
    """Random seed of the adapter, the order of the images, and the noise."""

    def check(self, kind: Kind) -> None:
        """Raises InputError for numbers out of range, empty texts, and a rank where there is no adapter."""
        numbers = [("--steps", self.steps, 1, math.inf), ("--rank", self.rank, 1, math.inf)]
        numbers += [("--batch-size", self.batch_size, 1, math.inf), ("--size", self.size, 8, math.inf)]
        check_ranges(numbers)
        check_ranges([("--learning-rate", self.learning_rate, 0, math.inf)], above_low=True, below_high=True)
        for name in ("prompt", "trigger"):
            if (given := getattr(self, name)) is not None and not given.strip():
                raise InputError(f"--{name} {given!r} has no words. Give some, or leave it out")
        if self.rank is not None and kind is Kind.FULL:
            raise InputError(
                f"--rank {self.rank} has no effect with --kind full, which trains no adapter. Leave it out, or give "
                "--kind lora"
            )
