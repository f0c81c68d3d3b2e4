"""Which runs have few steps: those in which what goes by the schedule would show, also as a part of a longer run."""

import pytest
import torch
from toy import Sampling, Toy, first_latent, sigmas_of, uncached

from cache_core.run.beginning import begun
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy import MOST_FEW, OpenSchedule, Schedule, schedule_of
from cache_core.strategy.few_steps import USUAL, are_few

RUNS = {  # sigmas, and whether these are few steps
    "8 steps": (sigmas_of(8), True),
    "9 steps": (sigmas_of(9), False),
    "8 shifted steps": (sigmas_of(8, shift=6), True),
    "the first 4 of 8": (sigmas_of(8)[:5], True),
    "the first 10 of 20": (sigmas_of(20)[:11], False),
    "the first 7 of 20": (sigmas_of(20)[:8], False),
    "the last 7 of 20": (sigmas_of(20)[13:], True),  # so much of the picture is left to these
    "one step": ([1.0, 0.0], True),
    "8 rising steps": ([step / 8 for step in range(8)] + [0.95], True),
    "20 rising steps": ([step / 20 for step in range(20)] + [0.95], False),
}


def scheduled(sigmas):
    return Schedule(sigmas, percent_to_sigma=lambda percent: 1 - percent)


@pytest.mark.parametrize("run", RUNS)
def test_few_steps_are_known_also_where_a_list_is_a_part_of_a_longer_run(run):
    sigmas, expected = RUNS[run]
    assert are_few(scheduled(sigmas)) is expected


def test_a_step_of_a_short_run_counts_by_how_far_it_goes_and_one_of_a_longer_run_as_ever():
    """A run of 20 steps over the whole range of noise is the measure."""

    def how_far(schedule):
        return schedule.how_far(MOST_FEW, USUAL)

    far = {run: how_far(scheduled(sigmas)) for run, (sigmas, _) in RUNS.items()}
    assert far["8 steps"] == far["8 shifted steps"] == far["the first 4 of 8"] == pytest.approx(20 / 8)
    assert far["one step"] == 20
    assert far["the last 7 of 20"] == pytest.approx(1)
    assert {far[run] for run, (_, few) in RUNS.items() if not few} == {1}
    assert how_far(scheduled([sigma / 10 for sigma in sigmas_of(8)])) == 1  # these go less far than one of 20
    assert how_far(schedule_of([1.0, 0.8, 0.9, 0.5, 0.2, 0.0])) == 4 and how_far(OpenSchedule()) == 1


def test_of_a_list_that_turns_round_the_length_is_known_and_of_an_unknown_one_it_is_not():
    turning = [1.0, 0.8, 0.9, 0.5, 0.2, 0.0]
    assert are_few(schedule_of(turning)) and not are_few(schedule_of([*turning, *turning]))
    assert not are_few(OpenSchedule())


@pytest.mark.parametrize("kind", [TaylorSeerCache, PyramidAttentionBroadcast, FasterCache], ids=lambda kind: kind.title)
def test_what_goes_by_the_schedule_is_left_out_of_such_a_run_and_is_there_on_request(kind):
    few, more = scheduled(sigmas_of(MOST_FEW)), scheduled(sigmas_of(MOST_FEW + 1))
    draft = kind(few_steps="draft")
    assert (
        begun([kind()], few)[0] == () and begun([kind()], more)[0] == (kind(),) and begun([draft], few)[0] == (draft,)
    )
    sampling = Sampling(Toy(), (kind(),), sigmas_of(MOST_FEW))
    assert torch.equal(sampling.sample(first_latent()), uncached(Toy(), first_latent(), sigmas=sigmas_of(MOST_FEW)))
    assert sampling.report.bytes_held == 0 and not sampling.report.count("reused", "forecast")


def test_beside_another_cache_a_note_says_which_one_skipped_nothing():
    working, report = begun([FirstBlockCache(), PyramidAttentionBroadcast()], scheduled(sigmas_of(6)))
    assert working == (FirstBlockCache(),)
    (note,) = report.notes
    assert note.startswith("Pyramid Attention Broadcast skipped nothing: with only 6 steps")
