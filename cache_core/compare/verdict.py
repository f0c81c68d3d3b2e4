"""Whether a cache is worth its changes: is it closer than as many steps without a cache as its time would buy?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean, median
from typing import Literal

MOST_ROUNDS = 3
UNSEEN, PLAIN = 40, 30  # dB: above the first nobody sees the difference, below the second everybody does
SPREAD, RUNS = 0.04, 2  # a clock is taken to be as steady as if two more runs had been 4 % apart, until it shows

Outcome = Literal["worth it", "look", "no better", "no faster", "too close"]


@dataclass(frozen=True)
class Verdict:
    """In one word for programs, and in a sentence for people."""

    outcome: Outcome
    text: str
    steps: int | None = None  # of the uncached run to look at beside the cache


@dataclass
class Clock:
    """Seconds of uncached runs in rounds, beside which caches are timed, and how far such seconds can be trusted."""

    steps: int
    rounds: list[list[float]] = field(default_factory=list)  # of each, seconds a step: the uncached run, then of fewer

    def begin(self, seconds: float) -> None:
        """A round begins with an uncached run of so many seconds."""
        self.rounds.append([seconds / self.steps])

    def add(self, steps: int, seconds: float) -> None:
        """An uncached run of fewer steps, in this round."""
        self.rounds[-1].append(seconds / steps)

    def share(self, cached: Sequence[float]) -> float:
        """A cache's seconds of each round over those of the uncached run beside it: the median."""
        return median(self._shares(cached))

    def noise(self, cached: Sequence[float]) -> float:
        """The relative spread (standard deviation) of one run's seconds beside another's.

        By how much uncached runs of one round differ, and a cache's share from round to round. A machine that gets
        slower from round to round adds nothing to it.
        """
        shares = [share / math.sqrt(2) for share in _deviations(self._shares(cached))]  # each of two runs
        squares = sum(deviation**2 for deviation in [*shares, *chain.from_iterable(map(_deviations, self.rounds))])
        freedom = len(shares) - 1 + sum(len(each) - 1 for each in self.rounds)
        return math.sqrt((RUNS * SPREAD**2 + squares) / (RUNS + freedom))

    def buys(self, cached: Sequence[float]) -> tuple[int, int]:
        """The fewest and the most steps that took a cache's time, whose seconds of each round are given.

        Three times the spread of the ratio of two runs to each side: twice flips one comparison in ten by a clock that
        wavers by 5 %. It shrinks with the root of the rounds.
        """
        share = self.share(cached)
        margin = 3 * self.noise(cached) * math.sqrt(2 / len(cached))
        return max(1, round(self.steps * share * (1 - margin))), max(1, round(self.steps * share * (1 + margin)))

    def _shares(self, cached: Sequence[float]) -> list[float]:
        return [seconds / (beside[0] * self.steps) for seconds, beside in zip(cached, self.rounds)]


def _deviations(values: Sequence[float]) -> list[float]:
    """Of each from their mean, relative to it."""
    mean = fmean(values)
    return [value / mean - 1 for value in values]


def judged(decibels: float, bought: tuple[int, int], steps: int, fewer: Mapping[int, float]) -> Verdict | int:
    """The verdict on a cache, or the number of steps whose closeness must be known first.

    decibels: how close the cache is to the uncached picture, of so many steps. bought: see Clock.buys. fewer: how close
    uncached runs of fewer steps are. Worth it: closer than the most steps that its time may buy. No better: not closer
    than the fewest.
    """
    least, most = bought
    if most >= steps and decibels == math.inf:
        return Verdict("no faster", "The same picture in the same time: nothing gained here.")
    if most < steps:
        if most not in fewer:
            return most
        if decibels > fewer[most]:
            return _worth_it(decibels, most)
    if least >= steps:
        return Verdict("no faster", "No faster than uncached here.")
    if least not in fewer:
        return least
    if decibels <= fewer[least]:
        return Verdict("no better", f"No better than {_steps(least)} without a cache here.", least)
    return too_close(bought, steps, fewer)


def stands(verdict: Verdict, rounds: int) -> bool:
    """Whether a verdict after so many rounds is the last word. One against a cache needs two: a run may be held up."""
    return verdict.outcome in ("worth it", "look") or (verdict.outcome != "too close" and rounds > 1)


def too_close(bought: tuple[int, int], steps: int, fewer: Collection[int]) -> Verdict:
    """Where the most steps that a cache's time may buy are better than it, and the fewest are not, or not known."""
    least, most = bought[0], min(bought[1], steps)
    shown = min(fewer, key=lambda count: abs(count - (least + most) / 2), default=None)
    span = f"{least} to {_steps(most)} in this time"
    return Verdict("too close", f"Too close to call: the clock's noise is larger ({span}).", shown)


def _worth_it(decibels: float, steps: int) -> Verdict:
    if decibels < PLAIN:
        return Verdict("look", f"Closer than {_steps(steps)} in the same time, but plainly changed: look at it.", steps)
    return Verdict("worth it", f"Closer than {_steps(steps)} in the same time: worth it.", steps)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
