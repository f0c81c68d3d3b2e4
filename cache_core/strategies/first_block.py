"""First Block Cache: if the first block barely changed, neither did the others."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from ..strategy import percents
from ..strategy.few_steps import CHOICES, DRAFT, MOST_FEW, USUAL, are_few
from ..strategy.forecast import History, safe_weights, safe_weights_on_device
from ..strategy.repairing import repair, why_too_long
from ..strategy.setting import setting, sizes
from ..strategy.step import Schedule
from ..strategy.strategy import COMPUTE, COMPUTE_ONLY, FIRST_BLOCK, Around, Call, Site, Strategy
from ..strategy.tensors import Features, bytes_of, relative_change, worst_change
from ..strategy.wish import TOO_FEW, contradiction_of, is_wished, planned_steps, target_speedup, why_nothing_left

GUARDS = MEAN, WORST_FRAME = ("mean", "worst frame")

HIGHEST_REPAIRED = 0.2  # threshold: above it gaps are so long that what is kept belongs to another path
TOO_HIGH = f"residual_diff_threshold is above {HIGHEST_REPAIRED:g}"


@dataclass
class FirstBlockState:
    """What one branch remembers of its last computed calls."""

    first: History  # residuals of the first block, main stream, about a thousand tokens: (rows, tokens, channels)
    # with a guard also those of the latent's parts, (rows * frames, tokens, channels)
    rest: History  # what the other blocks added
    hits: int = 0  # reused calls since the last computed one
    drift: float = 0.0  # how far off the first block was in these, added up
    step: int = -1  # the last computed one, by its index


@dataclass(frozen=True)
class FirstBlockCache(Strategy):
    """Run the first block; where its residual is as expected, what the other blocks add is too: skip them.

    From ParaAttention's first block cache, which builds on TeaCache, arXiv 2411.19108. There both are expected to be as
    they were in the last computed call; that is `max_order=0`. By default they are expected on a straight line along
    sigma through the last two, and the test asks how far the first block is off that line. Over reused calls in a row
    this adds up. It counts more in a step that goes a long way in sigma (by the square root of its length, measured
    best at flow shifts 1 to 6; on an even schedule all count alike), and in a run of few steps by as much as
    these go further than those of a usual run. A batch is as far off as its worst row; with
    `guard`, which is ours, as its sound or its worst frame where these are further off. Holds
    `max_order + 1` times what the skipped blocks add: streams * tokens * channels * bytes * branches.
    """

    title = "First Block Cache"
    summary = "Makes sampling faster. Runs the first block of every step and skips the others where it barely changed."
    source = "ParaAttention; TeaCache, arXiv 2411.19108"
    aliases = ("FBCache", "FBC", "WaveSpeed", "ParaAttention", "TeaCache", "EasyCache", "DBCache", "cache-dit")
    levels = ("model",)
    tests_first_block = True
    adds_up = True  # how far off the first block is, over reused calls in a row

    def new_state(self, site: Site) -> FirstBlockState:
        return FirstBlockState(first=History(self.max_order + 1), rest=History(self.max_order + 1))

    def will_hold(self, site: Site, features: Features, tested: Features = ()) -> int:
        return (self.max_order + 1) * bytes_of((*features, *tested))

    def around(self, call: Call, state: FirstBlockState) -> Around:
        tested = yield FIRST_BLOCK
        if self._may_stand_in(call, tested, state) and len(state.rest):
            order = 0 if self.target_speedup and call.adds_noise else self.max_order
            weights = safe_weights(state.rest.nodes, call.step.time, order)
            call.order = len(weights) - 1
            return state.rest.combined(weights)
        if not percents.may_serve(self, call.schedule, call.step, kept=self.max_order + 1):
            state.first.add(call.step.time, tested)  # little, and what changes is told outside the window too
            state.rest, state.hits, state.drift = History(self.max_order + 1), 0, 0.0
            state.step = call.step.index
            yield COMPUTE_ONLY
            return
        state.first.make_room(call.step.time)
        state.rest.make_room(call.step.time)
        rest = yield COMPUTE
        state.first.add(call.step.time, tested)
        state.rest.add(call.step.time, rest)
        state.hits, state.drift, state.step = 0, 0.0, call.step.index

    def _may_stand_in(self, call: Call, tested: Features, state: FirstBlockState) -> bool:
        if not self._plans(call.schedule):
            if self.target_speedup:
                call.note(TOO_FEW)
            return call.may_reuse and self._is_as_expected(call, tested, state)
        if is_wished(self, call, state.step) or not call.may_reuse:
            return False
        is_outside = not percents.is_between(self, call.schedule, call.step)
        if is_outside or state.hits == self.max_consecutive_cache_hits:  # not planned where the schedule is not known
            call.reason = percents.OUTSIDE if is_outside else f"{state.hits} reused in a row"
            return False
        state.hits += 1
        return True

    def _is_as_expected(self, call: Call, tested: Features, state: FirstBlockState) -> bool:
        def change(time: Tensor) -> Tensor:
            expected = state.first.combined(safe_weights_on_device(state.first.nodes, time, self.max_order))
            if self.guard != MEAN:
                return worst_change(tested, expected, call.total)
            return relative_change(tested[0], expected[0], call.total)

        changed = call.measured(change)
        far = sqrt(abs(call.step.length)) * call.schedule.how_far(MOST_FEW, USUAL)
        drift = state.drift + changed * far if self.adds_up else changed
        call.measure, call.threshold = drift, self.residual_diff_threshold
        if not call.schedule.is_within(call.step, self.start_percent, self.end_percent):
            call.reason = percents.OUTSIDE
        elif state.hits == self.max_consecutive_cache_hits:
            call.reason = f"{state.hits} reused in a row"
        elif not (changed > 0 and drift < self.residual_diff_threshold):  # NaN, or no change at all: tells nothing
            call.reason = f"change {drift:.3g}, threshold {self.residual_diff_threshold:g}"
        else:
            call.reason = f"change {drift:.3g} under {self.residual_diff_threshold:g}"
            state.hits, state.drift = state.hits + 1, drift
            return True
        return False

    def _plans(self, schedule: Schedule) -> bool:
        """Whether the wish decides; in runs of few steps the threshold does, for each of those changes much."""
        return bool(self.target_speedup) and not are_few(schedule)

    @property
    def tests_parts(self) -> bool:
        return self.guard != MEAN

    @property
    def trusts_schedule(self) -> bool:
        return bool(self.target_speedup)

    @property
    def is_off(self) -> bool:
        wish = self.target_speedup
        never = wish == 1 if wish else self.residual_diff_threshold == 0
        return never or self.max_consecutive_cache_hits == 0

    def computed_steps(self, schedule: Schedule, cost: float = 0.0) -> tuple[int, ...]:
        if not self._plans(schedule):
            return ()
        always = percents.steps_outside(self, schedule)
        longest = None if self.max_consecutive_cache_hits < 0 else self.max_consecutive_cache_hits
        return planned_steps(schedule, self.target_speedup, cost, always=always, longest=longest)

    def obstacle(self, schedule: Schedule) -> str:
        none_left = why_nothing_left(self, schedule) if self._plans(schedule) else ""
        return percents.none_between(self, schedule) or none_left

    @property
    def contradiction(self) -> str:
        return percents.wrong_way_round(self) or contradiction_of(self.target_speedup)

    def why_unrepaired(self, schedule: Schedule, cost: float = 0.0) -> str:
        if self._plans(schedule):
            return why_too_long(schedule, self.computed_steps(schedule, cost))
        return TOO_HIGH if self.residual_diff_threshold > HIGHEST_REPAIRED else ""

    # The settings, and what a user reads of them

    residual_diff_threshold: float = setting(
        0.12,
        "Higher is faster and less faithful. How far the first block's residual may be, relative to its size, from "
        "what was expected of it before the whole model is computed again. Usual: 0.08 careful, 0.12 balanced, 0.2 "
        "and more visibly different; 0 never reuses.",
        minimum=0.0,
        maximum=1.0,
        step=0.005,
        is_first=True,
    )
    start_percent: float = percents.start_percent()
    end_percent: float = percents.end_percent()
    max_consecutive_cache_hits: int = setting(
        -1,
        "Lower is slower and more faithful. Compute after this many reused steps in a row, whatever the change. Usual: "
        "-1, which is unlimited, or 2 to 4 to be careful; 0 never reuses.",
        minimum=-1,
        maximum=100,
    )
    max_order: int = setting(
        1,
        "Higher holds more memory. How what the skipped blocks add is predicted: 0 reuses it unchanged, as published; "
        "1 continues it along a straight line, usually closer to the uncached picture; 2 and 3 follow a curve. "
        f"At 1 it holds: {sizes('0.1', '0.1', '1.3', '2.9', '0.8')}. Usual: 1.",
        minimum=0,
        maximum=3,
    )
    few_steps: str = setting(
        DRAFT,
        "Runs of few steps: 'draft' goes by the threshold, 'compute all' skips none.",
        choices=CHOICES,
        shown=False,
    )
    guard: str = setting(
        MEAN,
        "What is compared with residual_diff_threshold. 'mean': the change of the picture or video as a whole. 'worst "
        "frame': that of the sound, or of the frame that changes most, where it is larger; slower, and more faithful "
        "to videos whose sound or a few frames change while the rest stands still. Usual: 'mean'.",
        choices=GUARDS,
        is_optional=True,
    )
    repair: str = repair()
    target_speedup: float = target_speedup("residual_diff_threshold")
