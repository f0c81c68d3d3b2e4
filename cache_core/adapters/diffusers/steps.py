"""Where in a sampling run a forward pass is, as far as its timestep and the scheduler tell."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from ...strategy.step import OpenSchedule, Schedule, Step, is_same
from .scales import THOUSAND, SchedulerTimes, Telling, TimestepAxis

NO_SCHEDULER = "Refrain: computed steps are spaced evenly, for the schedule is not known. Pass scheduler= to apply."
OTHER_SCHEDULER = (
    "Refrain: the model's first timestep %g is none of those of the scheduler that was passed, so the schedule is not "
    "known and computed steps are spaced evenly. Pass the scheduler that the pipeline steps with."
)
AGREED = 2  # evaluations after which a scheduler's count, or the order of steps, is believed


class CountedSchedule(OpenSchedule):
    """A schedule that nobody told us, on which every evaluation is a step of its own, as diffusers' configs count."""

    is_over = is_at_last = False

    def __init__(self, first: float, rises: bool = False) -> None:
        super().__init__()
        self.axis, self.told = TimestepAxis(first, rises), first
        self.is_supposed = self._is_next = False

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

    def step_at(self, sigma: float) -> Step:
        """The step that is on."""
        return super().step_at(self._reached[-1])

    def expected(self, told: Any, is_next: bool | None) -> float | None:
        """The timestep of the evaluation that goes on, for a model call that is told one which is not read yet.

        `is_next` says whether its branch was called in that evaluation: it is supposed that the next one then begins,
        nearer to the run's end, and else that the call belongs to it (`is_supposed`). See to it that this is right.
        None where nobody knows.
        """
        self.is_supposed = isinstance(told, Tensor) and self.count >= AGREED and is_next is not None
        self._is_next = self.is_supposed and bool(is_next)
        return self.told if self.is_supposed else None

    def is_right(self, told: float) -> bool:
        """Whether this timestep, as it was read, is one that was supposed."""
        if not self._is_next:
            return self.is_at(told)
        before, scale, self._is_next = self._reached[-2], self.axis.scale, False
        self.told, self._reached[-1] = told, self.sigma_of(told)
        return self.holds(told) and self.axis.scale is scale and self._reached[-1] <= before


class SchedulerSteps(Schedule):
    """The steps of a scheduler of diffusers', from the first that a run calls.

    Where noise rises (inversion), sigmas are counted backwards, so that they fall, and timesteps are the true ones.
    """

    def __init__(self, scheduler: Any, times: SchedulerTimes, telling: Telling, first: float) -> None:
        self._scheduler, self._timesteps, self._telling = scheduler, scheduler.timesteps, telling
        self._entries, self._written = times.timesteps, _writings(scheduler.timesteps)
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
        index, before, count = self._index_of(told), self.index, _count_of(self._scheduler)
        following = count if count is not None or before is None else before + 1
        self._agreed = self._agreed + 1 if index == following != before else 0
        self.index, self.told = index, told
        return self.sigma_of(told)

    def expected(self, told: Any, is_next: bool | None) -> float | None:
        """The timestep that a model call is told, without waiting for the device.

        Of an entry of the scheduler's own list it is known which one it is; else by the scheduler's count. `is_next`
        says whether its branch was called in the evaluation that goes on; None is not known. Of a copy, and a scheduler
        that does not count its steps, it is supposed that they go on in order (`is_supposed`): see to it that this is
        right. None where nothing tells, or what told has not been right so far.
        """
        self.is_supposed = False
        if (entry := self._entry_in_memory(told)) is not None:
            return entry
        if self._agreed < AGREED or self.is_over or self.index is None:
            return None
        if (count := _count_of(self._scheduler)) is None:
            if not isinstance(told, Tensor) or is_next is None:
                return None  # a number is there to be read
            count, self.is_supposed = self.index + is_next, True
        if count == self.index and not is_next:
            return self.told
        return self._telling.told_at(count) if self.index < count < len(self._shares) else None

    def is_right(self, told: float) -> bool:
        """Whether this timestep, as it was read, is the step's that the run is at."""
        return self._index_of(told) == self.index

    def _entry_in_memory(self, told: Any) -> float | None:
        """The entry that a tensor shows, once or several times, if it lies in the scheduler's list itself."""
        own = self._timesteps
        if not isinstance(told, Tensor) or (told.dtype, told.device) != (own.dtype, own.device) or self.is_over:
            return None
        shows_one = not any(stride for size, stride in zip(told.shape, told.stride()) if size > 1)
        is_in_list = told.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
        if not (shows_one and is_in_list and told.numel() and self._written == _writings(own)):
            return None
        index, between = divmod(told.storage_offset() - own.storage_offset(), own.stride(0) or 1)
        return self._entries[index] if not between and 0 <= index < len(self._entries) else None

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


def _writings(tensor: Tensor) -> int:
    """How often it was written so far; in inference mode nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def number_in(timestep: Any) -> float:
    """A timestep as a number: of a tensor its largest, for there may be one for each row or token. Reads the device."""
    return max(timestep.detach().flatten().tolist()) if isinstance(timestep, Tensor) else float(timestep)
