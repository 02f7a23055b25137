"""Metrics of pairs of images: PSNR and SSIM, one number per image; their mean over images is what tables print.

    PSNR   10 log₁₀(255² / MSE), MSE over all pixels and channels of the image
    SSIM   Wang et al. 2004: Gaussian windows of 11×11 with σ 1.5, K₁ 0.01, K₂ 0.03, per channel, mean over the windows
           that lie wholly inside the image

Of uint8 images. Tables that pool the error over all images before the logarithm have lower PSNR; those with padding or
uniform windows have another SSIM. LPIPS is a network (models/lpips).
"""

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Images = UInt8[np.ndarray, "images height width 3"]


def psnr(one: Images, other: Images) -> Float64[np.ndarray, " images"]:
    """Peak signal-to-noise ratio of each pair of images, in dB; infinite for equal ones."""
    error = np.array([np.square(x.astype(np.float64) - y).mean() for x, y in zip(one, other, strict=True)])
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / error)


def ssim(one: Images, other: Images) -> Float64[np.ndarray, " images"]:
    """Structural similarity of each pair of images, −1..1; 1 for equal ones. Sides are at least 11 pixels."""
    return np.array([_ssim(x, y) for x, y in zip(one, other, strict=True)])


def _ssim(one: UInt8[np.ndarray, "height width 3"], other: UInt8[np.ndarray, "height width 3"]) -> float:
    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = _windows(x), _windows(y)
    variances = _windows(x * x) + _windows(y * y) - mean_x**2 - mean_y**2
    covariance = _windows(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return float((luminance * (2 * covariance + _C2) / (variances + _C2)).mean())


def _windows(
    values: Float64[np.ndarray, "height width 3"],
) -> Float64[np.ndarray, "windows_down windows_across 3"]:
    """Gaussian-weighted means of the windows that lie wholly inside."""
    border = _WINDOW // 2
    blurred = cv2.GaussianBlur(values, (_WINDOW, _WINDOW), _SIGMA)
    return blurred[border:-border, border:-border]
