"""What Find Cache Settings tries: each strategy at its settings from careful to bold."""

from __future__ import annotations

from .compare.found import SPEED_UP, Wish
from .strategies.first_block import FirstBlockCache
from .strategies.taylorseer import TaylorSeerCache
from .strategy.strategy import Strategy
from .strategy.wish import FASTEST

_FIRST, _LAST, _RUNGS = 0.03, 0.48, 15  # thresholds: bisected in four runs, to 20 %; the default is in the middle
THRESHOLDS = tuple(float(f"{_FIRST * (_LAST / _FIRST) ** (rung / (_RUNGS - 1)):.2g}") for rung in range(_RUNGS))
SPEED_UPS = (1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # bisected in three runs; at 20 steps 15, 13, 11, 10, 8, 7 and 5
CAREFUL, BOLDER = 1.1, 1.1  # the least speed-up that is asked for, and how many times more where it falls short


def ladders(wish: Wish) -> tuple[tuple[Strategy, ...], ...]:
    """First Block Cache by its threshold, and TaylorSeer by a speed-up: where one is wished for, by that."""
    asked = (wish.speed_up, wish.speed_up * BOLDER) if wish.name == SPEED_UP else SPEED_UPS
    speed_ups = sorted({round(min(max(each, CAREFUL), FASTEST), 2) for each in asked})
    return (
        tuple(FirstBlockCache(residual_diff_threshold=threshold) for threshold in THRESHOLDS),
        tuple(TaylorSeerCache(target_speedup=speed_up) for speed_up in speed_ups),
    )
