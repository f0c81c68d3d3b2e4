"""One evaluation of the noise prediction: what the model calls of its branches share, be they in threads or not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from threading import Condition

from torch import nn

from ..model import uncompiled
from ..strategy import Site, Strategy
from .reading import SigmaReading

PATIENCE = 60.0  # seconds: the call that leads begins with the others, but may run a ControlNet or load weights first

MOST_CHANGES = 4  # in a row: a prompt with a range that ends begins and ends another within two
BRANCHES_CHANGE = (
    "the branches of the prompt are others at every evaluation, and new ones have nothing to reuse. Of context windows "
    "choose static ones, of LoRA keyframes use fewer; with samplers and guiders that alternate prompts it stays so"
)
NO_LEADER = "the branches' threads could not agree in time, so everything is computed: run them in one thread"


@dataclass
class Evaluation:
    """The model calls, one or several, of all branches at one point, and what was in the evaluation before.

    All branches decide by one measure. In one thread the first branch takes it. Where branches run in threads, each on
    a model of its own, one of the models leads: what it measures counts, whichever is first, so that the picture does
    not depend on chance. The others wait for it; if it ends or fails without a measure, all compute.
    """

    number: int = 0
    before: Evaluation | None = None  # the last one in which the model was called
    sigma: SigmaReading | None = None  # of all its calls, where that is known
    contexts: set[tuple[Hashable, int]] = field(default_factory=set)  # that were called, and for which time
    announced: set[Hashable] = field(default_factory=set)  # branches that were to run in threads
    must_compute: set[Strategy] = field(default_factory=set)  # those one of whose branches has nothing to reuse
    all_compute: bool = False  # a branch is back after evaluations without it: what it keeps is old
    changes: int = 0  # evaluations in a row, up to this one, in which a branch was new
    unconditional: str | None = None  # in calls of a branch that may be left out of the next: its name in the report
    without_unconditional: bool = False  # it was not run
    is_learning: bool = False  # the block plan was learned in it
    reading: SigmaReading | None = None  # of its last model call
    is_answered: bool = False  # someone else answered one of its calls
    is_reused: bool = False  # something stood in for a model call, or for blocks of it
    missed_leader: bool = False  # a thread waited for the one that leads in vain, in this evaluation or before
    lead: _Lead | None = None  # while branches run in threads
    _measures: dict[tuple[Strategy, Site], float] = field(default_factory=dict)
    _told: Condition = field(default_factory=Condition)

    def following(self, sigma: SigmaReading | None) -> Evaluation:
        """The one after it. If another node answered this one without a model call, no branch was away in it."""
        before, self.before = self if self.contexts else self.before, None  # no chain of them
        return Evaluation(self.number + 1, before, sigma, missed_leader=self.missed_leader)

    def own_contexts(self, contexts: Sequence[Hashable], model: nn.Module) -> tuple[tuple[Hashable, int], ...]:
        """Apart from other calls of the same branch in this evaluation, such as a guidance's second look.

        If one of them was not in the evaluation before, all compute. Where models are called in threads, none goes on
        before the branches of all are known: one may have come from another model, and has nothing to reuse on its new
        one.
        """
        with self._told:
            own = []
            for context in contexts:
                turn = 0
                while (context, turn) in self.contexts:
                    turn += 1
                self.contexts.add((context, turn))
                own.append((context, turn))
            before = self.before or Evaluation()
            if not before.contexts.issuperset(own):
                self.all_compute, self.changes = True, before.changes + 1
            if (lead := self.lead) is not None:
                lead.unheard.discard(uncompiled(model))
                self._told.notify_all()
                self.missed_leader |= not self._told.wait_for(lambda: not lead.unheard, PATIENCE)
            return tuple(own)

    def measured(self, strategy: Strategy, site: Site, model: nn.Module, measure: Callable[[], float]) -> float:
        """The number that all branches decide by here. NaN if the one that leads has taken none."""
        key = (strategy, site)
        with self._told:
            lead = self.lead
            if lead is not None and lead.model is not uncompiled(model):
                in_time = self._told.wait_for(lambda: key in self._measures or lead.is_over, PATIENCE)
                self.missed_leader |= not in_time
                return self._measures.get(key, nan)
            if key in self._measures or (lead is not None and lead.is_over):
                return self._measures.get(key, nan)
        value = measure()
        with self._told:
            self._measures[key] = value
            self._told.notify_all()
        return value

    def noting(self, predict: Callable[[bool, bool], tuple]) -> Callable[[bool, bool], tuple]:
        """`predict(with, without)`, and which of the two it leaves out is noted here."""

        def predicted(conditional: bool, unconditional: bool) -> tuple:
            self.without_unconditional = not unconditional
            self.all_compute |= unconditional and self.before is not None and self.before.without_unconditional
            return predict(conditional, unconditional)

        return predicted

    def begin_again(self, contexts: set[tuple[Hashable, int]]) -> None:
        """What its calls did that came after those of these branches does not count, and all compute."""
        self.contexts, self.all_compute = contexts, True
        self.without_unconditional = self.is_reused = False
        self.announced.clear()
        self.must_compute.clear()
        self._measures.clear()

    @contextmanager
    def in_threads(self, branches: Collection[Hashable]) -> Iterator[None]:
        """While its model calls, of these branches, run in threads; with a branch that is new, all compute."""
        self.announced.update(branches)
        known = self.before.announced if self.before else set()
        self.all_compute |= self.missed_leader or not self.announced <= known
        try:
            yield
        finally:
            if self.lead is not None:  # all threads are back, or one has failed: nobody waits any more
                self.ended_call(self.lead.model)
            self.lead = None

    def begin_threads(self, leader: nn.Module, models: Sequence[nn.Module]) -> None:
        """Branches begin to run in threads on these models: what the one that leads measures counts for all."""
        self.lead = _Lead(uncompiled(leader), {uncompiled(model) for model in models})

    def ended_call(self, model: nn.Module) -> None:
        """A call of this model is over, or the thread that was to call it, be it with an error."""
        with self._told:
            if self.lead is not None:
                self.lead.unheard.discard(uncompiled(model))
                self.lead.is_over |= self.lead.model is uncompiled(model)
                self._told.notify_all()


@dataclass
class _Lead:
    """The model that leads, and whether its first call is over: what was not measured in that one is not any more."""

    model: nn.Module
    unheard: set[nn.Module]  # models in threads whose first branches are not known yet
    is_over: bool = False
