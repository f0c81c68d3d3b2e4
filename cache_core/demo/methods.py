"""The methods that the demo compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..strategies.first_block import FirstBlockCache
from ..strategies.taylorseer import TaylorSeerCache
from ..strategy.strategy import Strategy

STEPS = 20
GUIDANCE = 3.0
Progress = Callable[[], None]  # called after each picture


@dataclass(frozen=True)
class Method:
    """A way to make the demo's pictures: with a strategy, or with fewer steps and no cache."""

    name: str
    settings: str
    strategy: Strategy | None = None
    steps: int = STEPS


def methods() -> list[Method]:
    """The uncached run first, then each strategy twice, then fewer steps of about the same cost."""
    return [
        Method("Uncached", f"{STEPS} steps, cfg {GUIDANCE:g}"),
        Method("First Block Cache", "threshold 0.12", FirstBlockCache()),
        Method("First Block Cache", "threshold 0.3", FirstBlockCache(residual_diff_threshold=0.3)),
        Method("TaylorSeer Cache", "interval 2", TaylorSeerCache(cache_interval=2)),
        Method("TaylorSeer Cache", "interval 3", TaylorSeerCache(cache_interval=3)),
        Method("Fewer steps, no cache", "11 steps", steps=11),
        Method("Fewer steps, no cache", "8 steps", steps=8),
    ]
