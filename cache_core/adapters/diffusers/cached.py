"""Strategies on a transformer of diffusers, whatever pipeline or loop calls it."""

from __future__ import annotations

import inspect
import logging
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
from ...run.reading import AnotherStep
from ...run.run import CacheRun
from ...strategy.tensors import copied
from .arguments import Arguments
from .configs import settings_of
from .grids import as_picture, on_grid
from .guidance import GIVEN, JOINED, WITHOUT, joined_output
from .parallel import TokenSplits, parallel_group
from .prompts import Origin, Prompts
from .room import free_away, free_on
from .sampling import Sampling, models_along
from .steps import NO_SCHEDULER, OTHER_SCHEDULER, SchedulerSteps, number_in, schedule_for

logger = logging.getLogger(__name__)

NO_TIMESTEP = "Refrain: %s is called without a timestep, so every call is computed."
SEVERAL_OUTPUTS = "the negative prompt is not estimated: the model gives more than one tensor"


class CachedModel:
    """Runs a model's forward passes with strategies, one `CacheRun` for each sampling run.

    Nobody says when a run begins. One does with the first call, after `reset()`, with which pipelines end, when the
    noise rises, when the scheduler was set up anew, when the first step comes again for another prompt, after an error,
    and where a scheduler that counts no steps goes on at another one than the next.
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
            sampling.begin_clock_in(beneath, self.model)
            with beneath, sampling.splits.resting():
                output = sampling.run.again(partial(self._output, sampling, branch, arguments))
            sampling.run.again(sampling.reading.settle)
        except AnotherStep:
            self._end()  # a call of a run of its own is computed
            return self.call(forward, args, kwargs, context)
        except BaseException as error:
            if (sampling := self._drop()) is not None:
                sampling.decisions.fail(error)
            raise
        sampling.run.report.seconds = sampling.seconds
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
        if (sampling := self._drop()) is not None:
            with sampling.run.telling():
                logger.info(sampling.told())

    def _drop(self) -> Sampling | None:
        sampling, self._sampling = self._sampling, None
        if sampling is not None:
            sampling.run.free()
        return sampling

    def _timestep(self, arguments: Arguments, context: CacheContext | None, branch: str) -> float | None:
        """The config's callback knows best, then the context, then the argument. May read the device."""
        sampling = self._sampling
        told = None if self.settings.timestep is None else self.settings.timestep()
        if told is None and context is not None:
            told = context.sigma if context.timestep is None else context.timestep
        told = arguments.timestep if told is None else told
        if told is None:
            self._say(NO_TIMESTEP, type(self.model).__name__)
            return None
        return number_in(told) if sampling is None else sampling.timestep_of(told, branch)

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
        sampling.calls(branch, origin)
        return sampling

    def _begin(self, timestep: float, rises: bool) -> Sampling:
        strategies = self.settings.strategies
        schedule = schedule_for(self.scheduler, timestep, rises)
        if schedule.is_open and any(getattr(strategy, "spacing", "") == "sigma" for strategy in strategies):
            self._say(NO_SCHEDULER) if self.scheduler is None else self._say(OTHER_SCHEDULER, timestep)
        group = self.group if self.group is not None else parallel_group(self.model)
        splits = TokenSplits(self.model)
        ranks = Ranks(group, splits.hooks, (WITHOUT,))
        run = CacheRun(strategies, schedule, ranks=ranks, free=free_on, free_away=free_away)
        estimates = run.state.terms.steps_in_at("guidance")
        self._sampling = Sampling(run, schedule, estimates, splits, may_be_divided=self.group is not None)
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
        latent, grid, guidance = arguments.latent, sampling.grid_of(arguments), sampling.run.call_guidance
        known = dict(sigma=sampling.reading.tensor, context=(WITHOUT, tuple(latent.shape)), label=WITHOUT)
        return on_grid(grid, partial(guidance, self.model, latent=as_picture(latent, grid), **known), predict)

    def _say(self, text: str, *values: Any) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)
