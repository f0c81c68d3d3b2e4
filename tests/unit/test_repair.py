"""Skipped steps are repaired in hindsight: by the formula, picture by picture, and only where the solver is known."""

import math
from itertools import pairwise

import pytest
import torch
from test_host_reads import CountingReads
from test_path import euler, reach, two_steps
from toy import NEGATIVE, POSITIVE, Sampling, Toy, first_latent, sigmas_of

from cache_core.run.path import SAME_STEP, LatentPath
from cache_core.run.repair import Repair
from cache_core.run.repairing import BESIDE, CANNOT, NOT_FALLING, UNKNOWN_SOLVER, allow_repair
from cache_core.run.run import CacheRun
from cache_core.run.solvers import SOLVERS, Step, dpmpp_2m
from cache_core.run.solvers import euler as eulers_step
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


def stepped(solver, step, latent, past):
    """One step of a solver, written as its source has it. `past` are predictions, the newest first."""
    left, denoised = step.following / step.sigma, past[0]
    if solver is eulers_step or step.before is None or not step.following:
        return latent + (step.following - step.sigma) * (latent - denoised) / step.sigma
    times = [-math.log(sigma) for sigma in step]
    h, h_last = times[2] - times[1], times[1] - times[0]
    if solver is dpmpp_2m:
        r = h_last / h
        return left * latent - math.expm1(-h) * ((1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * past[1])
    phi_1 = math.expm1(-h) / -h
    phi_2, c_2 = (phi_1 - 1) / -h, -h_last / h
    return left * latent + h * ((phi_1 - phi_2 / c_2) * denoised + phi_2 / c_2 * past[1])


def stepping(solver):
    """The same, as runs are sampled here."""

    def step(latent, sigma, following, past):
        before = past[1][0] if len(past) > 1 else None
        return stepped(solver, Step(before, sigma, following), latent, [clean for _, clean, _ in past])

    return step


def solved(skipped, repair=None, latent=None, solver=eulers_step):
    """A solver's steps; in the skipped ones the slope lies on the line through those of the last two computed steps."""
    latent, known, past = torch.tensor([[1.0, 0.0], [0.5, -2.0]]) if latent is None else latent, [], []
    if repair:
        repair.solvers = (solver,)
    sigmas = sigmas_of(20)
    for index, step in enumerate(map(Step, [None, *sigmas], sigmas, sigmas[1:])):
        if index in skipped:
            (s1, v1), (s0, v0) = known[:2]
            slope = v1 + (v1 - v0) * (step.sigma - s1) / (s1 - s0)
        else:
            slope = slope_at(latent, step.sigma)
        denoised = latent - step.sigma * slope
        fix = repair and repair.step(latent, denoised, step.sigma, step.following, index not in skipped)
        if fix and fix.missed is not None:
            slope = slope + fix.missed / step.sigma
        if index not in skipped:
            known.insert(0, (step.sigma, slope))
        past.insert(0, fix.denoised if fix else denoised)
        latent = stepped(solver, step, latent, past)
    return latent


every = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)


@every
def test_the_weights_are_those_of_the_solver(solver):
    latent, *past = torch.randn(3, 50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for step in (Step(None, 1.0, 0.9), Step(1.0, 0.9, 0.7), Step(14.6, 11.0, 9.0), Step(0.2, 0.1, 0.0)):
        of_latent, of_denoised, of_earlier = solver(step)
        made = of_latent * latent + of_denoised * past[0] + of_earlier * past[1]
        torch.testing.assert_close(made, stepped(solver, step, latent, past))


@every
@pytest.mark.parametrize("skipped", [range(3, 18, 2), range(4, 18, 3), (5, 6, 9, 10, 13)])
def test_the_repaired_path_is_closer_to_the_uncached_one(skipped, solver):
    uncached = solved((), solver=solver)
    off, on = ((solved(skipped, repair, solver=solver) - uncached).norm() for repair in (None, Repair()))
    assert on < off / 2


@every
def test_after_a_gap_the_sampler_steps_as_if_it_had_gone_along_the_line_between_both_slopes(solver):
    """By hand: its steps made again with other predictions in the two that were skipped."""
    clean = torch.randn(6, *first_latent().shape, generator=torch.Generator().manual_seed(2))
    sigmas = (1.0, 0.9, 0.8, 0.65, 0.5, 0.4, 0.25)
    steps = list(map(Step, [None, *sigmas], sigmas, sigmas[1:]))
    repair, latents, given, moved = Repair(), [first_latent()], [], []
    repair.solvers = (solver,)
    for index, (step, denoised) in enumerate(zip(steps, clean)):
        fix = repair.step(latents[-1], denoised, step.sigma, step.following, index not in (2, 3))
        given.append(fix.denoised if fix else denoised)
        moved.append(fix and fix.missed)
        latents.append(stepped(solver, step, latents[-1], given[::-1]))
    assert moved[:4] == [None] * 4 and moved[5] is None
    first, last = ((latents[at] - clean[at]) / sigmas[at] for at in (1, 4))
    again, predictions = latents[1], [clean[1], clean[0]]
    for at in (1, 2, 3):
        if at > 1:
            slope = first + (last - first) * (sigmas[at] - 0.9) / (0.5 - 0.9)
            predictions.insert(0, again - sigmas[at] * slope)
        again = stepped(solver, steps[at], again, predictions)
    torch.testing.assert_close(moved[4], again - latents[4])
    torch.testing.assert_close(latents[5], stepped(solver, steps[4], again, [clean[4], *predictions]))
    torch.testing.assert_close(latents[6], stepped(solver, steps[5], latents[5], [clean[5], clean[4]]))


@every
def test_nothing_is_corrected_in_the_last_step_and_without_a_gap(solver):
    repair, latent, clean = Repair(), first_latent(), first_latent(seed=2)
    repair.solvers = (solver,)
    for sigma, following, is_computed in ((0.9, 0.6, True), (0.6, 0.3, True), (0.3, 0.1, False), (0.1, 0.0, True)):
        assert repair.step(latent, clean * sigma, sigma, following, is_computed) is None


@every
def test_every_picture_is_repaired_by_itself(solver):
    many = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    alone = [solved(range(4, 18, 3), Repair(), picture, solver) for picture in many.split(1)]
    assert torch.equal(solved(range(4, 18, 3), Repair(), many, solver), torch.cat(alone))


@every
def test_outside_of_the_mask_nothing_is_moved(solver):
    mask, skipped = torch.tensor([[1.0, 0.0], [0.99, 1.0]]), range(3, 20, 2)
    repair, moves = Repair(mask), []
    step = repair.step

    def watched(latent, denoised, *given):
        fix = step(latent, denoised, *given)
        moves.extend([fix.denoised - denoised] if fix else [])
        return fix

    repair.step = watched
    solved(skipped, repair, solver=solver)
    assert len(moves) >= 8 and all(((move != 0) == (mask == 1)).all() for move in moves)


def test_what_is_owed_until_it_is_known_is_made_up_for_later():
    """A step later: on the same path but for the slope that was evaluated meanwhile."""
    late = Repair()
    step = late.step

    def at_first_uncertain(latent, denoised, sigma, *given):
        late.solvers = SOLVERS if sigma >= 0.75 else (eulers_step,)
        return step(latent, denoised, sigma, *given)

    late.step = at_first_uncertain
    uncached = solved(())
    off, on = ((solved((3, 4, 7, 9, 11), repair) - uncached).norm() for repair in (None, late))
    assert on < off / 2


# What step is whose


def solvers_seen(step, first_sigma=1.0, predict=lambda latent, sigma: torch.tanh(latent.roll(1, -1)) * (1 - sigma)):
    """After each step: by which solvers it could have been made."""
    path, past, seen = LatentPath(), [], []
    sigmas = [first_sigma * sigma for sigma in SIGMAS[:12]]
    latent = first_sigma * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    made = None
    for following_step in map(Step, [None, *sigmas], sigmas, sigmas[1:]):
        reach(path, latent)
        if made:
            seen.append({solver for solver in SOLVERS if path.is_step_of(solver(made))})
        past.insert(0, (following_step.sigma, predict(latent, following_step.sigma), latent))
        path.predicted(past[0][1])
        latent, made = step(latent, following_step.sigma, following_step.following, past), following_step
    return seen


@every
@pytest.mark.parametrize("first_sigma", [1.0, 14.6, 80.0])
def test_each_solvers_steps_are_told_from_all_others(solver, first_sigma, monkeypatch):
    monkeypatch.setattr("cache_core.run.path.SAME_STEP", SAME_STEP / 8)  # far from the limit
    assert solvers_seen(stepping(solver), first_sigma) == [set(SOLVERS), *[{solver}] * 9]  # the first is Euler's


@pytest.mark.parametrize("step", [two_steps, ancestral])
def test_other_steps_are_told_from_theirs(step):
    assert set(map(frozenset, solvers_seen(step)[1:])) == {frozenset()}


def test_where_predictions_do_not_change_all_step_so():
    still = first_latent().repeat(1, 1, 1)[0, :1, :1]
    assert all(seen == set(SOLVERS) for seen in solvers_seen(euler, predict=lambda latent, sigma: latent * 0 + still))
    assert all(seen == set(SOLVERS) for seen in solvers_seen(two_steps, predict=lambda x, sigma: x - sigma * still))


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
@every
def test_a_repaired_run_is_closer_to_the_uncached_one(strategy, solver):
    step = stepping(solver)
    uncached, _ = sampled(None, step)
    off, plain = sampled(without(strategy), step)
    on, sampling = sampled(strategy, step)
    report = sampling.report
    assert report.count("reused", "forecast") >= 6 and plain.report.count("reused", "forecast") >= 6
    found_late = solver is not eulers_step and strategy is BOTH[0]  # in its first gap one output was repeated
    assert report.gaps_repaired >= 3 - found_late and f"{report.gaps_repaired} gaps repaired" in report.line()
    assert report.as_dict()["totals"]["gaps_repaired"] == report.gaps_repaired
    assert report.computed_share <= plain.report.computed_share + 0.05
    assert distance(on, uncached) < 0.8 * distance(off, uncached)


@each
@pytest.mark.parametrize("step", [two_steps, ancestral])
def test_another_sampler_is_left_alone(strategy, step):
    off, plain = sampled(without(strategy), step)
    on, sampling = sampled(strategy, step)
    assert torch.equal(on, off) and sampling.report.gaps_repaired == 0
    assert sampling.report.unrepaired == UNKNOWN_SOLVER and not any("repair" in note for note in sampling.report.notes)
    assert [call.action for call in sampling.report.calls] == [call.action for call in plain.report.calls]


@pytest.mark.parametrize("step", [euler, two_steps])
def test_a_first_gap_is_repaired_late_or_not_at_all(step):
    """Its predictions repeat one output, so that at its end any method has stepped as Euler's."""
    strategy = TaylorSeerCache(cache_interval=2, disable_cache_before_step=1, spacing="steps", repair="on")
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
    strategy = TaylorSeerCache(cache_interval=2, disable_cache_after_step=14, spacing="steps", repair="on")
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
    assert not sampling.report.unrepaired


@pytest.mark.parametrize(
    ("strategies", "sigmas", "why"),
    [
        ([FirstBlockCache(residual_diff_threshold=0.21, repair="on")], SIGMAS, TOO_HIGH),
        ([TaylorSeerCache(cache_interval=5, repair="on")], SIGMAS, TOO_LONG),
        ([TaylorSeerCache(cache_interval=3, repair="on")], sigmas_of(20, shift=3), TOO_LONG),
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
    assert (run.state.repair is None) == bool(why) and not run.report.notes
    assert run.report.unrepaired == why


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


def test_what_is_held_counts_all_latents():
    """Two, and until the solver is certain the prediction before."""
    latent, _ = first_latent(2), None
    (_, off), (_, on) = (sampled(strategy, latent=latent) for strategy in (without(BOTH[1]), BOTH[1]))
    assert on.report.bytes_held == off.report.bytes_held + 3 * latent.nbytes
    assert on.report.bytes_foretold == off.report.bytes_foretold + 3 * latent.nbytes
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
    assert run.report.unrepaired == CANNOT


def test_a_model_that_makes_its_prediction_another_way_is_left_alone(monkeypatch):
    def fails(sigma, output, latent):
        raise TypeError("takes two")

    allow = allow_repair
    monkeypatch.setattr("test_repair.allow_repair", lambda run, mask, _: allow(run, mask, fails))
    on, sampling = sampled(BOTH[1])
    assert torch.equal(on, sampled(without(BOTH[1]))[0]) and sampling.report.unrepaired == CANNOT


def test_a_mask_of_another_shape_leaves_all_as_it_is():
    on, sampling = sampled(BOTH[1], mask=torch.ones(1, 1, 1))
    assert torch.equal(on, sampled(without(BOTH[1]))[0]) and sampling.report.unrepaired == CANNOT
