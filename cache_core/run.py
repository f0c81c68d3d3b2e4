"""One sampling run: what each branch of the prompt remembers, and the model calls that pass through."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .discovery import BlockPlan, Lesson
from .features import Layout, Structure, bytes_held, relative_error
from .hooks import HookRegistry
from .report import CallRecord, Report, Stopwatch
from .sites import BlockStack, Branches, Rehearsal, at_module
from .step import Schedule, Step
from .strategy import Site, Strategy

MOST_REHEARSAL_ERROR = 0.01  # of the output's norm: a plan read right gives 0 but for kernels that vary


@dataclass
class Memory:
    """What one branch keeps at one site."""

    state: Any
    layout: Layout | None = None  # shapes of the inputs of the call that was kept last; None before the first
    structure: Structure | None = None  # what its output held besides tensors, at a module


@dataclass
class Evaluation:
    """One evaluation of the noise prediction: the model calls, one or several, of all branches at one point."""

    seen: dict[Hashable, int] = field(default_factory=dict)  # how often each context was called
    measures: dict[tuple[int, Site], float] = field(default_factory=dict)  # taken by the first branch, for all
    is_learning: bool = False  # the block plan is being learned: nothing is cached
    must_compute: set[int] = field(default_factory=set)  # strategies one of whose branches has nothing to reuse


class CacheRun:
    """Carries strategies through one sampling run. Make a new one for each run; drop it afterwards.

    run = CacheRun([FirstBlockCache()], Schedule(sigmas))
    run.begin_evaluation()
    output = run.call_model(model, lambda: model(latent, sigma), sigma, contexts=["negative", "positive"])
    """

    def __init__(self, strategies: Sequence[Strategy], schedule: Schedule) -> None:
        self.strategies = tuple(strategy for strategy in strategies if not strategy.is_off)
        self.schedule = schedule
        self.report = Report(strategies=tuple(strategies), steps=schedule.count)
        self.evaluation = Evaluation()
        self.memories: dict[tuple[Hashable, int, Site], Memory] = {}
        self._plans: dict[nn.Module, BlockPlan] = {}
        self.rehearsed: set[nn.Module] = set()  # models whose plan was seen to be right
        self._places: dict[tuple[int, nn.Module], dict[str, nn.Module]] = {}

    def begin_evaluation(self) -> None:
        """The sampler asks for the noise prediction once more."""
        self.evaluation = Evaluation()

    def call_model(
        self,
        model: nn.Module,
        forward: Callable[[], Any],
        sigma: Tensor,
        contexts: Sequence[Hashable],
        labels: Sequence[str] = (),
    ) -> Any:
        """Run `forward`, which calls `model` once, with the strategies in place. Returns what `forward` returns.

        `contexts` says whose forward pass this is, one key for each branch joined along the batch axis; whatever makes
        old features unusable (another prompt, window, shape, model instance) belongs into the key. `labels` names the
        branches in the report.
        """
        watch = Stopwatch(sigma.device)
        call = ModelCall(self, model, sigma, self._own_contexts(contexts))
        with watch:
            output = self._learn(model, forward) if self._is_learning(model) else call.through(forward)
        self.report.add(call.record(tuple(labels or map(str, contexts)), watch))
        if call.kept_something:
            self.report.held(bytes_held([memory.state for memory in self.memories.values()]))
        return output

    def free(self) -> None:
        """Drop everything kept. The report stays."""
        self.memories.clear()
        self._plans.clear()
        self.rehearsed.clear()
        self._places.clear()
        self.begin_evaluation()

    def plan_of(self, model: nn.Module) -> BlockPlan:
        """The model's chains of blocks, as far as they are known."""
        return self._plans.get(model, BlockPlan())

    def refuse_plan(self, model: nn.Module, why: str) -> None:
        """The chains of this model were misread: it has none from here on."""
        self._plans[model] = BlockPlan()
        self._places.clear()
        self.report.note(f"the model's blocks could not be read ({why}), so they always run")

    def places(self, number: int, model: nn.Module) -> dict[str, nn.Module]:
        """The modules at which strategy `number` steps in on its own, by name: blocks, or modules inside them."""
        if (number, model) not in self._places:
            strategy, plan = self.strategies[number], self.plan_of(model)
            places = {name: block for chain in plan.chains for name, block in zip(chain.names, chain.blocks)}
            if strategy.level == "module":
                places = _modules_inside(places, strategy)
            if not places:
                self.report.note(
                    f"no chain of blocks was found in this model, so level {strategy.level} has nothing to cache"
                )
            self._places[number, model] = places
        return self._places[number, model]

    def _own_contexts(self, contexts: Sequence[Hashable]) -> tuple[Hashable, ...]:
        """Apart from other calls of the same branch in this evaluation, such as a guidance's second look."""
        own = []
        for context in contexts:
            turn = self.evaluation.seen.get(context, 0)
            self.evaluation.seen[context] = turn + 1
            own.append((context, turn))
        return tuple(own)

    def _is_learning(self, model: nn.Module) -> bool:
        if any(strategy.level != "output" for strategy in self.strategies) and model not in self._plans:
            self.evaluation.is_learning = True
        return self.evaluation.is_learning

    def _learn(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        if model in self._plans:
            return forward()
        lesson = Lesson(model)
        with lesson.watching():
            output = forward()
        plan = self._plans[model] = lesson.plan()
        self.report.blocks = str(plan)
        for note in plan.notes:
            self.report.note(note)
        return output


class SigmaReading:
    """A sigma on the device, and its value once that has been read."""

    def __init__(self, sigma: Tensor) -> None:
        self.tensor = sigma.detach().to(torch.float32).max()
        self._value: float | None = None

    @property
    def value(self) -> float:
        """Waits for the device the first time."""
        if self._value is None:
            self._value = self.tensor.item()
        return self._value

    def read_with(self, other: Tensor) -> float:
        """Another number's value; the sigma is read in the same transfer."""
        value, self._value = torch.stack((other.to(self.tensor), self.tensor)).tolist()
        return value


class ModelCall:
    """One forward pass of the model, for one branch or several joined in a batch."""

    def __init__(self, run: CacheRun, model: nn.Module, sigma: Tensor, contexts: tuple[Hashable, ...]) -> None:
        self.run, self.model, self.contexts = run, model, contexts
        self.plan = run.plan_of(model)
        self._sigma = SigmaReading(sigma)
        self._turns: dict[tuple[int, str], int] = {}
        self.visits: list[Visit] = []
        self.kept_something = False

    @property
    def step(self) -> Step:
        """Where in the schedule this call is. Waits for the device the first time."""
        return self.run.schedule.step_at(self._sigma.value)

    def measured(self, number: int, site: Site, measure: Callable[[Tensor], Tensor]) -> float:
        """The evaluation's measure at this site, read together with the sigma so that the device is waited for once."""
        measures = self.run.evaluation.measures
        if (number, site) not in measures:
            value = measure(self.run.schedule.time_of(self._sigma.tensor))
            measures[number, site] = self._sigma.read_with(value)
        return measures[number, site]

    def through(self, forward: Callable[[], Any]) -> Any:
        """Run the model's own forward with every strategy stepping in where it belongs."""
        hooks, stacks = HookRegistry(), []
        rehearses = self.model not in self.run.rehearsed
        for number, strategy in enumerate(self.run.strategies):
            if strategy.level == "model" and self.plan.chains:
                stacks.append(stack := BlockStack(self.visit(number, Site("model", "")), self.plan, rehearses))
                hooks.extend(self._along(stack))
            elif strategy.level in ("output", "model"):
                hooks.add(self.model, self._at(number, Site("output", "")))
            else:
                for name, module in self.run.places(number, self.model).items():
                    hooks.add(module, self._at(number, Site(strategy.level, name)))
        returned: list[Any] = []
        if stacks and stacks[0].given is not None:
            hooks.add(self.model, _noting_returns(returned))
        with hooks:
            output = forward()
        for stack in stacks:
            complete = stack.end()
            if not complete and stack.answers is not None:
                self._forget()
                self.run.report.note("the model did not run its blocks as learned; such calls are computed again")
                return forward()
            if complete and stack.given is not None and self.kept_something:
                self._rehearse(stack, forward, returned[0])
        return output

    def _rehearse(self, stack: BlockStack, forward: Callable[[], Any], computed: Any) -> None:
        """Once a run: leave out the blocks that were just computed, and see whether the model returns the same.

        A plan that was misread would make every reused call a wrong picture. Costs embedding, head and what else of the
        model always runs, and waits for the device.
        """
        returned: list[Any] = []
        hooks = self._along(Rehearsal(self.plan, stack.given))
        hooks.add(self.model, _noting_returns(returned))
        with hooks:
            forward()
        error = relative_error(returned[0], computed)
        if error <= MOST_REHEARSAL_ERROR:
            self.run.rehearsed.add(self.model)
            return
        self.run.refuse_plan(self.model, f"leaving them out changed the output by {error:.1%}")
        self._forget()

    def _along(self, stack: BlockStack | Rehearsal) -> HookRegistry:
        hooks = HookRegistry()
        for chain, members in enumerate(self.plan.chains):
            for index, block in enumerate(members.blocks):
                hooks.add(block, _handing_over(partial(stack.block, chain, index)))
        return hooks

    def _forget(self) -> None:
        """What this call's branches kept was made of a passage that is given up."""
        for key in [key for key in self.run.memories if key[0] in self.contexts]:
            del self.run.memories[key]
        self.visits = []

    def visit(self, number: int, site: Site) -> Visit:
        """This strategy at this site, in this call."""
        turn = self._turns.get((number, site.name), 0)
        self._turns[number, site.name] = turn + 1
        self.visits.append(visit := Visit(self, number, Site(site.level, site.name, turn)))
        return visit

    def record(self, labels: tuple[str, ...], watch: Stopwatch) -> CallRecord:
        """What this call did, for the report."""
        total = sum(visit.units for visit in self.visits)
        answers = [visit for visit in self.visits if visit.was_answered]
        told = next((call for visit in answers or self.visits for call in visit.calls), None)
        learning = self.run.evaluation.is_learning
        return CallRecord(
            step_of_call=partial(_step_at, self.run.schedule, self._sigma),
            branches=labels,
            action="computed" if not answers else "forecast" if told.order else "reused",
            reason="learning the model's blocks" if learning else told.reason if told else "",
            measure=told.measure if told else None,
            computed_share=sum(visit.units_computed for visit in self.visits) / total if total else 1.0,
            watch=watch,
        )

    def _at(self, number: int, site: Site) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return at_module(self.visit(number, site), forward, args, kwargs)

        return around


class Visit:
    """One strategy at one site in one model call: the way from its branches to their memories and to the report."""

    def __init__(self, call: ModelCall, number: int, site: Site) -> None:
        self.call, self.number, self.site = call, number, site
        self.calls: list[BranchCall] = []
        self.was_answered = False
        self.units = call.plan.block_count if site.level == "model" else 1
        self.units_computed = 0

    @property
    def branch_count(self) -> int:
        return len(self.call.contexts)

    @property
    def structure(self) -> Structure:
        """What this site's module returned around its tensors when it was last computed, for the first branch."""
        return self._memories[0].structure

    def branches(self, layout: Layout) -> Branches:
        """The strategy, started once for each branch with that branch's state.

        `layout` is the shapes of each branch's inputs here; features kept from others can't be used.
        """
        run, strategy = self.call.run, self.call.run.strategies[self.number]
        keys = [(context, self.number, self.site) for context in self.call.contexts]
        for key in keys:
            if key not in run.memories:
                run.memories[key] = Memory(strategy.new_state())
        self._layout, self._memories = layout, [run.memories[key] for key in keys]
        if any(memory.layout != layout for memory in self._memories):
            run.evaluation.must_compute.add(self.number)
        may_reuse = self.number not in run.evaluation.must_compute
        self.calls = [BranchCall(self.call, self.number, self.site, may_reuse) for _ in keys]
        arounds = [strategy.around(call, memory.state) for call, memory in zip(self.calls, self._memories)]
        return Branches(arounds, may_reuse)

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


def _handing_over(stand_in: Callable[..., Any]) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return stand_in(forward, args, kwargs)

    return around


def _noting_returns(returned: list[Any]) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        returned.append(forward(*args, **kwargs))
        return returned[-1]

    return around


def _step_at(schedule: Schedule, sigma: SigmaReading) -> Step:
    return schedule.step_at(sigma.value)


def _modules_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> dict[str, nn.Module]:
    """The places the strategy chooses in each block, without those inside another."""
    places: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        modules = dict(block.named_modules(prefix=name))
        running = [path for path, module in modules.items() if type(module).forward is not nn.Module.forward]
        chosen = strategy.places_in(name, [path for path in running if path != name])
        places |= {path: modules[path] for path in chosen if not any(path.startswith(f"{outer}.") for outer in chosen)}
    return places
