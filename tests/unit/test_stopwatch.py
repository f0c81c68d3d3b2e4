"""Times are those of the device. Where it runs on its own and has no events that tell them, none are shown."""

import pytest
import torch
from toy import Sampling, first_latent

from cache_core.report.record import Stopwatch
from cache_core.run import run as runs
from cache_core.strategies.taylorseer import TaylorSeerCache

DEVICES = ["mps", "xpu", "privateuseone"]  # Apple's, Intel's, DirectML's


class Device:
    """A clock that goes on only while the device works."""

    now, finished = 0.0, True


def event_on(device_clock):
    class Event:
        def __init__(self, device, enable_timing):
            assert enable_timing and device.type in DEVICES

        def record(self):
            self.at = device_clock.now

        def query(self):
            return device_clock.finished

        def synchronize(self):
            device_clock.finished = True

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    return Event


@pytest.mark.parametrize("device", DEVICES)
def test_events_of_the_device_tell_the_time(monkeypatch, device):
    clock = Device()
    monkeypatch.setattr(torch, "Event", event_on(clock))
    watch = Stopwatch(torch.device(device))
    with watch:
        clock.now, clock.finished = 2.5, False
    assert not watch.is_ready
    assert watch.seconds == 2.5 and watch.is_ready


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_without_events_shows_no_time(device):
    watch = Stopwatch(torch.device(device))  # this torch is built for none of them
    with watch:
        pass
    assert watch.is_ready and watch.seconds is None


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_without_times_has_no_speed_up_and_no_warning_about_it(toy, monkeypatch, device):
    monkeypatch.setattr(runs, "Stopwatch", lambda _: Stopwatch(torch.device(device)))
    sampling = Sampling(toy, (TaylorSeerCache(),))
    sampling.sample(first_latent())
    report = sampling.report.as_dict()
    assert report["totals"]["forecast"] + report["totals"]["reused"] > 4
    assert report["totals"]["speed_up"] is None and all(call["seconds"] is None for call in report["calls"])
    assert not report["warnings"] and "x," not in report["summary"]
