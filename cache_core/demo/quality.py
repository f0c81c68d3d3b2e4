"""How close a picture is to a reference: PSNR and SSIM, on pictures (3, height, width) in 0..1."""

import math

from torch import Tensor


def psnr(picture: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, inf for identical pictures."""
    error = (picture.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(picture: Tensor, reference: Tensor) -> float:
    """Structural similarity, 1 for identical pictures, with the Gaussian window of Wang et al. 2004."""
    from skimage.metrics import structural_similarity

    return float(
        structural_similarity(
            picture.double().cpu().numpy(),
            reference.double().cpu().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
