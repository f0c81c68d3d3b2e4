"""The report: what was computed, reused and forecast, why, and in a form that JSON can carry."""

import json
import math

import pytest
from toy import NEGATIVE, PICTURE, POSITIVE, GuidedSampling, ReuseAlways, Sampling, first_latent, sigmas_of

from cache_core import CacheRun, Report, Schedule
from cache_core.report.record import CallRecord
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

PAB = PyramidAttentionBroadcast(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
ATTENTION_ONLY = FasterCache(unconditional_batch_skip_range=1, spatial_attention_timestep_skip_end=1001)
GUIDANCE_ONLY = FasterCache(spatial_attention_block_skip_range=1)


@pytest.fixture(params=["joined", "separate", "alternating"])
def sampled(toy, request):
    sampling = Sampling(toy, (FirstBlockCache(),), layout=request.param)
    sampling.sample(first_latent())
    return sampling


def test_it_is_json_without_nan(sampled):
    report = sampled.report.as_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_it_is_json_even_where_a_measure_is_not_a_number(toy, value):
    sampling = Sampling(toy, (FirstBlockCache(),))
    for index in range(4):
        sampling.predict(dict.fromkeys(sampling.branches, first_latent().fill_(value)), index)
    json.dumps(sampling.report.as_dict(), allow_nan=False)


def test_totals_add_up(sampled):
    report = sampled.report.as_dict()
    totals, actions = report["totals"], ("computed", "reused", "forecast")
    assert sum(totals[action] for action in actions) == totals["calls"] == len(report["calls"])
    assert totals["computed_share"] == pytest.approx(
        sum(c["computed_share"] * len(c["branches"]) for c in report["calls"]) / (2 * 12)
    )
    assert all(call["seconds"] > 0 for call in report["calls"])


def test_every_branch_has_its_own_totals(sampled):
    totals = sampled.report.as_dict()["totals"]["branches"]
    assert set(totals) == {NEGATIVE, POSITIVE}
    assert sum(totals[NEGATIVE].values()) == sum(totals[POSITIVE].values()) == 12
    assert totals[NEGATIVE] == totals[POSITIVE]


def test_every_call_tells_its_step_and_sigma(sampled):
    calls = sampled.report.as_dict()["calls"]
    assert sorted({call["step"] for call in calls}) == list(range(12))
    assert all(call["sigma"] == pytest.approx(sampled.sigmas[call["step"]]) for call in calls)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_measure_told_is_the_one_compared_with_the_threshold(toy, shift):
    strategy = FirstBlockCache(residual_diff_threshold=0.1)
    sampling = Sampling(toy, (strategy,), sigmas_of(12, shift))
    sampling.sample(first_latent())
    told = [call for call in sampling.report.calls if call.measure is not None]
    assert {call.action == "computed" for call in told} == {True, False}
    assert all((0 < call.measure < 0.1) == (call.action != "computed") for call in told)
    assert all(call.reason.startswith(f"change {call.measure:.3g}") for call in told)


def test_every_call_has_a_reason(sampled):
    assert all(call["reason"] for call in sampled.report.as_dict()["calls"])


def test_a_forecast_of_order_zero_is_called_reuse(toy):
    sampling = Sampling(toy, (TaylorSeerCache(max_order=0),))
    sampling.sample(first_latent())
    assert sampling.report.count("forecast") == 0
    assert sampling.report.count("reused") + sampling.report.count("computed") == 12


def test_the_line_says_it_all(sampled):
    line = sampled.report.line()
    assert line.startswith(f"Refrain, First Block Cache: {len(sampled.report.calls)} model calls")
    assert "of the blocks computed" in line
    assert line.endswith(" held")
    assert "\n" not in line


def test_the_line_says_how_much_is_held_and_if_other_than_that_was_foretold(toy):
    sampling = Sampling(toy, (TaylorSeerCache(cache_interval=3, cache_level="block"),))
    sampling.sample(first_latent())
    report = sampling.report
    assert report.bytes_held == report.bytes_foretold == 20 * 2**10 and ", 20.0 KiB held" in report.line()
    report.held(0, 24 * 2**10)
    assert ", 20.0 KiB of 24.0 KiB foretold held" in report.line()


@pytest.mark.parametrize(
    ("strategies", "work"),
    [
        ([FirstBlockCache()], "blocks"),
        ([TaylorSeerCache()], "blocks"),
        ([TaylorSeerCache(cache_level="module", cache_interval=2)], "modules"),
        ([PAB], "attentions"),
        ([ATTENTION_ONLY], "attentions"),
        ([FasterCache()], "attentions"),  # those of a prediction that is left out do not run either
        ([GUIDANCE_ONLY], "predictions"),
        ([FirstBlockCache(), GUIDANCE_ONLY], "blocks"),
        ([TaylorSeerCache(cache_interval=2), PAB], "blocks and attentions"),
        ([FirstBlockCache(residual_diff_threshold=0.0), PAB], "attentions"),
    ],
    ids=lambda given: given if isinstance(given, str) else "+".join(strategy.title for strategy in given),
)
def test_the_share_is_of_what_the_strategies_cache(toy, strategies, work):
    sampling = GuidedSampling(toy, tuple(strategies))
    sampling.sample(first_latent(tokens=PICTURE[0] * PICTURE[1]))
    report = sampling.report
    assert report.count("reused", "forecast") > 0
    assert f"; {report.computed_share:.0%} of the {work} computed," in report.line()
    assert report.work == work


def test_the_line_says_that_settings_are_off(toy):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=0.0),))
    sampling.sample(first_latent())
    assert sampling.report.line().endswith("12 computed; these settings never reuse")
    assert sampling.report.as_dict()["strategies"][0]["off"]


def test_the_line_says_why_nothing_was_reused(toy):
    sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=1e-9),))
    sampling.sample(first_latent())
    assert "nothing reused: change " in sampling.report.line()


def test_settings_shown_are_those_of_the_node(toy):
    shown = Sampling(toy, (TaylorSeerCache(),)).report.as_dict()["strategies"][0]
    assert shown["title"] == "TaylorSeer Cache"
    assert shown["settings"]["cache_interval"] == 2
    assert "taylor_factors_dtype" not in shown["settings"]


def test_a_run_without_calls_has_a_report():
    report = CacheRun((FirstBlockCache(),), Schedule([1.0, 0.0])).report
    report.close()
    assert report.as_dict()["totals"]["calls"] == 0
    assert report.computed_share == 1.0
    assert report.speed_up is None


@pytest.mark.parametrize(
    ("calls", "speed_up"),
    [
        ([(1, "computed", 2.0), (2, "reused", 1.0)], 4 / 3),
        ([(1, "computed", 1.0), (1, "computed", 1.0), (2, "reused", 0.5), (2, "reused", 0.5)], 4 / 3),
        ([(1, "computed", 1.0), (1, "computed", 1.0), (2, "computed", 1.0), (2, "reused", 0.0)], 4 / 3),
        ([(1, "computed", 1.0), (2, "computed", 1.0)], 1.0),
        (
            [(1, "computed", 9.0), *((n, "computed", 2.0) for n in (2, 3)), *((n, "forecast", 1.0) for n in (4, 5))],
            10 / 15,
        ),
        ([(1, "reused", 1.0)], None),
        ([(1, "computed", 1.0), (1, "forecast", 1.0)], None),
        ([(1, "computed", 0.0)], None),
    ],
    ids=[
        "joined",
        "separate",
        "one-branch-left-out",
        "nothing-reused",
        "a-slow-first",
        "no-call",
        "no-evaluation",
        "no-time",
    ],
)
def test_the_speed_up_is_against_evaluations_in_which_nothing_was_reused(calls, speed_up):
    report = Report(strategies=(), steps=2)
    for evaluation, action, seconds in calls:
        report.add(CallRecord(None, (POSITIVE,), action, "", None, 1.0, None, evaluation, seconds=seconds))
    assert report.speed_up == (speed_up and pytest.approx(speed_up))


@pytest.mark.parametrize("layout", ["joined", "separate", "alternating"])
def test_all_calls_of_an_evaluation_have_its_number(toy, layout):
    sampling = Sampling(toy, (ReuseAlways(),), layout=layout)
    sampling.sample(first_latent())
    assert all(call.evaluation == call.step.index + 1 for call in sampling.report.calls)


def test_a_note_is_said_once(toy):
    report = Sampling(toy, (ReuseAlways(),)).report
    report.note("something")
    report.note("something")
    assert report.notes == ["something"]


def test_a_report_can_be_read_before_it_is_closed(toy):
    sampling = Sampling(toy, (ReuseAlways(),))
    sampling.sample(first_latent())
    assert sampling.run.report.as_dict()["totals"]["calls"] == 12


def test_closing_twice_changes_nothing(sampled):
    assert sampled.report.as_dict() == sampled.report.as_dict()
