"""One evaluation of the noise prediction: what the model calls of its branches share, be they in threads or not."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import nan
from threading import Condition
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..model.compiled import uncompiled

if TYPE_CHECKING:
    from ..strategy.strategy import Site
    from .reading import SigmaReading

PATIENCE = 60.0  # seconds: the call that leads begins with the others, but may run a ControlNet or load weights first
NO_LEADER = "the branches' threads could not agree in time, so everything is computed: run them in one thread"


@dataclass
class Evaluation:
    """The model calls, one or several, of all branches at one point.

    All branches decide by one measure. In one thread the first branch takes it. Where branches run in threads, each on
    a model of its own, one of the models leads: what it measures counts, whichever is first, so that the picture does
    not depend on chance. The others wait for it; if it ends or fails without a measure, all compute.
    """

    number: int = 0
    seen: set[tuple[Hashable, int]] = field(default_factory=set)  # contexts that were called, and for which time
    announced: set[Hashable] = field(default_factory=set)  # branches that were to run in threads
    must_compute: set[int] = field(default_factory=set)  # strategies one of whose branches has nothing to reuse
    all_compute: bool = False  # a branch is back after evaluations without it: what it keeps is old
    changes: int = 0  # evaluations in a row, up to this one, in which a branch was new
    without_unconditional: bool = False  # that branch was not run
    is_learning: bool = False  # the block plan was learned in it
    sigma: SigmaReading | None = None  # of all its calls, where that is known
    noise_share: Tensor | None = None  # share of the latent's move that no deterministic sampler makes
    missed_leader: bool = False  # a thread waited for the one that leads in vain
    _lead: _Lead | None = None  # while branches run in threads
    _measures: dict[tuple[int, Site], float] = field(default_factory=dict)
    _told: Condition = field(default_factory=Condition)

    def measured(self, place: tuple[int, Site], model: nn.Module, measure: Callable[[], float]) -> float:
        """The number that all branches decide by at this place. NaN if the one that leads has taken none."""
        with self._told:
            lead = self._lead
            if lead is not None and lead.model is not uncompiled(model):
                in_time = self._told.wait_for(lambda: place in self._measures or lead.is_over, PATIENCE)
                self.missed_leader |= not in_time
                return self._measures.get(place, nan)
            if place in self._measures or (lead is not None and lead.is_over):
                return self._measures.get(place, nan)
        value = measure()
        with self._told:
            self._measures[place] = value
            self._told.notify_all()
        return value

    def begin_threads(self, leader: nn.Module) -> None:
        """Branches begin to run in threads, one or more of them on this model: what it measures counts for all."""
        self._lead = _Lead(uncompiled(leader))

    def end_threads(self) -> None:
        """All of them are back, or one has failed: nobody waits any more."""
        if self._lead is not None:
            self.ended_call(self._lead.model)
        self._lead = None

    def ended_call(self, model: nn.Module) -> None:
        """A call of this model is over, or the thread that was to call it, be it with an error."""
        with self._told:
            if self._lead is not None and self._lead.model is uncompiled(model):
                self._lead.is_over = True
                self._told.notify_all()


@dataclass
class _Lead:
    """The model that leads, and whether its first call is over: what was not measured in that one is not any more."""

    model: nn.Module
    is_over: bool = False
