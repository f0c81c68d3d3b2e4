"""One sampling run: what each branch of the prompt remembers, and what is known of the model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .call import ModelCall
from .discovery import BlockPlan
from .features import Layout, Structure, bytes_held
from .report import Report, Stopwatch
from .step import Schedule
from .strategy import Site, Strategy


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
    is_learning: bool = False  # the block plan was learned in it: nothing is kept at blocks and modules
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
            output = call.through(forward)
        self.report.add(call.record(tuple(labels or map(str, contexts)), watch))
        if call.kept_something:
            self.report.held(bytes_held([memory.state for memory in self.memories.values()]))
        return output

    def free(self) -> None:
        """Drop everything kept. The report stays."""
        self.memories.clear()
        self._plans.clear()
        self._places.clear()
        self.begin_evaluation()

    def memory(self, context: Hashable, number: int, site: Site) -> Memory:
        """What this branch keeps at this site for strategy `number`."""
        key = (context, number, site)
        if key not in self.memories:
            self.memories[key] = Memory(self.strategies[number].new_state())
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
        needed = any(strategy.level != "output" for strategy in self.strategies) and model not in self._plans
        self.evaluation.is_learning |= needed
        return needed

    def learned(self, model: nn.Module, plan: BlockPlan) -> None:
        """The model's chains of blocks, and what else the user should know of them."""
        self._plans[model] = plan
        self.report.blocks = str(plan)
        for note in plan.notes:
            self.report.note(note)
        if not plan.chains:
            self.report.note("no chain of blocks was found: only the whole model's output can be cached")

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


def _modules_inside(blocks: dict[str, nn.Module], strategy: Strategy) -> dict[str, nn.Module]:
    """The places the strategy chooses in each block, without those inside another."""
    places: dict[str, nn.Module] = {}
    for name, block in blocks.items():
        modules = dict(block.named_modules(prefix=name))
        running = [path for path, module in modules.items() if type(module).forward is not nn.Module.forward]
        chosen = strategy.places_in(name, [path for path in running if path != name])
        places |= {path: modules[path] for path in chosen if not any(path.startswith(f"{outer}.") for outer in chosen)}
    return places
