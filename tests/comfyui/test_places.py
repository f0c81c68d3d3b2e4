"""Latents that change their size, guiders that skip ComfyUI's wrappers, model calls about another place or picture."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import closeness
from test_foreign_caches import PUBLISHED

from cache_core.run.going_on import ANOTHER_LATENT
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import NOISE_IS_ADDED, TaylorSeerCache

STRATEGIES = [FirstBlockCache(), TaylorSeerCache(), PyramidAttentionBroadcast(), FasterCache()]
EVERY = [*STRATEGIES, TaylorSeerCache(cache_level="model"), TaylorSeerCache(cache_level="block")]
TRUSTING = [TaylorSeerCache(), PyramidAttentionBroadcast(), FasterCache(), TaylorSeerCache(cache_level="model")]
for_every = pytest.mark.parametrize("strategy", EVERY, ids=lambda s: f"{s.title} {getattr(s, 'cache_level', '')}")
for_trusting = pytest.mark.parametrize("strategy", TRUSTING, ids=lambda s: f"{s.title} {getattr(s, 'cache_level', '')}")
OFF = [FirstBlockCache(residual_diff_threshold=0.0), TaylorSeerCache(cache_interval=1)]


@pytest.fixture
def sampled(demo, scenes, cached, reports, comfy, monkeypatch):
    """The latent of a scene, and with a strategy the report; `change(model)` is done last, `sampler` a function."""

    def sample(strategy=None, sampler=None, change=lambda model: model, **options):
        if sampler is not None:
            monkeypatch.setattr(comfy.samplers, "sampler_object", lambda _: comfy.samplers.KSAMPLER(sampler))
        model = change(demo.model() if strategy is None else cached(demo.model(), strategy))
        latent = demo.sample(model, scenes(1), **options)
        return latent, reports.all[-1] if strategy else None

    return sample


def resizing(at, size):
    """Euler, with the latent scaled to another size at one step."""

    def sample(model, latent, sigmas, extra_args, **_):
        for step, (sigma, following) in enumerate(pairwise(sigmas)):
            if step == at:
                latent = torch.nn.functional.interpolate(latent, size=size, mode="nearest")
            denoised = model(latent, sigma * latent.new_ones(len(latent)), **extra_args)
            latent = latent + (latent - denoised) / sigma * (following - sigma)
        return latent

    return sample


@for_every
@pytest.mark.parametrize("size", [(8, 12), (6, 6)], ids=str)
def test_a_latent_that_changes_its_size_begins_anew(sampled, strategy, size):
    sampler = resizing(9, size)
    plain, (latent, report) = sampled(sampler=sampler)[0], sampled(strategy, sampler)
    actions = [call.action for call in report.calls if "positive" in call.branches]
    assert actions[9] == "computed" and latent.shape[-2:] == size
    assert {"reused", "forecast"} & {*actions[:9]} and {"reused", "forecast"} & {*actions[10:]}
    assert ((latent - plain).norm() / plain.norm()).item() < 0.35
    assert NOISE_IS_ADDED not in report.notes


@pytest.mark.parametrize("strategy", OFF, ids=lambda s: s.title)
def test_off_is_off_where_a_latent_changes_its_size(sampled, strategy):
    plain, (latent, _) = (sampled(each, resizing(4, (8, 12)), steps=8) for each in (None, strategy))
    assert torch.equal(latent, plain[0])


@for_every
def test_comfyuis_upscaling_sampler_runs(sampled, comfy, strategy):
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    sampler = SamplerLCMUpscale.execute(2.0, 6, "bislerp").args[0]
    plain, (latent, report) = (
        sampled(each, sampler.sampler_function and _with_options(sampler), cfg=1.5) for each in (None, strategy)
    )
    assert latent.shape == plain[0].shape == (1, 16, 16, 16)
    assert torch.isfinite(latent).all() and len(report.calls) >= 20


def _with_options(sampler):
    return lambda model, latent, sigmas, **options: sampler.sampler_function(
        model, latent, sigmas, **(options | sampler.extra_options)
    )


@pytest.fixture
def guided(demo, comfy, cached, reports):
    """Sample with a guider whose class has these methods; with a strategy also its report."""

    def sample(strategy=None, sampler="euler", **methods):
        guider = type("Guider", (comfy.samplers.CFGGuider,), methods)(
            demo.model() if strategy is None else cached(demo.model(), strategy)
        )
        draw = torch.Generator().manual_seed(7)
        tokens, pooled = torch.randn(1, 8, 96, generator=draw), torch.randn(1, 96, generator=draw)
        guider.set_conds([[tokens, {"pooled_output": pooled}]], [[0 * tokens, {"pooled_output": 0 * pooled}]])
        guider.set_cfg(3.0)
        shape, sigmas = (
            (1, 16, 8, 8),
            comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", 20),
        )
        noise = comfy.sample.prepare_noise(torch.zeros(shape), 1)
        latent = guider.sample(
            noise, torch.zeros(shape), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1
        )
        return latent, reports.all[-1] if strategy else None

    return sample


def straight(guider, *args, **kwargs):
    """`__call__` as some packs have it: past ComfyUI's wrapper around the prediction."""
    return guider.predict_noise(*args, **kwargs)


def by_itself(guider, x, timestep, model_options, seed=None):
    """Its own weighing of the prompts, by one look at both."""
    import comfy.samplers

    conds = [guider.conds["positive"], guider.conds["negative"]]
    positive, negative = comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, timestep, model_options)
    return negative + 3.0 * (positive - negative)


def look_by_look(guider, x, timestep, model_options, seed=None):
    """The same by one look at each."""
    import comfy.samplers

    positive, negative = (
        comfy.samplers.calc_cond_batch(guider.inner_model, [guider.conds[name]], x, timestep, model_options)[0]
        for name in ("positive", "negative")
    )
    return negative + 3.0 * (positive - negative)


PAST_THE_WRAPPERS = {"predict_noise": straight, "both at once": by_itself, "one by one": look_by_look}


@for_every
@pytest.mark.parametrize("name", ["predict_noise", "both at once"])
def test_a_guider_that_skips_the_wrappers_reuses_like_any_other(guided, strategy, name):
    """Nothing is repaired past them."""
    strategy = replace(strategy, repair="off") if strategy.repair == "on" else strategy
    latent, report = guided(strategy, __call__=PAST_THE_WRAPPERS[name])
    usual_latent, usual = guided(strategy)
    assert [call.action for call in report.calls] == [call.action for call in usual.calls]
    assert usual.count("reused", "forecast") > 0 and report.bytes_held == usual.bytes_held
    assert torch.allclose(latent, usual_latent, atol=1e-5)


@for_every
def test_a_guider_that_looks_at_prompt_by_prompt_reuses_too(guided, strategy):
    """FasterCache finds no pair to estimate one from; its attention is extrapolated, of both prompts as else at 650."""
    strategy = PUBLISHED if isinstance(strategy, FasterCache) else strategy
    latent, report = guided(strategy, __call__=look_by_look)
    plain, usual = guided(__call__=look_by_look)[0], guided(strategy)[1]
    assert {call.evaluation for call in report.calls} == {call.evaluation for call in usual.calls}
    assert report.count("reused", "forecast") >= 4
    assert ((latent - plain).norm() / plain.norm()).item() < 0.3
    assert report.bytes_held <= usual.bytes_held


def test_a_step_of_heun_is_computed_once_past_the_wrappers_too(guided):
    (latent, report), (usual_latent, usual) = (
        guided(TaylorSeerCache(), "heun", **how) for how in ({"__call__": straight}, {})
    )
    assert torch.equal(latent, usual_latent)
    assert [call.action for call in report.calls] == [call.action for call in usual.calls]


@pytest.mark.parametrize("strategy", OFF, ids=lambda s: s.title)
@pytest.mark.parametrize("name", PAST_THE_WRAPPERS)
def test_off_is_off_past_the_wrappers(guided, strategy, name):
    call = PAST_THE_WRAPPERS[name]
    assert torch.equal(guided(strategy, __call__=call)[0], guided(__call__=call)[0])


def test_noise_is_seen_past_the_wrappers(guided):
    notes = [guided(TaylorSeerCache(), s, __call__=straight)[1].notes for s in ("euler", "euler_ancestral")]
    assert [NOISE_IS_ADDED in found for found in notes] == [False, True]


def counting():
    """How many timesteps a function was called for before this one."""
    seen = []

    def step_of(timestep):
        time = timestep.max().item()
        if time not in seen:
            seen.append(time)
        return seen.index(time)

    return step_of


def in_tiles(offset):
    """A model function that cuts the latent in two, from an offset that may change at each step; rolled back."""

    def change(model):
        step_of = counting()

        def tiled(apply_model, given):
            x, t = given["input"], given["timestep"]
            moved = offset(step_of(t))
            x = x.roll((moved, moved), (-2, -1))
            out = torch.zeros_like(x)
            for left in (0, 4):
                out[..., left : left + 4] = apply_model(x[..., left : left + 4], t, **given["c"])
            return out.roll((-moved, -moved), (-2, -1))

        changed = model.clone()
        changed.set_model_unet_function_wrapper(tiled)
        return changed

    return change


def rolled(offset):
    """A model function that rolls the latent by an offset that changes at each step, as for seamless textures."""

    def change(model):
        step_of = counting()

        def roll(apply_model, given):
            moved = offset(step_of(given["timestep"]))
            out = apply_model(given["input"].roll(moved, -1), given["timestep"], **given["c"])
            return out.roll(-moved, -1)

        changed = model.clone()
        changed.set_model_unet_function_wrapper(roll)
        return changed

    return change


MOVING = {
    "tiles that move": lambda: in_tiles(lambda step: 3 * step % 8),
    "tiles in two grids": lambda: in_tiles(lambda step: 2 * (step % 2)),
    "a latent that rolls": lambda: rolled(lambda step: 3 * step % 8),
}


ELSEWHERE = [*((name, TRUSTING[0]) for name in MOVING), *(("tiles that move", strategy) for strategy in TRUSTING[1:])]


@pytest.mark.parametrize(("name", "strategy"), ELSEWHERE, ids=str)
def test_another_place_is_not_forecast_from_this_one(sampled, strategy, name):
    """Was 17 to 24 dB, coloured speckle."""
    plain = sampled(change=MOVING[name]())[0]
    latent, report = sampled(strategy, change=MOVING[name]())
    assert closeness(latent, plain) > 34
    assert ANOTHER_LATENT in report.notes


@pytest.mark.parametrize("strategy", [TaylorSeerCache(), FasterCache()], ids=lambda s: s.title)
def test_tiles_that_stay_are_reused(sampled, strategy):
    plain, (latent, report) = (sampled(each, change=in_tiles(lambda step: 1)) for each in (None, strategy))
    assert ANOTHER_LATENT not in report.notes and report.count("reused", "forecast") >= 10
    assert closeness(latent, plain[0]) > 30


@pytest.mark.parametrize("strategy", OFF, ids=lambda s: s.title)
@pytest.mark.parametrize("name", MOVING)
def test_off_is_off_at_any_place(sampled, strategy, name):
    plain, (latent, _) = (sampled(each, change=MOVING[name](), steps=6) for each in (None, strategy))
    assert torch.equal(latent, plain[0])


def in_turns(model, latent, sigmas, extra_args, **_):
    """Euler on two pictures in turns, within one run."""
    latents = [latent, latent.flip(-2).roll(3, -1)]
    for sigma, following in pairwise(sigmas):
        for which in range(2):
            denoised = model(latents[which], sigma * latent.new_ones(len(latent)), **extra_args)
            latents[which] = latents[which] + (latents[which] - denoised) / sigma * (following - sigma)
    return latents[0]


@for_trusting
def test_two_pictures_in_turns_are_not_forecast_from_each_other(sampled, strategy):
    plain, (latent, report) = sampled(sampler=in_turns)[0], sampled(strategy, in_turns)
    assert closeness(latent, plain) > 34
    assert ANOTHER_LATENT in report.notes


@pytest.mark.parametrize("sampler", ["lcm", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_sampler_that_adds_noise_is_not_taken_for_another_picture(demo, scenes, cached, reports, sampler):
    demo.sample(cached(demo.model(), TaylorSeerCache()), scenes(2), sampler=sampler)
    (report,) = reports.all
    assert ANOTHER_LATENT not in report.notes and report.count("reused", "forecast") >= 8
