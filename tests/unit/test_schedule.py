"""Steps and schedules: where a model call is, and which steps are computed when the schedule alone decides."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import sigmas_of

from cache_core import Schedule
from cache_core.schedule import published_steps, sigma_spaced_steps
from cache_core.strategies.taylorseer import TaylorSeerCache

EVEN = [1.0, 0.75, 0.5, 0.25, 0.0]
few = settings(max_examples=60, deadline=None)  # a busy machine must not fail a test
settings_of_a_plan = (st.integers(1, 40), st.integers(0, 8), st.integers(1, 9))


@pytest.mark.parametrize(
    ("sigma", "index"),
    [(1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3), (0.74, 1), (0.51, 1), (0.1, 3), (0.0, 3), (1.3, 0)],
)
def test_the_step_is_read_off_the_schedule(sigma, index):
    step = Schedule(EVEN).step_at(sigma)
    assert (step.index, step.sigma) == (index, sigma)


@pytest.mark.parametrize("noise", [1 - 5e-6, 1, 1 + 5e-6])
def test_the_last_digits_of_float32_do_not_change_the_step(noise):
    sigmas = sigmas_of(30, shift=3.0)
    schedule = Schedule(sigmas)
    assert [schedule.step_at(sigma * noise).index for sigma in sigmas[:-1]] == list(range(30))


def test_noise_added_above_an_entry_reads_as_the_step_before():
    assert Schedule(EVEN).step_at(0.76).index == 0


@pytest.mark.parametrize("sigmas", [[14.6, 6.0, 2.0, 0.5, 0.0], [14.6, 6.0, 2.0, 0.5]])
def test_a_schedule_of_a_model_that_adds_noise_to_the_picture(sigmas):
    schedule = Schedule(sigmas)
    assert [schedule.step_at(sigma).index for sigma in sigmas[:-1]] == list(range(len(sigmas) - 1))
    times = [schedule.step_at(sigma).time for sigma in sigmas]
    assert all(1 > earlier > later >= 0 for earlier, later in pairwise(times))


def test_repeated_sigmas_are_the_last_of_their_steps():
    step = Schedule([1.0, 0.5, 0.5, 0.5, 0.0]).step_at(0.5)
    assert step.index == 3


def test_a_schedule_that_restarts_is_followed_to_its_last_entry_of_that_noise():
    schedule = Schedule([1.0, 0.6, 0.3, 0.8, 0.4, 0.0])
    assert schedule.step_at(0.4).index == 4
    assert schedule.step_at(1.0).index == 0


@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1.0], [0.7, 0.7]])
def test_a_single_step_is_step_zero(sigmas):
    schedule = Schedule(sigmas)
    assert schedule.count == 1
    assert schedule.step_at(sigmas[0]).index == 0
    assert schedule.is_within(schedule.step_at(sigmas[0]), 0.0, 1.0)


def test_lengths_of_steps_average_one():
    schedule = Schedule(sigmas_of(12, shift=3.0))
    lengths = [schedule.step_at(sigma).length for sigma in schedule.sigmas[:-1]]
    assert sum(lengths) / 12 == pytest.approx(1)
    assert lengths[0] < 1 < lengths[-1]
    assert Schedule(EVEN).step_at(0.5).length == pytest.approx(1)


@pytest.mark.parametrize(
    ("start", "end", "indices"),
    [(0.0, 1.0, [0, 1, 2, 3]), (0.25, 1.0, [1, 2, 3]), (0.0, 0.5, [0, 1, 2]), (0.5, 0.5, [2]), (1.0, 1.0, [])],
)
def test_shares_of_the_sampling_include_both_ends(start, end, indices):
    schedule = Schedule(EVEN)
    steps = [schedule.step_at(sigma) for sigma in EVEN[:-1]]
    assert [step.index for step in steps if schedule.is_within(step, start, end)] == indices


def test_shares_are_translated_as_the_model_does():
    schedule = Schedule(EVEN, percent_to_sigma=lambda percent: (1 - percent) ** 2)
    assert not schedule.is_within(schedule.step_at(0.5), 0.5, 1.0)  # half the noise range is sigma 0.25 here
    assert schedule.is_within(schedule.step_at(0.25), 0.5, 1.0)


@pytest.mark.parametrize(
    ("count", "warm_up", "interval", "steps"),
    [
        (20, 3, 5, [0, 1, 2, 7, 12, 17]),
        (10, 3, 4, [0, 1, 2, 6]),
        (6, 1, 2, [0, 2, 4]),
        (4, 9, 3, [0, 1, 2, 3]),
        (5, 2, 1, [0, 1, 2, 3, 4]),
        (6, 0, 3, [0, 2, 5]),
    ],
)
def test_published_steps_are_a_warm_up_and_a_constant_interval(count, warm_up, interval, steps):
    assert published_steps(count, warm_up, interval) == tuple(steps)


@few
@given(*settings_of_a_plan, st.floats(0.3, 8))
def test_sigma_spacing_computes_as_many_steps_as_published_and_the_first(count, warm_up, interval, shift):
    steps = sigma_spaced_steps(tuple(sigmas_of(count, shift)), warm_up, interval)
    assert len(steps) == len(published_steps(count, warm_up, interval))
    assert list(steps) == sorted(set(steps))
    assert set(steps) <= set(range(count))
    assert 0 in steps


@few
@given(*settings_of_a_plan)
def test_sigma_spacing_of_an_even_schedule_is_the_published(count, warm_up, interval):
    assert sigma_spaced_steps(tuple(sigmas_of(count)), warm_up, interval) == published_steps(count, warm_up, interval)


def test_sigma_spacing_leaves_the_crowd_at_high_noise():
    spaced, published = sigma_spaced_steps(tuple(sigmas_of(20, 6.0)), 3, 4), published_steps(20, 3, 4)
    assert sum(spaced) > sum(published)
    sigmas = sigmas_of(20, 6.0)

    def widest_gap(steps):
        return max(sigmas[a] - sigmas[b] for a, b in zip(steps, [*steps[1:], 20], strict=True))

    assert widest_gap(spaced) < widest_gap(published)


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.5, 0.5], [1.0, 0.0]])
def test_odd_schedules_can_be_spaced(sigmas):
    steps = sigma_spaced_steps(tuple(sigmas), 1, 2)
    assert steps == tuple(range(len(sigmas) - 1))[::2]


def test_a_long_schedule_is_planned_fast_enough_to_ask_at_every_site():
    strategy, schedule = TaylorSeerCache(cache_level="module"), Schedule(sigmas_of(100, 3.0))
    assert all(0 in strategy.computed_steps(schedule) for _ in range(20))
