"""Skipped steps repaired in hindsight, on the demo model: what it gains, and everywhere it must leave alone."""

from functools import cache
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from conftest import Reports
from test_conditioning import areas, prompt

from cache_core.compare.quality import psnr
from cache_core.demo.codec import FLUX_SCALE, FLUX_SHIFT, decode
from cache_core.run.repairing import CANNOT, UNKNOWN_SOLVER
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

COUNT, SEED = 8, 100
FIRST_BLOCK, TAYLORSEER = FirstBlockCache(), TaylorSeerCache(cache_interval=2)
BOTH = pytest.mark.parametrize("strategy", [FIRST_BLOCK, TAYLORSEER], ids=lambda strategy: strategy.title)


def repairing(strategy, repair="on"):
    return type(strategy)(**{**vars(strategy), "repair": repair})


@pytest.fixture(scope="module")
def run(demo, scenes):
    """Sample the first scenes in one batch, uncached or cached; with the report, which is None where it is uncached."""
    from cache_core.adapters.comfyui import with_cache

    @cache
    def sampled(strategy=None, count=COUNT, shift=3.0, **options):
        reports, model = Reports(), demo.shifted(demo.model(), shift)
        model = with_cache(model, strategy, watch=reports.watch) if strategy else model
        latent = demo.sample(model, scenes(count), seed=SEED, **options)
        return SimpleNamespace(latent=latent, report=reports.all[0] if strategy else None)

    return sampled


def decibels(some, reference):
    """Of each picture."""
    some, reference = (decode((each - FLUX_SHIFT) * FLUX_SCALE) for each in (some.latent, reference.latent))
    return [psnr(one, other) for one, other in zip(some, reference, strict=True)]


def gains(run, strategy, **options):
    """By how much repair brings each picture closer to the uncached one, and the run with it."""
    plain, off, on = (run(each, **options) for each in (None, repairing(strategy, "off"), repairing(strategy)))
    assert off.report.count("reused", "forecast") >= 6 and on.report.count("reused", "forecast") >= 6
    assert off.report.gaps_repaired == 0 and not off.report.unrepaired
    pairs = zip(decibels(on, plain), decibels(off, plain), strict=True)
    return [closer - before for closer, before in pairs], on, off


@pytest.mark.parametrize(("threshold", "gain"), [(0.08, 3), (0.12, 4)])
def test_first_block_cache_is_closer_with_repair(run, threshold, gain):
    """Picture by picture. A jump may show in the first block: a step of twenty more is computed at most."""
    differences, on, off = gains(run, FirstBlockCache(residual_diff_threshold=threshold))
    assert median(differences) >= gain and sum(each > 0 for each in differences) >= 6
    assert on.report.gaps_repaired >= 4 and f"{on.report.gaps_repaired} gaps repaired" in on.report.line()
    assert on.report.computed_share <= off.report.computed_share + 0.05


def test_taylorseer_computes_the_same_steps_and_its_worst_pictures_get_closer(run):
    differences, on, off = gains(run, TAYLORSEER, shift=1.0)
    assert on.report.gaps_repaired == 5 and on.report.computed_share == off.report.computed_share
    assert median(differences) > 0
    plain = run(shift=1.0)
    assert min(decibels(on, plain)) > min(decibels(off, plain)) + 1


@BOTH
def test_without_guidance(run, strategy):
    differences, on, _ = gains(run, strategy, shift=1.0, cfg=1.0, count=4)
    assert on.report.gaps_repaired >= 4 and median(differences) > 0


@BOTH
@pytest.mark.parametrize("sampler", ["lms", "euler_ancestral", "uni_pc", "heun"])
def test_other_samplers_are_left_alone_bit_for_bit(run, strategy, sampler):
    options = dict(count=1, sampler=sampler)
    off, on = (run(repairing(strategy, repair), **options) for repair in ("off", "on"))
    assert torch.equal(on.latent, off.latent) and on.report.gaps_repaired == 0
    assert on.report.unrepaired == UNKNOWN_SOLVER and not any("repair" in note for note in on.report.notes)
    is_reused = strategy is TAYLORSEER or sampler == "lms"
    assert bool(on.report.count("reused", "forecast")) >= is_reused


@pytest.mark.parametrize(
    ("strategy", "gain", "of_eight", "closeness"), [(FIRST_BLOCK, 4, 7, 56), (TAYLORSEER, 2, 6, 44.5)]
)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "res_multistep"])
def test_samplers_that_look_back_are_repaired(run, strategy, gain, of_eight, closeness, sampler):
    differences, on, off = gains(run, strategy, sampler=sampler)
    assert on.report.gaps_repaired >= 4 and on.report.computed_share <= off.report.computed_share + 0.1
    assert median(differences) > gain and sum(each > 0 for each in differences) >= of_eight
    assert median(decibels(on, run(sampler=sampler))) > closeness


def test_ddim_steps_as_euler_and_is_repaired(run):
    differences, on, _ = gains(run, FIRST_BLOCK, sampler="ddim", count=3)
    assert on.report.gaps_repaired >= 4 and median(differences) > 2


@BOTH
def test_a_picture_of_a_batch_is_repaired_as_if_alone(demo, cached, reports, scenes, strategy):
    """Alone it may be computed at other steps by First Block Cache, which goes by the worst picture: twice the same."""
    one, model = scenes(1), cached(demo.shifted(demo.model(), 3), repairing(strategy))
    noise = dict(seed=SEED, latent=None)
    alone = demo.sample(model, one, **noise)
    twice = demo.sample(model, one + one, **noise)[:1]
    assert torch.allclose(twice, alone, atol=2e-3) or strategy is FIRST_BLOCK
    assert all(report.gaps_repaired >= 3 for report in reports.all)


@BOTH
def test_branches_split_are_repaired_as_if_joined(demo, cached, reports, scenes, monkeypatch, strategy):
    base, own, latents = type(demo.model().model), type(demo.model().model).memory_required, {}
    for how in ("joined", "split"):

        def needed(self, shape, *args, _how=how, **kwargs):
            return float("inf") if _how == "split" and shape[0] > 1 else own(self, shape, *args, **kwargs)

        monkeypatch.setattr(base, "memory_required", needed)
        latents[how] = demo.sample(cached(demo.model(), repairing(strategy)), scenes(1))
    joined, split = reports.all
    assert {len(call.branches) for call in split.calls} == {1} and {len(call.branches) for call in joined.calls} == {2}
    assert joined.gaps_repaired == split.gaps_repaired >= 3
    assert torch.allclose(latents["split"], latents["joined"], atol=1e-4)


@BOTH
def test_within_a_mask_and_of_a_picture(demo, cached, reports, scenes, strategy):
    """Denoise 0.8 within a mask: what is held to the picture stays that, the rest comes closer."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3:] = 1
    two = scenes(2)
    picture = demo.sample(demo.model(), two, steps=6)
    options = dict(latent=picture, denoise=0.8, noise_mask=mask, seed=3)
    plain = demo.sample(demo.model(), two, **options)
    off, on = (demo.sample(cached(demo.model(), repairing(strategy, r)), two, **options) for r in ("off", "on"))
    assert torch.allclose(on[..., :3], picture[..., :3], atol=1e-4)
    assert reports.all[1].gaps_repaired >= 3 and reports.all[1].count("reused", "forecast") >= 6
    errors = [(each - plain)[..., 3:].flatten(1).norm(dim=1) for each in (on, off)]
    assert (errors[0] / errors[1]).median() < 1


def test_prompts_for_parts_of_the_picture_leave_forecasts_of_the_output_unrepaired(demo, comfy, cached, reports):
    """What they are made of is of another shape than what would have to be moved."""
    latents = {}
    for repair in ("off", "on"):
        noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 8), 1)
        model = cached(demo.model(), repairing(TAYLORSEER, repair))
        given = (areas(), prompt(""), torch.zeros_like(noise))
        latents[repair] = comfy.sample.sample(model, noise, 20, 3.0, "euler", "simple", *given, seed=1)
    assert torch.equal(latents["on"], latents["off"]) and reports.all[1].count("forecast") >= 6
    assert reports.all[1].unrepaired == CANNOT


@pytest.mark.parametrize(
    ("strategy", "why"),
    [(FirstBlockCache(residual_diff_threshold=0.3), "above 0.2"), (TaylorSeerCache(cache_interval=3), "too far apart")],
)
def test_where_it_is_off_nothing_is_changed_and_a_word_says_why(run, strategy, why):
    off, on = (run(repairing(strategy, repair), count=1) for repair in ("off", "on"))
    assert torch.equal(on.latent, off.latent) and on.report.count("reused", "forecast") >= 6
    assert why in on.report.unrepaired and on.report.bytes_held == off.report.bytes_held
