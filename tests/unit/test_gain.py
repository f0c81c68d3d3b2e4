"""What a run gained, as the page says it: steps skipped, whole or in part, and the seconds without a cache."""

import pytest
from toy import NEGATIVE, PICTURE, POSITIVE, GuidedSampling, Sampling, first_latent

from cache_core import Report, Schedule
from cache_core.report.gain import steps_of
from cache_core.report.record import CallRecord
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

ALWAYS = {"spatial_attention_timestep_skip_start": -1, "spatial_attention_timestep_skip_end": 1001}
STEPS = Schedule([1.0, 0.75, 0.5, 0.25, 0.0])


def record(step, action, share=0.0, evaluation=None, branches=(POSITIVE,), **known):
    place = None if step is None else STEPS.step_at(STEPS.sigmas[step])
    evaluation = step + 1 if evaluation is None else evaluation
    return CallRecord(None, branches, action, "", None, share, None, evaluation, place, **known)


@pytest.mark.parametrize(
    ("calls", "done", "skipped", "in_part"),
    [
        ([record(0, "computed", 1.0), record(1, "reused")], 2, 1, 0),
        ([record(0, "computed", 1.0), record(1, "forecast", 0.1)], 2, 1, 0),  # the first block of ten ran
        ([record(0, "reused", attention_only=True), record(1, "forecast", 0.9)], 2, 0, 2),
        ([record(0, "computed", 1.0, branches=(POSITIVE,)), record(0, "reused", branches=(NEGATIVE,))], 1, 0, 1),
        ([record(0, "computed", 1.0, 1), record(0, "reused", 0.0, 2), record(1, "reused", 0.0, 3)], 2, 1, 1),  # Heun
        ([record(None, "reused", 0.0, 1), record(None, "computed", 1.0, 2)], 2, 1, 0),  # not read off the device yet
        ([], 0, 0, 0),
    ],
)
def test_steps_are_skipped_whole_or_in_part(calls, done, skipped, in_part):
    assert steps_of(calls) == {"steps_done": done, "steps_skipped": skipped, "steps_in_part": in_part}


@pytest.mark.parametrize("layout", ["joined", "separate"])
@pytest.mark.parametrize(
    ("strategies", "is_whole"),
    [
        ([FirstBlockCache()], True),
        ([TaylorSeerCache()], True),
        ([TaylorSeerCache(cache_level="module", cache_interval=2)], True),
        ([PyramidAttentionBroadcast(**ALWAYS)], False),
        ([FasterCache(unconditional_batch_skip_range=1, **ALWAYS)], False),
        ([FasterCache(spatial_attention_block_skip_range=1)], False),  # the positive prompt runs
    ],
)
def test_a_step_counts_as_skipped_where_nearly_nothing_ran(toy, strategies, is_whole, layout):
    sampling = GuidedSampling(toy, tuple(strategies), layout=layout)
    sampling.sample(first_latent(tokens=PICTURE[0] * PICTURE[1]))

    totals = sampling.report.as_dict()["totals"]
    assert totals["reused"] + totals["forecast"] > 0 and totals["steps_done"] == 12
    assert (totals["steps_skipped"] > 0, totals["steps_in_part"] > 0) == (is_whole, not is_whole)


def test_an_attention_cache_after_another_does_not_make_its_skipped_steps_partial(toy):
    sampling = GuidedSampling(toy, (FirstBlockCache(), PyramidAttentionBroadcast(**ALWAYS)))
    sampling.sample(first_latent(tokens=PICTURE[0] * PICTURE[1]))

    calls = [call for call in sampling.report.as_dict()["calls"] if call["action"] != "computed"]
    assert {call["in_part"] for call in calls if call["strategy"] == "First Block Cache"} == {False}


def test_the_seconds_without_a_cache_are_those_of_the_run_and_what_its_skipped_calls_saved():
    calls = [
        record(0, "computed", 1.0, seconds=2.0),
        record(1, "reused", seconds=0.5),
        record(2, "reused", seconds=0.5),
    ]
    report = Report((FirstBlockCache(),), 3, calls=calls, seconds=4.0, state="finished")

    assert report.as_dict()["totals"]["seconds_uncached"] == pytest.approx(4.0 + 1.5 + 1.5)


@pytest.mark.parametrize("known", [{"seconds": 0.0}, {"seconds": 4.0, "calls": [record(0, "reused", seconds=0.5)]}])
def test_the_seconds_without_a_cache_are_not_told_where_they_are_not_known(known):
    report = Report((FirstBlockCache(),), 3, state="finished", **known)

    assert report.as_dict()["totals"]["seconds_uncached"] is None


def test_a_run_that_skipped_nothing_says_why_by_itself(toy):
    sampling = Sampling(toy, (TaylorSeerCache(disable_cache_before_step=4, few_steps="draft"),), STEPS.sigmas)
    sampling.sample(first_latent())
    off = Sampling(toy, (FirstBlockCache(residual_diff_threshold=0.0),))
    off.sample(first_latent())
    skips = Sampling(toy, (FirstBlockCache(),))
    skips.sample(first_latent())

    assert [each.report.as_dict()["why_nothing"] for each in (sampling, off, skips)] == [
        "4 steps are too few for warm-up 4 and interval 2",
        "these settings never reuse",
        "",
    ]
