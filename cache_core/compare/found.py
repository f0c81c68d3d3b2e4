"""What a search found: every run it made, the cache it chose, and the sentence that says how good that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isnan
from typing import NamedTuple

from ..strategy.setting import counted
from ..strategy.strategy import Strategy
from .side_by_side import described
from .verdict import Verdict

SEARCHED, JUDGED = "searched", "judged"  # the two seeds
CLOSENESS = {"can't see it": 45.0, "hardly": 38.0, "draft": 30.0}  # dB to the uncached picture
SPEED_UP = "speed-up"
WISHES = (*CLOSENESS, SPEED_UP)
NEARLY = 1.02  # a speed-up is met to 2 %
WITHOUT = "The model is handed on without a cache."

How = Strategy | int  # how a run samples: with a cache, or with so many steps and none


class Measure(NamedTuple):
    """What is measured of one sampling run."""

    decibels: float  # to the uncached run of the same seed; inf if it is identical
    seconds: float
    share: float | None  # of the uncached run's work that was computed; None if nobody counted


@dataclass(frozen=True)
class Point:
    """One sampling run of a search."""

    how: How
    seed: str  # SEARCHED or JUDGED
    decibels: float
    seconds: float
    share: float  # computed, of the uncached run's work; of its seconds where nobody counted
    beside: float  # seconds of the uncached run of this seed
    steps: int  # of that run

    @property
    def costs_steps(self) -> int:
        """The steps without a cache that compute as much: rounded up, to their advantage."""
        return max(1, ceil(self.share * self.steps - 1e-6))

    @property
    def saves_steps(self) -> bool:
        """Whether it is a cache, with which at least one step's work is saved."""
        return isinstance(self.how, Strategy) and self.costs_steps < self.steps

    @property
    def speed_up(self) -> float:
        """By what was computed."""
        return 1 / self.share

    @property
    def by_the_clock(self) -> float:
        """The speed-up by the measured seconds."""
        return self.beside / self.seconds


@dataclass(frozen=True)
class Wish:
    """A closeness by its name, or a speed-up by its number."""

    name: str
    speed_up: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in WISHES:
            raise ValueError(f"There is no wish {self.name!r}. Choose one of: {', '.join(WISHES)}.")

    @property
    def told(self) -> str:
        return f"{self.speed_up:g}x" if self.name == SPEED_UP else f"{CLOSENESS[self.name]:g} dB"

    def is_met(self, point: Point, margin: float = 0.0) -> bool:
        """Whether it came true; a closeness with so many dB to spare."""
        if self.name == SPEED_UP:
            return point.speed_up * NEARLY >= self.speed_up
        return point.decibels >= CLOSENESS[self.name] + margin

    def lacks(self, point: Point) -> float:
        """By how many dB a closeness was missed."""
        return 0.0 if self.name == SPEED_UP else max(0.0, CLOSENESS[self.name] - point.decibels)

    def asks_for_bolder(self, point: Point) -> bool:
        """Whether settings that compute less come nearer: to be fast enough, or to be as fast as the closeness lets."""
        return self.is_met(point) != (self.name == SPEED_UP)

    def best(self, points: Sequence[Point]) -> Point | None:
        """Of those that save a step: for a closeness the fastest that has it, else the closest; for a speed-up the
        closest that has it, else the fastest. None that is not comparable (NaN)."""

        def rank(point: Point) -> tuple[bool, float, float]:
            is_met = self.is_met(point)
            by_speed = (self.name == SPEED_UP) != is_met
            first, then = (-point.share, point.decibels) if by_speed else (point.decibels, -point.share)
            return is_met, first, then

        return max(filter(_is_candidate, points), key=rank, default=None)


def closest(points: Sequence[Point]) -> Point | None:
    """Of those that save a step."""
    return max(filter(_is_candidate, points), key=lambda point: point.decibels, default=None)


def _is_candidate(point: Point) -> bool:
    return point.saves_steps and not isnan(point.decibels)


@dataclass(frozen=True)
class Found:
    """All points, and what was chosen: on the seed it was searched on, and beside fewer steps on another.

    Without `chosen` no cache saved a step. Without `fewer` the chosen one saved none on the other seed.
    """

    wish: Wish
    steps: int
    points: tuple[Point, ...]
    uncached: Point  # on the judging seed, if anything was judged
    chosen: Point | None = None
    judged: Point | None = None
    fewer: Point | None = None

    @property
    def strategy(self) -> Strategy | None:
        """What to sample with: the chosen cache, if it is closer than fewer steps at the same cost."""
        is_worth_it = self.fewer is not None and self.judged.decibels > self.fewer.decibels
        return self.judged.how if is_worth_it else None

    @property
    def is_met(self) -> bool:
        """Whether there is a cache with which the wish came true on the seed that was not searched on."""
        return self.strategy is not None and self.wish.is_met(self.judged)

    @property
    def verdict(self) -> Verdict:
        """On the judged cache, beside the fewer steps that cost as much."""
        if self.fewer is None:
            return Verdict("no faster", "No step saved here.")
        steps = counted(self.fewer.how, "step")
        if self.strategy is None:
            return Verdict("no better", f"No better than {steps} without a cache.", self.fewer.how)
        if self.is_met:
            return Verdict("worth it", f"Closer than {steps} at the same cost, and as was wished.", self.fewer.how)
        return Verdict("look", f"Closer than {steps} at the same cost; the wish was {self.wish.told}.", self.fewer.how)

    @property
    def told(self) -> str:
        """All this as a sentence or two."""
        if self.chosen is None:
            return f"Nothing to reuse: no cache that was tried saved a step of {self.steps}. {WITHOUT}"
        name, settings = described([self.chosen.how])
        cache = f"{name}, {settings}"
        if self.fewer is None:
            return f"Nothing to reuse: {cache} saved no step on a seed it did not search on. {WITHOUT}"
        return f"{self._reached(cache)} {WITHOUT}" if self.strategy is None else self._reached(cache)

    def _reached(self, cache: str) -> str:
        fewer = counted(self.fewer.how, "step")
        cost, give = ("costs", "gives") if self.fewer.how == 1 else ("cost", "give")
        numbers = f"{_speed(self.judged)}, {_close(self.judged)} on a seed it did not search on"
        beside = f"{fewer} without a cache {cost} as much and {give} {_close(self.fewer)}."
        if self.strategy is None:
            return f"No cache that was judged beats fewer steps. The best, {cache}: {numbers}; {beside}"
        if self.is_met:
            return f"{cache}: {numbers}; {beside}"
        if self.wish.is_met(self.chosen):
            missed = _speed(self.chosen) if self.wish.name == SPEED_UP else _close(self.chosen)
            return f"{cache}: {numbers}; {beside} The wish was {self.wish.told}; on the seed it searched on: {missed}."
        best = "fast as {}; the fastest" if self.wish.name == SPEED_UP else "close as {}; the closest"
        return f"No cache that was tried is as {best.format(self.wish.told)}, {cache}: {numbers}; {beside}"


def _speed(point: Point) -> str:
    return f"{point.speed_up:.1f}x ({point.by_the_clock:.1f}x by the clock)"


def _close(point: Point) -> str:
    return "the identical picture" if point.decibels == float("inf") else f"{point.decibels:.0f} dB"
