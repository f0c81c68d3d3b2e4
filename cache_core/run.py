"""One sampling run: what each branch of the prompt remembers, and what is known of the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, get_args

from torch import Tensor, nn

from .attention import Kind, is_attention, kind_of
from .call import ModelCall, SigmaReading
from .discovery import BlockPlan, block_lists
from .features import Layout, Structure, bytes_held
from .report import Report
from .step import Schedule
from .strategy import GUIDANCE, Level, Site, Strategy

MOST_LESSONS = 4  # two branches of a prompt, twice


@dataclass
class Memory:
    """What one branch keeps at one site."""

    state: Any
    layout: Layout | None = None  # shapes of the inputs of the call that was kept last; None before the first
    structure: Structure | None = None  # what its output held besides tensors, at a module


@dataclass
class Evaluation:
    """One evaluation of the noise prediction: the model calls, one or several, of all branches at one point."""

    number: int = 0
    seen: set[tuple[Hashable, int]] = field(default_factory=set)  # contexts that were called, and for which time
    measures: dict[tuple[int, Site], float] = field(default_factory=dict)  # taken by the first branch, for all
    must_compute: set[int] = field(default_factory=set)  # strategies one of whose branches has nothing to reuse
    all_compute: bool = False  # a branch is back after evaluations without it: what it keeps is old
    without_unconditional: bool = False  # that branch was not run
    is_learning: bool = False  # the block plan was learned in it
    sigma: SigmaReading | None = None  # of all its calls, where that is known


class CacheRun:
    """Carries strategies through one sampling run. Make a new one for each run; drop it afterwards.

    run = CacheRun([FirstBlockCache()], Schedule(sigmas))
    run.begin_evaluation()
    output = run.call_model(model, lambda: model(latent, sigma), sigma, contexts=["negative", "positive"])

    `methods` names, by the class of a block, the method by which a model runs it where that is not `forward`.
    """

    def __init__(
        self, strategies: Sequence[Strategy], schedule: Schedule, methods: Mapping[str, str] | None = None
    ) -> None:
        self.strategies = tuple(strategy for strategy in strategies if not strategy.is_off)
        self.schedule, self.methods = schedule, methods or {}
        self.report = Report(strategies=tuple(strategies), steps=schedule.count)
        self.evaluation, self.previous = Evaluation(), Evaluation()
        self.memories: dict[tuple[Hashable, int, Site], Memory] = {}
        self._call: ModelCall | None = None
        self._plans: dict[nn.Module, BlockPlan] = {}
        self.barred: set[tuple[int, Site]] = set()  # sites where a strategy can't keep what it needs
        self._lessons: dict[nn.Module, int] = {}  # how many taught nothing
        self._places: dict[tuple[int, nn.Module], list[tuple[nn.Module, Site]]] = {}

    def begin_evaluation(self, sigma: SigmaReading | None = None) -> None:
        """The sampler asks for the noise prediction once more; of all branches at this sigma, where that is known."""
        self.previous = self.evaluation
        self.evaluation = Evaluation(self.previous.number + 1, sigma=sigma)

    def steps_in_at(self, level: Level) -> bool:
        """Whether one of the strategies works at this level."""
        if level == "guidance":
            return self.number_at_guidance is not None
        return any(level in strategy.levels for strategy in self.strategies)

    @property
    def number_at_guidance(self) -> int | None:
        """Which of the strategies stands in for the prediction without the prompt, if one does."""
        numbers = (
            number
            for number, strategy in enumerate(self.strategies)
            if "guidance" in strategy.levels and strategy.steps_in_at(GUIDANCE)
        )
        return next(numbers, None)

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
        call, outer = self._new_call(model, sigma, contexts), self._call
        self._call = call
        try:
            with call.watch:
                output = call.through(forward)
        finally:
            self._call = outer
        self.report.add(call.record(tuple(labels) or tuple(map(str, contexts))))
        self._tell_held(call)
        return output

    def call_attention(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run one attention operation, `forward(*args, **kwargs)`, inside a model call.

        For adapters that can step in there: a model whose blocks have no attention modules has no other such site.
        """
        return forward(*args, **kwargs) if self._call is None else self._call.attention(forward, args, kwargs)

    def call_guidance(
        self,
        model: nn.Module,
        predict: Callable[[bool, bool], tuple[Tensor | None, Tensor | None]],
        sigma: Tensor,
        context: Hashable,
        label: str = "negative",
    ) -> tuple[Tensor, Tensor]:
        """The noise predictions of one evaluation with and without the prompt, by `predict(with, without)`.

        `predict` makes model calls for those predictions that are wanted, the other is None. `context` and `label` are
        those of the branch without the prompt; both predictions have the latent's shape.
        """
        if not self.steps_in_at("guidance"):
            return predict(True, True)
        call = self._new_call(model, sigma, [("guidance", context)])
        known, self.evaluation.sigma = self.evaluation.sigma, call.sigma
        try:
            predictions, stood_in = call.guided(predict)
        finally:
            self.evaluation.sigma = known
        if stood_in:
            self.report.add(call.record((label,)))
        self._tell_held(call)
        return predictions

    def free(self) -> None:
        """Drop everything kept. The report stays."""
        self.memories.clear()
        self._plans.clear()
        self._places.clear()
        self._call = None
        self.evaluation, self.previous = Evaluation(), Evaluation()

    def memory(self, context: Hashable, number: int, site: Site) -> Memory:
        """What this branch keeps at this site for strategy `number`."""
        key = (context, number, site)
        if key not in self.memories:
            self.memories[key] = Memory(self.strategies[number].new_state(site))
        return self.memories[key]

    def forget(self, contexts: Sequence[Hashable]) -> None:
        """Drop what these branches keep: it was made of a passage that is given up."""
        for key in [key for key in self.memories if key[0] in contexts]:
            del self.memories[key]

    def plan_of(self, model: nn.Module) -> BlockPlan:
        """The model's chains of blocks, as far as they are known."""
        return self._plans.get(model, BlockPlan())

    def must_learn(self, model: nn.Module) -> bool:
        """Whether a strategy needs the model's chains of blocks, and they are not known yet."""
        needed = any(map(_needs_blocks, self.strategies)) and model not in self._plans
        self.evaluation.is_learning |= needed
        return needed

    def learned(self, model: nn.Module, plan: BlockPlan) -> None:
        """The model's chains of blocks, and what else the user should know of them."""
        self._plans[model] = plan
        self._places.clear()
        self._forget_sites_outside(plan)
        self.report.blocks = str(plan)
        for note in plan.notes:
            self.report.note(note)
        if not plan.chains:
            self.report.note("no chain of blocks was found: only the whole model's output can be cached")

    def not_learned(self, model: nn.Module, error: float) -> BlockPlan:
        """Leaving out the chains that were found changed the output by so much: they were misread, there are none.

        Without bound if the model ran them with other shapes than just before. It may be different in its first call:
        the next calls try again.
        """
        self.barred: set[tuple[int, Site]] = set()  # sites where a strategy can't keep what it needs
        self._lessons[model] = self._lessons.get(model, 0) + 1
        if error < inf or self._lessons[model] == MOST_LESSONS:
            why = f"leaving them out changed the output by {error:.1%}" if error < inf else "their shapes change"
            self.learned(model, BlockPlan())
            self.report.note(f"the model's blocks could not be read ({why}), so they always run")
        return BlockPlan()

    def blocks_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's blocks by name; before its chains are known, all that may be blocks."""
        if model in self._plans:
            return {
                name: block for chain in self._plans[model].chains for name, block in zip(chain.names, chain.blocks)
            }
        return {f"{name}.{key}": block for name, blocks in block_lists(model) for key, block in blocks.items()}

    def places(self, number: int, model: nn.Module) -> list[tuple[nn.Module, Site]]:
        """Where strategy `number` steps in on its own: at blocks, or at modules inside them."""
        if (number, model) not in self._places:
            blocks, places = self.blocks_of(model), []
            for level in self.strategies[number].levels:
                if level in _SITES_OF:
                    places += _SITES_OF[level](blocks, self.strategies[number])
                    if not blocks:
                        self.report.note(
                            f"no chain of blocks was found in this model, so level {level} has nothing to cache"
                        )
            self._places[number, model] = places
        return self._places[number, model]

    def _new_call(self, model: nn.Module, sigma: Tensor, contexts: Sequence[Hashable]) -> ModelCall:
        own = self._own_contexts(contexts)
        self.evaluation.all_compute |= not set(own) <= set(self.previous.seen)
        return ModelCall(self, model, self.evaluation.sigma or SigmaReading(sigma), own)

    def _tell_held(self, call: ModelCall) -> None:
        if call.kept_something:
            self.report.held(bytes_held([memory.state for memory in self.memories.values()]))

    def _forget_sites_outside(self, plan: BlockPlan) -> None:
        """Drop what was kept, before the chains were known, in lists that are none."""
        names = {name for chain in plan.chains for name in chain.names}
        for key in [key for key in self.memories if key[2].level in _SITES_OF]:
            name = key[2].name
            if name not in names and not any(name.startswith(f"{block}.") for block in names):
                del self.memories[key]

    def _own_contexts(self, contexts: Sequence[Hashable]) -> tuple[Hashable, ...]:
        """Apart from other calls of the same branch in this evaluation, such as a guidance's second look."""
        own = []
        for context in contexts:
            turn = 0
            while (context, turn) in self.evaluation.seen:
                turn += 1
            self.evaluation.seen.add((context, turn))
            own.append((context, turn))
        return tuple(own)


def _needs_blocks(strategy: Strategy) -> bool:
    """Whether it works at blocks, along them or inside them."""
    kinds = (Site("attention", "", kind=kind) for kind in get_args(Kind))
    within = set(strategy.levels) - {"output", "guidance", "attention"}
    return bool(within) or ("attention" in strategy.levels and any(map(strategy.steps_in_at, kinds)))


def _blocks(blocks: dict[str, nn.Module], strategy: Strategy) -> list[tuple[nn.Module, Site]]:
    return [(block, Site("block", name)) for name, block in blocks.items()]


def _modules_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> list[tuple[nn.Module, Site]]:
    """The modules that the strategy chooses in each block."""
    places: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        modules = {name: block} | _running_inside(name, block)
        chosen = strategy.places_in(name, [path for path in modules if path != name])
        places |= {path: modules[path] for path in chosen}
    return [(module, Site("module", name)) for name, module in _without_inner(places).items()]


def _attention_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> list[tuple[nn.Module, Site]]:
    """The attention modules in each block; those it does not step in at too, as what runs in them is no site."""
    modules = {
        path: module
        for name, block in blocks.items()
        for path, module in _running_inside(name, block).items()
        if is_attention(path)
    }
    return [
        (module, Site("attention", name, kind=kind_of(name, module)))
        for name, module in _without_inner(modules).items()
    ]


_SITES_OF = {"block": _blocks, "module": _modules_inside, "attention": _attention_inside}


def _running_inside(name: str, block: nn.Module) -> dict[str, nn.Module]:
    """The modules inside a block that have a forward, by dotted name."""
    return {
        path: module
        for path, module in block.named_modules(prefix=name)
        if path != name and type(module).forward is not nn.Module.forward
    }


def _without_inner(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that are not inside another of them."""

    def is_inner(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:length]) in modules for length in range(1, len(parts)))

    return {name: module for name, module in modules.items() if not is_inner(name)}
