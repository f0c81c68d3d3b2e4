"""Windows of timesteps: two settings `<name>_start` and `<name>_end`, both of them outside, as published."""

from __future__ import annotations

from typing import Any

from .step import SAME_SIGMA, Step
from .strategy import Strategy, setting


def timestep(default: int, help: str) -> Any:
    """A setting that is one end of a window, from 1000 noisiest to 0 clean."""
    return setting(default, f"{help} Timesteps run from 1000 (noise) to 0 (picture).", minimum=-1, maximum=1001)


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
