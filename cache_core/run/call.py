"""One model call on its way through the strategies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..model.attention import kind_of
from ..model.compiled import entry_of
from ..model.failures import SHAPES_DO_NOT_FIT, is_of_the_device, is_out_of_memory
from ..model.hooks import HookRegistry
from ..model.lesson import Lesson
from ..model.rehearsal import Rehearsal
from ..model.structure import all_finite, is_feature, relative_error
from ..report.record import CallRecord, Stopwatch
from ..strategy.step import Step
from ..strategy.strategy import GUIDANCE, AttentionKind, Site
from .reading import SigmaReading, StepOfCall
from .sites import at_guidance, at_module
from .stack import BlockStack, keep_passages
from .visit import Visit

if TYPE_CHECKING:
    from .run import CacheRun

NO_MEMORY = "memory ran out while leaving them out was tested"
NO_NUMBER = "the model's output holds NaN or infinity"
SHAPES_CHANGE = "their shapes change"
UNCOMPILED = "blocks run without torch.compile: this cache steps in inside them; one at level model or output keeps it"
MOST_REHEARSAL_ERROR = 0.01  # of the output's norm: a plan read right gives 0 but for kernels that vary


class ModelCall:
    """One forward pass of the model, for one branch or several joined in a batch."""

    def __init__(self, run: CacheRun, model: nn.Module, sigma: SigmaReading, contexts: tuple[Hashable, ...]) -> None:
        self.run, self.model, self.sigma, self.contexts = run, model, sigma, contexts
        self.evaluation = run.evaluation
        self.plan, self.compilation = run.plan_of(model), run.compilation_of(model)
        self.watch = Stopwatch(sigma.tensor.device)
        self._running: list[str] = []  # the blocks that run now, by name, outermost first
        self._is_inside_attention = False
        self._turns: dict[tuple[int, str], int] = {}
        self.visits: list[Visit] = []
        self.kept_something = False

    @property
    def step(self) -> Step:
        """Where in the schedule this call is. Waits for the device the first time."""
        step = self.run.schedule.step_at(self.sigma.value)
        self.run.noticed(self.sigma.noise_share)
        return step

    @property
    def adds_noise(self) -> bool:
        """Whether the sampler was seen to add noise by now. Waits for the device the first time."""
        self.run.noticed(self.sigma.noise_share)
        return self.run.adds_noise

    def measured(self, number: int, site: Site, measure: Callable[[Tensor], Tensor]) -> float:
        """The evaluation's measure at this site, read together with the sigma so that the device is waited for once."""

        def take() -> float:
            return self.sigma.read_with(measure(self.run.schedule.time_of(self.sigma.tensor)))

        return self.evaluation.measured((number, site), self.model, take)

    def through(self, forward: Callable[[], Any], inputs: Sequence[Any] | None) -> Any:
        """Run `forward` with every strategy stepping in where it belongs. `inputs` as in `CacheRun.call_model`."""
        hooks, stacks = HookRegistry(), []
        whole: Callable[..., Any] = lambda *_: forward()  # noqa: E731 - strategies step in around it
        lesson = None
        if self.run.must_learn(self.model):
            lesson = Lesson(self.model, self.run.methods, bool(self.compilation))
        for number, strategy in enumerate(self.run.strategies):
            if "model" in strategy.levels and self.plan.chains:
                stacks.append(stack := BlockStack(self.visit(number, Site("model", "")), self.plan))
                hooks.extend(self._along(stack))
            elif "output" in strategy.levels or ("model" in strategy.levels and lesson is None):
                at_output = self._at(number, Site("output", ""))
                if inputs is not None and self.adds_noise:
                    whole = partial(at_output, whole)
                else:
                    hooks.add(self.model, at_output)
            for module, site in self.run.places(number, self.model):
                if site.level != "attention" or self.run.attends_in(self.model):
                    hooks.add(module, self._at(number, site), entry_of(module))
        if self.run.attends_in(self.model):
            for name, block in self.run.blocks_of(self.model).items():
                hooks.add(block, self._naming(name), entry_of(block))
        returned: list[Any] = []
        if lesson is not None:
            hooks.extend(lesson.watching())
            hooks.add(self.model, _noting_returns(returned))
        hooks = self._between_compiled(hooks)
        with hooks:
            output = whole(*inputs or ())
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
        evaluation = self.evaluation
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
            why, is_certain = self._why_misread(lesson, forward, computed)
            if why:
                self.plan = self.run.not_learned(self.model, why, is_certain)
                return
        self.run.learned(self.model, self.plan)
        passages = [lesson.streams_of(chain) for chain in self.plan.chains]
        for number, strategy in enumerate(self.run.strategies):
            if "model" in strategy.levels and passages:
                keep_passages(self.visit(number, Site("model", "")), self.plan, passages)

    def _why_misread(self, lesson: Lesson, forward: Callable[[], Any], computed: list[Any]) -> tuple[str | None, bool]:
        """Why the chains that were found must not be left out, if so, and whether that is certain."""
        try:
            error = self._rehearsed(lesson, forward, computed)
        except RuntimeError as failure:
            if not is_out_of_memory(failure):
                raise
            return NO_MEMORY, True  # the model alone has just fitted
        if error <= MOST_REHEARSAL_ERROR:
            return None, True
        if error < inf:
            return f"leaving them out changed the output by {error:.1%}", True
        return SHAPES_CHANGE if all_finite(computed) else NO_NUMBER, False

    def _rehearsed(self, lesson: Lesson, forward: Callable[[], Any], computed: list[Any]) -> float:
        """Put the plan to the test, and drop the chains that must not be in it. The relative error of what is left.

        If there are several chains, the first must see the latent: with another latent, something else must enter it.
        Otherwise it encodes the prompt, say, and would not change from step to step. Then the blocks that were just
        computed are left out, and the model must return the same. A plan that was misread would make every reused call
        a wrong picture. Costs embedding, head and what else of the model always runs, once or twice a run, and waits
        for the device.
        """
        while len(self.plan.chains) > 1 and self._leads_blindly(lesson, forward):
            self.plan = self.plan.without([self.plan.chains[0]], "it does not see the latent")
        plan, error = self.plan, inf
        returning_more = [chain for chain in plan.chains if chain.has_extras]
        simpler = plan.without(returning_more, "its blocks return more than they pass on")
        for self.plan in (plan, replace(plan, runs_first=True), *([simpler] if returning_more else [])):
            if self.plan.chains and (error := self._rehearsal_error(lesson, forward, computed)) <= MOST_REHEARSAL_ERROR:
                break
        return error

    def _leads_blindly(self, lesson: Lesson, forward: Callable[[], Any]) -> bool:
        """Whether the chain that leads is given the same for another latent, on all ranks."""
        saw_the_same = self._rehearsal(lesson, forward, _with_another_latent).saw_the_same
        return not any(self._largest([not saw_the_same]))

    def _largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each among all ranks: they must take the model for the same, or one would wait for ever."""
        return self.run.ranks.largest(values, self.sigma.tensor.device)

    def _rehearsal_error(self, lesson: Lesson, forward: Callable[[], Any], computed: list[Any]) -> float:
        returned: list[Any] = []
        rehearsal = self._rehearsal(lesson, forward, _noting_returns(returned))
        misled = self._largest([chain in rehearsal.misled for chain in range(len(self.plan.chains))])
        if any(misled):
            chains = [chain for chain, is_misled in zip(self.plan.chains, misled) if is_misled]
            self.plan = self.plan.without(chains, "it begins amid blocks that are skipped, and takes what they give")
            return self._rehearsal_error(lesson, forward, computed)
        error = relative_error(returned, computed) if rehearsal.is_as_learned else inf
        return self._largest([error])[0]

    def _rehearsal(self, lesson: Lesson, forward: Callable[[], Any], around_model: Callable[..., Any]) -> Rehearsal:
        passages = [lesson.streams_of(chain) for chain in self.plan.chains]
        rehearsal = Rehearsal(self.plan, passages, self.run.on_blocks_left_out)
        hooks = self._along(rehearsal)
        hooks.add(self.model, around_model)
        with self._between_compiled(hooks):
            try:
                forward()
            except SHAPES_DO_NOT_FIT as failure:
                if is_of_the_device(failure):
                    raise
                rehearsal.is_as_learned = False
        return rehearsal

    def _between_compiled(self, hooks: HookRegistry) -> HookRegistry:
        """With these, hooks that keep torch.compile's work around and behind them, never through them."""
        if not self.compilation:
            return hooks
        places = {module: method for module, method in hooks.hooked.items() if module is not self.model}
        opened = self.compilation.opened_at(places)
        if self.run.steps_in_inside_blocks(self.model):
            if places:
                self.run.report.note(UNCOMPILED)
        else:
            blocks = [block for block in self.run.blocks_of(self.model).values() if block in places]
            opened.extend(self.compilation.compiled_alone({block: places[block] for block in blocks}))
        opened.extend(hooks)
        return opened

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
        learning = self.evaluation.is_learning
        return CallRecord(
            step_of_call=StepOfCall(self.run.schedule, self.sigma),
            branches=labels,
            action="computed" if not answers else "forecast" if told.order else "reused",
            reason="learning the model's blocks" if learning else told.reason if told else "nothing is cached in it",
            measure=told.measure if told else None,
            computed_share=sum(visit.units_computed for visit in self.visits) / total if total else 1.0,
            watch=self.watch,
            evaluation=self.evaluation.number,
            threshold=told.threshold if told else None,
            strategy=self.run.strategies[told.number].title if told else "",
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


def _kind_of_operation(block: str, args: tuple) -> AttentionKind:
    """The kind of attention(query, key, value, ...), each (rows, tokens, ...) or (rows, heads, tokens, channels)."""
    query, key = args[:2]
    return "cross" if query.shape[-2] != key.shape[-2] else kind_of(block)
