"""How many times faster a run is to be: the setting, how many steps that leaves to compute, and which."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from math import floor
from typing import Any

from .few_steps import MOST_FEW
from .setting import counted, setting
from .spacing import WARM_UP, is_due, steps_between_turns, wished_steps
from .step import Schedule
from .strategy import Call, Strategy

FASTEST = 5  # times; also the most steps of which one is computed, whatever a reused one costs
NOT_PLANNED = (
    "target_speedup {:g} is not reached: steps had to be computed that it leaves out, because a prompt or a window was "
    "new in them"
)
NOT_KNOWN = (
    "how many steps this run has is not known in advance, so target_speedup {:g} is only approached: after the warm-up "
    "one in {:.3g} is computed"
)
TOO_FEW = f"target_speedup works in runs of more than {MOST_FEW} steps; in this one the threshold decides"


def target_speedup(decides: str) -> Any:
    """The setting `target_speedup`. `decides` names what does so without it."""
    return setting(
        0.0,
        f"Higher is faster and less faithful. How many times faster sampling is to be; 0 lets {decides} decide. So "
        "many steps are computed as give that, and what a skipped step still costs is counted in. Where it can't be "
        "reached, the report says what can. Usual: 0; or 1.3 careful, 1.6 balanced, 2 fast.",
        minimum=0.0,
        maximum=float(FASTEST),
        step=0.05,
        is_optional=True,
    )


def contradiction_of(speedup: float) -> str:
    """That this is no wish, and what to do; "" if it is one, or 0."""
    if not 0 < speedup < 1:
        return ""
    return f"target_speedup {speedup:g} is slower than without a cache: raise it above 1, or set it to 0 (no target)"


def share_to_compute(speedup: float, cost: float) -> float:
    """The share of steps to compute, where a reused one takes `cost` of the work of a computed one.

    >>> share_to_compute(2.0, 0.0), round(share_to_compute(2.0, 0.1), 3)
    (0.5, 0.444)
    """
    return (1 / speedup - cost) / (1 - cost) if cost < 1 else 1.0


def computed_count(count: int, speedup: float, cost: float) -> int:
    """How many of so many steps are computed: the number next to the wish, and at least one in five."""
    return min(count, max(_nearest(count, 1 / FASTEST), _nearest(count, share_to_compute(speedup, cost))))


def speedup_of(count: int, computed: int, cost: float) -> float:
    """How many times less work that is than to compute all steps."""
    return count / (computed + cost * (count - computed))


def planned_steps(
    schedule: Schedule, speedup: float, cost: float, warm_up: int = 3, always: Collection[int] = (),
    longest: int | None = None, spacing: str = "sigma",
) -> tuple[int, ...]:  # fmt: skip
    """The steps that are computed for this wish, those in `always` among them, spaced along "sigma" or along "steps".

    The warm-up is longer than usual (`WARM_UP`). At most `longest` in a row are left out. Of a run whose number
    of steps is not known: of those it has had so far.
    """
    if (way := schedule.way) is None:
        return steps_between_turns(schedule.count, schedule.turns, warm_up, _interval(speedup, cost))
    always = frozenset({*always, *(step for turn in schedule.turns[1:] for step in (turn - 1, turn))})
    count, way = len(way) - 1, way if spacing == "sigma" else tuple(map(float, range(len(way))))
    fewest = 0 if longest is None else count // (longest + 1)
    for computed in range(max(fewest, computed_count(count, speedup, cost)), count + 1):
        steps = wished_steps(way, computed, max(warm_up, WARM_UP), always)
        if longest is None or all(b - a - 1 <= longest for a, b in pairwise((*steps, count))):
            break
    return steps


def is_wished(strategy: Strategy, call: Call, last: int) -> bool:
    """Whether its wish has it compute this call, after the step `last`. The report is told why, and what it misses."""
    speedup, cost = strategy.target_speedup, call.cost_of_reuse
    if cost is None:
        return True
    planned = strategy.computed_steps(call.schedule, cost)
    if why := why_less(strategy.title, call.schedule, speedup, cost, planned):
        call.note(why)
    is_planned = is_due(planned, call.step.index, last)
    if call.may_reuse:
        call.reason = f"{'planned' if is_planned else 'left out'} for {speedup:g}x"
    elif call.step.index not in planned:
        call.note(NOT_PLANNED.format(speedup))
    return is_planned


def why_nothing_left(strategy: Strategy, schedule: Schedule) -> str:
    """That a wish leaves no step out on this schedule; "" if it does, or there is none."""
    if not strategy.target_speedup or schedule.way is None or len(strategy.computed_steps(schedule)) < schedule.count:
        return ""
    return f"target_speedup {strategy.target_speedup:g} leaves out none of {counted(schedule.count, 'step')}"


def _nearest(count: int, share: float) -> int:
    """The whole number of steps next to this share of so many; of two the larger, which is more faithful."""
    return floor(round(share * count, 9) + 0.5)


def _interval(speedup: float, cost: float) -> float:
    return min(FASTEST, 1 / max(share_to_compute(speedup, cost), 1 / FASTEST))


def why_less(title: str, schedule: Schedule, speedup: float, cost: float, planned: Collection[int]) -> str:
    """That a wish can't be met, and what can, as a sentence; "" if it is met as closely as steps allow."""
    if schedule.way is None:
        return NOT_KNOWN.format(speedup, _interval(speedup, cost))
    count, computed = len(schedule.way) - 1, len(planned)
    if computed <= _nearest(count, share_to_compute(speedup, cost)):
        return ""
    most = speedup_of(count, computed, cost)
    allow = "its other settings" if computed > computed_count(count, speedup, cost) else f"{title}'s own cost"
    return f"target_speedup {speedup:g}: {most:.3g}x is the most that {counted(count, 'step')} and {allow} allow"
