"""Prompt accuracy: does a model that was trained on few images generate the image of the prompt?

The score is the share of samples whose nearest training image of the same bucket, by the Euclidean distance of pixels
after both are reduced to 32×32, has the prompt as its caption. Chance is one in the number of captions of a bucket. A
metric for models that memorise a small set; it does not measure generalisation to new prompts.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 32


def features(images: UInt8[np.ndarray, "images height width 3"]) -> Float[np.ndarray, "images features"]:
    """Each image reduced to 32×32 by area averages, as 32·32·3 numbers."""
    small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float64).ravel() for image in small])


def hits(
    samples: UInt8[np.ndarray, "samples height width 3"],
    prompts: Sequence[str],
    training: UInt8[np.ndarray, "training height width 3"],
    captions: Sequence[str],
) -> list[bool]:
    """For each sample, whether its nearest training image has the sample's prompt as caption. All of one bucket."""
    references = features(training)
    nearest = [int(np.square(references - sample).sum(axis=1).argmin()) for sample in features(samples)]
    return [captions[index] == prompt for index, prompt in zip(nearest, prompts, strict=True)]
