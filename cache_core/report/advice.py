"""What a run's measures suggest for the threshold, and warnings in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from statistics import quantiles
from typing import Any

from ..strategy.few_steps import MOST_FEW
from ..strategy.setting import counted
from .record import CallRecord

PERCENTS = (50, 75, 95)
FEWEST = 4  # measures; quantiles of fewer say nothing
FINENESS = range(5, 100, 5)  # percents of the quantiles that thresholds to try are chosen from
BEYOND = (1.25, 1.5, 2, 3)  # times the threshold: where most was reused, the measures say little of what is above it
FEW = 8  # a threshold to try skips at least the 8th part of the steps more, or less
HARDLY = 1.05  # times as fast
SILENT = (
    "",
    "nothing to reuse yet",
    "learning the model's blocks",
    "nothing is cached in it",
)  # reasons that say little
MUCH = 2 * 2**30  # bytes held
UNCHANGED = "no step changed by less than the threshold"


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


def thresholds_to_try(calls: Sequence[CallRecord]) -> list[dict[str, Any]]:
    """A higher and a lower threshold, of two digits, that would skip clearly more and fewer steps than this run.

    `skips` counts evaluations, out of `of`. Fewer entries where there is no such threshold.
    """
    measured = _measured(calls)
    if len(measured) < FEWEST:
        return []
    changes, now = _changes(measured), measured[-1].threshold
    cuts = quantiles((call.measure for call in measured), n=100, method="inclusive")
    wanted = [*(cuts[percent - 1] for percent in FINENESS), *(now * times for times in BEYOND)]
    skips = {value: _reuses(changes, value) for value in sorted({float(f"{value:.2g}") for value in wanted})}
    total, done = len({call.evaluation for call in calls}), sum(call.action != "computed" for call in measured)
    far = max(1, total // FEW)
    more = [value for value, count in skips.items() if value > now and count >= done + far]
    fewer = [value for value, count in skips.items() if value < now and 0 < count <= done - far]
    wanted = [*(more[:1] if total > MOST_FEW else []), *fewer[-1:]]  # each of few steps changes much
    return [{"threshold": value, "skips": skips[value], "of": total} for value in wanted]


def warnings_of(calls: Sequence[CallRecord], why: str, bytes_held: int, speed_up: float | None) -> list[str]:
    """What the user should change, or know, in whole sentences. `why`: why nothing was reused; "" if something was."""
    warnings = []
    reused = sum(call.action != "computed" for call in calls)
    if why:
        advice = [in_one_line(each) for each in thresholds_to_try(calls)[:1]]
        warnings.append(". ".join([f"0 reused: {why}", *advice]) + ".")
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


def why_nothing(calls: Sequence[CallRecord], obstacles: Sequence[str], notes: Sequence[str]) -> str:
    """The most telling reason for which nothing was reused; "" if something was, or nothing was called.

    `obstacles` are why the settings can reuse nothing.
    """
    if not calls or any(call.action != "computed" for call in calls):
        return ""
    if obstacles:
        return "; ".join(obstacles)
    measured = _measured(calls)
    if measured and min(call.measure for call in measured) >= measured[-1].threshold:
        steps = len({call.evaluation for call in calls})
        few = f"; with only {counted(steps, 'step')} each one changes much" if steps <= MOST_FEW else ""
        return f"{UNCHANGED} {measured[-1].threshold:g}{few}"
    telling = [call.reason for call in calls if call.reason not in SILENT]
    return (telling or ["; ".join(notes) or "nothing is cached in this model"])[-1]


def in_one_line(advice: dict[str, Any]) -> str:
    """A threshold to try, in words."""
    return f"Threshold {advice['threshold']:g} would skip about {advice['skips']} of {advice['of']} steps"


def in_words(report: dict[str, Any]) -> str:
    """A report as a few lines of text: what was done, what other thresholds would do, warnings and notes."""
    lines = [report["summary"], *(f"{in_one_line(advice)}." for advice in report["advice"])]
    lines += [f"Warning: {warning}" for warning in report["warnings"]]
    lines += [f"Note: {note}" for note in report["notes"]]
    return "\n".join(lines)


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
