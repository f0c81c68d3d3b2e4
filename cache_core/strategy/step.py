"""Where in the noise schedule a model call is."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any

HIGHEST_FLOW_SIGMA = 1.5  # flow models end at 1, the others begin far above
ONE_STEP = "a single step has none before it to reuse"
SAME_SIGMA = 1e-5  # relative: float32 arithmetic moves a sigma in its last digits


@dataclass(frozen=True)
class Step:
    """One denoising step: the schedule's interval that a model call's sigma lies in."""

    index: int  # 0 is the run's first; the interval reaches from sigmas[index] to sigmas[index + 1]
    sigma: float  # of this very call: samplers also call between the schedule's entries
    time: float  # the sigma as the noise's share of the latent, 1 noisiest, 0 clean
    timestep: float  # the same as models count it, from 1000 noisiest to 0 clean
    length: float  # of the interval in time, 1.0 being that of an even schedule
    position: float  # how far into the run in time, counted in such even steps


class Schedule:
    """The sigmas of one sampling run in their order: falling, usually to 0, or rising, as when a picture is inverted.

    `percent_to_sigma` translates a share of the model's whole noise range (0.0 its start, 1.0 its end) to a sigma, as
    the model's own sampling does; without it, shares are read along the schedule. `timestep_of` translates a sigma to a
    timestep between 0 and 1000; without it, that is a thousand times the noise's share. `is_flow` says whether sigmas
    are the noise's share; if it is None, that is so where none is above 1.5. Raises ValueError for sigmas that both
    fall and rise: `schedule_of` takes any.
    """

    is_open = False

    def __init__(
        self,
        sigmas: Sequence[float],
        percent_to_sigma: Callable[[float], float] | None = None,
        timestep_of: Callable[[float], float] | None = None,
        is_flow: bool | None = None,
    ) -> None:
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        if not is_in_order(self.sigmas):
            raise ValueError(f"sigmas both fall and rise: {self.sigmas}. Make a schedule of them by schedule_of().")
        self.count = max(len(self.sigmas) - 1, 1)
        self.is_rising = self.sigmas[-1] > self.sigmas[0]
        self._is_flow = max(self.sigmas) <= HIGHEST_FLOW_SIGMA if is_flow is None else is_flow
        self.times = tuple(self.time_of(sigma) for sigma in self.sigmas)
        self._percent_to_sigma = cache(percent_to_sigma or self._along_schedule)
        self._timestep_of = timestep_of or (lambda sigma: 1000 * self.time_of(sigma))

    def step_at(self, sigma: float) -> Step:
        """The step `sigma` belongs to: the last that starts at it or before. Before the schedule it is the first."""
        entries = self.sigmas[: self.count]
        index = max((index for index, entry in enumerate(entries) if self._has_reached(sigma, entry)), default=0)
        following = self.times[min(index + 1, len(self.times) - 1)]
        time, even = self.time_of(sigma), (self.times[0] - self.times[-1]) / self.count
        length, position = (self.times[index] - following, self.times[0] - time) if even else (1.0, index)
        return Step(index, sigma, time, self._timestep_of(sigma), length / (even or 1), position / (even or 1))

    def _has_reached(self, sigma: float, entry: float) -> bool:
        """Whether a run that is at `sigma` has come to this entry of the schedule."""
        return entry * (1 - SAME_SIGMA) <= sigma if self.is_rising else entry >= sigma * (1 - SAME_SIGMA)

    def time_of(self, sigma: Any) -> Any:
        """The sigma, a number or a tensor, as the noise's share of the latent.

        A flow model's sigma is that already. Models that add noise to the picture have sigmas far above 1.
        """
        return sigma if self._is_flow else sigma / (1 + sigma)

    def is_within(self, step: Step, start_percent: float, end_percent: float) -> bool:
        """Whether the step lies in this share of the model's noise range, both ends included."""
        noisiest = self._percent_to_sigma(start_percent) if start_percent > 0 else float("inf")
        cleanest = self._percent_to_sigma(end_percent) if end_percent < 1 else 0.0
        return noisiest >= step.sigma * (1 - SAME_SIGMA) and step.sigma * (1 + SAME_SIGMA) >= cleanest

    def _along_schedule(self, percent: float) -> float:
        sigmas = self.sigmas[::-1] if self.is_rising else self.sigmas
        position = min(max(percent, 0.0), 1.0) * self.count
        below = min(int(position), self.count - 1)
        above, beneath = sigmas[below], sigmas[min(below + 1, len(sigmas) - 1)]
        return above + (beneath - above) * (position - below)

    @property
    def expected_count(self) -> int | None:
        """How many steps the run is to have, where that is known when it begins."""
        return self.count

    @property
    def turns(self) -> list[int]:
        """The steps with which sigmas begin to fall, or to rise, anew; the first is one."""
        return [0]

    @property
    def way(self) -> tuple[float, ...] | None:
        """The times of the run's steps and of its end, in order, where they are known when it begins.

        Where sigmas turn round it is how far the run has come by then, with every turn.
        """
        return self.times

    @property
    def share_of_range(self) -> float:
        """How much of the model's whole noise range this run covers, 1 being all of it."""
        first, last = (
            bisect_left(range(1001), -sigma, key=lambda share: -self._percent_to_sigma(share / 1000)) / 1000
            for sigma in (self.sigmas[0], self.sigmas[-1])
        )
        return abs(last - first)

    def how_far(self, few: int, usual: int) -> float:
        """How far a step goes in time, in steps of a `usual` run from noise: above 1 in runs of `few` only."""
        count = self.expected_count
        return max(1.0, usual * abs(self.times[0] - self.times[-1]) / count) if count and count <= few else 1.0

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each of the sigmas."""
        return tuple(self._timestep_of(sigma) for sigma in self.sigmas)

    @cached_property
    def positions(self) -> tuple[float, ...]:
        """The position of each of the steps."""
        return tuple(self.step_at(sigma).position for sigma in self.sigmas[: self.count])


class OpenSchedule(Schedule):
    """A schedule that nobody told us, or whose sigmas both fall and rise: its steps are told apart as they come.

    `expected` are the sigmas that it is thought to reach, as long as it does.
    """

    is_open = True

    def __init__(
        self,
        percent_to_sigma: Callable[[float], float] | None = None,
        timestep_of: Callable[[float], float] | None = None,
        is_flow: bool = True,
        expected: Sequence[float] = (),
    ) -> None:
        super().__init__([1.0, 0.0], percent_to_sigma, timestep_of, is_flow)
        self._reached: list[float] = []
        self._expected = [sigma for index, sigma in enumerate(expected) if not index or sigma != expected[index - 1]]

    @property
    def expected_count(self) -> int | None:
        return len(self._expected) - 1 if self._expected else None

    @property
    def way(self) -> tuple[float, ...] | None:
        times = [self.time_of(sigma) for sigma in self._expected]
        return tuple(accumulate((abs(b - a) for a, b in pairwise(times)), initial=0.0)) if times else None

    def step_at(self, sigma: float) -> Step:
        """The step that is on: another sigma than before begins the next. Lengths are not known and count as 1."""
        if not self._reached or not is_same(sigma, self._reached[-1]):
            self._reached.append(sigma)
            self.count = len(self._reached)
            expected = self._expected[self.count - 1 : self.count]
            if not expected or not is_same(sigma, expected[0]):
                self._expected = []
        index = self.count - 1
        return Step(index, sigma, self.time_of(sigma), self._timestep_of(sigma), length=1.0, position=index)

    @property
    def turns(self) -> list[int]:
        turns, sigmas = [0], self._expected or self._reached
        for index in range(2, len(sigmas)):
            first, second, last = sigmas[turns[-1]], sigmas[turns[-1] + 1], sigmas[index - 1]
            if index > turns[-1] + 1 and (second > first) != (sigmas[index] > last):
                turns.append(index)
        return turns


def schedule_of(
    sigmas: Sequence[float],
    percent_to_sigma: Callable[[float], float] | None = None,
    timestep_of: Callable[[float], float] | None = None,
    is_flow: bool | None = None,
) -> Schedule:
    """The schedule of these sigmas: an open one if they both fall and rise, as when a sampler restarts."""
    if is_in_order(sigmas):
        return Schedule(sigmas, percent_to_sigma, timestep_of, is_flow)
    is_flow = max(sigmas) <= HIGHEST_FLOW_SIGMA if is_flow is None else is_flow
    return OpenSchedule(percent_to_sigma, timestep_of, is_flow, expected=sigmas)


def is_in_order(sigmas: Sequence[float]) -> bool:
    """Whether sigmas only fall or only rise; equal neighbours do neither."""
    return not any(a < b for a, b in pairwise(sigmas)) or not any(a > b for a, b in pairwise(sigmas))


def is_same(sigma: float, other: float) -> bool:
    """Whether two sigmas, or timesteps, are one but for float32's last digits."""
    return abs(sigma - other) <= SAME_SIGMA * max(abs(sigma), abs(other))
