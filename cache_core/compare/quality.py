"""How close pictures are to a reference: PSNR and SSIM, on pictures (..., 3, height, width) in 0..1."""

import math
from collections.abc import Iterable
from statistics import fmean

import torch
from torch import Tensor

_SIGMA, _RADIUS = 1.5, 5  # of the Gaussian window of Wang et al. 2004, in pixels: 11 by 11
_MEANS, _VARIANCES = 0.01**2, 0.03**2  # their constants for a range of 1, which keep flat areas from dividing by zero


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of all pictures together; inf if they are identical."""
    error = (pictures.float() - reference.float()).square().mean(dtype=torch.double).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(pictures: Tensor, reference: Tensor) -> float:
    """Structural similarity, the mean over all pictures and channels; 1 if they are identical. Wang et al. 2004.

    Where the window would reach over the edge nothing is measured; on pictures smaller than it, it is cut to fit.
    """
    size = pictures.shape[-2:]
    x, y = (tensor.float().reshape(-1, *size) for tensor in (pictures, reference))  # (channels, height, width)
    total = sum(_similarity(*channel) for channel in zip(x, y, strict=True))  # one by one: it bounds the memory
    return total / len(x)


def closeness(pictures: Iterable[Tensor], reference: Iterable[Tensor]) -> tuple[float, float]:
    """PSNR in dB and SSIM of all pictures together, one by one: of each side one (3, height, width) is at hand."""
    errors, similarities = [], []
    for picture, other in zip(pictures, reference, strict=True):
        errors.append((picture.float() - other.float()).square().mean(dtype=torch.double).item())
        similarities.append(ssim(picture, other) if errors[-1] else 1.0)
    error = fmean(errors)
    return math.inf if error == 0 else -10 * math.log10(error), fmean(similarities)


def _similarity(x: Tensor, y: Tensor) -> float:
    """Of one channel, (height, width)."""
    mean_x, mean_y, square_x, square_y, product = _blurred(torch.stack([x, y, x * x, y * y, x * y])).double()
    variances = square_x - mean_x**2 + square_y - mean_y**2
    likeness = (2 * mean_x * mean_y + _MEANS) * (2 * (product - mean_x * mean_y) + _VARIANCES)
    return (likeness / ((mean_x**2 + mean_y**2 + _MEANS) * (variances + _VARIANCES))).mean().item()


def _blurred(pictures: Tensor) -> Tensor:
    """Of (..., height, width), smaller by the window. Sums of shifted pictures: ten times as fast as a convolution."""
    for axis in (-2, -1):
        radius = min(_RADIUS, (pictures.shape[axis] - 1) // 2)
        weights = [math.exp(-0.5 * (offset / _SIGMA) ** 2) for offset in range(-radius, radius + 1)]
        inside = pictures.shape[axis] - 2 * radius
        blurred = torch.zeros_like(pictures.narrow(axis, 0, inside))
        for start, weight in enumerate(weights):
            blurred.add_(pictures.narrow(axis, start, inside), alpha=weight / sum(weights))
        pictures = blurred
    return pictures
