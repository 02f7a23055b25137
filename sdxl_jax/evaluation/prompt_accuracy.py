"""Prompt accuracy: does a model that was trained on few images show the one that it is asked for?

For each sample, the nearest training image of the same bucket is found, by the Euclidean distance of pixels after
both are reduced to 32×32. The sample is right if that image has the caption it was made from. Chance is one in the
number of captions of a bucket. A measure for models that learn a small set by heart; it says nothing of new prompts.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 32


def reduced(images: UInt8[np.ndarray, "images height width 3"]) -> Float[np.ndarray, "images numbers"]:
    """Each image as 32·32·3 numbers, by area averages."""
    small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float64).ravel() for image in small])


def hits(
    samples: UInt8[np.ndarray, "samples height width 3"],
    asked: Sequence[str],
    training: UInt8[np.ndarray, "training height width 3"],
    captions: Sequence[str],
) -> list[bool]:
    """For each sample, whether its nearest training image has the caption that was asked for. All of one bucket."""
    references = reduced(training)
    nearest = [int(np.square(references - sample).sum(axis=1).argmin()) for sample in reduced(samples)]
    return [captions[index] == prompt for index, prompt in zip(nearest, asked, strict=True)]
