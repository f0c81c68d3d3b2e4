"""Where in the noise schedule a model call is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

HIGHEST_FLOW_SIGMA = 1.5  # flow models end at 1, the others begin far above
SAME_SIGMA = 1e-5  # relative: float32 arithmetic moves a sigma in its last digits


@dataclass(frozen=True)
class Step:
    """One denoising step: the schedule's interval that a model call's sigma lies in."""

    index: int  # 0 is the noisiest; the interval reaches from sigmas[index] down to sigmas[index + 1]
    sigma: float  # of this very call: samplers also call between the schedule's entries
    time: float  # the sigma as the noise's share of the latent, 1 noisiest, 0 clean
    timestep: float  # the same as models count it, from 1000 noisiest to 0 clean
    length: float  # of the interval in time, 1.0 being that of an even schedule
    position: float  # how far into the run in time, counted in such even steps


class Schedule:
    """The sigmas of one sampling run, noisiest first, usually ending in 0.

    `percent_to_sigma` translates a share of the model's whole noise range (0.0 its start, 1.0 its end) to a sigma, as
    the model's own sampling does; without it, shares are read along the schedule. `timestep_of` translates a sigma to a
    timestep between 0 and 1000; without it, that is a thousand times the noise's share.
    """

    is_open = False

    def __init__(
        self,
        sigmas: Sequence[float],
        percent_to_sigma: Callable[[float], float] | None = None,
        timestep_of: Callable[[float], float] | None = None,
    ) -> None:
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self.count = max(len(self.sigmas) - 1, 1)
        self.times = tuple(self.time_of(sigma) for sigma in self.sigmas)
        self._percent_to_sigma = percent_to_sigma or self._along_schedule
        self._timestep_of = timestep_of or (lambda sigma: 1000 * self.time_of(sigma))

    def step_at(self, sigma: float) -> Step:
        """The step `sigma` belongs to: the last one that starts at it or above. Above the schedule it is the first."""
        entries = self.sigmas[: self.count]
        reached = [index for index, entry in enumerate(entries) if entry >= sigma * (1 - SAME_SIGMA)]
        index = reached[-1] if reached else 0
        following = self.times[min(index + 1, len(self.times) - 1)]
        time, even = self.time_of(sigma), (self.times[0] - self.times[-1]) / self.count
        length, position = (self.times[index] - following, self.times[0] - time) if even else (1.0, index)
        return Step(index, sigma, time, self._timestep_of(sigma), length / (even or 1), position / (even or 1))

    def time_of(self, sigma: Any) -> Any:
        """The sigma, a number or a tensor, as the noise's share of the latent.

        A flow model's sigma is that already. Models that add noise to the picture have sigmas far above 1.
        """
        return sigma if self.sigmas[0] <= HIGHEST_FLOW_SIGMA else sigma / (1 + sigma)

    def is_within(self, step: Step, start_percent: float, end_percent: float) -> bool:
        """Whether the step lies in this share of the model's noise range, both ends included."""
        noisiest = self._percent_to_sigma(start_percent) if start_percent > 0 else float("inf")
        cleanest = self._percent_to_sigma(end_percent) if end_percent < 1 else 0.0
        return noisiest >= step.sigma * (1 - SAME_SIGMA) and step.sigma * (1 + SAME_SIGMA) >= cleanest

    def _along_schedule(self, percent: float) -> float:
        position = min(max(percent, 0.0), 1.0) * self.count
        below = min(int(position), self.count - 1)
        above, beneath = self.sigmas[below], self.sigmas[min(below + 1, len(self.sigmas) - 1)]
        return above + (beneath - above) * (position - below)

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep of each of the sigmas."""
        return tuple(self._timestep_of(sigma) for sigma in self.sigmas)


class OpenSchedule(Schedule):
    """A schedule that nobody told us: flow sigmas that become known as the run reaches them, each a step of its own."""

    is_open = True

    def __init__(self) -> None:
        super().__init__([1.0, 0.0])
        self._reached: list[float] = []

    def step_at(self, sigma: float) -> Step:
        """The step `sigma` belongs to; one below all so far begins the next. Lengths are not known and count as 1."""
        if not self._reached or sigma < self._reached[-1] * (1 - SAME_SIGMA):
            self._reached.append(sigma)
            self.count = len(self._reached)
        index = max(i for i, entry in enumerate(self._reached) if i == 0 or entry >= sigma * (1 - SAME_SIGMA))
        return Step(index, sigma, self.time_of(sigma), self._timestep_of(sigma), length=1.0, position=index)
