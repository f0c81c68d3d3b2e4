"""First Block Cache: if the first block barely changed, neither did the others."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from ..strategy.forecast import History, safe_weights, safe_weights_on_device
from ..strategy.setting import setting
from ..strategy.step import Schedule
from ..strategy.strategy import COMPUTE, FIRST_BLOCK, Around, Call, Site, Strategy
from ..strategy.tensors import relative_change, sampled_tokens


@dataclass
class FirstBlockState:
    """What one branch remembers of its last computed calls."""

    first: History  # residuals of the first block, main stream, about a thousand tokens: (rows, tokens, channels)
    rest: History  # what the other blocks added
    hits: int = 0  # reused calls since the last computed one
    drift: float = 0.0  # how far off the first block was in these, added up


@dataclass(frozen=True)
class FirstBlockCache(Strategy):
    """Run the first block; where its residual is as expected, what the other blocks add is too: skip them.

    From ParaAttention's first block cache, which builds on TeaCache, arXiv 2411.19108. There both are expected to be as
    they were in the last computed call; that is `max_order=0`. By default they are expected on a straight line along
    sigma through the last two, and the test asks how far the first block is off that line. Over reused calls in a row
    this adds up. It counts more in a step that goes a long way in sigma (by the square root of its length, measured
    best at flow shifts 1 to 6; on an even schedule all count alike). A batch is as far off as its worst row.
    """

    title = "First Block Cache"
    summary = "Runs the first block of every step and skips the others where it barely changed."
    source = "ParaAttention; TeaCache, arXiv 2411.19108"
    aliases = ("FBCache", "FBC", "WaveSpeed", "ParaAttention", "TeaCache", "EasyCache", "DBCache", "cache-dit")
    levels = ("model",)
    trusts_schedule = False

    def new_state(self, site: Site) -> FirstBlockState:
        return FirstBlockState(first=History(self.max_order + 1), rest=History(self.max_order + 1))

    def around(self, call: Call, state: FirstBlockState) -> Around:
        (residual,) = yield FIRST_BLOCK
        residual = sampled_tokens(residual)
        if call.may_reuse and self._is_as_expected(call, residual, state):
            weights = safe_weights(state.rest.nodes, call.step.time, self.max_order)
            call.order = len(weights) - 1
            return state.rest.combined(weights)
        rest = yield COMPUTE
        state.first.add(call.step.time, (residual,))
        state.rest.add(call.step.time, rest)
        state.hits, state.drift = 0, 0.0

    def _is_as_expected(self, call: Call, residual: Tensor, state: FirstBlockState) -> bool:
        def change(time: Tensor) -> Tensor:
            (expected,) = state.first.combined(safe_weights_on_device(state.first.nodes, time, self.max_order))
            return relative_change(residual, expected, call.total)

        drift = state.drift + call.measured(change) * sqrt(abs(call.step.length))
        call.measure, call.threshold = drift, self.residual_diff_threshold
        if not call.schedule.is_within(call.step, self.start_percent, self.end_percent):
            call.reason = "outside start_percent to end_percent"
        elif state.hits == self.max_consecutive_cache_hits:
            call.reason = f"{state.hits} reused in a row"
        elif not state.drift < drift < self.residual_diff_threshold:  # NaN, or no change at all: tells nothing
            call.reason = f"change {drift:.3g}, threshold {self.residual_diff_threshold:g}"
        else:
            call.reason = f"change {drift:.3g} under {self.residual_diff_threshold:g}"
            state.hits, state.drift = state.hits + 1, drift
            return True
        return False

    @property
    def is_off(self) -> bool:
        return self.residual_diff_threshold == 0 or self.max_consecutive_cache_hits == 0

    def obstacle(self, schedule: Schedule) -> str:
        steps = (schedule.step_at(sigma) for sigma in schedule.sigmas[1 : schedule.count])
        if any(schedule.is_within(step, self.start_percent, self.end_percent) for step in steps):
            return ""
        return "no step after the first is within start_percent to end_percent"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"{self.title}: start_percent {self.start_percent} is after end_percent {self.end_percent}, so nothing "
                f"would ever be reused. Lower start_percent or raise end_percent."
            )

    # The settings, and what a user reads of them

    residual_diff_threshold: float = setting(
        0.12,
        "How far the first block's residual may be, relative to its size, from what was expected of it before the "
        "whole model is computed again. Higher is faster and less faithful. Usual: 0.08 careful, 0.12 balanced, 0.2 "
        "and more visibly different; 0 never reuses.",
        minimum=0.0,
        maximum=1.0,
        step=0.005,
    )
    start_percent: float = setting(
        0.0,
        "Reuse only after this share of the sampling. Higher is slower and keeps the composition closer to that of the "
        "uncached picture. Usual: 0 to 0.3.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    end_percent: float = setting(
        1.0,
        "Reuse only before this share of the sampling. Lower is slower and computes more of the last, detail-making "
        "steps in full. Usual: 0.8 to 1.",
        minimum=0.0,
        maximum=1.0,
        step=0.01,
    )
    max_consecutive_cache_hits: int = setting(
        -1,
        "Compute after this many reused steps in a row, whatever the change. Lower is slower and more faithful. Usual: "
        "-1, which is unlimited, or 2 to 4 to be careful; 0 never reuses.",
        minimum=-1,
        maximum=100,
    )
    max_order: int = setting(
        1,
        "How what the skipped blocks add is predicted: 0 reuses it unchanged, as published; 1 continues it along a "
        "straight line, usually closer to the uncached picture; 2 and 3 follow a curve. Higher holds more memory. "
        "Usual: 1.",
        minimum=0,
        maximum=3,
    )
