"""PSNR and SSIM: right by hand, and the same as scikit-image's."""

import math

import pytest
import torch
from toy import relative_error

from cache_core.compare.quality import closeness, psnr, ssim


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(picture, amount, seed=1):
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return (picture + amount * noise).clamp(0, 1)


def by_scikit_image(picture, reference):
    metrics = pytest.importorskip("skimage.metrics", reason="our SSIM is compared with scikit-image's")
    return metrics.structural_similarity(
        picture.double().numpy(),
        reference.double().numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("amount", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("size", [(64, 48), (11, 11), (33, 200)])
def test_ssim_is_that_of_scikit_image(size, amount):
    reference = pictures(3, *size)
    picture = noisy(reference, amount)
    assert ssim(picture, reference) == pytest.approx(by_scikit_image(picture, reference), abs=1e-5)  # float32 sums


def test_ssim_of_smooth_pictures_is_that_of_scikit_image():
    ramp = torch.linspace(0, 1, 64).expand(3, 64, 64)
    assert ssim(ramp.mT, ramp) == pytest.approx(by_scikit_image(ramp.mT, ramp), abs=1e-5)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    black, grey = torch.zeros(3, 32, 32), torch.full((3, 32, 32), 0.5)
    assert ssim(black, grey) == pytest.approx(0.0001 / (0.25 + 0.0001), rel=1e-4)


def test_ssim_is_one_only_for_the_same_picture():
    picture = pictures(3, 32, 32)
    assert ssim(picture, picture) == 1
    assert ssim(1 - picture, picture) < 0


def test_ssim_of_several_pictures_is_their_mean():
    reference = pictures(4, 3, 24, 24)
    picture = torch.stack([noisy(one, amount) for one, amount in zip(reference, (0.0, 0.1, 0.2, 0.4))])
    each = [ssim(one, other) for one, other in zip(picture, reference)]
    assert ssim(picture, reference) == pytest.approx(sum(each) / 4)
    assert each == sorted(each, reverse=True)


def test_a_picture_smaller_than_the_window_is_measured_all_the_same():
    picture = pictures(3, 4, 20)
    assert ssim(picture, picture) == 1
    assert ssim(noisy(picture, 0.3), picture) < 0.9


def test_psnr_counts_decibels_of_all_pictures_together():
    black = torch.zeros(2, 3, 16, 16)
    half = torch.stack([black[0], black[1] + 0.1])
    assert psnr(black, black) == math.inf
    assert psnr(black + 0.1, black) == pytest.approx(20, abs=1e-4)
    assert psnr(half, black) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_one_by_one_pictures_are_as_close_as_together():
    reference = pictures(5, 3, 24, 24)
    picture = torch.stack([noisy(one, amount) for one, amount in zip(reference, (0.0, 0.01, 0.1, 0.2, 0.4))])
    assert closeness(iter(picture), iter(reference)) == pytest.approx(
        (psnr(picture, reference), ssim(picture, reference)), rel=1e-9
    )
    assert closeness(iter(reference), iter(reference)) == (math.inf, 1.0)
    with pytest.raises(ValueError, match="longer"):
        closeness(picture[:4], reference)


def test_what_is_measured_is_not_changed():
    picture = pictures(3, 16, 16)
    copy = picture.clone()
    ssim(picture, 1 - picture)
    assert relative_error(picture, copy) == 0
