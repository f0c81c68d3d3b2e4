"""One sampling run of a transformer of diffusers, as far as the calls of its model tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from ...run.reading import SigmaReading
from ...run.run import CacheRun
from .guidance import Apart
from .prompts import Origin
from .steps import CountedSchedule, SchedulerSteps

PROMPTS_CHANGE = (
    "the prompt is another tensor at every step, so nothing can be reused: make it once, before the loop, or name the "
    'branch: with cache_context(model, "cond")'
)
MOST_NEW_PROMPTS = 3  # evaluations in a row


@dataclass
class Sampling:
    """One sampling run, as far as the calls of its model tell, and the evaluation it is at."""

    run: CacheRun
    schedule: CountedSchedule | SchedulerSteps
    began: float  # by the clock
    estimates: bool  # the prediction without the prompt
    reading: SigmaReading | None = None  # of the evaluation that goes on
    called: dict[str, Origin | None] = field(default_factory=dict)  # branches, and their conditionings
    called_before: frozenset[str] = frozenset()  # branches of the evaluation before
    has_new_prompt: bool = False  # since the evaluation began: a branch without a name was new
    new_prompts: int = 0  # evaluations in a row with one
    given: Tensor | None = None  # the prediction with the prompt
    apart: Apart = field(default_factory=Apart)

    def is_at(self, timestep: float, branch: str) -> bool:
        """Whether a call belongs to the evaluation that goes on."""
        return self.reading is not None and self.schedule.is_at(timestep) and branch not in self.called

    def begin_evaluation(self, timestep: float, device: torch.device) -> None:
        """The next one, at this timestep."""
        self.called_before, self.called, self.given = frozenset(self.called), {}, None
        self.new_prompts, self.has_new_prompt = self.new_prompts + 1 if self.has_new_prompt else 0, False
        if self.new_prompts == MOST_NEW_PROMPTS:
            self.run.report.note(PROMPTS_CHANGE)
        sigma = self.schedule.begin_evaluation(timestep)
        self.reading = SigmaReading(torch.full((), sigma, device=device), self.schedule, self.run.state.paths, sigma)
        self.run.begin_evaluation(self.reading)

    @property
    def is_complete(self) -> bool:
        """Whether this was its last call: of the last step, with all branches of the one before."""
        is_last = self.schedule.is_at_last and not (self.has_new_prompt or self.new_prompts)
        return is_last and bool(self.called_before) and self.called_before <= self.called.keys()

    def is_over(self, timestep: float, branch: str, origin: Origin | None) -> bool:
        """Whether a call can't belong to this run any more."""
        if self.schedule.is_over or not self.schedule.holds(timestep):
            return True
        if not self.schedule.is_at(timestep):
            return self.schedule.sigma_of(timestep) > self.reading.value
        before = self.called.get(branch)
        return self.run.state.evaluation.number == 1 and before is not None and before != origin

    def rose_at_once(self, timestep: float, branch: str, origin: Origin | None) -> bool:
        """Whether the second evaluation has the higher timestep: then they rise through the run."""
        is_second = self.run.state.evaluation.number == 1 and self.called.get(branch) == origin
        return self.schedule.is_open and is_second and timestep > self.schedule.told

    def is_left_behind(self, other: Sampling) -> bool:
        """Whether another run on the same scheduler has been more than a step further on."""
        if self.schedule.is_open or other.schedule.is_open or None in (self.schedule.index, other.schedule.index):
            return False
        return self.schedule.is_over or self.schedule.index < other.schedule.index - 1


_ALONG: WeakKeyDictionary[Any, WeakSet] = WeakKeyDictionary()  # schedulers outlive models, and models schedulers


def models_along(scheduler: Any) -> WeakSet:
    """The cached models that are called along a scheduler. It tells none of them when another takes over."""
    return _ALONG.setdefault(scheduler, WeakSet())
