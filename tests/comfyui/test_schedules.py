"""Sigma lists that do not simply fall, sigmas that are not on a list, and how models count them."""

from itertools import pairwise

import pytest
import torch
from conftest import closeness
from zoo import all_architectures

from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import NOISE_IS_ADDED, TaylorSeerCache

TAYLORSEER = [TaylorSeerCache(cache_interval=4), TaylorSeerCache(cache_interval=4, cache_level="model")]
OFF = [FirstBlockCache(residual_diff_threshold=0.0), TaylorSeerCache(cache_interval=1)]
OTHERS = [FirstBlockCache(), PyramidAttentionBroadcast(), FasterCache()]
SCENES = 4


def even(first, last, steps):
    return [first + (last - first) * step / steps for step in range(steps + 1)]


FALLING = even(1.0, 0.0, 20)
RISING = {  # lists that rise: all steps, and as few as TaylorSeer computes
    "FlipSigmas": (even(1e-4, 0.99, 20), even(1e-4, 0.99, 7)),
    "inversion to .95": (even(1e-3, 0.95, 20), even(1e-3, 0.95, 7)),
    "from half": (even(0.5, 0.98, 20), even(0.5, 0.98, 7)),
}
BENT = {  # lists that fall and rise: all steps, and at least as many as TaylorSeer computes
    "a bump": ([*even(1.0, 0.4, 12), *even(0.7, 0.0, 8)], [*even(1.0, 0.4, 5), *even(0.7, 0.0, 4)]),
    "a restart": (
        [*even(1.0, 0.2, 12), *even(0.8, 0.2, 6), *even(0.2, 0.0, 3)[1:]],
        [*even(1.0, 0.2, 5), *even(0.8, 0.2, 3), *even(0.2, 0.0, 2)[1:]],
    ),
    "two bumps": (
        [*even(1.0, 0.6, 8), *even(0.8, 0.3, 8), *even(0.5, 0.0, 8)],
        [*even(1.0, 0.6, 4), *even(0.8, 0.3, 4), *even(0.5, 0.0, 4)],
    ),
}


@pytest.fixture(scope="module")
def clean(demo, scenes):
    """Finished latents of the scenes."""
    return demo.sample(demo.model(), scenes(SCENES))


@pytest.fixture
def sampled(demo, scenes, cached, reports, clean):
    """Latents along a list of sigmas, and with a strategy the report; a list that begins low goes on from pictures."""

    def sample(sigmas, strategy=None, sampler="euler"):
        model = demo.model() if strategy is None else cached(demo.model(), strategy)
        start = clean if sigmas[0] < 0.6 else None
        options = dict(
            steps=len(sigmas) - 1, sigmas=torch.tensor(sigmas), latent=start, disable_noise=start is not None
        )
        latent = demo.sample(model, scenes(SCENES), sampler=sampler, **options)
        return latent, reports.all[-1] if strategy else None

    return sample


@pytest.mark.parametrize("strategy", TAYLORSEER, ids=lambda strategy: strategy.cache_level)
@pytest.mark.parametrize("name", RISING)
def test_rising_sigmas_are_forecast_better_than_fewer_steps_do(sampled, name, strategy):
    """They were read as one step: 1 or 2 of 20 computed."""
    sigmas, fewer = RISING[name]
    plain = sampled(sigmas)[0]
    latent, report = sampled(sigmas, strategy)
    assert report.count("computed") == len(fewer) - 1 and report.count("reused", "forecast") == 21 - len(fewer)
    assert NOISE_IS_ADDED not in report.notes
    error, of_fewer = ((found - plain).norm() for found in (latent, sampled(fewer)[0]))
    assert error < of_fewer


@pytest.mark.parametrize("strategy", TAYLORSEER, ids=lambda strategy: strategy.cache_level)
@pytest.mark.parametrize("name", BENT)
def test_sigmas_that_turn_round_are_forecast_better_than_fewer_steps_do(sampled, name, strategy):
    sigmas, fewer = BENT[name]
    plain = sampled(sigmas)[0]
    latent, report = sampled(sigmas, strategy)
    assert report.count("computed") <= len(fewer) - 1 and report.count("reused", "forecast") >= 9
    assert closeness(latent, plain) > closeness(sampled(fewer)[0], plain)
    assert any("both fall and rise" in note for note in report.notes) and report.steps == len(sigmas) - 1


@pytest.mark.parametrize("strategy", OTHERS, ids=lambda strategy: strategy.title)
def test_the_others_reuse_where_sigmas_turn_round(sampled, strategy):
    sigmas, fewer = BENT["a bump"]
    plain, (latent, report) = sampled(sigmas)[0], sampled(sigmas, strategy)
    assert report.count("reused", "forecast") >= 8
    assert closeness(latent, plain) > closeness(sampled(fewer)[0], plain) - 1


@pytest.mark.parametrize("strategy", OTHERS[:2], ids=lambda strategy: strategy.title)
def test_the_others_reuse_where_sigmas_rise(sampled, strategy):
    sigmas, fewer = RISING["inversion to .95"]
    plain, (latent, report) = sampled(sigmas)[0], sampled(sigmas, strategy)
    assert report.count("reused", "forecast") >= 4
    assert (latent - plain).norm() < (sampled(fewer)[0] - plain).norm()


@pytest.mark.parametrize("strategy", OFF, ids=lambda strategy: strategy.title)
@pytest.mark.parametrize("name", [*RISING, *BENT])
def test_off_is_off_on_any_list(sampled, name, strategy):
    sigmas = (RISING | BENT)[name][1]
    assert torch.equal(sampled(sigmas, strategy)[0], sampled(sigmas)[0])


@pytest.mark.parametrize("repeated", [1, 4, 10])
def test_a_planned_step_of_no_length_is_not_lost(sampled, repeated):
    """Equal neighbours: whatever step they hide, as much is computed as on the list without them."""
    sigmas = sorted([*FALLING, *3 * [FALLING[repeated]]], reverse=True)
    strategy, plain = TaylorSeerCache(cache_interval=3), sampled(FALLING)[0]
    latent, report = sampled(sigmas, strategy)
    assert 7 <= report.count("computed") <= 10 and report.count("forecast") >= 10
    assert closeness(latent, plain) > 38


@pytest.mark.parametrize("zeros", [1, 2])
def test_a_list_that_is_padded_with_zeros_in_front_is_sampled_like_one_without(
    demo, comfy, scenes, cached, reports, monkeypatch, zeros
):
    def sample(model, latent, sigmas, extra_args, **_):
        latent = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        for sigma, following in list(pairwise(sigmas))[-20:]:
            denoised = model(latent, sigma * latent.new_ones(len(latent)), **extra_args)
            latent = latent + (latent - denoised) / sigma * (following - sigma)
        return latent

    def sampled(model, sigmas):
        return demo.sample(model, scenes(SCENES), steps=len(sigmas) - 1, sigmas=torch.tensor(sigmas))

    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda _: comfy.samplers.KSAMPLER(sample))
    plain, strategy = sampled(demo.model(), FALLING), TaylorSeerCache(cache_interval=3)
    assert torch.equal(sampled(demo.model(), [*zeros * [0.0], *FALLING]), plain)
    latents = [sampled(cached(demo.model(), strategy), [*padding, *FALLING]) for padding in ([], zeros * [0.0])]
    usual, padded = reports.all
    assert padded.count("forecast", "reused") >= 10 and padded.count("computed") <= usual.count("computed") + 2
    assert closeness(latents[1], plain) > closeness(latents[0], plain) - 2


SCALES = {
    "in the middle": lambda step: 0.85 if 5 <= step < 12 else 1.0,
    "late": lambda step: 1.0 if step < 6 else 0.85,
    "by turns": lambda step: (0.93, 1.0)[step % 2],
}


@pytest.fixture(params=SCALES)
def detailed(request, demo, comfy, scenes, monkeypatch):
    """Pictures of a sampler that tells the model less noise than there is, for more detail."""

    def sample(model, latent, sigmas, extra_args, **_):
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            told = sigma * SCALES[request.param](step)
            denoised = model(latent, told * latent.new_ones(len(latent)), **extra_args)
            latent = latent + (latent - denoised) / sigma * (following - sigma)
        return latent

    monkeypatch.setattr(comfy.samplers, "sampler_object", lambda _: comfy.samplers.KSAMPLER(sample))
    return lambda model, steps=20: demo.sample(model, scenes(SCENES), steps=steps)


def test_no_planned_step_is_missed_whatever_sigma_a_sampler_asks_at(demo, detailed, cached, reports):
    """Those were skipped whose interval no sigma fell into: 32.6 dB."""
    strategy, schedule = TaylorSeerCache(cache_interval=3), schedule_of_demo(demo)
    latent, report = detailed(cached(demo.model(), strategy)), reports.all[-1]
    report.close()
    for planned in strategy.computed_steps(schedule):
        assert next(call for call in report.calls if call.step.index >= planned).action == "computed"
    assert report.count("reused", "forecast") >= 10
    plain = detailed(demo.model())
    assert closeness(latent, plain) > closeness(detailed(demo.model(), steps=report.count("computed")), plain) + 3


def schedule_of_demo(demo):
    from cache_core.adapters.comfyui.schedules import schedule_for

    return schedule_for(demo.model(), torch.tensor(FALLING))


@pytest.mark.parametrize(
    ("name", "time"), [("PixArt", 1.2 / 2.2), ("Stable Audio 1", 1.2 / 2.2), ("Cosmos 1", 1.2 / 2.2)]
)
def test_a_schedule_that_begins_low_is_read_as_its_model_counts(comfy, name, time):
    """Models that add noise to the picture: a refining run begins below 1.5, where flow models' sigmas are."""
    from cache_core.adapters.comfyui.schedules import schedule_for

    (architecture,) = [found for found in all_architectures() if found.name == name]
    step = schedule_for(architecture.build(), torch.tensor([1.2, 0.6, 0.2, 0.0])).step_at(1.2)
    assert step.time == pytest.approx(time)
    assert 0 < step.timestep < 1000


def test_a_flow_model_counts_a_sigma_above_one_as_it_is(demo):
    from cache_core.adapters.comfyui.schedules import schedule_for

    assert schedule_for(demo.model(), torch.tensor([2.0, 1.0, 0.0])).step_at(0.5).time == 0.5
