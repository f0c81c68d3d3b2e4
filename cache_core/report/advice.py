"""What a run's measures suggest for the threshold, and warnings in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import quantiles
from typing import Any

from .record import CallRecord

PERCENTS = (50, 75, 95)
FEWEST = 4  # measures; quantiles of fewer say nothing
HARDLY = 1.05  # times as fast
MUCH = 2 * 2**30  # bytes held


def quantiles_of(calls: Sequence[CallRecord]) -> dict[str, Any] | None:
    """Quantiles of what was compared with the threshold, each as a threshold to try: about how much it would reuse.

    None if too little was measured. `reuses` counts evaluations, out of `evaluations`.
    """
    measured = _measured(calls)
    if len(measured) < FEWEST:
        return None
    changes = _changes(measured)
    cuts = quantiles((call.measure for call in measured), n=100, method="inclusive")
    return {
        "threshold": measured[-1].threshold,
        "evaluations": len({call.evaluation for call in calls}),
        "quantiles": [
            {"percent": percent, "value": cuts[percent - 1], "reuses": _reuses(changes, cuts[percent - 1])}
            for percent in PERCENTS
        ],
    }


def warnings_of(
    calls: Sequence[CallRecord],
    obstacles: Sequence[str],
    notes: Sequence[str],
    bytes_held: int,
    speed_up: float | None,
) -> list[str]:
    """What the user should change, or know, in whole sentences. `obstacles` are why the settings can reuse nothing."""
    warnings = []
    reused = sum(call.action != "computed" for call in calls)
    if calls and not reused:
        warnings.append(f"0 reused: {_why_nothing(calls, obstacles, notes)}.")
    if reused > len(calls) / 5 and speed_up is not None and speed_up < HARDLY:
        warnings.append(
            f"{reused} of {len(calls)} calls were not computed in full, but the run was hardly faster "
            f"({speed_up:.2f}x): the time goes elsewhere than into what this cache skips, or the machine was busy."
        )
    if bytes_held >= MUCH:
        warnings.append(
            f"The cache held {bytes_held / 2**30:.1f} GiB. Where memory is short, choose a level that holds "
            f"less, such as the model's output."
        )
    return warnings


def in_words(report: dict[str, Any]) -> str:
    """A report as a few lines of text: what was done, what thresholds would do, warnings and notes."""
    lines = [report["summary"]]
    if measures := report["measures"]:
        lines.append(f"The change per step, against the threshold {measures['threshold']:g}:")
        lines += [
            f"  P{cut['percent']} {cut['value']:.3g}: as the threshold, it would reuse about {cut['reuses']} of "
            f"{measures['evaluations']} steps"
            for cut in measures["quantiles"]
        ]
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    lines += [f"Note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def _why_nothing(calls: Sequence[CallRecord], obstacles: Sequence[str], notes: Sequence[str]) -> str:
    if obstacles:
        return "; ".join(obstacles)
    measured = _measured(calls)
    lowest = min((call.measure for call in measured), default=0.0)
    if measured and lowest >= measured[-1].threshold:
        why = f"the change was {lowest:.3g} or more at every step, and the threshold is {measured[-1].threshold:g}"
        suggested = quantiles_of(calls)
        if suggested is None:
            return why
        half = suggested["quantiles"][0]
        return f"{why}. {half['value']:.2g} would reuse about {half['reuses']} of {suggested['evaluations']} steps"
    return calls[-1].reason or "; ".join(notes) or "nothing is cached in this model"


def _measured(calls: Sequence[CallRecord]) -> list[CallRecord]:
    """The first call of each evaluation that compared something with a threshold; the others took its number."""
    first: dict[int, CallRecord] = {}
    for call in calls:
        if call.measure is not None and call.threshold is not None and isfinite(call.measure):
            first.setdefault(call.evaluation, call)
    return list(first.values())


def _changes(measured: Sequence[CallRecord]) -> list[float]:
    """What each evaluation alone added: over reused calls in a row the measure adds up."""
    changes, so_far = [], 0.0
    for call in measured:
        changes.append(max(call.measure - so_far, 0.0))
        so_far = call.measure if call.action != "computed" else 0.0
    return changes


def _reuses(changes: Sequence[float], threshold: float) -> int:
    """How many evaluations this threshold would have reused, had they changed as they did."""
    count, so_far = 0, 0.0
    for change in changes:
        so_far += change
        if so_far < threshold:
            count += 1
        else:
            so_far = 0.0
    return count
