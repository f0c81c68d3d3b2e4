"""`target_speedup` on the demo model: as many steps are computed as were asked for, whatever the sampler."""

import pytest
import torch
from test_windows import LOOPED, STATIC, STEPS, relative, sample, windowed  # noqa: F401 - fixtures
from torch.utils.flop_counter import FlopCounterMode

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.step import Schedule
from cache_core.strategy.wish import NOT_PLANNED

WISHES = [TaylorSeerCache(target_speedup=2.0), FirstBlockCache(target_speedup=1.5)]
EACH = pytest.mark.parametrize("strategy", WISHES, ids=lambda strategy: strategy.title)
CLOSE = 0.025  # of the uncached run's work: half a step of twenty


def drawn(demo, scenes, model, **options):
    """A latent, and what PyTorch counted on the way to it."""
    with FlopCounterMode(display=False) as counter:
        latent = demo.sample(model, scenes(1), steps=STEPS, **options)
    return latent, counter.get_total_flops()


@EACH
@pytest.mark.parametrize("sampler", ["euler", "res_multistep", "dpmpp_2m", "heun", "euler_ancestral"])
def test_so_much_work_is_done_as_was_asked_for(demo, cached, reports, scenes, strategy, sampler):
    _, whole = drawn(demo, scenes, demo.model(), sampler=sampler)
    latent, done = drawn(demo, scenes, cached(demo.model(), strategy), sampler=sampler)
    (report,) = reports.all

    assert torch.isfinite(latent).all()
    assert abs(done / whole - 1 / strategy.target_speedup) < CLOSE
    computed = {call.step.index for call in report.calls if call.action == "computed"}
    assert computed.isdisjoint(call.step.index for call in report.calls if call.action != "computed")
    assert {0, STEPS - 1} <= computed and len(computed) == (10 if strategy is WISHES[0] else 12)
    assert not [note for note in report.notes if "target_speedup" in note]


@pytest.mark.parametrize("shift", [1.0, 6.0])
def test_the_steps_computed_are_those_planned_and_both_prompts_alike(demo, cached, reports, scenes, comfy, shift):
    model = demo.shifted(demo.model(), shift)
    sigmas = comfy.samplers.KSampler(model, STEPS, "cpu", "euler", "simple").sigmas.tolist()
    for cfg in (1.0, 3.0):
        demo.sample(cached(model, WISHES[0]), scenes(1), steps=STEPS, cfg=cfg)
        computed = [call.step.index for call in reports.all[-1].calls if call.action == "computed"]
        assert sorted({*computed}) == list(WISHES[0].computed_steps(Schedule(sigmas)))
        assert reports.all[-1].count("forecast", "reused") == 10


def test_what_can_not_be_reached_is_said(demo, cached, reports, scenes):
    demo.sample(cached(demo.model(), FirstBlockCache(target_speedup=5.0, repair="off")), scenes(1), steps=STEPS)
    (note,) = reports.all[0].notes
    assert note.startswith("target_speedup 5: 2.") and note.endswith("20 steps and First Block Cache's own cost allow")
    assert reports.all[0].count("computed") == STEPS // 5


@EACH
def test_in_windows_that_stay_it_is_met_and_closer_than_fewer_steps(
    demo, cached, reports, sample, windowed, strategy  # noqa: F811
):  # fmt: skip
    plain = sample(windowed(demo.model(), STATIC))
    error = relative(sample(windowed(cached(demo.model(), strategy), STATIC)), plain)
    computed = {call.step.index for call in reports.all[0].calls if call.action == "computed"}
    assert len(computed) == (10 if strategy is WISHES[0] else 12) and not reports.all[0].notes
    assert 0 < error < 0.8 * relative(sample(windowed(demo.model(), STATIC), steps=len(computed)), plain)


def test_in_windows_that_move_it_can_not_be_and_the_report_says_why(
    demo, cached, reports, sample, windowed  # noqa: F811
):  # fmt: skip
    assert torch.isfinite(sample(windowed(cached(demo.model(), WISHES[0]), LOOPED))).all()
    assert reports.all[0].count("computed") > 0.9 * len(reports.all[0].calls)
    assert NOT_PLANNED.format(2.0) in reports.all[0].notes
