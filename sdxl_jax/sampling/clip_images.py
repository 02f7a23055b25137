"""Images as CLIP's image towers take them: the standard preprocessing.

It equals open_clip's `image_transform` and transformers' `CLIPImageProcessor`. That of ComfyUI and of sgm, which resize
with torch, gives embeddings that differ in the third digit.
"""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained on, 0..1."""


def preprocess(image: UInt8[np.ndarray, "height width 3"], side: int) -> Float32[np.ndarray, "side side 3"]:
    """An image 0..255 as the towers take it: the short side resized to `side` (Pillow's bicubic, antialiased), the
    centre cropped, then the mean subtracted and divided by the deviation of CLIP's images."""
    height, width = image.shape[:2]
    short = min(height, width)
    size = width * side // short, height * side // short  # rounded down, as in both
    resized = Image.fromarray(image)
    if resized.size != size:
        resized = resized.resize(size, Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in size)
    cropped = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32)
    return (cropped / np.float32(255) - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
