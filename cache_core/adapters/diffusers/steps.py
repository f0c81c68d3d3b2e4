"""Where in a sampling run a forward pass is, as far as its timestep and the scheduler tell."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from ...strategy.step import OpenSchedule, Schedule, is_same
from .scales import THOUSAND, SchedulerTimes, Telling, TimestepAxis

AGREED = 2  # evaluations after which a scheduler that counts its steps is believed


class CountedSchedule(OpenSchedule):
    """A schedule that nobody told us, on which every evaluation is a step of its own, as diffusers' configs count."""

    is_over = is_at_last = False

    def __init__(self, first: float, rises: bool = False) -> None:
        super().__init__()
        self.axis, self.told = TimestepAxis(first, rises), first

    def holds(self, told: float) -> bool:
        """Whether a run on it may have this timestep."""
        return self.axis.holds(told)

    def is_at(self, told: float) -> bool:
        """Whether the evaluation that goes on has this timestep."""
        return is_same(told, self.told)

    def sigma_of(self, told: float) -> float:
        """How far from the run's end a timestep is: the noise's share of the latent, 1 noisiest."""
        return self.axis.sigma_of(told)

    def begin_evaluation(self, told: float) -> float:
        """The next step, at this timestep. Returns its sigma."""
        self.told = told
        self._reached.append(self.sigma_of(told))
        self.count = len(self._reached)
        return self._reached[-1]

    def expected(self, is_called: bool) -> float | None:
        """Nobody knows the next timestep."""
        return None


class SchedulerSteps(Schedule):
    """The steps of a scheduler of diffusers', from the first that a run calls.

    Where noise rises (inversion), sigmas are counted backwards, so that they fall, and timesteps are the true ones.
    """

    def __init__(self, scheduler: Any, times: SchedulerTimes, telling: Telling, first: float) -> None:
        self._scheduler, self._timesteps, self._telling = scheduler, scheduler.timesteps, telling
        rises = times.shares[-1] > times.shares[0]
        self._shares = [1 - share for share in times.shares] if rises else times.shares
        self._agreed, self.index, self.told = 0, -1, first
        start = self.sigma_of(first)
        sigmas = sorted({sigma for sigma in self._shares if sigma <= start}, reverse=True)
        super().__init__([*sigmas, 0.0], timestep_of=lambda sigma: THOUSAND * (1 - sigma if rises else sigma))

    @property
    def is_over(self) -> bool:
        """Whether the scheduler has been set up for another run since."""
        return self._scheduler.timesteps is not self._timesteps

    @property
    def is_at_last(self) -> bool:
        """Whether the evaluation that goes on is the run's last."""
        return self.index == len(self._shares) - 1

    def holds(self, told: float) -> bool:
        """Whether a run on it may have this timestep."""
        return True

    def is_at(self, told: float) -> bool:
        """Whether the evaluation that goes on has this timestep."""
        index = self._index_of(told)
        return is_same(told, self.told) if index is None else index == self.index

    def sigma_of(self, told: float) -> float:
        """How far from the run's end a timestep is: the noise's share of the latent, 1 noisiest."""
        index = self._index_of(told)
        return self._between(told) if index is None else self._shares[index]

    def begin_evaluation(self, told: float) -> float:
        """The step that is meant: what a model is given may be rounded. Returns its sigma."""
        index, before = self._index_of(told), self.index
        self._agreed = self._agreed + 1 if index == _count_of(self._scheduler) != before else 0
        self.index, self.told = index, told
        return self.sigma_of(told)

    def expected(self, is_called: bool) -> float | None:
        """The timestep of a model call by the scheduler's own count, without waiting for the device.

        `is_called` says whether its branch was called in the evaluation that goes on. None where the scheduler does
        not count its steps, or has not been right so far.
        """
        count = _count_of(self._scheduler)
        if count is None or self._agreed < AGREED or self.is_over or self.index is None:
            return None
        if count == self.index and not is_called:
            return self.told
        return self._telling.told_at(count) if self.index < count < len(self._shares) else None

    def _index_of(self, told: float) -> int | None:
        """Of several entries that it may be, the one that the scheduler says it is at."""
        near, count = self._telling.near(told), _count_of(self._scheduler)
        return count if count in near else next(iter(near), None)

    def _between(self, told: float) -> float:
        """Of a timestep between two entries: samplers of higher order ask for some."""
        entries = [self._telling.told_at(index) for index in range(len(self._shares))]
        for (one, other), (sigma, following) in zip(pairwise(entries), pairwise(self._shares)):
            if min(one, other) <= told <= max(one, other) and one != other:
                return sigma + (following - sigma) * (told - one) / (other - one)
        return self._shares[min(range(len(entries)), key=lambda index: abs(entries[index] - told))]


def schedule_for(scheduler: Any, first: float, rises: bool = False) -> CountedSchedule | SchedulerSteps:
    """The schedule of a run whose first call has this timestep. An open one if the scheduler's does not contain it.

    `rises` says that timesteps rise in such a run, where the scheduler does not say it.
    """
    if scheduler is not None and scheduler.timesteps is not None and len(scheduler.timesteps):
        times, count = SchedulerTimes(scheduler), _count_of(scheduler)
        tellings = [(telling, telling.near(first)) for telling in times.tellings()]
        fitting = [telling for telling, near in tellings if count in near]
        fitting += [telling for telling, near in tellings if near and count in (None, 0)]  # a loop that begins late
        if fitting:
            return SchedulerSteps(scheduler, times, fitting[0], first)
    return CountedSchedule(first, rises)


def _count_of(scheduler: Any) -> int | None:
    """The step that a scheduler is at, as it counts them; None if it does not."""
    if not hasattr(scheduler, "step_index"):
        return None
    begins_at = getattr(scheduler, "begin_index", None) or 0
    return begins_at if scheduler.step_index is None else scheduler.step_index


def number_in(timestep: Any) -> float:
    """A timestep as a number: of a tensor its largest, for there may be one for each row or token. Reads the device."""
    return float(timestep.detach().max()) if isinstance(timestep, Tensor) else float(timestep)
