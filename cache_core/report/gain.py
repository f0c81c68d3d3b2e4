"""What a run gained, in the words of who waits for it: steps that were skipped, and seconds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .record import CallRecord


def steps_of(calls: Sequence[CallRecord]) -> dict[str, int]:
    """How many steps are done, how many of them were skipped, and how many in part. A step may take several calls."""
    steps: dict[Hashable, list[CallRecord]] = {}
    for call in calls:
        steps.setdefault(call.step.index if call.step else ("evaluation", call.evaluation), []).append(call)
    skipped = [all(_is_skipped(call) for call in each) for each in steps.values()]
    touched = [any(call.action != "computed" for call in each) for each in steps.values()]
    return {
        "steps_done": len(steps),
        "steps_skipped": sum(skipped),
        "steps_in_part": sum(touched) - sum(skipped),
    }


def seconds_uncached(calls: Sequence[CallRecord], seconds: float, speed_up: float | None) -> float | None:
    """About how long the run would have taken had all calls been computed; None where that can't be told.

    `seconds` is what the whole run took, `speed_up` how many times faster its calls were.
    """
    if not seconds or speed_up is None:
        return None
    return seconds + (speed_up - 1) * sum(call.seconds or 0.0 for call in calls)


def _is_skipped(call: CallRecord) -> bool:
    return call.action != "computed" and not call.in_part
