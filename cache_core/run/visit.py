"""One strategy at one site in one model call, for all branches joined in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..model.structure import Structure
from ..strategy.step import Schedule, Step
from ..strategy.strategy import COMPUTE, Around, Request, Site
from ..strategy.tensors import Features
from .memory import BlocksRan
from .rows import Layout

if TYPE_CHECKING:
    from .call import ModelCall


class Branches:
    """A strategy's `around` at one site in one model call, run for every branch of the batch at the same pace."""

    def __init__(self, arounds: Sequence[Around], may_reuse: bool) -> None:
        self._asking: dict[int, Around] = dict(enumerate(arounds))
        self._answers: list[Features | None] = [None] * len(arounds)
        self._may_reuse = may_reuse

    def decide(self, computed: list[Features] | None = None) -> Request | list[Features]:
        """What to compute next or, if every branch gave an answer and none is new here, the answers.

        `computed` is what the branches asked for last, one for each.
        """
        requests = set()
        for branch, around in list(self._asking.items()):
            try:
                requests.add(around.send(computed[branch] if computed else None))
            except StopIteration as stop:
                self._answers[branch] = stop.value
                del self._asking[branch]
        if len(requests) > 1 or (computed and requests - {COMPUTE}):
            raise RuntimeError(
                "A strategy must ask for the same in all branches: first for a part at most once, then for COMPUTE."
            )
        if not requests and self._may_reuse and all(answer is not None for answer in self._answers):
            return self._answers
        return requests.pop() if requests else COMPUTE

    def keep(self, computed: list[Features]) -> None:
        """Hand the branches what was computed, the last thing they asked for."""
        self.decide(computed)
        if self._asking:
            raise RuntimeError("A strategy asked again after the whole site was computed. Yield COMPUTE once, last.")


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
            self.call.evaluation.must_compute.add(self.number)
        may_reuse = self.number not in self.call.evaluation.must_compute and not self.call.evaluation.all_compute
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
        if self.site.level == "model":
            self.call.run.on_blocks_left_out()

    def kept(self, structure: Structure | None = None, ran: BlocksRan | None = None) -> None:
        """The site was computed and the branches have what they wanted of it."""
        for memory in self._memories:
            memory.layout, memory.structure, memory.ran = self._layout, structure, ran
        self.call.kept_something = True

    def ran_alike(self, ran: BlocksRan) -> bool:
        """Whether the same blocks ran in what the branches keep, or they keep nothing yet."""
        return all(memory.ran in (None, ran) for memory in self._memories)

    def forget(self) -> None:
        """The branches' features are of no more use."""
        self.call.run.forget(self._contexts)

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
    threshold: float | None = None
    order: int = 0

    @property
    def schedule(self) -> Schedule:
        return self.model_call.run.schedule

    @property
    def step(self) -> Step:
        return self.model_call.step

    @property
    def adds_noise(self) -> bool:
        return self.model_call.run.adds_noise

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        return self.model_call.measured(self.number, self.site, measure)

    def total(self, part: Tensor) -> Tensor:
        return self.model_call.run.ranks.total(part)

    def note(self, text: str) -> None:
        self.model_call.run.report.note(text)
