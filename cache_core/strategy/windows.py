"""Windows of timesteps: two settings `<name>_start` and `<name>_end`, both of them outside, as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .setting import setting
from .step import SAME_SIGMA, Schedule, Step
from .strategy import Strategy

FASTER = "is faster and less faithful"


def starts_at(default: int, what: str, effect: str = FASTER) -> Any:
    """The setting `<name>_start`, a window's end towards the picture; `what` is done in it, to this effect."""
    direction = "Lower does so in more of the last steps, which draw detail."
    return _timestep(default, f"Lower {effect}. {what} only above this timestep", direction)


def ends_at(default: int, what: str, effect: str = FASTER) -> Any:
    """The setting `<name>_end`, a window's end towards the noise."""
    direction = "Higher does so in more of the first steps, which decide the composition."
    return _timestep(default, f"Higher {effect}. {what} only below this timestep", direction)


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
    """Whether one of the next `count` steps lies in this window. On an open schedule any may."""
    following = schedule.timesteps[step.index + 1 : min(step.index + 1 + count, schedule.count)]
    return schedule.is_open or any(_is_inside(strategy, name, timestep) for timestep in following)


def closed_windows(strategy: Strategy, names: Sequence[str]) -> str:
    """That no step can lie in some of these windows, and what to do; "" if one can in each."""
    ends = {name: (getattr(strategy, f"{name}_start"), getattr(strategy, f"{name}_end")) for name in names}
    return "; ".join(
        f"{name}_start {start} is not below {name}_end {end}: set start to the lower one"
        for name, (start, end) in ends.items()
        if start >= end
    )


def obstacle_in(strategy: Strategy, names: Sequence[str], schedule: Schedule) -> str:
    """That no step of the schedule after its first lies in any of these windows; "" if one does."""
    timesteps = schedule.timesteps[1 : schedule.count]
    if any(_is_inside(strategy, name, timestep) for name in names for timestep in timesteps):
        return ""
    return "no step after the first is within the timesteps to skip"
