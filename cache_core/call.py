"""One model call on its way through the strategies."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .attention import Kind, kind_of
from .discovery import Lesson
from .features import Layout, Structure, is_feature, relative_error
from .hooks import HookRegistry
from .report import CallRecord, Stopwatch
from .sites import BlockStack, Branches, Rehearsal, at_guidance, at_module, keep_passages
from .step import Schedule, Step
from .strategy import GUIDANCE, Site

if TYPE_CHECKING:
    from .run import CacheRun

_SHAPES_DO_NOT_FIT = (RuntimeError, ValueError, LookupError, TypeError)  # what a misread plan makes a model raise
MOST_REHEARSAL_ERROR = 0.01  # of the output's norm: a plan read right gives 0 but for kernels that vary


class SigmaReading:
    """A sigma on the device, and its value once that has been read, or where it is known already."""

    def __init__(self, sigma: Tensor, value: float | None = None) -> None:
        self.tensor = sigma.detach().to(torch.float32).max()
        self._value = value

    @property
    def value(self) -> float:
        """Waits for the device the first time."""
        if self._value is None:
            self._value = self.tensor.item()
        return self._value

    def read_with(self, other: Tensor) -> float:
        """Another number's value; the sigma is read in the same transfer."""
        if self._value is not None:
            return other.item()
        value, self._value = torch.stack((other.to(self.tensor), self.tensor)).tolist()
        return value


class ModelCall:
    """One forward pass of the model, for one branch or several joined in a batch."""

    def __init__(self, run: CacheRun, model: nn.Module, sigma: SigmaReading, contexts: tuple[Hashable, ...]) -> None:
        self.run, self.model, self.sigma, self.contexts = run, model, sigma, contexts
        self.plan = run.plan_of(model)
        self.watch = Stopwatch(sigma.tensor.device)
        self._running: list[str] = []  # the blocks that run now, by name, outermost first
        self._is_inside_attention = False
        self._turns: dict[tuple[int, str], int] = {}
        self.visits: list[Visit] = []
        self.kept_something = False

    @property
    def step(self) -> Step:
        """Where in the schedule this call is. Waits for the device the first time."""
        return self.run.schedule.step_at(self.sigma.value)

    def measured(self, number: int, site: Site, measure: Callable[[Tensor], Tensor]) -> float:
        """The evaluation's measure at this site, read together with the sigma so that the device is waited for once."""
        measures = self.run.evaluation.measures
        if (number, site) not in measures:
            value = measure(self.run.schedule.time_of(self.sigma.tensor))
            measures[number, site] = self.sigma.read_with(value)
        return measures[number, site]

    def through(self, forward: Callable[[], Any]) -> Any:
        """Run the model's own forward with every strategy stepping in where it belongs."""
        hooks, stacks = HookRegistry(), []
        lesson = Lesson(self.model, self.run.methods) if self.run.must_learn(self.model) else None
        for number, strategy in enumerate(self.run.strategies):
            if "model" in strategy.levels and self.plan.chains:
                stacks.append(stack := BlockStack(self.visit(number, Site("model", "")), self.plan))
                hooks.extend(self._along(stack))
            elif "output" in strategy.levels or ("model" in strategy.levels and lesson is None):
                hooks.add(self.model, self._at(number, Site("output", "")))
            for module, site in self.run.places(number, self.model):
                hooks.add(module, self._at(number, site))
        if self.run.steps_in_at("attention"):
            for name, block in self.run.blocks_of(self.model).items():
                hooks.add(block, self._naming(name))
        returned: list[Any] = []
        if lesson is not None:
            hooks.extend(lesson.watching())
            hooks.add(self.model, _noting_returns(returned))
        with hooks:
            output = forward()
        if lesson is not None:
            self._learn(lesson, forward, returned)
        misled = [stack for stack in stacks if not stack.end() and stack.answers is not None]
        if misled:
            self._give_up()
            self.run.report.note("the model did not run its blocks as learned; such calls are computed again")
            return forward()
        return output

    def attention(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """One attention operation. It is a site where no attention module is around it."""
        if not self._running or self._is_inside_attention:
            return forward(*args, **kwargs)
        site = Site("attention", self._running[-1], kind=_kind_of_operation(self._running[-1], args))
        for number, strategy in enumerate(self.run.strategies):
            if "attention" in strategy.levels and strategy.steps_in_at(site):
                forward = partial(self._at(number, site), forward)
        return forward(*args, **kwargs)

    def guided(self, predict: Callable[[bool, bool], tuple]) -> tuple[tuple[Tensor, Tensor], bool]:
        """Both noise predictions of one evaluation, and whether a strategy stood in for the one without the prompt."""
        evaluation = self.run.evaluation
        visit = self.visit(self.run.number_at_guidance, GUIDANCE)

        def noting_branches(conditional: bool, unconditional: bool) -> tuple:
            evaluation.without_unconditional = not unconditional
            evaluation.all_compute |= unconditional and self.run.previous.without_unconditional
            return predict(conditional, unconditional)

        predictions = at_guidance(visit, noting_branches)
        return predictions, visit.was_answered

    def _learn(self, lesson: Lesson, forward: Callable[[], Any], computed: list[Any]) -> None:
        """The first call of a run: what it taught is put to the test, and what it computed is kept."""
        self.plan = lesson.plan()
        if self.plan.chains and self.run.steps_in_at("model"):
            error = self._rehearsed(lesson, forward, computed)
            if error > MOST_REHEARSAL_ERROR:
                self.plan = self.run.not_learned(self.model, error)
                return
        self.run.learned(self.model, self.plan)
        passages = [lesson.passage(chain) for chain in self.plan.chains]
        for number, strategy in enumerate(self.run.strategies):
            if "model" in strategy.levels and passages:
                keep_passages(self.visit(number, Site("model", "")), self.plan, passages)

    def _rehearsed(self, lesson: Lesson, forward: Callable[[], Any], computed: list[Any]) -> float:
        """Put the plan to the test, and drop the chains that must not be in it. The relative error of what is left.

        If there are several chains, the first must see the latent: with another latent, something else must enter it.
        Otherwise it encodes the prompt, say, and would not change from step to step. Then the blocks that were just
        computed are left out, and the model must return the same. A plan that was misread would make every reused call
        a wrong picture. Costs embedding, head and what else of the model always runs, once or twice a run, and waits
        for the device.
        """
        while len(self.plan.chains) > 1 and self._rehearsal(lesson, forward, _with_another_latent).saw_the_same:
            self.plan = self.plan.without([self.plan.chains[0]], "it does not see the latent")
        plan, error = self.plan, inf
        returning_more = [chain for chain in plan.chains if chain.has_extras]
        simpler = plan.without(returning_more, "its blocks return more than they pass on")
        for self.plan in (plan, replace(plan, runs_first=True), *([simpler] if returning_more else [])):
            if self.plan.chains and (error := self._rehearsal_error(lesson, forward, computed)) <= MOST_REHEARSAL_ERROR:
                break
        return error

    def _rehearsal_error(self, lesson: Lesson, forward: Callable[[], Any], computed: list[Any]) -> float:
        returned: list[Any] = []
        rehearsal = self._rehearsal(lesson, forward, _noting_returns(returned))
        if rehearsal.misled:
            chains = [self.plan.chains[chain] for chain in sorted(rehearsal.misled)]
            self.plan = self.plan.without(chains, "it begins amid blocks that are skipped, and takes what they give")
            return self._rehearsal_error(lesson, forward, computed)
        return relative_error(returned, computed) if rehearsal.is_as_learned else inf

    def _rehearsal(self, lesson: Lesson, forward: Callable[[], Any], around_model: Callable[..., Any]) -> Rehearsal:
        rehearsal = Rehearsal(self.plan, [lesson.passage(chain) for chain in self.plan.chains])
        hooks = self._along(rehearsal)
        hooks.add(self.model, around_model)
        with hooks:
            try:
                forward()
            except _SHAPES_DO_NOT_FIT:
                rehearsal.is_as_learned = False
        return rehearsal

    def _give_up(self) -> None:
        self.run.forget(self.contexts)
        self.visits = []

    def _along(self, stack: BlockStack | Rehearsal) -> HookRegistry:
        hooks = HookRegistry()
        for chain, members in enumerate(self.plan.chains):
            for index, block in enumerate(members.blocks):
                hooks.add(block, _handing_over(partial(stack.block, chain, index)), members.methods[index])
        return hooks

    def visit(self, number: int, site: Site) -> Visit:
        """This strategy at this site, in this call."""
        turn = self._turns.get((number, site.name), 0)
        self._turns[number, site.name] = turn + 1
        self.visits.append(visit := Visit(self, number, replace(site, turn=turn)))
        return visit

    def record(self, labels: tuple[str, ...]) -> CallRecord:
        """What this call did, for the report."""
        total = sum(visit.units for visit in self.visits)
        answers = [visit for visit in self.visits if visit.was_answered]
        told = next((call for visit in answers or self.visits for call in visit.calls), None)
        learning = self.run.evaluation.is_learning
        return CallRecord(
            step_of_call=partial(_step_at, self.run.schedule, self.sigma),
            branches=labels,
            action="computed" if not answers else "forecast" if told.order else "reused",
            reason="learning the model's blocks" if learning else told.reason if told else "nothing is cached in it",
            measure=told.measure if told else None,
            computed_share=sum(visit.units_computed for visit in self.visits) / total if total else 1.0,
            watch=self.watch,
            evaluation=self.run.evaluation.number,
        )

    def _at(self, number: int, site: Site) -> Callable[..., Any]:
        is_passing = not self.run.strategies[number].steps_in_at(site)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outer = self._is_inside_attention
            self._is_inside_attention |= site.level == "attention"
            try:
                if is_passing:
                    return forward(*args, **kwargs)
                return at_module(self.visit(number, site), forward, args, kwargs)
            finally:
                self._is_inside_attention = outer

        return around

    def _naming(self, block: str) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._running.append(block)
            try:
                return forward(*args, **kwargs)
            finally:
                self._running.pop()

        return around


class Visit:
    """One strategy at one site in one model call: the way from its branches to their memories and to the report."""

    def __init__(self, call: ModelCall, number: int, site: Site) -> None:
        self.call, self.number, self.site = call, number, site
        self.calls: list[BranchCall] = []
        self.was_answered = False
        self.units = call.plan.block_count if site.level == "model" else 1
        self.units_computed = self.units if self.is_barred else 0
        self._contexts = call.contexts

    @property
    def branch_count(self) -> int:
        return len(self._contexts)

    def take_as_one(self) -> None:
        """The branches can't be told apart in the features here: together they are one."""
        self._contexts = (self._contexts,)

    @property
    def structure(self) -> Structure:
        """What this site's module returned around its tensors when it was last computed, for the first branch."""
        return self._memories[0].structure

    def branches(self, layout: Layout) -> Branches:
        """The strategy, started once for each branch with that branch's state.

        `layout` is the shapes of each branch's inputs here; features kept from others can't be used.
        """
        run, strategy = self.call.run, self.call.run.strategies[self.number]
        self._layout = layout
        self._memories = [run.memory(context, self.number, self.site) for context in self._contexts]
        if any(memory.layout != layout for memory in self._memories):
            run.evaluation.must_compute.add(self.number)
        may_reuse = self.number not in run.evaluation.must_compute and not run.evaluation.all_compute
        self.calls = [BranchCall(self.call, self.number, self.site, may_reuse) for _ in self._memories]
        arounds = [strategy.around(call, memory.state) for call, memory in zip(self.calls, self._memories)]
        return Branches(arounds, may_reuse)

    @property
    def is_barred(self) -> bool:
        """Whether the strategy is kept out here."""
        return (self.number, self.site) in self.call.run.barred

    def bar(self) -> None:
        """What this site gives can't be kept: keep the strategy out from now on, so that it may reuse elsewhere."""
        self.call.run.barred.add((self.number, self.site))
        self.note(f"{self.site.name or 'the model'} always runs: it returns something that can't be kept")

    def answered(self) -> None:
        """The strategy stands in for this site."""
        self.was_answered = True

    def kept(self, structure: Structure | None = None) -> None:
        """The site was computed and the branches have what they wanted of it."""
        for memory in self._memories:
            memory.layout, memory.structure = self._layout, structure
        self.call.kept_something = True

    def unit_computed(self) -> None:
        """A block of the stack, or the module, was computed."""
        self.units_computed = min(self.units_computed + 1, self.units)

    def note(self, text: str) -> None:
        """Say something in the report, once."""
        self.call.run.report.note(text)


@dataclass
class BranchCall:
    """See `strategy.Call`."""

    model_call: ModelCall
    number: int
    site: Site
    may_reuse: bool
    reason: str = "nothing to reuse yet"
    measure: float | None = None
    order: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.model_call.run.schedule

    @property
    def step(self) -> Step:
        return self.model_call.step

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        return self.model_call.measured(self.number, self.site, measure)

    def note(self, text: str) -> None:
        self.model_call.run.report.note(text)


def _handing_over(stand_in: Callable[..., Any]) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return stand_in(forward, args, kwargs)

    return around


def _with_another_latent(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model, given something else for its first argument."""

    def other(leaf: Any) -> Any:
        return 0.7 * leaf.flip(-1) + 0.1 if is_feature(leaf) else leaf

    if args:
        return forward(tree_map(other, args[0]), *args[1:], **kwargs)
    first = next(iter(kwargs), None)
    return forward(**{name: tree_map(other, value) if name == first else value for name, value in kwargs.items()})


def _noting_returns(returned: list[Any]) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        returned.append(forward(*args, **kwargs))
        return returned[-1]

    return around


def _kind_of_operation(block: str, args: tuple) -> Kind:
    """The kind of attention(query, key, value, ...), each (rows, tokens, ...) or (rows, heads, tokens, channels)."""
    query, key = args[:2]
    return "cross" if query.shape[-2] != key.shape[-2] else kind_of(block)


def _step_at(schedule: Schedule, sigma: SigmaReading) -> Step:
    return schedule.step_at(sigma.value)
