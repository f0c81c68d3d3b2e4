"""First Block Cache's guard on the models of the zoo that make video with sound: LTX-2 and MiniMax-H3."""

from dataclasses import replace
from math import prod

import pytest
import torch
from zoo import all_architectures

from cache_core.strategies.first_block import FirstBlockCache

MEAN = FirstBlockCache(residual_diff_threshold=0.062, max_order=0)
GUARD = replace(MEAN, guard="worst frame")
STEPS = 12  # of eight or fewer First Block Cache would count each change by how far they go


@pytest.fixture(scope="module", params=["LTX-2", "MiniMax-H3"])
def architecture(request, comfy):
    (found,) = [each for each in all_architectures() if each.name == request.param]
    if not found.is_here:
        pytest.skip("this ComfyUI does not have it")
    return found


@pytest.fixture(scope="module")
def model(architecture):
    return architecture.build()


@pytest.fixture
def shown(architecture, model, cached, reports):
    """Samples with a strategy while `change(latent, picture, step)` moves the latent, and returns the report."""
    import comfy.sample
    import comfy.samplers

    size = prod(architecture.latent[0])

    def shown(strategy, change):
        def evaluate(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
            for step, sigma in enumerate(sigmas[:-2]):  # the last step goes a long way
                now = x.clone().flatten()  # picture and sound in one row
                change(now[:size].view(architecture.latent[0]), now[size:], step)
                denoiser(now.view_as(x), sigma * x.new_ones([x.shape[0]]), **extra_args)
            return x

        sigmas = torch.cat((torch.linspace(0.7, 0.69, STEPS), torch.zeros(1)))
        positive, negative = architecture.prompts()
        comfy.sample.sample_custom(
            cached(model, strategy), architecture.noise(), 1.0, comfy.samplers.KSAMPLER(evaluate), sigmas,
            positive, negative, architecture.empty_latent(), noise_mask=None, callback=None, disable_pbar=True, seed=0,
        )  # fmt: skip
        return reports.all[-1]

    return shown


def drawn(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))


def still(picture, sound, step):
    pass


def other_sound(picture, sound, step):
    sound.copy_(drawn(sound.shape, step))


def other_frame(picture, sound, step):
    picture[:, :, 1] = drawn(picture[:, :, 1].shape, step)


each_change = pytest.mark.parametrize("change", [other_sound, other_frame])


@each_change
def test_by_the_mean_calls_are_reused_although_the_sound_or_a_frame_changes(shown, change):
    assert shown(MEAN, change).count("reused") >= 2


@each_change
def test_with_the_guard_those_calls_are_computed(shown, change):
    report = shown(GUARD, change)
    assert report.count("reused") == 0, [call.measure for call in report.calls]
    assert not any("guard" in note for note in report.notes)  # frames were found


def test_with_the_guard_a_video_that_stands_still_is_reused(shown):
    assert shown(GUARD, still).count("reused") >= 2
