"""Skipped steps are repaired in hindsight: by the formula, picture by picture, and only where the sampler is Euler."""

from itertools import pairwise

import pytest
import torch
from test_host_reads import CountingReads
from test_path import euler, reach, two_steps
from toy import NEGATIVE, POSITIVE, Sampling, Toy, first_latent, sigmas_of

from cache_core.run.path import SAME_STEP, LatentPath
from cache_core.run.repair import Repair, with_fix
from cache_core.run.repairing import BESIDE, CANNOT, NOT_EULER, NOT_FALLING, UNREPAIRED, allow_repair
from cache_core.run.run import CacheRun
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import TOO_HIGH, FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.repairing import TOO_LONG
from cache_core.strategy.step import Schedule, schedule_of

STEPS = 24
SIGMAS = sigmas_of(STEPS)
BOTH = [FirstBlockCache(residual_diff_threshold=0.2, repair="on"), TaylorSeerCache(cache_interval=2, repair="on")]
BOTH += [TaylorSeerCache(cache_interval=2, cache_level="model", repair="on")]
each = pytest.mark.parametrize("strategy", BOTH, ids=lambda strategy: f"{strategy.title}-{strategy.levels[0]}")


def without(strategy):
    return type(strategy)(**{**vars(strategy), "repair": "off"})


def ancestral(latent, sigma, following, past):
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(int(1000 * sigma)))
    return past[0][1] + following * (0.8 * (latent - past[0][1]) / sigma + 0.6 * noise)


# The mathematics, on an equation whose solution is known


def slope_at(latent, sigma):
    return torch.stack((-latent[:, 1], latent[:, 0]), 1) + torch.tensor([0.3, 1.0]) * sigma**2


def solved(skipped, repair=None, latent=None):
    """Euler's steps; in the skipped ones the slope lies on the line through those of the last two computed steps."""
    latent, known = torch.tensor([[1.0, 0.0], [0.5, -2.0]]) if latent is None else latent, []
    for index, (sigma, following) in enumerate(pairwise(sigmas_of(20))):
        if index in skipped:
            (s1, v1), (s0, v0) = known[:2]
            slope = v1 + (v1 - v0) * (sigma - s1) / (s1 - s0)
        else:
            slope = slope_at(latent, sigma)
        denoised = latent - sigma * slope
        fix = repair and repair.step(latent, denoised, sigma, following, index not in skipped, may_repair=True)
        if fix is not None:
            denoised, slope = with_fix(denoised, fix, sigma, following), slope + fix / sigma
        if index not in skipped:
            known.insert(0, (sigma, slope))
        latent = latent + (following - sigma) * (latent - denoised) / sigma
    return latent


@pytest.mark.parametrize("skipped", [range(3, 20, 2), range(4, 18, 3), (5, 6, 9, 10, 13)])
def test_the_repaired_path_is_closer_to_the_uncached_one(skipped):
    uncached = solved(())
    off, on = ((solved(skipped, repair) - uncached).norm() for repair in (None, Repair()))
    assert on < off / 2


def test_the_fix_is_what_the_line_between_both_slopes_moves_less_what_was_moved():
    repair, latent, clean = Repair(), first_latent(), first_latent(seed=2)
    assert repair.step(latent, clean, 0.9, 0.8, True, True) is None
    first = (latent - clean) / 0.9
    assert repair.step(latent, clean * 2, 0.8, 0.65, False, True) is None
    assert repair.step(latent, clean * 3, 0.65, 0.5, False, True) is None
    fix = repair.step(latent, clean * 4, 0.5, 0.4, True, True)
    last = (latent - clean * 4) / 0.5
    on_line = [first + (last - first) * (0.9 - sigma) / 0.4 for sigma in (0.8, 0.65)]
    used = [(latent - clean * 2) / 0.8, (latent - clean * 3) / 0.65]
    by_hand = sum(h * (line - slope) for h, line, slope in zip((-0.15, -0.15), on_line, used))
    torch.testing.assert_close(fix, by_hand)
    moved = latent + fix  # Euler's step from there by the prediction as it was is the step by the corrected one
    corrected = with_fix(clean * 4, fix, 0.5, 0.4)
    torch.testing.assert_close(latent - 0.1 * (latent - corrected) / 0.5, moved - 0.1 * (moved - clean * 4) / 0.5)


def test_nothing_is_corrected_in_the_last_step_and_without_a_gap():
    repair, latent, clean = Repair(), first_latent(), first_latent(seed=2)
    for sigma, following, is_computed in ((0.9, 0.6, True), (0.6, 0.3, True), (0.3, 0.1, False), (0.1, 0.0, True)):
        assert repair.step(latent, clean * sigma, sigma, following, is_computed, True) is None


def test_every_picture_is_repaired_by_itself():
    many = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    alone = [solved(range(4, 18, 3), Repair(), picture) for picture in many.split(1)]
    assert torch.equal(solved(range(4, 18, 3), Repair(), many), torch.cat(alone))


def test_outside_of_the_mask_nothing_is_moved():
    mask, skipped = torch.tensor([[1.0, 0.0], [0.99, 1.0]]), range(3, 20, 2)
    repair, moves = Repair(mask), []
    step = repair.step
    repair.step = lambda *given, **options: moves.append(step(*given, **options)) or moves[-1]
    solved(skipped, repair)
    moves = [move for move in moves if move is not None]
    assert moves and all(((move != 0) == (mask == 1)).all() for move in moves)


def test_what_is_owed_until_it_is_known_is_made_up_for_later():
    """A step later: on the same path but for the slope that was evaluated meanwhile."""
    late = Repair()
    step = late.step
    late.step = lambda *given, may_repair: step(*given, may_repair=given[2] < 0.75)
    uncached = solved(())
    off, on = ((solved((3, 4, 7, 9, 11), repair) - uncached).norm() for repair in (None, late))
    assert on < off / 2


# What is Euler's step


def steps_seen(step, first_sigma=1.0, predict=lambda latent, sigma: torch.tanh(latent.roll(1, -1)) * (1 - sigma)):
    path, past, seen = LatentPath(), [], []
    sigmas = [first_sigma * sigma for sigma in SIGMAS[:12]]
    latent = first_sigma * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for before, (sigma, following) in zip([None, *sigmas], pairwise(sigmas)):
        reach(path, latent)
        seen.append(path.is_euler_step(before, sigma) if before else None)
        past.insert(0, (sigma, predict(latent, sigma), latent))
        path.predicted(past[0][1])
        latent = step(latent, sigma, following, past)
    return seen[1:]


@pytest.mark.parametrize("first_sigma", [1.0, 14.6, 80.0])
def test_eulers_steps_are_told_from_all_others(first_sigma, monkeypatch):
    monkeypatch.setattr("cache_core.run.path.SAME_STEP", SAME_STEP / 8)  # far from the limit
    assert steps_seen(euler, first_sigma) == [None, *[True] * 9]  # of the first step any method makes Euler's
    assert set(steps_seen(two_steps, first_sigma)[1:]) == {False}
    assert set(steps_seen(ancestral, first_sigma)) == {False}


def test_where_predictions_do_not_change_any_method_steps_so():
    still = first_latent().repeat(1, 1, 1)[0, :1, :1]
    assert set(steps_seen(euler, predict=lambda latent, sigma: latent * 0 + still)) == {None}
    assert set(steps_seen(two_steps, predict=lambda latent, sigma: latent - sigma * still)) <= {None}


# In a run


def sampled(strategy, step=euler, sigmas=SIGMAS, latent=None, mask=None, allowed=True, branches=(NEGATIVE, POSITIVE)):
    """The toy under guidance, as ComfyUI's adapter samples it."""
    sampling, past = Sampling(Toy(), (strategy,) if strategy else None, list(sigmas), branches=branches), []
    latent = first_latent(2) if latent is None else latent
    if strategy:
        sampling.run = CacheRun((strategy,), schedule_of(sigmas), denoise_mask=mask)
        if allowed:
            allow_repair(sampling.run.state, mask, lambda sigma, output, latent: latent - sigma * output)
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        if strategy:
            sampling.run.begin_evaluation(latent=latent)
        predicted = sampling.calls(dict.fromkeys(sampling.branches, latent), index)
        slope = 2 * predicted[POSITIVE] - predicted[NEGATIVE] if NEGATIVE in predicted else predicted[POSITIVE]
        denoised = latent - sigma * slope
        denoised = sampling.run.end_evaluation(denoised) if strategy else denoised
        past.insert(0, (sigma, denoised, latent))
        latent = step(latent, sigma, following, past)
    return latent, sampling


def distance(latent, other):
    return ((latent - other).norm() / other.norm()).item()


@each
def test_a_repaired_run_is_closer_to_the_uncached_one(strategy):
    uncached, _ = sampled(None)
    off, plain = sampled(without(strategy))
    on, sampling = sampled(strategy)
    report = sampling.report
    assert report.count("reused", "forecast") >= 6 and plain.report.count("reused", "forecast") >= 6
    assert report.gaps_repaired >= 3 and f"{report.gaps_repaired} gaps repaired" in report.line()
    assert report.as_dict()["totals"]["gaps_repaired"] == report.gaps_repaired
    assert report.computed_share <= plain.report.computed_share + 0.05
    assert distance(on, uncached) < 0.8 * distance(off, uncached)


@each
@pytest.mark.parametrize("step", [two_steps, ancestral])
def test_another_sampler_is_left_alone(strategy, step):
    off, plain = sampled(without(strategy), step)
    on, sampling = sampled(strategy, step)
    assert torch.equal(on, off) and sampling.report.gaps_repaired == 0
    assert UNREPAIRED.format(NOT_EULER) in sampling.report.notes
    assert [call.action for call in sampling.report.calls] == [call.action for call in plain.report.calls]


@pytest.mark.parametrize("step", [euler, two_steps])
def test_a_first_gap_is_repaired_late_or_not_at_all(step):
    """Its predictions repeat one output, so that at its end any method has stepped as Euler's."""
    strategy = TaylorSeerCache(cache_interval=2, disable_cache_before_step=1, repair="on")
    off, _ = sampled(without(strategy), step)
    on, sampling = sampled(strategy, step)
    assert sampling.report.calls[1].action == "reused"
    if step is euler:
        gaps = sampling.report.calls[-1].step.index // 2
        assert sampling.report.gaps_repaired >= gaps - 1 and not torch.equal(on, off)
    else:
        assert torch.equal(on, off)


def test_the_last_gap_is_repaired_although_nothing_is_kept_after_it():
    """What is computed from disable_cache_after_step on is kept for no forecast, so there is nothing to move."""
    strategy = TaylorSeerCache(cache_interval=2, disable_cache_after_step=14, repair="on")
    uncached, off, (on, sampling) = sampled(None)[0], sampled(without(strategy))[0], sampled(strategy)
    skipped = [call.step.index for call in sampling.report.calls if call.action != "computed"]
    assert max(skipped) == 13 and sampling.report.gaps_repaired == len(set(skipped)) >= 6
    assert not sampling.report.notes and distance(on, uncached) < 0.8 * distance(off, uncached)


@each
def test_off_is_bit_identical_and_puts_nothing_anywhere(strategy):
    never, _ = sampled(without(strategy), allowed=False)
    off, sampling = sampled(without(strategy))
    assert torch.equal(off, never) and sampling.report.count("reused", "forecast")
    assert sampling.run.state.repair is None and sampling.report.gaps_repaired == 0
    assert sampling.run.state.paths.whole_is_followed == strategy.trusts_schedule
    assert not [note for note in sampling.report.notes if "repair" in note]


@pytest.mark.parametrize(
    ("strategies", "sigmas", "why"),
    [
        ([FirstBlockCache(residual_diff_threshold=0.21, repair="on")], SIGMAS, TOO_HIGH),
        ([TaylorSeerCache(cache_interval=5, repair="on")], SIGMAS, TOO_LONG),
        ([TaylorSeerCache(cache_interval=3, repair="on")], sigmas_of(20), TOO_LONG),
        ([TaylorSeerCache(cache_interval=3, repair="on")], sigmas_of(30), ""),
        ([TaylorSeerCache(cache_interval=2, repair="on")], sigmas_of(20, shift=3), ""),
        ([TaylorSeerCache(cache_interval=2, cache_level="block", repair="on")], SIGMAS, "cache_level is block"),
        ([BOTH[0], FasterCache()], SIGMAS, BESIDE),
        ([BOTH[0]], [1.0, 0.5, 0.8, 0.0], NOT_FALLING),
        ([BOTH[0]], SIGMAS[::-1], NOT_FALLING),
    ],
)
def test_where_it_would_do_harm_or_is_not_known_to_help_it_is_off(strategies, sigmas, why):
    run = CacheRun(strategies, schedule_of(sigmas))
    allow_repair(run.state, None, None)
    assert (run.state.repair is None) == bool(why) == any("repair" in note for note in run.report.notes)
    assert not why or UNREPAIRED.format(why) in run.report.notes


def test_nothing_is_waited_for():
    """Whether it is Euler comes with the sigma: once in a model call, as without."""
    reads = {}
    for strategy in (BOTH[0], without(BOTH[0])):
        with CountingReads() as counting:
            _, sampling = sampled(strategy, branches=(POSITIVE,))
        reads[strategy.repair] = counting.reads
        assert bool(sampling.report.gaps_repaired) == (strategy.repair == "on")
    assert reads["on"] <= reads["off"] < 1.2 * len(sampling.report.calls)


@each
def test_when_memory_runs_out_in_a_repair_the_run_goes_on_without(strategy, monkeypatch):
    asked = []

    def fail(*given, **options):
        asked.append(given)
        if len(asked) == 4:
            raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Repair, "step", fail)
    on, sampling = sampled(strategy)
    assert len(asked) == 4 and torch.equal(on, sampled(without(strategy))[0])
    assert any("memory ran out" in note for note in sampling.report.notes) and sampling.run.state.repair is None


def test_what_is_held_counts_both_latents():
    latent, _ = first_latent(2), None
    (_, off), (_, on) = (sampled(strategy, latent=latent) for strategy in (without(BOTH[1]), BOTH[1]))
    assert on.report.bytes_held == off.report.bytes_held + 2 * latent.nbytes
    assert on.report.bytes_foretold == off.report.bytes_foretold + 2 * latent.nbytes
    on.run.free()
    assert on.run.state.repair is None


def test_another_branch_or_model_begins_anew(monkeypatch):
    """What was computed for others is on another path: no line leads there."""
    forgotten, forget = [], Repair.forget
    monkeypatch.setattr(Repair, "forget", lambda repair: (forgotten.append(1), forget(repair))[1])
    run, toy, latent = CacheRun((BOTH[1],), Schedule(SIGMAS)), Toy(), first_latent()
    allow_repair(run.state, None, lambda sigma, output, latent: latent - sigma * output)
    seen = []
    for index, (sigma, following) in enumerate(pairwise(SIGMAS)):
        run.begin_evaluation(latent=latent)
        level, names = torch.tensor([sigma]), ["first"] if index < 9 else ["second"]
        forward = lambda: toy(latent, level, torch.zeros(1, 6, 4))  # noqa: B023, E731
        denoised = run.end_evaluation(latent - sigma * run.call_model(toy, forward, level, contexts=names))
        latent = latent + (following - sigma) * (latent - denoised) / sigma
        seen.append(len(forgotten))
    assert [index for index, (a, b) in enumerate(pairwise([1, *seen])) if b > a] == [0, 9]
    assert run.report.gaps_repaired >= 5


def test_where_the_sampler_is_not_given_what_is_seen_nothing_is_corrected():
    """By a guider that goes past the wrapper around an evaluation."""
    run, latent = CacheRun((BOTH[1],), Schedule(SIGMAS)), first_latent()
    allow_repair(run.state, None, None)
    run.begin_evaluation_of(latent)
    assert run.end_evaluation(latent) is latent and run.state.repair is None
    assert UNREPAIRED.format(CANNOT) in run.report.notes


def test_a_model_that_makes_its_prediction_another_way_is_left_alone(monkeypatch):
    def fails(sigma, output, latent):
        raise TypeError("takes two")

    allow = allow_repair
    monkeypatch.setattr("test_repair.allow_repair", lambda run, mask, _: allow(run, mask, fails))
    on, sampling = sampled(BOTH[1])
    assert torch.equal(on, sampled(without(BOTH[1]))[0]) and UNREPAIRED.format(CANNOT) in sampling.report.notes


def test_a_mask_of_another_shape_leaves_all_as_it_is():
    on, sampling = sampled(BOTH[1], mask=torch.ones(1, 1, 1))
    assert torch.equal(on, sampled(without(BOTH[1]))[0]) and UNREPAIRED.format(CANNOT) in sampling.report.notes
