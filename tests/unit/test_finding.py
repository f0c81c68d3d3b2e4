"""The search for a cache, on simulated models: what it finds, in how many runs, and what it says of it."""

import math
import random
from itertools import pairwise

import pytest

from cache_core.compare.finding import MOST_RUNS, Search
from cache_core.compare.found import JUDGED, SEARCHED, SPEED_UP, WISHES, Measure, Wish
from cache_core.compare.side_by_side import described
from cache_core.ladders import SPEED_UPS, THRESHOLDS, ladders
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

STEPS = 20
SEEN = Wish("can't see it")


class Model:
    """A simulated model: closeness falls with the share left out, which rises with the threshold or interval."""

    def __init__(self, noise=0.0, counted=True, seed=0, **lifts):
        self.dice, self.noise, self.counted = random.Random(seed), noise, counted
        self.lifts = {"first": 0.0, "taylor": -6.0, "fewer": -14.0, "judged": 0.0, "luck": 0.0} | lifts  # dB
        self.runs = []

    def __call__(self, how, seed):
        self.runs.append((how, seed))
        if how == STEPS:
            return Measure(math.inf, 10.0, 1.0)
        share, kind = self.share(how)
        decibels = 70 - 50 * (1 - share) + self.lifts[kind] + self.dice.gauss(0, self.noise)
        decibels += self.lifts["judged"] * (seed == JUDGED and kind != "fewer")
        decibels += self.lifts["luck"] * (1 if seed == SEARCHED else -1) * (kind == "taylor")
        is_told = self.counted or isinstance(how, int)
        return Measure(math.inf if share == 1 else decibels, 10 * share, share if is_told else None)

    def share(self, how):
        if isinstance(how, FirstBlockCache):
            left_out = 14 * math.log(how.residual_diff_threshold / 0.02) / math.log(0.5 / 0.02)
            return (STEPS - round(max(0.0, left_out))) / STEPS, "first"
        if isinstance(how, TaylorSeerCache):
            return round(STEPS / how.target_speedup) / STEPS, "taylor"
        return how / STEPS, "fewer"


def found(model, wish=SEEN, tried=None, **more):
    return Search(model, tried or ladders(wish), wish, STEPS, **more).run()


def seeds(model, seed):
    return [how for how, at in model.runs if at == seed]


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("noise", [0.0, 2.0, 6.0])
def test_at_most_twelve_runs_are_made_whatever_the_closeness_does(name, noise):
    for seed in range(50):
        model = Model(noise, seed=seed)
        result = found(model, Wish(name, 1.7))
        assert len(model.runs) == len(result.points) <= MOST_RUNS == 12


def test_the_runs_are_those_of_the_method():
    model = Model()
    result = found(model)
    assert model.runs[0] == (STEPS, SEARCHED)
    assert model.runs[-3:] == [(STEPS, JUDGED), (result.chosen.how, JUDGED), (result.judged.costs_steps, JUDGED)]
    assert not [how for how in seeds(model, SEARCHED)[1:] if isinstance(how, int)]
    assert {type(how) for how in seeds(model, SEARCHED)[1:]} == {FirstBlockCache, TaylorSeerCache}
    assert len(set(model.runs)) == len(model.runs)  # nothing is sampled twice


@pytest.mark.parametrize("name", ["can't see it", "hardly", "draft"])
def test_of_a_smooth_model_the_boldest_setting_that_is_close_enough_is_found_to_a_step(name):
    model, wish = Model(), Wish(name)
    result = found(model, wish)
    can_be = [Model()(how, SEARCHED) for ladder in ladders(wish) for how in ladder]
    best = min(measure.share for measure in can_be if measure.decibels >= {**dict(zip(WISHES, (45, 38, 30)))}[name])
    assert result.is_met and result.strategy == result.chosen.how
    assert best <= result.chosen.share < best + 1.01 / STEPS < 0.75


@pytest.mark.parametrize("speed_up", [1.2, 1.5, 2.0, 2.5, 3.0])
def test_of_a_smooth_model_the_closest_setting_that_is_fast_enough_is_found_to_a_step(speed_up):
    wish = Wish(SPEED_UP, speed_up)
    result = found(Model(), wish)
    can_be = [Model()(how, SEARCHED) for ladder in ladders(wish) for how in ladder]
    best = max(measure.decibels for measure in can_be if 1.02 / measure.share >= speed_up)
    assert result.is_met
    assert best - 51 / STEPS < result.chosen.decibels <= best


def test_the_other_strategy_is_taken_where_it_is_better():
    assert isinstance(found(Model()).strategy, FirstBlockCache)
    assert isinstance(found(Model(taylor=6.0)).strategy, TaylorSeerCache)


def test_where_nobody_counts_what_was_computed_seconds_decide():
    assert found(Model(counted=False)).strategy == found(Model()).strategy is not None


def judged_in(result):
    """The caches that were sampled on the judging seed."""
    return [point for point in result.points if point.seed == JUDGED and not isinstance(point.how, int)]


def test_a_noisy_closeness_still_ends_in_what_was_tried_and_meets_the_wish_there():
    for seed in range(100):
        result = found(Model(3.0, seed=seed))
        searched = {point.how: point for point in result.points if point.seed == SEARCHED and point.saves_steps}
        close = [point for point in searched.values() if point.decibels >= 45]
        if close:
            first = searched[judged_in(result)[0].how]
            assert first.decibels >= 45 and first.share == min(point.share for point in close)


def test_what_fails_on_the_other_seed_makes_way_for_what_had_as_much_to_spare():
    result = found(Model(judged=-5.0))
    first, second = judged_in(result)
    assert first.decibels < 45 <= second.decibels and result.judged == second and result.is_met
    assert result.chosen.decibels >= 45 + (45 - first.decibels)
    assert result.strategy == second.how


def test_what_was_lucky_on_the_search_seed_is_not_what_is_handed_on():
    lucky = {"taylor": 0.0, "luck": 12.0, "fewer": -10.0}
    for wish in (SEEN, Wish(SPEED_UP, 1.6)):
        result = found(Model(**lucky), wish)
        assert isinstance(judged_in(result)[0].how, TaylorSeerCache)
        assert isinstance(result.strategy, FirstBlockCache) and result.is_met


def test_where_both_fail_on_the_other_seed_the_sentence_has_both_numbers():
    result = found(Model(judged=-40.0, fewer=-60.0))
    assert (
        len(judged_in(result)) >= 2 and len(result.points) <= 12 and result.strategy is not None and not result.is_met
    )
    assert "The wish was 45 dB; on the seed it searched on: " in result.told


def test_what_is_no_better_than_fewer_steps_is_not_handed_on():
    result = found(Model(fewer=10.0))
    assert result.chosen is not None and result.strategy is None and not result.is_met
    assert result.told.startswith("No cache that was judged beats fewer steps. The best, First Block Cache")
    assert result.told.endswith("The model is handed on without a cache.")


def test_a_closeness_that_cannot_be_had_gives_the_closest_that_saves_a_step():
    model = Model(first=-28.0, taylor=-35.0, fewer=-50.0)
    result = found(model)
    tried = [point for point in result.points if point.saves_steps and point.seed == SEARCHED]
    assert result.chosen.decibels == max(point.decibels for point in tried) < 45
    assert result.strategy == result.chosen.how and not result.is_met
    assert result.told.startswith("No cache that was tried is as close as 45 dB; the closest, ")


def test_a_speed_up_that_cannot_be_had_gives_the_fastest():
    wish = Wish(SPEED_UP, 5.0)
    result = found(Model(), wish, tried=ladders(wish)[:1])
    assert result.chosen.share == min(point.share for point in result.points if point.saves_steps)
    assert result.told.startswith("No cache that was tried is as fast as 5x; the fastest, ")


def test_caches_that_do_nothing_cost_two_runs_each_and_leave_the_model_as_it_is():
    model = Model()
    model.share = lambda how: (1.0, "first") if not isinstance(how, int) else (how / STEPS, "fewer")
    result = found(model)
    assert len(model.runs) == 1 + 2 * len(ladders(SEEN))
    assert result.chosen is None and result.strategy is None
    assert result.told.startswith("Nothing to reuse: no cache that was tried saved a step of 20.")


def test_a_cache_that_saves_nothing_on_the_other_seed_is_not_handed_on():
    class Fickle(Model):
        def __call__(self, how, seed):
            measure = super().__call__(how, seed)
            return measure._replace(share=1.0) if seed == JUDGED else measure

    result = found(Fickle())
    assert result.chosen is not None and result.strategy is None and result.fewer is None
    assert "saved no step on a seed it did not search on" in result.told


def test_pictures_that_are_not_comparable_are_never_chosen():
    model = Model()
    model.lifts["first"] = math.nan
    result = found(model)
    assert isinstance(result.chosen.how, TaylorSeerCache)


def test_a_ladder_costs_four_runs_at_most():
    model = Model()
    model.share = lambda how: (0.5, "first") if not isinstance(how, int) else (how / STEPS, "fewer")
    model.lifts["first"] = -3.0  # 42 dB: careful settings are asked for, but there are none
    found(model, tried=[ladders(SEEN)[0]])
    assert len(seeds(model, SEARCHED)) <= 1 + 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("before_the_last", [0, 1, 2, 5, 7])
def test_what_ends_a_run_ends_the_search(error, before_the_last):
    whole, model = Model(), Model()
    found(whole)
    at = len(whole.runs) - 1 - before_the_last

    def sample(how, seed):
        if len(model.runs) == at:
            raise error
        return model(how, seed)

    with pytest.raises(error):
        found(sample)
    assert len(model.runs) == at


@pytest.mark.parametrize("most_runs", [1, 4, 7, 9])
def test_a_smaller_budget_is_kept_to_and_shared_by_the_strategies(most_runs):
    model = Model()
    found(model, most_runs=most_runs)
    assert len(model.runs) <= most_runs
    if most_runs >= 7:
        assert {type(how) for how in seeds(model, SEARCHED)[1:]} == {FirstBlockCache, TaylorSeerCache}


def test_ladders_go_from_careful_to_bold_in_legal_settings():
    assert len(set(THRESHOLDS)) == 15 and all(before < after for before, after in pairwise(THRESHOLDS))
    assert THRESHOLDS[7] == 0.12 and SPEED_UPS[3] == 2.0 and list(SPEED_UPS) == sorted(set(SPEED_UPS))
    for wish in (SEEN, *(Wish(SPEED_UP, speed_up) for speed_up in (0.5, 1.2, 1.55, 5.0, 20.0))):
        tried = [strategy for ladder in ladders(wish) for strategy in ladder]
        assert not [strategy for strategy in tried if strategy.is_off or strategy.contradiction]


def test_a_speed_up_is_asked_of_taylorseer_as_it_is_and_a_bit_bolder():
    asked = [strategy.target_speedup for strategy in ladders(Wish(SPEED_UP, 1.6))[1]]
    assert asked == [1.6, 1.76]
    assert [strategy.target_speedup for strategy in ladders(Wish(SPEED_UP, 5.0))[1]] == [5.0]


def test_the_sentence_names_the_setting_both_speeds_and_what_it_is_compared_with():
    result = found(Model())
    (_, settings), share = described([result.strategy]), result.judged.share
    speed = f"{1 / share:.1f}x ({1 / share:.1f}x by the clock)"
    assert result.told == (
        f"First Block Cache, {settings}: {speed}, "
        f"{result.judged.decibels:.0f} dB on a seed it did not search on; {result.fewer.how} steps without a cache "
        f"cost as much and give {result.fewer.decibels:.0f} dB."
    )


def test_an_unknown_wish_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="Choose one of: can't see it, hardly, draft, speed-up"):
        Wish("perfect")
