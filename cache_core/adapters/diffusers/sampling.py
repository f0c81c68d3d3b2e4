"""One sampling run of a transformer of diffusers, as far as the calls of its model tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ...model.compiled import is_compiled, uncompiled
from ...model.hooks import HookRegistry
from ...run.alike import Decisions
from ...run.reading import SigmaReading, largest
from ...run.run import CacheRun
from .arguments import Arguments
from .grids import Shape, grid_of
from .guidance import GIVEN, WITHOUT, Apart
from .parallel import TokenSplits
from .prompts import Origin
from .steps import CountedSchedule, SchedulerSteps, number_in

PROMPTS_CHANGE = (
    "the prompt is another tensor at every step, so nothing can be reused: make it once, before the loop, or name the "
    'branch: with cache_context(model, "cond")'
)
DIVIDED = (
    "the negative prompt is not estimated: it and the prompt are computed in different processes, at the same time, so "
    "nothing would be gained; attention is cached in both"
)
MOST_NEW_PROMPTS = 3  # evaluations in a row


@dataclass
class Sampling:
    """One sampling run, as far as the calls of its model tell, and the evaluation it is at."""

    run: CacheRun
    schedule: CountedSchedule | SchedulerSteps
    estimates: bool  # the prediction without the prompt
    splits: TokenSplits  # where diffusers splits the tokens among ranks
    may_be_divided: bool = False  # the prompts, among ranks: the user named a group
    began: float = field(default_factory=time.perf_counter)
    is_running: bool = False  # the clock: from the first module that runs, loading left out
    is_timed: bool = True  # false where loading can't be told apart
    reading: SigmaReading | None = None  # of the evaluation that goes on
    called: dict[str, Origin | None] = field(default_factory=dict)  # branches, and their conditionings
    called_before: frozenset[str] = frozenset()  # branches of the evaluation before
    has_new_prompt: bool = False  # since the evaluation began: a branch without a name was new
    new_prompts: int = 0  # evaluations in a row with one
    unread: Tensor | None = None  # the timestep that a call is told, while it is only supposed
    given: Tensor | None = None  # the prediction with the prompt
    apart: Apart = field(default_factory=Apart)
    decisions: Decisions = field(init=False)  # of this rank and others
    grids: dict[torch.Size, Shape | None] = field(default_factory=dict)  # of packed latents, by their shape

    def __post_init__(self) -> None:
        self.decisions = Decisions(self.run.state.terms.ranks)

    def told(self) -> str:
        """The run is over: the line for the log, once its report is complete."""
        report = self.run.report
        report.steps = self.schedule.count
        report.close()
        self.decisions.tell(report)
        return report.line()

    @property
    def seconds(self) -> float:
        """Since the run began, loading left out. 0 where that can't be told."""
        return time.perf_counter() - self.began if self.is_timed else 0.0

    def begin_clock_in(self, hooks: HookRegistry, model: nn.Module) -> None:
        """Count from the first module inside the model that runs: what offloads the model loads it before that.

        In what is compiled as a whole a hook would make it compile anew. If accelerate loads that, nobody can tell.
        """
        if self.is_running:
            return
        if is_compiled(model):
            self.is_timed = not any(hasattr(each, "_hf_hook") for each in (model, uncompiled(model)))
            return
        for module in model.children():
            if not (isinstance(module, nn.ModuleList) or is_compiled(module)):
                hooks.add(module, self._begin_clock)

    def _begin_clock(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not self.is_running:
            self.is_running, self.began = True, time.perf_counter()
        return forward(*args, **kwargs)

    def grid_of(self, arguments: Arguments) -> Shape | None:
        """Frames, rows and columns of a packed latent; read once a run."""
        shape = arguments.latent.shape
        if shape not in self.grids:
            self.grids[shape] = grid_of(arguments)
        return self.grids[shape]

    def timestep_of(self, told: Any, branch: str) -> float:
        """The timestep that a call is told, read from the device only if need be, or later with what else is read."""
        is_known = branch in self.called or self.called.keys() | {branch} <= self.called_before
        expected = self.schedule.expected(told, branch in self.called if is_known else None)
        self.unread = told if self.schedule.is_supposed and expected is not None else None
        return number_in(told) if expected is None else expected

    def calls(self, branch: str, origin: Origin | None) -> None:
        """This branch is called, in the evaluation that goes on."""
        self.called[branch] = origin
        if self.unread is not None:
            self.run.again(partial(self.reading.suppose, self.unread, self.schedule.is_right))

    def is_at(self, timestep: float, branch: str) -> bool:
        """Whether a call belongs to the evaluation that goes on."""
        return self.reading is not None and self.schedule.is_at(timestep) and branch not in self.called

    def begin_evaluation(self, timestep: float, device: torch.device) -> None:
        """The next one, at this timestep."""
        if self.reading is None:
            self.run.state.terms.ranks.require_alike(self.run.state.terms.strategies, device)
        self.called_before, self.called, self.given = frozenset(self.called), {}, None
        self.new_prompts, self.has_new_prompt = self.new_prompts + 1 if self.has_new_prompt else 0, False
        if self.new_prompts == MOST_NEW_PROMPTS:
            self.run.report.note(PROMPTS_CHANGE)
        one_prompt = [{WITHOUT}, {GIVEN}] if self.may_be_divided else [{WITHOUT}]
        if self.estimates and self.called_before in one_prompt:
            self.run.report.note(DIVIDED)
        sigma = self.schedule.begin_evaluation(timestep)
        self.reading = self.run.again(lambda: self._read_at(sigma, device))
        self.run.begin_evaluation(self.reading)

    def _read_at(self, sigma: float, device: torch.device) -> SigmaReading:
        schedule, paths = self.schedule, self.run.state.paths
        if schedule.is_open and self.unread is not None:
            return SigmaReading(schedule.axis.sigma_on_device(largest(self.unread).to(device)), schedule, paths)
        return SigmaReading(torch.full((), sigma, device=device), schedule, paths, sigma)

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
