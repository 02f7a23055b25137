"""What can be measured, and how images are resized for it: the names on the command line, which is why nothing heavy is
imported here."""

import enum


class ResizeMode(enum.Enum):
    """How images are resized for FID's network, and normalised: see `resize`."""

    TF1 = "tf1"
    """TensorFlow 1's bilinear resize: the tables of ADM, LDM, DiT and EDM."""
    CLEAN = "clean"
    """Antialiased bicubic: clean-fid's default."""
    PYTORCH = "pytorch"
    """torch's bilinear resize: pytorch-fid."""


class Metric(enum.Enum):
    """A metric of images; most of them compare with a reference."""

    FID = "fid"
    """Fréchet Inception distance. Lower is better."""
    SFID = "sfid"
    """FID of Inception's spatial features. Lower is better."""
    KID = "kid"
    """Kernel Inception distance, × 1; unbiased, for few images. Lower is better."""
    PRECISION_RECALL = "precision_recall"
    """Precision and recall, k = 3, 0 to 1. Higher is better."""
    INCEPTION_SCORE = "inception_score"
    """With Inception's own head (--inception-head). Higher is better."""
    PROBE_SCORE = "probe_score"
    """The Inception Score's formula with a linear classifier of yours (--probe). Higher is better."""
    CMMD = "cmmd"
    """Distance of CLIP embeddings (--clip). Lower is better."""
    CLIP_SCORE = "clip_score"
    """100 · cosine of image and prompt (--clip). Higher is better."""
    PSNR = "psnr"
    """Of pairs of images, in dB. Higher is better."""
    SSIM = "ssim"
    """Of pairs of images, up to 1. Higher is better."""
    LPIPS_ALEX = "lpips_alex"
    """Perceptual distance of pairs of images, AlexNet: tables. Lower is better."""
    LPIPS_VGG = "lpips_vgg"
    """Perceptual distance of pairs of images, VGG16. Lower is better."""
    PSIM = "psim"
    """Unweighted perceptual distance of pairs, 0 to 5: likely what SDXL's table 3 calls LPIPS. Lower is better."""


SCORES = {metric: (metric.value,) for metric in Metric} | {Metric.PRECISION_RECALL: ("precision", "recall")}
"""The names of a metric's scores."""
HIGHER_IS_BETTER = ("precision", "recall", "inception_score", "probe_score", "clip_score", "psnr", "ssim")
"""Scores of which the highest is best; of the others, the lowest."""
OF_INCEPTION = (Metric.FID, Metric.SFID, Metric.KID, Metric.PRECISION_RECALL)
"""Metrics of two sets of Inception's features."""
OF_CLASSES = (Metric.INCEPTION_SCORE, Metric.PROBE_SCORE)
"""Metrics of one set of Inception's features."""
OF_CLIP = (Metric.CMMD, Metric.CLIP_SCORE)
OF_PAIRS = (Metric.PSNR, Metric.SSIM, Metric.LPIPS_ALEX, Metric.LPIPS_VGG, Metric.PSIM)
"""Metrics of images and their counterparts of the same name."""
