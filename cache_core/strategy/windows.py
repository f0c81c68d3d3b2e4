"""Windows of timesteps: two settings `<name>_start` and `<name>_end`, both of them outside, as published."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .setting import setting
from .spacing import lasts
from .step import ONE_STEP, SAME_SIGMA, Schedule, Step
from .strategy import Strategy

Window = tuple[int, int]  # start, end
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
    return _is_inside(_window(strategy, name), step.timestep)


def _window(strategy: Strategy, name: str) -> Window:
    return getattr(strategy, f"{name}_start"), getattr(strategy, f"{name}_end")


def _is_inside(window: Window, timestep: float) -> bool:
    margin = SAME_SIGMA * timestep  # or a step at an end would be inside or not as float32 rounds its sigma
    start, end = window
    return start < timestep - margin and timestep + margin < end


def may_open(strategy: Strategy, name: str, schedule: Schedule, step: Step, count: int) -> bool:
    """Whether one of the next `count` steps lies in this window. On an open schedule any may."""
    following = schedule.timesteps[step.index + 1 : min(step.index + 1 + count, schedule.count)]
    window = _window(strategy, name)
    return schedule.is_open or any(_is_inside(window, timestep) for timestep in following)


def last_beside(strategy: Strategy, own: tuple[str, int], other: tuple[str, int], schedule: Schedule) -> int | None:
    """The last step that may reuse a value of a branch which another rule leaves out of steps: then its values are old.

    Each rule is a window's name and a skip range. Such a step lies in the first window, and the other rule leaves out
    neither it nor the one before. -1 if there is none; None on an open schedule, where nobody knows.
    """
    if schedule.is_open:
        return None
    rules = [(_window(strategy, name), skip_range) for name, skip_range in (own, other)]
    return _last_beside(*rules, schedule.timesteps, schedule.positions)


@lru_cache(maxsize=32)
def _last_beside(
    own: tuple[Window, int], other: tuple[Window, int], timesteps: tuple[float, ...], positions: tuple[float, ...]
) -> int:
    last = -1
    for index in range(1, len(positions)):
        distance = positions[index] - positions[index - 1]
        is_reused, is_left_out = (
            _is_inside(window, timesteps[index]) and lasts(distance, skip_range) for window, skip_range in (own, other)
        )
        last = index if is_reused and not is_left_out else last
    return last


def closed_windows(strategy: Strategy, names: Sequence[str]) -> str:
    """That no step can lie in some of these windows, and what to do; "" if one can in each."""
    ends = {name: _window(strategy, name) for name in names}
    return "; ".join(
        f"{name}_start {start} is not below {name}_end {end}: set start to the lower one"
        for name, (start, end) in ends.items()
        if start >= end
    )


def obstacle_in(strategy: Strategy, names: Sequence[str], schedule: Schedule) -> str:
    """That no step of the schedule after its first lies in any of these windows; "" if one does."""
    timesteps = schedule.timesteps[1 : schedule.count]
    if any(_is_inside(_window(strategy, name), timestep) for name in names for timestep in timesteps):
        return ""
    return ONE_STEP if schedule.count == 1 else "no step after the first is within the timesteps to skip"
