"""What Find Cache Settings tries: each strategy at its settings from careful to bold."""

from __future__ import annotations

from .strategies.first_block import FirstBlockCache
from .strategies.taylorseer import TaylorSeerCache

_FIRST, _LAST, _RUNGS = 0.03, 0.48, 15  # thresholds: bisected in four runs, to 20 %; the default is in the middle
THRESHOLDS = tuple(float(f"{_FIRST * (_LAST / _FIRST) ** (rung / (_RUNGS - 1)):.2g}") for rung in range(_RUNGS))
INTERVALS = range(2, 7)

LADDERS = (
    tuple(FirstBlockCache(residual_diff_threshold=threshold) for threshold in THRESHOLDS),
    tuple(TaylorSeerCache(cache_interval=interval) for interval in INTERVALS),
)
