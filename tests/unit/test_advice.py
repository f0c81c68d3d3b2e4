"""What a run's measures suggest, the warnings in plain words, and what can be read of a run that is still going on."""

import json

import pytest
from toy import POSITIVE, ReuseAlways, Sampling, first_latent, sigmas_of

from cache_core import CacheRun, Report, Schedule
from cache_core.report.advice import in_words, quantiles_of, thresholds_to_try
from cache_core.report.record import CallRecord
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache


def record(evaluation, action="computed", measure=None, seconds=1.0, threshold=0.1):
    return CallRecord(
        None, (POSITIVE,), action, "", measure, 1.0, None, evaluation, seconds=seconds, threshold=threshold
    )


def report_of(*calls, **settings):
    report = Report(strategies=(FirstBlockCache(),), steps=len(calls), state="finished", **settings)
    for call in calls:
        report.add(call)
    return report


def test_a_suggested_threshold_reuses_what_it_says_where_each_step_changes_alike():
    measures = [(n, "computed", 0.1 * n) for n in range(1, 6)]
    suggested = quantiles_of([record(*measured) for measured in measures])
    assert [cut["percent"] for cut in suggested["quantiles"]] == [50, 75, 95]
    assert [cut["value"] for cut in suggested["quantiles"]] == pytest.approx([0.3, 0.4, 0.48])
    assert [cut["reuses"] for cut in suggested["quantiles"]] == [1, 2, 3]  # they add up until above
    assert suggested["threshold"] == 0.1 and suggested["evaluations"] == 5


def test_what_reused_calls_add_up_is_taken_apart_before_another_threshold_is_tried():
    added_up = [(1, "computed", 0.2), *((n + 2, "reused", 0.02 * (n + 1)) for n in range(4)), (6, "computed", 0.2)]
    suggested = quantiles_of([record(*measured) for measured in added_up])
    assert suggested["quantiles"][0]["value"] == pytest.approx(0.07)
    assert suggested["quantiles"][0]["reuses"] == 3  # 0.02 each, up to 0.06; the fourth makes 0.08


def test_joined_and_separate_branches_count_once_for_an_evaluation():
    once = [record(n, "computed", 0.1 * n) for n in range(1, 6)]
    assert quantiles_of([call for call in once for _ in range(2)]) == quantiles_of(once)


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.15])
def test_thresholds_to_try_skip_about_as_many_steps_as_they_say(toy, threshold):
    def skipped_at(value):
        sampling = Sampling(toy, (FirstBlockCache(residual_diff_threshold=value, max_order=0),), sigmas_of(30))
        sampling.sample(first_latent())
        return sampling.report.as_dict()

    report = skipped_at(threshold)
    assert {try_["threshold"] > threshold for try_ in report["advice"]} == {True, False}
    for try_ in report["advice"]:
        told, now = try_["skips"], report["totals"]["steps_skipped"]
        assert (told > now) == (try_["threshold"] > threshold) and told != now
        assert abs(skipped_at(try_["threshold"])["totals"]["steps_skipped"] - told) <= 6
        assert f"Threshold {try_['threshold']:g} would skip about {told} of 30 steps." in in_words(report)
    assert "P50" not in in_words(report)


def test_no_threshold_is_suggested_that_skips_about_as_many_steps():
    alike = [record(n, "computed", 1.0) for n in range(1, 21)]
    assert thresholds_to_try(alike) == []


@pytest.mark.parametrize("calls", [[], [record(1, measure=0.5)], [record(n) for n in range(9)]], ids=len)
def test_too_few_measures_suggest_nothing(calls):
    assert quantiles_of(calls) is None


DRAFT = dict(few_steps="draft")


@pytest.mark.parametrize(
    ("strategy", "steps", "sentence"),
    [
        (TaylorSeerCache(), 3, "0 reused: with only 3 steps each one changes so much that skipping it would show"),
        (FasterCache(), 8, "To skip some all the same, set few_steps to 'draft' on Apply FasterCache."),
        (PyramidAttentionBroadcast(), 6, "0 reused: with only 6 steps each one changes so much"),
        (TaylorSeerCache(**DRAFT), 3, "0 reused: 3 steps are too few for warm-up 3 and interval 2."),
        (TaylorSeerCache(**DRAFT), 1, "0 reused: 1 step is too few for warm-up 3 and interval 2."),
        (FirstBlockCache(), 1, "0 reused: a single step has none before it to reuse."),
        (PyramidAttentionBroadcast(**DRAFT), 1, "0 reused: a single step has none before it to reuse."),
        (
            TaylorSeerCache(disable_cache_before_step=10),
            10,
            "0 reused: 10 steps are too few for warm-up 10 and interval 2.",
        ),
        (
            TaylorSeerCache(disable_cache_before_step=100),
            20,
            "0 reused: 20 steps are too few for warm-up 100 and interval 2.",
        ),
        (
            TaylorSeerCache(disable_cache_before_step=10, disable_cache_after_step=5),
            20,
            "0 reused: disable_cache_before_step 10 and disable_cache_after_step 5 leave no step. Raise the latter",
        ),
        (
            TaylorSeerCache(disable_cache_before_step=0, disable_cache_after_step=1, spacing="steps"),
            12,
            "0 reused: disable_cache_before_step 0 and disable_cache_after_step 1 leave no step. Raise the latter",
        ),
        (
            FirstBlockCache(start_percent=0.6, end_percent=0.5),
            12,
            "0 reused: start_percent 0.6 is after end_percent 0.5: lower the one or raise the other.",
        ),
        (
            FirstBlockCache(few_steps="compute all"),
            6,
            "To skip some all the same, use Apply First Block Cache with a higher threshold.",
        ),
        (
            FirstBlockCache(start_percent=0.98),
            6,
            "0 reused: no step after the first is within start_percent",
        ),
        (FirstBlockCache(residual_diff_threshold=0.0), 6, "0 reused: these settings never reuse."),
        (
            FirstBlockCache(residual_diff_threshold=1e-6),
            12,
            "0 reused: no step changed by less than the threshold 1e-06. Threshold ",
        ),
        (
            PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=101),
            9,
            "0 reused: no step after the first is within the timesteps to skip.",
        ),
        (
            FasterCache(
                spatial_attention_timestep_skip_end=5,
                temporal_attention_timestep_skip_end=5,
                unconditional_batch_timestep_skip_end=5,
            ),
            9,
            "0 reused: no step after the first is within the timesteps to skip.",
        ),
    ],
    ids=lambda value: getattr(value, "title", None),
)
def test_a_run_that_reused_nothing_says_why(toy, strategy, steps, sentence):
    sampling = Sampling(toy, (strategy,), sigmas_of(steps))
    sampling.sample(first_latent())
    report = sampling.report.as_dict()
    assert report["totals"]["computed"] == report["totals"]["calls"]
    (warning,) = report["warnings"]
    assert sentence in warning
    assert warning in in_words(report)


def test_a_run_of_few_steps_is_not_told_to_raise_the_threshold(toy):
    few, more = (Sampling(toy, (FirstBlockCache(residual_diff_threshold=1e-6),), sigmas_of(steps)) for steps in (8, 9))
    for sampling in (few, more):
        sampling.sample(first_latent())
    (warning,), (other,) = (sampling.report.as_dict()["warnings"] for sampling in (few, more))
    assert warning.endswith("threshold 1e-06; with only 8 steps each one changes much.") and "Threshold" in other
    assert few.report.as_dict()["advice"] == []
    assert few.report.as_dict()["why_nothing"] in warning  # so the strip says it too


def test_a_run_that_reused_has_no_such_warning(toy):
    sampling = Sampling(toy, (FirstBlockCache(),))
    sampling.sample(first_latent())
    assert sampling.report.count("forecast", "reused") > 0
    assert not [warning for warning in sampling.report.as_dict()["warnings"] if warning.startswith("0 reused")]


def test_reuse_that_gained_no_time_is_named():
    slow = report_of(*(record(n, "computed") for n in range(2)), *(record(n, "reused") for n in range(2, 6)))
    fast = report_of(*(record(n, "computed") for n in range(2)), *(record(n, "reused", None, 0.1) for n in range(2, 6)))
    assert ["hardly faster (1.00x)" in warning for warning in slow.as_dict()["warnings"]] == [True]
    assert fast.as_dict()["warnings"] == []


def test_gigabytes_held_are_named():
    (warning,) = report_of(record(1), record(2, "reused", None, 0.1), bytes_held=3 * 2**30).as_dict()["warnings"]
    assert warning.startswith("The cache held 3.0 GiB.")


def test_a_run_that_is_going_on_warns_of_nothing_yet():
    report = CacheRun((TaylorSeerCache(),), Schedule(sigmas_of(3))).report
    report.add(record(1))
    assert report.so_far()["state"] == "running"
    assert report.so_far()["warnings"] == []


class OnTheDevice:
    """A step and a stopwatch that are still on the device, and count who waits for them."""

    def __init__(self, step):
        self._step, self.is_ready, self.waits = step, False, 0

    @property
    def step(self):
        self.waits += not self.is_ready
        return self._step

    @property
    def seconds(self):
        self.waits += not self.is_ready
        return 0.5


@pytest.fixture
def pending():
    """Three calls: of the first two, time and step are not known yet."""
    step = Schedule([1.0, 0.5, 0.0]).step_at(1.0)
    device = [OnTheDevice(step) for _ in range(3)]
    device[2].is_ready = True
    report = Report(strategies=(ReuseAlways(),), steps=3)
    for number, reading in enumerate(device):
        report.add(CallRecord(reading, (POSITIVE,), "computed", "", None, 1.0, reading, number))
    return report, device


def test_a_run_is_read_without_waiting_and_completed_later(pending):
    report, device = pending
    assert [call["seconds"] for call in report.so_far()["calls"]] == [None, None, 0.5]
    assert [call["sigma"] for call in report.so_far()["calls"]] == [None, None, 1.0]
    assert json.loads(json.dumps(report.so_far(), allow_nan=False)) == report.so_far()
    device[0].is_ready = True
    assert [call["seconds"] for call in report.so_far(first=1)["calls"]] == [None, 0.5]
    assert report.so_far()["calls"][0]["seconds"] == 0.5
    assert sum(reading.waits for reading in device) == 0
    report.close()
    assert [call["seconds"] for call in report.so_far()["calls"]] == [0.5] * 3
    assert device[1].waits > 0


def test_a_stopped_run_lets_go_of_the_device_without_waiting(pending):
    report, device = pending
    report.stop()
    assert report.state == report.so_far()["state"] == "stopped"
    assert [call["seconds"] for call in report.so_far()["calls"]] == [None, None, 0.5]
    assert all(call.watch is None and call.reading is None for call in report.calls)
    assert sum(reading.waits for reading in device) == 0


def test_every_call_is_told_of_when_it_is_in_the_report(toy):
    sampling = Sampling(toy, (FirstBlockCache(),), layout="separate")
    seen = []
    sampling.report.on_call = lambda: seen.append((len(sampling.report.calls), sampling.report.bytes_held))
    sampling.sample(first_latent())
    assert [number for number, _ in seen] == list(range(1, 25))
    assert seen[-1][1] == sampling.report.bytes_held > 0


def test_the_speed_up_of_an_unfinished_run_counts_what_is_timed():
    report = report_of(record(1, seconds=2.0), record(2, "reused", seconds=1.0), record(3, seconds=None))
    assert report.speed_up == pytest.approx(4 / 3)
