"""What `sdxl-jax finetune` can be asked for. No jax, so that `--help` is quick; what is chosen for the rest is in
`choices`."""

import enum
import math
from dataclasses import dataclass
from typing import Literal

from sdxl_jax.errors import InputError, check_ranges


class Kind(enum.Enum):
    """What of the base is trained."""

    LORA = "lora"
    """An adapter of the UNet's attention, beside the frozen base: a small file."""
    DREAMBOOTH = "dreambooth"
    """The same for one subject, beside images of its class, so that the class is not forgotten."""
    TEXTUAL_INVERSION = "textual-inversion"
    """Embedding vectors of a new token in each text encoder, beside the frozen base: a tiny file."""
    FULL = "full"
    """The whole UNet: a model of its own."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's own choices."""

    prompt: str | None = None
    """Caption of the images that have none."""
    trigger: str | None = None
    """Word for what is learnt: put before each caption that does not have it; the caption of images without any. Of
    textual inversion, the new token, e.g. "<zwx>"."""
    steps: int | None = None
    """Updates. Default: 100 per image, at least 500 and at most 1500, and no less than 10 epochs; twice that with
    images of the class, which every second example is."""
    learning_rate: float | None = None
    """Learning rate. Default: 3e-4 for textual inversion; 1e-4 for an adapter; 1e-6 for the whole UNet, 1e-5 from 1000
    images on; these two higher for UNets with fewer than 320 channels, in proportion."""
    rank: int | None = None
    """Rank of the adapter, and its alpha. Default: 8 for up to 10 images, 16 for up to 50, 32 for more."""
    quantize: Literal["int8"] | None = None
    """Keep the frozen base in eight bits, in half of bfloat16's memory. Default: bfloat16 for a UNet with 1024 channels
    or more, else float32."""
    batch_size: int | None = None
    """Images per step, over all devices. Default: 1 per device, 4 for a UNet with fewer than 1024 channels."""
    size: int | None = None
    """Side in pixels of a square with as many pixels as the images are trained at. Default: the base's own."""
    validation_prompt: tuple[str, ...] = ()
    """Prompt to sample while training, five times; may be repeated. Default: up to 4 captions."""
    seed: int = 0
    """Random seed of what is trained, the order of the images, and the noise."""
    vectors: int | None = None
    """Embedding vectors of textual inversion. Default: 2."""
    initial: str | None = None
    """Words that the vectors of textual inversion begin as, e.g. dog. Default: random vectors."""
    class_prompt: str | None = None
    """Prompt of DreamBooth's class, e.g. "a photo of a dog": its images are sampled from the base before training."""
    class_images: int | None = None
    """Images of DreamBooth's class. Default: 100, as in diffusers."""

    def check(self, kind: Kind) -> None:
        """Raises InputError for numbers out of range, empty texts, options of another kind, and a missing token."""
        numbers = [("--steps", self.steps, 1, math.inf), ("--rank", self.rank, 1, math.inf)]
        numbers += [("--batch-size", self.batch_size, 1, math.inf), ("--size", self.size, 8, math.inf)]
        check_ranges([*numbers, ("--vectors", self.vectors, 1, 75), ("--class-images", self.class_images, 1, math.inf)])
        check_ranges([("--learning-rate", self.learning_rate, 0, math.inf)], above_low=True, below_high=True)
        for name in ("prompt", "trigger", "initial", "class_prompt"):
            if (given := getattr(self, name)) is not None and not given.strip():
                raise InputError(f"{_flag(name)} {given!r} has no words. Give some, or leave it out")
        for name, kinds in _OF_KINDS.items():
            if (given := getattr(self, name)) is not None and kind not in kinds:
                raise InputError(
                    f"{_flag(name)} {given} has no effect with --kind {kind.value}. Leave it out, or give --kind "
                    f"{' or '.join(each.value for each in kinds)}"
                )
        if kind is Kind.DREAMBOOTH and self.class_prompt is None:
            raise InputError(
                'DreamBooth needs --class-prompt: the class of the subject, e.g. --class-prompt "a photo of a dog". '
                "Without images of a class: --kind lora"
            )
        if kind is Kind.TEXTUAL_INVERSION and self.trigger is None:
            raise InputError(
                'textual inversion needs --trigger: the new token, which is no word yet, e.g. --trigger "<zwx>"'
            )


_OF_KINDS = {
    "rank": (Kind.LORA, Kind.DREAMBOOTH),
    "quantize": (Kind.LORA, Kind.DREAMBOOTH, Kind.TEXTUAL_INVERSION),
    "vectors": (Kind.TEXTUAL_INVERSION,),
    "initial": (Kind.TEXTUAL_INVERSION,),
    "class_prompt": (Kind.DREAMBOOTH,),
    "class_images": (Kind.DREAMBOOTH,),
}
"""Options that some kinds have."""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
