"""Where in a sampling run a forward pass is, as far as its timestep and the scheduler tell."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...strategy.step import HIGHEST_FLOW_SIGMA, SAME_SIGMA, OpenSchedule, Schedule

FIRST_WHEN_COUNTING_UP = 0.01  # no run begins with a clean picture
ROUNDING = 2**-8  # relative: timesteps come in bfloat16
THOUSANDTHS = 1000


class TimestepAxis:
    """How a model counts its timesteps, told by the first of a run: to 1 or to 1000, and which end is noise.

    >>> TimestepAxis(1000).sigma_of(250), TimestepAxis(1.0).sigma_of(0.25), TimestepAxis(0.0).sigma_of(0.75)
    (0.25, 0.25, 0.25)
    """

    def __init__(self, first: float) -> None:
        self.scale = _scale_of(first)
        self.counts_up = first / self.scale < FIRST_WHEN_COUNTING_UP  # as Z-Image and Lumina do

    def sigma_of(self, timestep: float) -> float:
        """The noise's share, 1 noisiest."""
        self.scale = max(self.scale, _scale_of(timestep))  # 0 is 0 on both scales
        share = timestep / self.scale
        return 1 - share if self.counts_up else share


class CountedSchedule(OpenSchedule):
    """A schedule that nobody told us, on which every evaluation is a step of its own, as diffusers' configs count."""

    def begin_evaluation(self, sigma: float) -> float:
        """The next step, at this sigma."""
        self._reached.append(sigma)
        self.count = len(self._reached)
        return sigma


class SchedulerSteps(Schedule):
    """The steps of a scheduler of diffusers', from the first that a run calls."""

    def __init__(self, scheduler: Any, first: float) -> None:
        self._scheduler, self._timesteps = scheduler, scheduler.timesteps
        self._sigmas = sigmas_of(scheduler)
        first = self.begin_evaluation(first)
        super().__init__([*sorted({sigma for sigma in self._sigmas if sigma <= first}, reverse=True), 0.0])

    @property
    def is_over(self) -> bool:
        """Whether the scheduler has been set up for another run since."""
        return self._scheduler.timesteps is not self._timesteps

    def begin_evaluation(self, sigma: float) -> float:
        """The scheduler's sigma that is meant: what a model is given may be rounded.

        Of several that it may be, the one that the scheduler says it is at.
        """
        near = [entry for entry in self._sigmas if abs(entry - sigma) <= ROUNDING * sigma]
        index = getattr(self._scheduler, "step_index", None)
        if index is not None and index < len(self._sigmas) and self._sigmas[index] in near:
            return self._sigmas[index]
        return min(near, key=lambda entry: abs(entry - sigma), default=sigma)


def schedule_for(scheduler: Any, first: float) -> CountedSchedule | SchedulerSteps:
    """The schedule of a run whose first call is at this sigma. An open one if the scheduler's does not contain it."""
    if scheduler is not None and any(abs(entry - first) <= ROUNDING * first for entry in sigmas_of(scheduler)):
        return SchedulerSteps(scheduler, first)
    return CountedSchedule()


def sigmas_of(scheduler: Any) -> list[float]:
    """A scheduler's timesteps as shares of noise. Waits for the device."""
    timesteps = scheduler.timesteps.tolist()
    return [timestep / _scale_of(max(timesteps)) for timestep in timesteps]


def is_same(sigma: float, other: float) -> bool:
    """Whether two sigmas are one, but for float32's last digits."""
    return abs(sigma - other) <= SAME_SIGMA * max(sigma, other)


def number_in(timestep: Any) -> float:
    """A timestep as a number: of a tensor its largest, for there may be one for each row or token. Reads the device."""
    return float(timestep.detach().max()) if isinstance(timestep, Tensor) else float(timestep)


def _scale_of(timestep: float) -> int:
    return THOUSANDTHS if timestep > HIGHEST_FLOW_SIGMA else 1
