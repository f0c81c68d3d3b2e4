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
    margin = SAME_SIGMA * step.timestep  # or a step at an end would be inside or not as float32 rounds its sigma
    start, end = getattr(strategy, f"{name}_start"), getattr(strategy, f"{name}_end")
    return start < step.timestep - margin and step.timestep + margin < end


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
    steps = [schedule.step_at(sigma) for sigma in schedule.sigmas[1 : schedule.count]]
    if any(is_open(strategy, name, step) for name in names for step in steps):
        return ""
    return "no step after the first is within the timesteps to skip"
