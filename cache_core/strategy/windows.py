"""Windows of timesteps: two settings `<name>_start` and `<name>_end`, both of them outside, as published."""

from __future__ import annotations

from typing import Any

from .setting import setting
from .step import SAME_SIGMA, Schedule, Step
from .strategy import Strategy


def starts_at(default: int, what: str) -> Any:
    """The setting `<name>_start`, a window's end towards the picture; `what` happens in it, as in "Reuse it"."""
    direction = "Lower does so in more of the last steps, which draw detail."
    return _timestep(default, f"{what} only above this timestep", direction)


def ends_at(default: int, what: str) -> Any:
    """The setting `<name>_end`, a window's end towards the noise."""
    direction = "Higher does so in more of the first steps, which decide the composition."
    return _timestep(default, f"{what} only below this timestep", direction)


def _timestep(default: int, what: str, direction: str) -> Any:
    scale = "on a scale from 1000 (noise) to 0 (picture)"
    return setting(default, f"{what}, {scale}. {direction} Usual: {default}.", minimum=-1, maximum=1001)


def is_open(strategy: Strategy, name: str, step: Step) -> bool:
    """Whether the step lies in this window of the strategy's."""
    return _is_inside(strategy, name, step.timestep)


def _is_inside(strategy: Strategy, name: str, timestep: float) -> bool:
    margin = SAME_SIGMA * timestep  # or a step at an end would be inside or not as float32 rounds its sigma
    start, end = getattr(strategy, f"{name}_start"), getattr(strategy, f"{name}_end")
    return start < timestep - margin and timestep + margin < end


def may_open(strategy: Strategy, name: str, schedule: Schedule, step: Step, count: int) -> bool:
    """Whether a call in the next `count` steps may lie in this window. On an open schedule any may."""
    if schedule.is_open:
        return True
    last = schedule.timesteps[min(step.index + count, len(schedule.sigmas) - 1)]
    low, high = sorted((last, step.timestep))
    start, end = getattr(strategy, f"{name}_start"), getattr(strategy, f"{name}_end")
    return low < end and start < high


def check_windows(strategy: Strategy, *names: str) -> None:
    """Raise ValueError for a window that no step can lie in."""
    for name in names:
        start, end = getattr(strategy, f"{name}_start"), getattr(strategy, f"{name}_end")
        if start >= end:
            raise ValueError(
                f"{strategy.title}: {name}_start {start} is not below {name}_end {end}, so no step lies between them. "
                f"Timesteps count down from 1000 to 0: set start to the lower one, such as 100, and end to the higher."
            )


def obstacle_in(strategy: Strategy, names: list[str], schedule: Schedule) -> str:
    """That no step of the schedule after its first lies in any of these windows; "" if one does."""
    timesteps = schedule.timesteps[1 : schedule.count]
    if any(_is_inside(strategy, name, timestep) for name in names for timestep in timesteps):
        return ""
    return "no step after the first is within the timesteps to skip"
