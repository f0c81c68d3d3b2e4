"""Asked for a closeness or a speed-up: searches on one seed in few sampling runs, and judges on another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..strategy.strategy import Strategy
from .found import JUDGED, SEARCHED, Found, How, Measure, Point, Wish, closest

MOST_RUNS = 12
TO_JUDGE = 4  # runs on the judging seed: uncached, with the cache and maybe another, with fewer steps at its cost

Ladder = Sequence[Strategy]  # one strategy's settings, the most careful first
Sample = Callable[[How, str], Measure]  # samples a seed with a cache, or with so many steps and none


@dataclass
class Search:
    """One search. `sample` makes a sampling run and says how close it is to the uncached one of its seed, made before.

    What it raises, a cancel for instance, ends the search. Closeness falls and speed rises along a ladder, but for some
    noise, so each is bisected: towards bolder settings as long as the wish allows or asks for them. Every point that
    was tried is a candidate in the end. They are ranked by what they compute: seconds waver. The best of many on one
    seed looks better there than it is, so it is judged on another, and the next best takes its place where it fails.
    """

    sample: Sample
    ladders: Sequence[Ladder]
    wish: Wish
    steps: int
    most_runs: int = MOST_RUNS
    points: list[Point] = field(default_factory=list)  # all runs, in the order they were made

    def run(self) -> Found:
        """Search, choose, judge."""
        uncached = self._try(self.steps, SEARCHED)
        self._climb_in_turns()
        if self.wish.best(self.points) is None:
            return Found(self.wish, self.steps, tuple(self.points), uncached)
        uncached = self._try(self.steps, JUDGED)
        judged = self._judged()
        fewer = self._fewer(judged) if judged.saves_steps else None
        chosen = next(point for point in self.points if point.how == judged.how)
        return Found(self.wish, self.steps, tuple(self.points), uncached, chosen, judged, fewer)

    def _judged(self) -> Point:
        """The best on the judging seed. Where that does not hold what it promised, the next best as far as runs go."""
        judged: list[Point] = []
        while candidate := self._candidate(judged):
            judged.append(self._try(candidate.how, JUDGED))
            if self.wish.is_met(judged[-1]) and self._is_worth_it(judged[-1]):
                return judged[-1]
            if self.most_runs - len(self.points) < 2:  # one with a cache, one of fewer steps
                break
        hold = [point for point in judged if self.most_runs > len(self.points) or self._known_fewer(point)]
        worthy = [point for point in hold if not self._known_fewer(point) or self._is_worth_it(point)]
        return self.wish.best(worthy) or self.wish.best(hold) or judged[-1]

    def _candidate(self, judged: Sequence[Point]) -> Point | None:
        """The best not judged yet. After one that was too far by so many dB, one with as many to spare, or the closest.

        The closest or best of another strategy, if there is one: what misled the search once may do so again.
        """
        tried = {point.how for point in judged}
        left = [point for point in self.points if point.seed == SEARCHED and point.how not in tried]
        others = [point for point in left if judged and type(point.how) is not type(judged[-1].how)]
        lacking = self.wish.lacks(judged[-1]) if judged else 0.0
        if not lacking:
            return self.wish.best(others) or self.wish.best(left)
        spare = [point for point in left if self.wish.is_met(point, lacking)]
        return self.wish.best(spare) or closest(others) or closest(left)

    def _is_worth_it(self, judged: Point) -> bool:
        return judged.saves_steps and judged.decibels > self._fewer(judged).decibels

    def _fewer(self, judged: Point) -> Point:
        """The run without a cache of the steps that compute as much, sampled once."""
        return self._known_fewer(judged) or self._try(judged.costs_steps, JUDGED)

    def _known_fewer(self, judged: Point) -> Point | None:
        known = (point for point in self.points if (point.how, point.seed) == (judged.costs_steps, JUDGED))
        return next(known, None)

    def _climb_in_turns(self) -> None:
        waiting = deque(_Climb(ladder, self.wish, 1 / self.steps) for ladder in self.ladders)
        while waiting and len(self.points) + TO_JUDGE < self.most_runs:
            climb = waiting.popleft()
            if not climb.is_over:
                climb.add(self._try(climb.next, SEARCHED))
                waiting.append(climb)

    def _try(self, how: How, seed: str) -> Point:
        measure = self.sample(how, seed)
        uncached = next((point for point in self.points if point.seed == seed), None)
        beside = uncached.seconds if uncached else measure.seconds
        share = measure.seconds / beside if measure.share is None else measure.share
        self.points.append(Point(how, seed, measure.decibels, measure.seconds, share, beside, self.steps))
        return self.points[-1]


class _Climb:
    """The bisection of one ladder. It ends where what lies between computes less than one step more or less."""

    def __init__(self, ladder: Ladder, wish: Wish, a_step: float) -> None:
        self.ladder, self.wish, self.a_step = ladder, wish, a_step
        self.low, self.high = 0, len(ladder) - 1  # the rungs that may still be tried
        self.careful: Point | None = None  # the neighbours of these that were tried
        self.bold: Point | None = None
        self.at = self.high // 2

    @property
    def next(self) -> Strategy:
        return self.ladder[self.at]

    @property
    def is_over(self) -> bool:
        if self.low > self.high:
            return True
        between = self.careful.share - self.bold.share if self.careful and self.bold else 1.0
        return between < 1.5 * self.a_step

    def add(self, point: Point) -> None:
        """What came of the next rung. Where nothing was saved the boldest comes next: if that saves nothing, all is."""
        if point.saves_steps and not self.wish.asks_for_bolder(point):
            self.high, self.bold = self.at - 1, point
        else:
            self.low, self.careful = self.at + 1, point
        self.at = (self.low + self.high) // 2 if point.saves_steps or self.bold else self.high
