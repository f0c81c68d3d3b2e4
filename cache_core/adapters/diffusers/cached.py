"""Strategies on a transformer of diffusers, whatever pipeline or loop calls it."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from copy import deepcopy
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
from ...run.run import CacheRun
from ...strategy.tensors import copied
from .arguments import Arguments
from .configs import settings_of
from .guidance import GIVEN, JOINED, WITHOUT, joined_output
from .parallel import context_parallel_group
from .prompts import Origin, Prompts
from .sampling import Sampling, models_along
from .steps import SchedulerSteps, number_in, schedule_for

logger = logging.getLogger(__name__)

NO_TIMESTEP = "Refrain: %s is called without a timestep, so every call is computed."
NO_SCHEDULER = "Refrain: computed steps are spaced evenly, for the schedule is not known. Pass scheduler= to apply."
OTHER_SCHEDULER = (
    "Refrain: the model's first timestep %g is none of those of the scheduler that was passed, so the schedule is not "
    "known and computed steps are spaced evenly. Pass the scheduler that the pipeline steps with."
)
SEVERAL_OUTPUTS = "the negative prompt is not estimated: the model gives more than one tensor"


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
        self._ended: SchedulerSteps | None = None  # of a run that ended by itself, with its last step
        self._prompts = Prompts()
        self._parameters = tuple(inspect.signature(model.forward).parameters)
        self._is_off = all(strategy.is_off for strategy in self.settings.strategies)
        self._said: set[str] = set()
        if scheduler is not None:
            models_along(scheduler).add(self)

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One forward pass of the model."""
        named = dict(zip(self._parameters, args)) | kwargs
        named = {name: named[name] for name in self._parameters if name in named} | named
        arguments = Arguments(args, kwargs, named)
        if self._is_off or arguments.wants_gradients:
            return forward(*args, **kwargs)
        conditioning = arguments.conditioning
        origin = None if conditioning is None else Origin(conditioning)
        branch = self._branch_of(origin) if context is None else context.name
        timestep = self._timestep(arguments, context, branch)
        if timestep is None or not isfinite(timestep) or self._is_after_the_end(timestep):
            return forward(*args, **kwargs)
        beneath = HookRegistry()  # strategies step in around what lies behind our hook, not around hooks above it
        beneath.add(self.model, lambda _, *args, **kwargs: forward(*args, **kwargs))
        try:
            sampling = self._sampling_at(timestep, branch, origin, arguments.latent.device)
            with beneath:
                output = self._output(sampling, branch, arguments)
        except BaseException:
            self._drop()
            raise
        sampling.run.report.seconds = time.perf_counter() - sampling.began
        if sampling.is_complete:
            self._end()
            self._ended = sampling.schedule
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedModel:
        """For a copy of the model, on the same scheduler, with nothing done yet."""
        return CachedModel(deepcopy(self.model, memo), self.settings, self.scheduler, self.group)

    def reset(self) -> None:
        """The sampling run is over. Its report is complete, and nothing else is left of it."""
        self._end()
        self._ended = None
        self._prompts.clear()

    def _is_after_the_end(self, timestep: float) -> bool:
        """Whether a call is one more of the last step of a run that seemed to be complete."""
        ended = self._ended
        return self._sampling is None and ended is not None and not ended.is_over and ended.is_at(timestep)

    def end_if_left_behind(self, other: Sampling) -> None:
        """End the run if another model's on the same scheduler goes on without it, as Wan 2.2's second expert does."""
        if self._sampling is not None and self._sampling.is_left_behind(other):
            self._end()

    def _end(self) -> None:
        if self._sampling is not None:
            run = self._sampling.run
            run.report.steps = self._sampling.schedule.count
            self._drop()
            with run.telling():
                run.report.close()
                logger.info(run.report.line())

    def _drop(self) -> None:
        sampling, self._sampling = self._sampling, None
        if sampling is not None:
            sampling.run.free()

    def _timestep(self, arguments: Arguments, context: CacheContext | None, branch: str) -> float | None:
        """The config's callback knows best, then the context, then the argument. May read the device."""
        sampling = self._sampling
        told = None if self.settings.timestep is None else self.settings.timestep()
        if told is None and context is not None:
            told = context.sigma if context.timestep is None else context.timestep
        if told is None:
            told = arguments.timestep
        if told is None:
            self._say(NO_TIMESTEP, type(self.model).__name__)
            return None
        expected = None if sampling is None else sampling.schedule.expected(branch in sampling.called)
        return number_in(told) if expected is None else expected

    def _branch_of(self, origin: Origin | None) -> str:
        """A name for the branch that has this conditioning. Those whose conditioning is gone are forgotten."""
        sampling = self._sampling
        for branch in self._prompts.take_gone():
            if sampling is not None:
                sampling.run.forget(branch)
        branch, is_new = self._prompts.name_of(origin)
        if sampling is not None and is_new:
            sampling.has_new_prompt = True
        return branch

    def _sampling_at(self, timestep: float, branch: str, origin: Origin | None, device: torch.device) -> Sampling:
        """The run that this call belongs to, at its evaluation."""
        sampling = self._sampling
        if sampling is None or sampling.is_over(timestep, branch, origin):
            rises = sampling is not None and sampling.rose_at_once(timestep, branch, origin)
            self._end()
            sampling = self._begin(timestep, rises)
        if not sampling.is_at(timestep, branch):
            sampling.begin_evaluation(timestep, device)
            if self.scheduler is not None:
                for other in models_along(self.scheduler) - {self}:
                    other.end_if_left_behind(sampling)
        sampling.called[branch] = origin
        return sampling

    def _begin(self, timestep: float, rises: bool) -> Sampling:
        strategies = self.settings.strategies
        schedule = schedule_for(self.scheduler, timestep, rises)
        if schedule.is_open and any(getattr(strategy, "spacing", "") == "sigma" for strategy in strategies):
            self._say(NO_SCHEDULER) if self.scheduler is None else self._say(OTHER_SCHEDULER, timestep)
        group = self.group if self.group is not None else context_parallel_group(self.model)
        run = CacheRun(strategies, schedule, ranks=Ranks(group))
        self._sampling = Sampling(run, schedule, time.perf_counter(), run.steps_in_at("guidance"))
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
        return sampling.run.call_model(self.model, forward, sampling.reading.tensor, branches, latent=arguments.latent)

    def _forward(self, arguments: Arguments) -> Any:
        return self.model.forward(*arguments.args, **arguments.kwargs)  # as strategies have it, while they step in

    def _guided(self, sampling: Sampling, arguments: Arguments, predict: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """The predictions with the prompt and without: the model's own, or what stands in."""
        context = (WITHOUT, tuple(arguments.latent.shape))
        sigma = sampling.reading.tensor
        return sampling.run.call_guidance(self.model, predict, sigma, context, WITHOUT, arguments.latent)

    def _say(self, text: str, *values: Any) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)
