"""The settings `start_percent` and `end_percent`: the share of the sampling in which anything is reused."""

from __future__ import annotations

from typing import Any

from .setting import setting
from .step import ONE_STEP, Schedule, Step
from .strategy import Strategy

OUTSIDE = "outside start_percent to end_percent"


def start_percent() -> Any:
    """The setting `start_percent`."""
    return setting(
        0.0,
        "Higher is slower and keeps the composition closer to that of the uncached picture. Reuse only after this "
        "share of the sampling. Usual: 0 to 0.3.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )


def end_percent() -> Any:
    """The setting `end_percent`."""
    return setting(
        1.0,
        "Lower is slower and computes more of the last, detail-making steps in full. Reuse only before this share of "
        "the sampling. Usual: 0.8 to 1.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )


def is_between(strategy: Strategy, schedule: Schedule, step: Step) -> bool:
    """Whether the step lies in this share of the sampling."""
    return schedule.is_within(step, strategy.start_percent, strategy.end_percent)


def may_serve(strategy: Strategy, schedule: Schedule, step: Step, kept: int) -> bool:
    """Whether what this step gives may be of use in it, or in as many of the next as it is kept for."""
    if schedule.is_open:
        return True
    following = map(schedule.step_at, schedule.sigmas[step.index + 1 : min(step.index + 1 + kept, schedule.count)])
    return any(is_between(strategy, schedule, each) for each in (step, *following))


def steps_outside(strategy: Strategy, schedule: Schedule) -> list[int]:
    """The steps outside of it, by their index; none of an open schedule, where it is not known."""
    is_whole = strategy.start_percent <= 0 and strategy.end_percent >= 1
    steps = [] if is_whole or schedule.is_open else map(schedule.step_at, schedule.sigmas[: schedule.count])
    return [step.index for step in steps if not is_between(strategy, schedule, step)]


def none_between(strategy: Strategy, schedule: Schedule) -> str:
    """That no step of the schedule after its first lies in it; "" if one does."""
    if {*range(1, schedule.count)} - {*steps_outside(strategy, schedule)}:
        return ""
    return ONE_STEP if schedule.count == 1 else "no step after the first is within start_percent to end_percent"


def wrong_way_round(strategy: Strategy) -> str:
    """That it ends before it begins, and what to do; "" if it does not."""
    start, end = strategy.start_percent, strategy.end_percent
    if start <= end:
        return ""
    return f"start_percent {start:g} is after end_percent {end:g}: lower the one or raise the other"
