"""`target_speedup`: so much of the model's work is computed as was asked for, as near as whole steps come to it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import (
    NEGATIVE,
    POSITIVE,
    Sampling,
    Toy,
    first_latent,
    reference,
    relative_error,
    sigmas_of,
    uncached,
)

from cache_core import CacheRun, Schedule
from cache_core.model import Counter, weights_in
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy import OpenSchedule, schedule_of
from cache_core.strategy.spacing import wished_steps
from cache_core.strategy.wish import computed_count, planned_steps, speedup_of, why_less

WISHES = (1.3, 1.5, 2.0, 2.5, 3.0)
LEVELS = ("output", "model", "block", "module")
WISHING = [FirstBlockCache(), *(TaylorSeerCache(cache_level=level) for level in LEVELS)]
RUNS = ((20, 1.0), (30, 6.0), (50, 3.0))  # steps and shift; the plans themselves are looked at for all
CLOSE = 0.02  # of the uncached run's work
REHEARSAL = 0.01  # what the rehearsal takes of twenty of the toy's steps, at most
AROUND_BLOCKS, FIRST_OF_BLOCKS = 0.008, 0.207  # of the toy's work: embedding and head; those and the first block


def named(value):
    return f"{type(value).__name__}-{getattr(value, 'cache_level', 'model')}" if hasattr(value, "levels") else None


def wishing(strategy, speedup):
    return replace(strategy, target_speedup=speedup)


def operations_of(strategy, sigmas):
    """What PyTorch counts in a sampling run of the toy, and the run."""
    sampling = Sampling(Toy(), None if strategy is None else (strategy,), sigmas)
    with FlopCounterMode(display=False) as counter:
        sampling.result = sampling.sample(first_latent())
    return counter.get_total_flops(), sampling


def computed_in(sampling):
    return [call.step.index for call in sampling.report.calls if call.action == "computed"]


@pytest.mark.parametrize(
    ("strategy", "steps", "shift", "speedup"),
    [
        *((strategy, *run, wish) for strategy in WISHING[:2] for run in RUNS for wish in WISHES),
        *((strategy, 20, 3.0, wish) for strategy in WISHING[2:] for wish in (1.3, 2.0)),
    ],
    ids=named,
)
def test_so_much_work_is_done_as_was_asked_for(strategy, steps, shift, speedup):
    sigmas = sigmas_of(steps, shift)
    done, sampling = operations_of(wishing(strategy, speedup), sigmas)
    share, steps_computed = done / operations_of(None, sigmas)[0], computed_in(sampling)

    cost = {"model": AROUND_BLOCKS, "output": 0.0}.get(getattr(strategy, "cache_level", ""), AROUND_BLOCKS)
    cost = FIRST_OF_BLOCKS if isinstance(strategy, FirstBlockCache) else cost
    one_step = (1 - cost) / steps
    if sampling.report.notes:
        assert speedup == 3.0 and isinstance(strategy, FirstBlockCache)  # one in five steps is always computed
        assert len(steps_computed) == steps // 5 and "x is the most that" in sampling.report.notes[0]
    else:
        assert abs(share - 1 / speedup) <= max(CLOSE, one_step / 2 + REHEARSAL)
    assert len(steps_computed) == computed_count(steps, speedup, cost)
    assert (steps_computed[0], steps_computed[-1]) == (0, steps - 1)
    assert sampling.report.count("reused", "forecast") == steps - len(steps_computed)


def test_the_toys_share_that_always_runs_is_what_pytorch_counts():
    toy, latent = Toy(), first_latent()
    sampling = Sampling(toy, (FirstBlockCache(target_speedup=2.0),), sigmas_of(20))
    with FlopCounterMode(display=False) as counter:
        sampling.sample(latent)
    (known,) = sampling.run.state.models._known.values()
    counted = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    assert known.costs[sampling.strategies[0]] == pytest.approx(FIRST_OF_BLOCKS, abs=0.001)
    assert counted["Toy"] == counter.get_total_flops()
    own = counted["Toy.double_blocks.0"] / 20  # the first block ran in every step, and the rehearsal without it
    uncached_step = operations_of(None, sigmas_of(20))[0] / 20
    assert own / uncached_step == pytest.approx(FIRST_OF_BLOCKS - AROUND_BLOCKS, abs=0.005)


@pytest.mark.parametrize("steps", [20, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("speedup", WISHES)
@pytest.mark.parametrize("cost", [0.0, 0.02, FIRST_OF_BLOCKS])
def test_a_plan_has_the_number_of_steps_that_comes_nearest(steps, shift, speedup, cost):
    planned = planned_steps(Schedule(sigmas_of(steps, shift)), speedup, cost)
    assert list(planned) == sorted({*planned}) and planned[0] == 0 and planned[-1] == steps - 1
    shares = {count: 1 / speedup_of(steps, count, cost) for count in range(1, steps + 1)}
    nearest = min(shares, key=lambda count: (round(abs(shares[count] - 1 / speedup), 9), -count))
    assert len(planned) == max(nearest, steps // 5)


def test_it_warms_up_less_where_it_computes_little_then_goes_evenly():
    even = Schedule(sigmas_of(20)).times
    assert wished_steps(even, 12) == (0, 1, 2, 3, 4, 6, 8, 10, 13, 15, 17, 19)
    assert wished_steps(even, 10) == (0, 1, 2, 3, 4, 7, 10, 13, 16, 19)
    assert wished_steps(even, 8) == (0, 1, 2, 5, 9, 12, 16, 19)
    assert wished_steps(even, 4) == (0, 6, 13, 19)
    assert TaylorSeerCache(target_speedup=2.0, disable_cache_before_step=7).computed_steps(Schedule(sigmas_of(30)))[
        :8
    ] == (0, 1, 2, 3, 4, 5, 6, 9)


def test_along_a_shifted_schedule_it_computes_a_little_more_where_steps_are_long():
    times = Schedule(sigmas_of(20, 6.0)).times
    assert wished_steps(times, 11) == (0, 1, 2, 4, 5, 8, 10, 13, 15, 17, 19)
    assert wished_steps(tuple(map(float, range(21))), 11) == wished_steps(Schedule(sigmas_of(20)).times, 11)  # by steps


@pytest.mark.parametrize("strategy", WISHING, ids=named)
def test_at_nought_pictures_are_bit_for_bit_those_without_the_setting(strategy):
    kept = {name: value for name, value in vars(strategy).items() if name != "target_speedup"}
    before = Sampling(Toy(), (type(strategy)(**kept),))
    after = Sampling(Toy(), (wishing(strategy, 0.0),))
    assert torch.equal(before.sample(first_latent()), after.sample(first_latent()))
    assert not [call for call in after.report.calls if "x" in call.reason.split()[-1:]]
    (known,) = after.run.state.models._known.values()
    assert not known.shares and not known.costs  # nothing is counted for it


@pytest.mark.parametrize("strategy", WISHING, ids=named)
def test_once_as_fast_is_off_and_slower_is_a_contradiction(strategy):
    off = Sampling(Toy(), (wishing(strategy, 1.0),))
    assert wishing(strategy, 1.0).is_off and torch.equal(off.sample(first_latent()), reference())
    slower = Sampling(Toy(), (wishing(strategy, 0.5),))
    assert torch.equal(slower.sample(first_latent()), reference()) and slower.toy.runs_of("block") == 60
    said = slower.run.report.so_far()["why_nothing"]
    assert said == "target_speedup 0.5 is slower than without a cache: raise it above 1, or set it to 0 (no target)"


@pytest.mark.parametrize("strategy", WISHING[:3], ids=named)
def test_what_decides_else_has_no_effect(strategy):
    others = {"residual_diff_threshold": 0.0} if isinstance(strategy, FirstBlockCache) else {"cache_interval": 1}
    one, other = (Sampling(Toy(), (each,), sigmas_of(20)) for each in (wishing(strategy, 2.0),
                  replace(strategy, target_speedup=2.0, **others)))  # fmt: skip
    assert torch.equal(one.sample(first_latent()), other.sample(first_latent()))
    assert one.report.count("reused", "forecast") > 8


def test_a_wish_that_rounds_to_all_steps_says_so():
    sampling = Sampling(Toy(), (TaylorSeerCache(target_speedup=1.02),))
    assert torch.equal(sampling.sample(first_latent()), reference())
    assert sampling.run.report.so_far()["why_nothing"] == "target_speedup 1.02 leaves out none of 12 steps"


def test_in_few_steps_the_threshold_decides():
    sigmas = sigmas_of(8)
    plain, wishful = (Sampling(Toy(), (FirstBlockCache(target_speedup=wish),), sigmas) for wish in (0.0, 2.0))
    assert torch.equal(plain.sample(first_latent()), wishful.sample(first_latent()))
    assert any("in this one the threshold decides" in note for note in wishful.report.notes)
    rests = Sampling(Toy(), (TaylorSeerCache(target_speedup=2.0),), sigmas)
    assert torch.equal(rests.sample(first_latent()), uncached(Toy(), first_latent(), sigmas=sigmas))
    draft = Sampling(Toy(), (TaylorSeerCache(target_speedup=2.0, few_steps="draft"),), sigmas)
    draft.sample(first_latent())
    assert computed_in(draft) == [0, 2, 5, 7]


def test_steps_that_are_always_computed_are_of_the_number_and_may_be_too_many():
    schedule = Schedule(sigmas_of(20))
    late = TaylorSeerCache(target_speedup=2.0, disable_cache_after_step=16)
    assert late.computed_steps(schedule) == (0, 1, 2, 3, 4, 10, 16, 17, 18, 19)
    window = FirstBlockCache(target_speedup=2.0, start_percent=0.7)
    sampling = Sampling(Toy(), (window,), sigmas_of(20))
    sampling.sample(first_latent())
    assert len(computed_in(sampling)) == 14  # up to 0.7
    assert sampling.report.notes == [
        "target_speedup 2: 1.31x is the most that 20 steps and its other settings allow"
    ]  # fmt: skip
    often = FirstBlockCache(target_speedup=3.0, max_consecutive_cache_hits=1).computed_steps(schedule)
    assert max(b - a for a, b in pairwise(often)) == 2


def test_a_sampler_that_asks_twice_in_a_step_computes_both_or_none():
    """Heun's method asks at the sigma that a step leads to, then again at the same one from another latent."""
    for strategy in (TaylorSeerCache(target_speedup=2.0), FirstBlockCache(target_speedup=1.5)):
        sigmas, toy = sigmas_of(20), Toy()
        sampling, latent = Sampling(toy, (strategy,), sigmas, branches=(POSITIVE,)), first_latent()
        for index in range(20):
            first = sampling.call_on(latent, index)
            ahead = latent + (sigmas[index + 1] - sigmas[index]) * first
            if index < 19:
                first = (first + sampling.call_on(ahead, index + 1)) / 2
            latent = latent + (sigmas[index + 1] - sigmas[index]) * first
        computed = sampling.report.count("computed")
        planned = len({*computed_in(sampling)})
        assert computed == 2 * planned - 1 and sampling.report.count("forecast", "reused") == 39 - computed
        assert planned == computed_count(20, strategy.target_speedup, FIRST_OF_BLOCKS if computed > 20 else 0.0)


def test_a_schedule_that_turns_round_has_the_wished_number_of_steps():
    sigmas = [*sigmas_of(12), *sigmas_of(8)]
    schedule = schedule_of(sigmas)
    assert schedule.is_open and len(schedule.way) == len(sigmas)
    planned = planned_steps(schedule, 2.0, 0.0)
    assert len(planned) == 11 and {0, schedule.turns[1] - 1, schedule.turns[1], 20} <= {*planned}
    sampling = Sampling(Toy(), (TaylorSeerCache(target_speedup=2.0),))
    sampling.sigmas, sampling.run = sigmas, CacheRun(sampling.strategies, schedule)
    sampling.sample(first_latent())
    assert computed_in(sampling) == list(planned) and not sampling.report.notes


def test_a_run_of_unknown_length_approaches_the_wish_and_says_so():
    sampling = Sampling(Toy(), (TaylorSeerCache(target_speedup=1.5),), sigmas_of(30))
    sampling.run = CacheRun(sampling.strategies, OpenSchedule())
    sampling.sample(first_latent())
    assert computed_in(sampling)[:7] == [0, 1, 2, 4, 5, 7, 8] and len(computed_in(sampling)) == 21
    assert sampling.report.notes == [
        "how many steps this run has is not known in advance, so target_speedup 1.5 is only approached: after the "
        "warm-up one in 1.5 is computed"
    ]


def test_a_branch_that_begins_later_is_computed_and_the_report_says_what_that_means():
    sampling = Sampling(Toy(), (TaylorSeerCache(target_speedup=2.0),), sigmas_of(20), branches=(POSITIVE,))
    latent, planned = first_latent(), sampling.strategies[0].computed_steps(Schedule(sampling.sigmas))
    begins = next(step for step in range(10, 20) if step not in planned)
    for index in range(20):
        names = (POSITIVE,) if index < begins else (POSITIVE, NEGATIVE)
        predicted = sampling.predict(dict.fromkeys(names, latent), index)[POSITIVE]
        latent = latent + (sampling.sigmas[index + 1] - sampling.sigmas[index]) * predicted
    assert {*computed_in(sampling)} == {*planned, begins}
    assert sum("target_speedup 2 is not reached" in note for note in sampling.report.notes) == 1


def test_the_first_call_teaches_what_a_reused_one_costs_and_no_call_after_it_counts():
    sampling = Sampling(Toy(), (FirstBlockCache(target_speedup=2.0),), sigmas_of(20))
    sampling.predict(dict.fromkeys(sampling.branches, first_latent()), 0)
    (known,) = sampling.run.state.models._known.values()
    counted = known.counter.operations
    assert known.shares[""] == 1.0 and counted > 0
    sampling.sample(first_latent())
    assert known.counter.operations == counted


@pytest.mark.parametrize(("speedup", "far"), [(1.4, False), (2.5, True)])
@pytest.mark.parametrize("strategy", [FirstBlockCache(), TaylorSeerCache(cache_level="model")], ids=named)
def test_whether_gaps_are_repaired_follows_from_the_plan(strategy, speedup, far):
    schedule, cost = Schedule(sigmas_of(20)), FIRST_OF_BLOCKS if isinstance(strategy, FirstBlockCache) else 0.0
    assert bool(wishing(strategy, speedup).why_unrepaired(schedule, cost)) == far


def test_it_stays_close_while_it_reuses():
    for strategy in WISHING:
        sampling = Sampling(Toy(), (wishing(strategy, 2.0),), sigmas_of(20))
        exact = uncached(Toy(), first_latent(), sigmas=sigmas_of(20))
        assert relative_error(sampling.sample(first_latent()), exact) < 0.05
        assert sampling.toy.runs_of("module") < 0.62 * 20 * len(sampling.toy.units("module"))


def test_where_a_reused_step_costs_much_the_report_says_what_was_possible():
    schedule = Schedule(sigmas_of(20))
    told = why_less("First Block Cache", schedule, 3.0, 0.5, planned_steps(schedule, 3.0, 0.5))
    assert told == "target_speedup 3: 1.67x is the most that 20 steps and First Block Cache's own cost allow"


def test_where_nothing_is_counted_parameters_tell(monkeypatch):
    monkeypatch.setattr(Counter, "watching", lambda *_: [])
    sampling = Sampling(Toy(), (FirstBlockCache(target_speedup=1.5),), sigmas_of(20))
    sampling.sample(first_latent())
    (known,) = sampling.run.state.models._known.values()
    left_out = sum(map(weights_in, sampling.toy.blocks[1:])) / weights_in(sampling.toy)
    assert known.costs[sampling.strategies[0]] == pytest.approx(1 - left_out)
    assert len(computed_in(sampling)) == computed_count(20, 1.5, 1 - left_out)
