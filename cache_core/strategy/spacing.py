"""Which steps are computed when the schedule alone decides."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .step import SAME_SIGMA, Step

OWN_SHARE = 0.2  # how far the targets lean to the schedule's own spacing: best or near it at flow shifts 1, 3 and 6


@lru_cache(maxsize=32)
def published_steps(count: int, warm_up: int, interval: int) -> tuple[int, ...]:
    """Steps that a warm-up and a constant interval compute: the first `warm_up`, then the last of every `interval`.

    >>> published_steps(20, warm_up=3, interval=5)
    (0, 1, 2, 7, 12, 17)
    """
    return tuple(step for step in range(count) if step < warm_up or (step - warm_up + 1) % interval == 0 or step == 0)


@lru_cache(maxsize=32)
def sigma_spaced_steps(times: tuple[float, ...], warm_up: int, interval: int) -> tuple[int, ...]:
    """The same number of steps, near the times at which an even schedule would compute them.

    A shifted schedule crowds its steps at high noise, where the output hardly changes from one to the next, and strides
    at low noise. Spaced by index, the computed steps do so too, and what is forecast then loses to taking fewer steps.
    On an even schedule both rules choose the same steps. `times` is the whole schedule with its end, noisiest first.

    >>> sigma_spaced_steps((1.0, 0.75, 0.5, 0.25, 0.0), warm_up=1, interval=2)
    (0, 2)
    >>> sigma_spaced_steps((1.0, 0.95, 0.9, 0.6, 0.0), warm_up=1, interval=2)
    (0, 3)
    """
    count = len(times) - 1
    chosen: set[int] = set()
    for index in published_steps(count, warm_up, interval):
        even = times[0] + (times[-1] - times[0]) * index / count
        target = even + OWN_SHARE * (times[index] - even)
        free = (step for step in range(count) if step not in chosen)
        chosen.add(min(free, key=lambda step: abs(times[step] - target)))
    return tuple(sorted(chosen))


def steps_between_turns(count: int, turns: list[int], warm_up: int, interval: int) -> tuple[int, ...]:
    """The same where sigmas turn round: both begin anew. The step that leads there, mostly a long one, is computed too.

    >>> steps_between_turns(10, [0, 6], warm_up=1, interval=3)
    (0, 3, 5, 6, 9)
    """
    published, ends = published_steps(count, warm_up, interval), [*turns[1:], count]
    steps = {turn + step for turn, end in zip(turns, ends) for step in published if turn + step < end}
    return tuple(sorted(steps | {turn - 1 for turn in turns[1:]}))


def nothing_between(before: int, after: int) -> str:
    """That a warm-up and the steps from another one on leave none, and what to do."""
    steps = f"disable_cache_before_step {before} and disable_cache_after_step {after}"
    return f"{steps} leave no step. Raise the latter, or set it to -1 (never)"


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
