"""The demo without ComfyUI: every method of its table runs through diffusers, reuses, and keeps the picture."""

import pytest
import torch

from cache_core.compare.quality import psnr
from cache_core.demo import PROMPTS, codec, sampling
from cache_core.demo.methods import STEPS, methods
from cache_core.demo.still_life import SIZE
from cache_core.demo.with_diffusers import denoised, sampler

METHODS = [method for method in methods() if method.strategy is not None]


@pytest.fixture(scope="module")
def uncached():
    return denoised(
        sampling.load_transformer(), None, PROMPTS[:1], sampling.noise(0, SIZE), sampling.flow_sigmas(STEPS)
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}, {method.settings}")
def test_a_method_reuses_and_keeps_the_picture(uncached, method):
    transformer = sampling.load_transformer()
    latent, share = denoised(
        transformer, method.strategy, PROMPTS[:1], sampling.noise(0, SIZE), sampling.flow_sigmas(STEPS)
    )
    planned = {"interval 2": 0.55}.get(method.settings)
    assert share == planned if planned else 0.3 < share < 0.8
    closeness = psnr(codec.decode(latent), codec.decode(uncached[0]))
    assert 25 < closeness < 90
    assert not hasattr(transformer, "_diffusers_hook")


def test_a_picture_of_the_demo_says_how_long_it_took_and_what_was_computed():
    with sampler() as sample, torch.no_grad():
        made = sample(METHODS[0], PROMPTS[0], 0)
    assert made.pictures.shape == (1, 3, SIZE, SIZE)
    assert made.seconds > 0 and 0.3 < made.computed_share < 0.8
