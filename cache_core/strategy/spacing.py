"""Which steps are computed when the schedule alone decides."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import floor
from typing import Any

from .setting import counted, setting
from .step import SAME_SIGMA, Schedule, Step

WARM_UP = 5  # steps: for 12 of 20 they gave the demo +6.6 / +5.5 / +0.7 dB against 3, at shift 1 / 3 / 6
AFTER_WARM_UP = 5  # steps at least, where there are so many: 4 of 8 gave +3.8 / -0.8 / -4.7 dB against 3
FEW = 10  # computed steps: fewer are far apart
OWN_SHARE, SHARE_OF_FEW = 0.8, 0.2  # how far places lean to the schedule's own steps, against evenly along sigma


def spacing() -> Any:
    """The setting `spacing`."""
    return setting(
        "sigma",
        "Where the computed steps are. 'sigma': where they serve best, at the start and where the noise falls fast. "
        "'steps': every so many steps, as published. Usual: 'sigma'.",
        choices=("sigma", "steps"),
    )


@lru_cache(maxsize=32)
def published_steps(count: int, warm_up: int, interval: float) -> tuple[int, ...]:
    """Steps that a warm-up and a constant interval compute: the first `warm_up`, then the last of every `interval`.

    >>> published_steps(20, warm_up=3, interval=5)
    (0, 1, 2, 7, 12, 17)
    >>> published_steps(10, warm_up=1, interval=1.5)
    (0, 2, 3, 5, 6, 8, 9)
    """

    def ends_here(step: int) -> bool:
        return floor((step - warm_up + 1) / interval) > floor((step - warm_up) / interval)

    return tuple(step for step in range(count) if step < warm_up or ends_here(step) or step == 0)


@lru_cache(maxsize=32)
def sigma_spaced_steps(times: tuple[float, ...], warm_up: int, interval: int) -> tuple[int, ...]:
    """As many steps as published, where they serve best: few of them near the times of the published ones.

    A shifted schedule crowds its steps at high noise and strides at low noise. Few steps spaced by index would do so
    too, and what is forecast then loses to taking fewer steps. On an even schedule they are the published ones. `times`
    is the whole schedule with its end, noisiest first.

    >>> sigma_spaced_steps((1.0, 0.75, 0.5, 0.25, 0.0), warm_up=1, interval=3)
    (0, 3)
    >>> sigma_spaced_steps((1.0, 0.97, 0.95, 0.9, 0.8, 0.6, 0.0), warm_up=1, interval=3)
    (0, 5)
    """
    count = len(times) - 1
    published = published_steps(count, warm_up, interval)
    if len(published) >= FEW:
        return wished_steps(times, len(published), max(warm_up, WARM_UP))
    chosen: set[int] = set()
    for index in published:
        even = times[0] + (times[-1] - times[0]) * index / count
        target = even + SHARE_OF_FEW * (times[index] - even)
        free = (step for step in range(count) if step not in chosen)
        chosen.add(min(free, key=lambda step: abs(times[step] - target)))
    return tuple(sorted(chosen))


@lru_cache(maxsize=32)
def wished_steps(
    times: tuple[float, ...], computed: int, warm_up: int = WARM_UP, always: frozenset[int] = frozenset()
) -> tuple[int, ...]:  # fmt: skip
    """So many steps: a warm-up, of few of them a shorter one, the last one, and the others evenly between, by places.

    Those in `always` are among them, and may be more than that. `times` is the whole schedule with its end.

    >>> even = tuple(1 - step / 20 for step in range(21))
    >>> wished_steps(even, 12)
    (0, 1, 2, 3, 4, 6, 8, 10, 13, 15, 17, 19)
    >>> wished_steps(even, 10, always=frozenset({16, 17, 18, 19}))
    (0, 1, 2, 3, 4, 10, 16, 17, 18, 19)
    """
    count = len(times) - 1
    places = places_of(times, OWN_SHARE if computed >= FEW else SHARE_OF_FEW)
    chosen = {step for step in always if 0 <= step < count} | ({0} if count else set())
    for target in range(1, min(warm_up, max(computed - AFTER_WARM_UP, (computed - 1) // 2))):
        if len(chosen) < computed:
            _choose(chosen, places, target, range(1, count))
    if len(chosen) < min(computed, count):
        chosen.add(count - 1)
    gaps = list(pairwise(sorted(chosen)))
    more = dict.fromkeys(gaps, 0)  # how many steps are computed within each gap
    for _ in range(min(computed, count) - len(chosen)):
        open_gaps = [gap for gap in gaps if gap[1] - gap[0] - 1 > more[gap]]
        more[max(open_gaps, key=lambda gap: (places[gap[1]] - places[gap[0]]) / (more[gap] + 1))] += 1
    for (start, end), within in more.items():
        for number in range(1, within + 1):
            target = places[start] + (places[end] - places[start]) * number / (within + 1)
            _choose(chosen, places, target, range(start + 1, end))
    return tuple(sorted(chosen))


def places_of(times: tuple[float, ...], own_share: float = OWN_SHARE) -> list[float]:
    """Where each step is, in steps: by its number, but for a share by how far the noise has fallen."""
    count, whole = len(times) - 1, times[0] - times[-1]
    along = [(times[0] - time) / whole * count if whole else index for index, time in enumerate(times)]
    return [place + own_share * (index - place) for index, place in enumerate(along)]


def _choose(chosen: set[int], places: list[float], target: float, among: range) -> None:
    """One more step of these, the nearest to the target that is free."""
    if free := [step for step in among if step not in chosen]:
        chosen.add(min(free, key=lambda step: round(abs(places[step] - target), 5)))


def is_due(planned: Collection[int], step: int, last: int) -> bool:
    """Whether a step is planned, or one since the last computed one was that no call came for."""
    return step in planned or any(last < index < step for index in planned)


def steps_between_turns(count: int, turns: list[int], warm_up: int, interval: float) -> tuple[int, ...]:
    """The same where sigmas turn round: both begin anew. The step that leads there, mostly a long one, is computed too.

    >>> steps_between_turns(10, [0, 6], warm_up=1, interval=3)
    (0, 3, 5, 6, 9)
    """
    published, ends = published_steps(count, warm_up, interval), [*turns[1:], count]
    steps = {turn + step for turn, end in zip(turns, ends) for step in published if turn + step < end}
    return tuple(sorted(steps | {turn - 1 for turn in turns[1:]}))


def steps_at_interval(schedule: Schedule, warm_up: int, interval: int, along: str) -> tuple[int, ...]:
    """The steps that a warm-up and an interval compute, spaced along "sigma" or along "steps"."""
    if schedule.is_open:
        return steps_between_turns(schedule.count, schedule.turns, warm_up, interval)
    if along == "steps":
        return published_steps(schedule.count, warm_up, interval)
    return sigma_spaced_steps(schedule.times, warm_up, interval)


def nothing_between(before: int, after: int) -> str:
    """That a warm-up and the steps from another one on leave none, and what to do."""
    steps = f"disable_cache_before_step {before} and disable_cache_after_step {after}"
    return f"{steps} leave no step. Raise the latter, or set it to -1 (never)"


def too_few(count: int, warm_up: int, interval: int) -> str:
    """That a run of so many steps is computed as a whole by these settings."""
    are = "is" if count == 1 else "are"
    return f"{counted(count, 'step')} {are} too few for warm-up {warm_up} and interval {interval}"


@dataclass
class Broadcast:
    """How long a computed value has stood in: for `skip_range - 1` evaluations at most, and for a distance.

    That is `skip_range` steps of an even schedule, in time; on such a one both bounds are the published one. A shifted
    schedule strides at low noise: there the second bound ends it earlier (at shift 6, +9 to +15 dB for 0 to 5 % more
    computed).
    """

    computed_at: float = 0.0  # position of the step
    reuses: int = 0

    def begin(self, step: Step) -> None:
        """A value was computed."""
        self.computed_at, self.reuses = step.position, 0

    def goes_on(self, step: Step, skip_range: int) -> bool:
        """Whether it stands in for this evaluation too, which then counts."""
        goes_on = self.reuses + 1 < skip_range and lasts(step.position - self.computed_at, skip_range)
        self.reuses += goes_on
        return goes_on


def lasts(distance: float, skip_range: int) -> bool:
    """Whether a value stands in so far from where it was computed."""
    return abs(distance) < skip_range * (1 - SAME_SIGMA)
