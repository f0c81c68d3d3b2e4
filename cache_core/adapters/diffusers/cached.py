"""Strategies on a transformer of diffusers, whatever pipeline or loop calls it."""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext
from torch import Tensor, nn

from ...model.hooks import HookRegistry
from ...model.structure import flattened
from ...report.report import Report
from ...run.ranks import Ranks
from ...run.reading import SigmaReading
from ...run.run import CacheRun
from ...strategy.tensors import copied
from .arguments import Arguments
from .configs import settings_of
from .guidance import GIVEN, JOINED, WITHOUT, Apart, joined_output
from .steps import CountedSchedule, SchedulerSteps, TimestepAxis, is_same, number_in, schedule_for

logger = logging.getLogger(__name__)

NO_TIMESTEP = "Refrain: %s is called without a timestep, so every call is computed."
NO_SCHEDULER = "Refrain: computed steps are spaced evenly, for the schedule is not known. Pass scheduler= to apply."
SEVERAL_OUTPUTS = "the negative prompt is not estimated: the model gives more than one tensor"


@dataclass
class Sampling:
    """One sampling run, as far as the calls of its model tell, and the evaluation it is at."""

    run: CacheRun
    axis: TimestepAxis
    schedule: CountedSchedule | SchedulerSteps
    began: float  # by the clock
    estimates: bool  # the prediction without the prompt
    sigma: float | None = None  # as the model is told it
    reading: SigmaReading | None = None  # as the schedule has it
    called: dict[str, weakref.ref | None] = field(default_factory=dict)  # branches, and their conditionings
    given: Tensor | None = None  # the prediction with the prompt
    apart: Apart = field(default_factory=Apart)


class CachedModel:
    """Runs a model's forward passes with strategies, one `CacheRun` for each sampling run.

    Nobody says when a run begins. One does with the first call, after `reset()`, with which pipelines end, when the
    noise rises, when the scheduler was set up anew, when the first step comes again for another prompt, after an error.
    """

    def __init__(self, model: nn.Module, strategies_or_config: Any, scheduler: Any = None, group: Any = None) -> None:
        self.model, self.scheduler, self.group = model, scheduler, group
        Ranks(group)  # complains now, not in the first forward pass
        self.settings = settings_of(model, strategies_or_config)
        self.report: Report | None = None  # of the run that is on, or of the last
        self._sampling: Sampling | None = None
        self._prompts: dict[str, weakref.ref] = {}  # branches of calls without a context: their conditionings
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._is_off = all(strategy.is_off for strategy in self.settings.strategies)
        self._said: set[str] = set()

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One forward pass of the model."""
        arguments = Arguments(args, kwargs, dict(zip(self._parameters, args)) | kwargs)
        timestep = None if self._is_off or arguments.wants_gradients else self._timestep(arguments, context)
        if timestep is None or not isfinite(timestep):
            return forward(*args, **kwargs)
        branch = self._branch_of(arguments.conditioning) if context is None else context.name
        beneath = HookRegistry()  # strategies step in around what lies behind our hook, not around hooks above it
        beneath.add(self.model, lambda _, *args, **kwargs: forward(*args, **kwargs))
        try:
            sampling = self._sampling_at(timestep, branch, arguments)
            with beneath:
                output = self._output(sampling, branch, arguments)
        except BaseException:
            self._drop()
            raise
        sampling.run.report.seconds = time.perf_counter() - sampling.began
        return output

    def reset(self) -> None:
        """The sampling run is over. Its report is complete, and nothing else is left of it."""
        self._end()
        self._prompts.clear()

    def _end(self) -> None:
        if self._sampling is not None:
            report = self._sampling.run.report
            report.steps = self._sampling.schedule.count
            self._drop()
            report.close()
            logger.info(report.line())

    def _drop(self) -> None:
        sampling, self._sampling = self._sampling, None
        if sampling is not None:
            sampling.run.free()

    def _timestep(self, arguments: Arguments, context: CacheContext | None) -> float | None:
        """The config's callback knows best, then the context, then the argument. Reads the device, once a call."""
        told = self.settings.timestep() if self.settings.timestep is not None else None
        if told is None and context is not None:
            told = context.sigma if context.timestep is None else context.timestep
        if told is None:
            told = arguments.timestep
        if told is None:
            self._say(NO_TIMESTEP, type(self.model).__name__)
        return None if told is None else number_in(told)

    def _branch_of(self, conditioning: Tensor | None) -> str:
        """A name for the branch that has this conditioning. Those whose conditioning is gone are forgotten."""
        for branch in [branch for branch, known in self._prompts.items() if known() is None]:
            del self._prompts[branch]
            if self._sampling is not None:
                self._sampling.run.forget(branch)
        if conditioning is None:
            return "prompt"
        for branch, known in self._prompts.items():
            if known() is conditioning:
                return branch
        numbers = (f"prompt {number}" for number in range(1, len(self._prompts) + 2))
        branch = next(name for name in numbers if name not in self._prompts)
        self._prompts[branch] = weakref.ref(conditioning)
        return branch

    def _sampling_at(self, timestep: float, branch: str, arguments: Arguments) -> Sampling:
        """The run that this call belongs to, at its evaluation."""
        sampling, conditioning = self._sampling, arguments.conditioning
        if sampling is None or _is_over(sampling, sampling.axis.sigma_of(timestep), branch, conditioning):
            self._end()
            sampling = self._begin(timestep)
        sigma = sampling.axis.sigma_of(timestep)
        if sampling.sigma is None or not is_same(sigma, sampling.sigma) or branch in sampling.called:
            known = sampling.schedule.begin_evaluation(sigma)
            sampling.sigma, sampling.called, sampling.given = sigma, {}, None
            at = torch.full((), known, device=arguments.latent.device)
            sampling.reading = SigmaReading(at, sampling.schedule, sampling.run.state.paths, known)
            sampling.run.begin_evaluation(sampling.reading)
        sampling.called[branch] = None if conditioning is None else weakref.ref(conditioning)
        return sampling

    def _begin(self, timestep: float) -> Sampling:
        axis, strategies = TimestepAxis(timestep), self.settings.strategies
        schedule = schedule_for(self.scheduler, axis.sigma_of(timestep))
        if schedule.is_open and any(getattr(strategy, "spacing", "") == "sigma" for strategy in strategies):
            self._say(NO_SCHEDULER)
        group = self.group if self.group is not None else context_parallel_group(self.model)
        run = CacheRun(strategies, schedule, ranks=Ranks(group))
        self._sampling = Sampling(run, axis, schedule, time.perf_counter(), run.steps_in_at("guidance"))
        self.report = run.report
        return self._sampling

    def _output(self, sampling: Sampling, branch: str, arguments: Arguments) -> Any:
        through, guided = partial(self._through, sampling), partial(self._guided, sampling, arguments)
        if sampling.estimates and branch == WITHOUT and sampling.given is not None:
            return sampling.apart.output(partial(through, (WITHOUT,), arguments), guided, sampling.given)
        is_joined = branch == JOINED or (self.settings.is_joined and branch not in (GIVEN, WITHOUT))
        branches = (WITHOUT, GIVEN) if is_joined and arguments.latent.shape[0] % 2 == 0 else (branch,)
        if sampling.estimates and len(branches) > 1:
            output = joined_output(through, guided, arguments, self.settings.joined_arguments)
        else:
            output = through(branches, arguments)
        if sampling.estimates and len(flattened(output)[0]) > 1:
            sampling.estimates = False
            sampling.run.report.note(SEVERAL_OUTPUTS)
        if sampling.estimates and branch == GIVEN:
            (sampling.given,) = copied(flattened(output)[0])
        return output

    def _through(self, sampling: Sampling, branches: tuple[str, ...], arguments: Arguments) -> Any:
        """One call of the model."""
        forward = partial(self._forward, arguments)
        return sampling.run.call_model(self.model, forward, sampling.reading.tensor, branches)

    def _forward(self, arguments: Arguments) -> Any:
        return self.model.forward(*arguments.args, **arguments.kwargs)  # as strategies have it, while they step in

    def _guided(self, sampling: Sampling, arguments: Arguments, predict: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """The predictions with the prompt and without: the model's own, or what stands in."""
        context = (WITHOUT, tuple(arguments.latent.shape))
        return sampling.run.call_guidance(self.model, predict, sampling.reading.tensor, context, WITHOUT)

    def _say(self, text: str, *values: Any) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)


def context_parallel_group(model: nn.Module) -> Any:
    """The ranks among which diffusers splits the tokens, if `model.enable_parallelism` was called for that."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    return None if config is None else config._flattened_mesh.get_group()


def _is_over(sampling: Sampling, sigma: float, branch: str, conditioning: Tensor | None) -> bool:
    """Whether a call at this sigma can't belong to this run."""
    if isinstance(sampling.schedule, SchedulerSteps) and sampling.schedule.is_over:
        return True
    if not is_same(sigma, sampling.sigma):
        return sigma > sampling.sigma
    before = sampling.called.get(branch)
    return sampling.run.state.evaluation.number == 1 and before is not None and before() is not conditioning
