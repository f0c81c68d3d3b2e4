"""Steps and schedules: where a model call is, and which steps are computed when the schedule alone decides."""

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy import sigmas_of

from cache_core import Schedule
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.spacing import Broadcast, published_steps, sigma_spaced_steps
from cache_core.strategy.step import OpenSchedule, schedule_of

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


@pytest.mark.parametrize("bent", [[1.0, 0.6, 0.3, 0.8, 0.4, 0.0], [0.0, 1.0, 0.5, 0.0], [0.2, 0.6, 0.1]])
def test_sigmas_that_both_fall_and_rise_are_counted_as_they_come(bent):
    schedule = schedule_of(bent)
    assert [schedule.step_at(sigma).index for sigma in bent[:-1]] == list(range(len(bent) - 1))
    assert schedule.is_open
    with pytest.raises(ValueError, match="schedule_of"):
        Schedule(bent)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("last", [1.0, 0.95])
def test_a_rising_schedule_is_followed_as_a_falling_one_is(shift, last):
    rising = [last * sigma for sigma in sigmas_of(20, shift)[::-1]]
    schedule = schedule_of(rising)
    steps = [schedule.step_at(sigma) for sigma in rising[:-1]]
    assert [step.index for step in steps] == list(range(20))
    assert steps[0].position == 0 and all(step.length > 0 for step in steps)
    assert sum(step.length for step in steps) == pytest.approx(20)
    assert schedule.step_at((rising[4] + rising[5]) / 2).index == 4


@pytest.mark.parametrize("noise", [1 - 5e-6, 1, 1 + 5e-6])
def test_the_last_digits_of_float32_do_not_change_the_step_of_a_rising_schedule(noise):
    sigmas = sigmas_of(30, shift=3.0)[::-1]
    assert [Schedule(sigmas).step_at(sigma * noise).index for sigma in sigmas[:-1]] == list(range(30))


def test_shares_of_a_rising_schedule_count_from_its_noisy_end():
    schedule = Schedule(EVEN[::-1])
    within = [schedule.is_within(schedule.step_at(sigma), 0.0, 0.4) for sigma in EVEN]
    assert within == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("sigmas", "is_flow", "time"), [([1.2, 0.5, 0.0], False, 1.2 / 2.2), ([1.2, 0.5, 0.0], True, 1.2)]
)
def test_whether_sigmas_are_shares_of_noise_is_what_the_model_says(sigmas, is_flow, time):
    step = schedule_of(sigmas, is_flow=is_flow).step_at(1.2)
    assert (step.time, step.timestep) == pytest.approx((time, 1000 * time))


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


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 20])
def test_the_place_of_a_step_is_how_far_it_is_in_even_steps(steps, shift):
    schedule = Schedule(sigmas_of(steps, shift))
    found = [schedule.step_at(sigma) for sigma in schedule.sigmas[:-1]]
    assert [step.position for step in found] == pytest.approx([steps * (1 - sigma) for sigma in schedule.sigmas[:-1]])
    assert all(after.position - step.position == pytest.approx(step.length) for step, after in pairwise(found))
    between = (schedule.sigmas[1] + schedule.sigmas[2]) / 2
    assert found[1].position < schedule.step_at(between).position < found[2].position


def test_a_schedule_of_a_part_of_the_noise_begins_at_place_zero():
    schedule = Schedule([0.6, 0.4, 0.2, 0.0])
    assert [schedule.step_at(sigma).position for sigma in schedule.sigmas] == pytest.approx([0, 1, 2, 3])


@pytest.mark.parametrize(("sigma", "timestep"), [(1.0, 1000), (0.25, 250), (0.0, 0), (0.3, 300)])
def test_the_timestep_of_a_flow_model_is_its_sigma_in_thousandths(sigma, timestep):
    assert Schedule(EVEN).step_at(sigma).timestep == pytest.approx(timestep)


def test_the_timestep_of_other_models_is_what_they_say_or_the_share_of_the_noise():
    assert Schedule([14.6, 1.0, 0.0]).step_at(1.0).timestep == pytest.approx(500)
    assert Schedule([14.6, 1.0, 0.0], timestep_of=lambda sigma: 60 * sigma).step_at(14.6).timestep == pytest.approx(876)


def test_an_open_schedule_makes_a_step_of_each_sigma_it_reaches():
    schedule, sigmas = OpenSchedule(), [1.0, 1.0, 0.8, 0.8 * (1 + 5e-6), 0.5, 0.5 * (1 - 5e-6), 0.1]
    steps = [schedule.step_at(sigma) for sigma in sigmas]
    assert [step.index for step in steps] == [step.position for step in steps] == [0, 0, 1, 1, 2, 2, 3]
    assert {step.length for step in steps} == {1.0}
    assert [step.timestep for step in steps] == pytest.approx([1000 * sigma for sigma in sigmas])
    assert schedule.is_open
    assert not Schedule(EVEN).is_open
    assert schedule.count == 4


def test_an_open_schedule_counts_a_sigma_that_comes_again_as_another_step():
    schedule = OpenSchedule()
    assert [schedule.step_at(sigma).index for sigma in (0.9, 0.6, 0.3, 0.9, 0.9, 0.6)] == [0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("shift", "skip_range", "lasting"),
    [
        (1.0, 1, 0),
        (1.0, 2, 1),
        (1.0, 5, 4),  # as published
        (6.0, 5, 4),  # many steps at high noise are but a little way
    ],
)
def test_a_value_lasts_for_one_evaluation_less_than_the_range(shift, skip_range, lasting):
    schedule, broadcast = Schedule(sigmas_of(20, shift)), Broadcast()
    steps = [schedule.step_at(sigma) for sigma in schedule.sigmas[:-1]]
    broadcast.begin(steps[0])
    assert [broadcast.goes_on(step, skip_range) for step in steps[1:8]] == [True] * lasting + [False] * (7 - lasting)


def test_a_value_lasts_no_further_than_so_many_even_steps():
    schedule, broadcast = Schedule([1.0, 0.9, 0.71, 0.7, 0.5, 0.0]), Broadcast()  # an even step is 0.2
    broadcast.begin(schedule.step_at(0.9))
    assert [broadcast.goes_on(schedule.step_at(sigma), 2) for sigma in (0.5, 0.4)] == [False, False]
    broadcast.begin(schedule.step_at(0.9))
    assert broadcast.goes_on(schedule.step_at(0.51), 2)


def test_a_step_evaluated_twice_counts_twice_and_another_value_begins_anew():
    step, broadcast = Schedule(EVEN).step_at(0.5), Broadcast()
    for _ in range(2):
        broadcast.begin(step)
        assert [broadcast.goes_on(step, 3) for _ in range(4)] == [True, True, False, False]


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
def test_sigma_spacing_computes_as_many_steps_as_published_the_first(count, warm_up, interval, shift):
    steps = sigma_spaced_steps(tuple(sigmas_of(count, shift)), warm_up, interval)
    computed = len(published_steps(count, warm_up, interval))
    assert len(steps) == computed and list(steps) == sorted({*steps} & {*range(count)})
    assert steps[0] == 0 and (steps[-1] == count - 1 or computed < 10)


@few
@given(*settings_of_a_plan)
def test_few_steps_of_an_even_schedule_are_the_published(count, warm_up, interval):
    published = published_steps(count, warm_up, interval)
    assume(len(published) < 10)
    assert sigma_spaced_steps(tuple(sigmas_of(count)), warm_up, interval) == published


def test_few_steps_leave_the_crowd_at_high_noise():
    spaced, published = sigma_spaced_steps(tuple(sigmas_of(20, 6.0)), 3, 4), published_steps(20, 3, 4)
    assert sum(spaced) > sum(published)
    sigmas = sigmas_of(20, 6.0)

    def widest_gap(steps):
        return max(sigmas[a] - sigmas[b] for a, b in zip(steps, [*steps[1:], 20], strict=True))

    assert widest_gap(spaced) < widest_gap(published)


def test_more_steps_go_by_the_schedules_own_and_are_a_little_denser_where_these_are_long():
    assert sigma_spaced_steps(tuple(sigmas_of(20)), 3, 2) == (0, 1, 2, 3, 4, 6, 9, 11, 14, 16, 19)
    assert sigma_spaced_steps(tuple(sigmas_of(20, 8.0)), 3, 2) == (0, 1, 2, 4, 5, 8, 10, 13, 15, 17, 19)
    assert sigma_spaced_steps(tuple(sigmas_of(50, 3.0)), 3, 3)[:6] == (0, 1, 2, 3, 5, 9)


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 0.5, 0.5], [1.0, 0.0]])
def test_odd_schedules_can_be_spaced(sigmas):
    steps = sigma_spaced_steps(tuple(sigmas), 1, 2)
    assert steps == tuple(range(len(sigmas) - 1))[::2]


def test_a_long_schedule_is_planned_fast_enough_to_ask_at_every_site():
    strategy, schedule = TaylorSeerCache(cache_level="module"), Schedule(sigmas_of(100, 3.0))
    assert all(0 in strategy.computed_steps(schedule) for _ in range(20))
