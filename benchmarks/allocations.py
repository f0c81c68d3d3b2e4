"""How much memory calls take, by the allocator's own events: exact, and the same from run to run.

On the CPU these are the events of PyTorch's profiler: every allocation and every release, in order. On CUDA they are
the counters of the caching allocator: what tensors take, not what is reserved for them.
"""

from __future__ import annotations

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler tells that it starts and stops

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Taken(NamedTuple):
    """Bytes of one call."""

    peak: int  # the most in use at any time of it, above what was in use before the first call
    held: int  # in use when it has ended, above the same
    allocated: int  # of all allocations made in it, be they released or not


def taken_by(calls: list[Callable[[], None]], device: str = "cpu") -> list[Taken]:
    """Runs these one after the other. What each took."""
    return _on_cuda(calls) if torch.device(device).type == "cuda" else _on_cpu(calls)


def _on_cpu(calls: list[Callable[[], None]]) -> list[Taken]:
    names = [f"measured call {number}" for number in range(len(calls))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        for name, call in zip(names, calls):
            with record_function(name):
                call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name() in names}
    taken, in_use, changes = [], 0, iter(changes)
    upcoming = next(changes, None)
    for began, ended in (spans[name] for name in names):
        while upcoming and upcoming[0] < began:
            in_use, upcoming = in_use + upcoming[1], next(changes, None)
        peak, allocated = in_use, 0
        while upcoming and upcoming[0] <= ended:
            in_use, allocated, upcoming = in_use + upcoming[1], allocated + max(upcoming[1], 0), next(changes, None)
            peak = max(peak, in_use)
        taken.append(Taken(peak, in_use, allocated))
    return taken


def _on_cuda(calls: list[Callable[[], None]]) -> list[Taken]:
    def so_far() -> int:
        return torch.cuda.memory_stats()["allocated_bytes.all.allocated"]

    taken, before = [], torch.cuda.memory_allocated()
    for call in calls:
        torch.cuda.reset_peak_memory_stats()
        allocated = so_far()
        call()
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        taken.append(Taken(peak - before, held - before, so_far() - allocated))
    return taken
