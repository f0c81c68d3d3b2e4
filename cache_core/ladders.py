"""What Find Cache Settings tries: each strategy at its settings from careful to bold."""

from __future__ import annotations

from .strategies.first_block import HIGHEST_REPAIRED, FirstBlockCache
from .strategies.taylorseer import TaylorSeerCache
from .strategy.repairing import OFF, ON

_FIRST, _LAST, _RUNGS = 0.03, 0.48, 15  # thresholds: bisected in four runs, to 20 %; the default is in the middle
THRESHOLDS = tuple(float(f"{_FIRST * (_LAST / _FIRST) ** (rung / (_RUNGS - 1)):.2g}") for rung in range(_RUNGS))
INTERVALS = range(2, 7)

# TaylorSeer is tried without repair, by which it gains little and sometimes loses (docs/benchmarks/README.md).
LADDERS = (
    tuple(
        FirstBlockCache(residual_diff_threshold=threshold, repair=ON if threshold <= HIGHEST_REPAIRED else OFF)
        for threshold in THRESHOLDS
    ),
    tuple(TaylorSeerCache(cache_interval=interval) for interval in INTERVALS),
)
