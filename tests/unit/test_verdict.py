"""The verdict on a cache: against the fewer steps that its time would buy, beyond the clock's noise."""

import math
import random

import pytest

from cache_core.compare.verdict import MOST_ROUNDS, Clock, Verdict, judged, stands, too_close

STEPS = 20
CLOSENESS = {steps: 30 + 1.5 * steps for steps in range(1, STEPS)}  # dB of uncached runs of fewer steps


def outcome(decibels, bought, fewer=CLOSENESS):
    return judged(decibels, bought, STEPS, fewer).outcome


@pytest.mark.parametrize(
    ("decibels", "bought", "expected", "words"),
    [
        (50, (10, 12), "worth it", "Closer than 12 steps in the same time: worth it."),
        (47, (10, 12), "too close", "Too close to call: the clock's noise is larger (10 to 12 steps in this time)."),
        (45, (10, 12), "no better", "No better than 10 steps without a cache here."),
        (29, (10, 12), "no better", "No better than 10 steps without a cache here."),
        (45, (20, 22), "no faster", "No faster than uncached here."),
        (70, (18, 21), "too close", "Too close to call: the clock's noise is larger (18 to 20 steps in this time)."),
        (math.inf, (18, 21), "no faster", "The same picture in the same time: nothing gained here."),
        (math.inf, (9, 11), "worth it", "Closer than 11 steps in the same time: worth it."),
        (31, (1, 1), "no better", "No better than 1 step without a cache here."),
    ],
)
def test_each_case_has_its_sentence(decibels, bought, expected, words):
    said = judged(decibels, bought, STEPS, CLOSENESS)
    assert (said.outcome, said.text) == (expected, words)


def test_a_ruined_picture_is_never_called_worth_it():
    ruined = {steps: 10.0 for steps in CLOSENESS}
    said = judged(29.9, (4, 5), STEPS, ruined)
    assert said.outcome == "look"
    assert said.text == "Closer than 5 steps in the same time, but plainly changed: look at it."
    assert outcome(30.1, (4, 5), ruined) == "worth it"


def test_it_asks_for_the_most_steps_first_and_for_the_fewest_only_if_those_are_better():
    assert judged(47, (10, 12), STEPS, {}) == 12
    assert judged(50, (10, 12), STEPS, {12: 48.0}).outcome == "worth it"
    assert judged(47, (10, 12), STEPS, {12: 48.0}) == 10
    assert judged(47, (18, 20), STEPS, {}) == 18  # as many steps as the uncached run has are that run


def test_the_run_to_look_at_is_the_one_that_was_compared():
    assert judged(50, (10, 12), STEPS, CLOSENESS).steps == 12
    assert judged(40, (10, 12), STEPS, CLOSENESS).steps == 10
    assert judged(40, (20, 22), STEPS, CLOSENESS).steps is None
    assert too_close((10, 12), STEPS, [10]).steps == 10
    assert too_close((10, 12), STEPS, [7, 15]).steps == 7  # as near as any
    assert too_close((10, 12), STEPS, []).steps is None


def clock(uncached, fewer=()):
    """A clock of rounds with these seconds of uncached runs, and (steps, seconds) of fewer in the first."""
    made = Clock(STEPS)
    for number, seconds in enumerate(uncached):
        made.begin(seconds)
        for run in () if number else fewer:
            made.add(*run)
    return made


def test_a_clock_that_runs_steadily_is_believed_to_a_step():
    steady, cached = clock([10.0, 10.0, 10.0], [(12, 6.0), (10, 5.0)]), [6.0, 6.0, 6.0]
    assert steady.noise(cached) < 0.025
    assert steady.buys(cached) == (11, 13)


def test_a_clock_that_wavers_is_believed_less():
    steady, wavering = clock([10.0], [(12, 6.0)]), clock([10.0], [(12, 7.5)])
    assert wavering.noise([6.0]) > 2.5 * steady.noise([6.0])
    assert wavering.buys([6.0])[0] < steady.buys([6.0])[0] < 12 < steady.buys([6.0])[1] < wavering.buys([6.0])[1]


def test_a_share_that_differs_from_round_to_round_shows_the_noise_too():
    assert clock([10.0, 10.0]).noise([6.0, 9.0]) > 3 * clock([10.0, 10.0]).noise([6.0, 6.0])


def test_more_rounds_help():
    spans = []
    for rounds in (1, 2, 3):
        least, most = clock([10.0] * rounds, [(12, 6.8)]).buys([6.0] * rounds)
        spans.append(most - least)
    assert spans == sorted(spans, reverse=True)
    assert spans[0] > spans[-1] > 0


def test_time_is_measured_as_ratios_side_by_side():
    """A machine that is half as fast in the second round changes nothing."""
    changing, steady = clock([10.0, 20.0]), clock([10.0, 10.0])
    assert changing.share([6.0, 12.0]) == 0.6
    assert changing.buys([6.0, 12.0]) == steady.buys([6.0, 6.0])


@pytest.mark.parametrize(
    ("outcome", "rounds"), [("worth it", 1), ("look", 1), ("no better", 2), ("no faster", 2), ("too close", 9)]
)
def test_one_round_may_speak_for_a_cache_but_not_against_it(outcome, rounds):
    first = next((number for number in range(1, 9) if stands(Verdict(outcome, ""), number)), 9)
    assert first == rounds


@pytest.mark.parametrize(("jitter", "most"), [(0.005, 0), (0.02, 0), (0.05, 1), (0.1, 12)])
@pytest.mark.parametrize("share", [0.4, 0.5, 0.62, 0.8])
@pytest.mark.parametrize("beyond", [-1.4, -0.7, 0.1, 0.8])
def test_the_verdict_does_not_flip_with_the_clock(share, jitter, most, beyond):
    """A hundred comparisons of a cache that is about as close as the steps that its time buys."""
    draw, decibels = random.Random(1), CLOSENESS[round(STEPS * share)] + beyond

    outcomes = [compared(decibels, share, lambda: max(0.3, draw.gauss(1, jitter))) for _ in range(100)]

    assert min(outcomes.count("worth it"), outcomes.count("no better")) <= most  # of 100, the less frequent


def test_without_the_noise_such_verdicts_would_flip():
    """By the measured seconds alone, as one would read them off the table."""
    draw, decibels = random.Random(0), CLOSENESS[12] + 0.75
    naive = [decibels > CLOSENESS[round(STEPS * 0.62 * draw.gauss(1, 0.05))] for _ in range(100)]
    assert 25 < sum(naive) < 75  # as often one as the other


@pytest.mark.parametrize(("decibels", "expected"), [(65.0, "worth it"), (36.0, "no better")])
def test_a_clear_case_is_clear_in_spite_of_the_noise(decibels, expected):
    draw = random.Random(0)
    assert {compared(decibels, 0.5, lambda: draw.gauss(1, 0.04)) for _ in range(50)} == {expected}


def compared(decibels, share, jitter):
    """The outcome of rounds as nodes/comparing.py makes them, by a clock of this jitter."""
    clock, cached, said = Clock(STEPS), [], None
    for _ in range(MOST_ROUNDS):
        clock.begin(STEPS * jitter())
        cached.append(STEPS * share * jitter())
        bought, fewer = clock.buys(cached), {}
        while isinstance(said := judged(decibels, bought, STEPS, fewer), int):
            fewer[said] = CLOSENESS[said]
            clock.add(said, said * jitter())
        said = judged(decibels, clock.buys(cached), STEPS, CLOSENESS)
        if stands(said, len(cached)):
            break
    return said.outcome
