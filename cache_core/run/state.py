"""What a sampling run is, and what one model call of it is: plain data that knows nothing of what drives it."""

import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ..report.record import Stopwatch
from ..report.report import Report
from ..strategy import Level, Schedule, Strategy
from .evaluation import Evaluation
from .memory import Memories
from .models import KnownModel, Models
from .path import Paths
from .ranks import Ranks
from .reading import SigmaReading

ANSWERED_ELSEWHERE = (
    "another node answers model calls without running the model's blocks, as a cache does: since the first of them no "
    "call is reused here, for each would take the other's guesses for the model's. Remove one of the two"
)


@dataclass(frozen=True)
class Terms:
    """What a run goes by. Nothing of it changes, unless strategies step aside."""

    strategies: tuple[Strategy, ...]  # those that are on
    schedule: Schedule
    ranks: Ranks
    methods: Mapping[str, str]  # by which a model runs modules of a class where that is not `forward`
    on_blocks_left_out: Callable[[], None] | None  # called once it is decided that the blocks to come won't run
    cancels: tuple[type[BaseException], ...] = ()  # what ends a run because somebody wants it

    def steps_in_at(self, level: Level) -> bool:
        """Whether one of the strategies works at this level."""
        if level == "guidance":
            return self.at_guidance is not None
        return any(level in strategy.levels for strategy in self.strategies)

    @property
    def at_guidance(self) -> Strategy | None:
        """The strategy that stands in for the prediction without the prompt, if one does."""
        return next((strategy for strategy in self.strategies if strategy.works_at("guidance")), None)

    @property
    def need_blocks(self) -> bool:
        """Whether a strategy works at blocks, along them or inside them."""
        levels: tuple[Level, ...] = ("model", "block", "module", "attention")
        return any(strategy.works_at(level) for strategy in self.strategies for level in levels)

    @cached_property
    def stand_in_for_calls(self) -> bool:
        """Whether a strategy stands in for the model or its blocks."""
        return any(strategy.stands_in_for_calls for strategy in self.strategies)


@dataclass
class RunState:
    """One sampling run."""

    terms: Terms
    models: Models  # what is known of those it calls
    paths: Paths  # the ways of latents so far
    report: Report  # what was done
    memories: Memories = field(default_factory=Memories)  # what branches keep from call to call
    evaluation: Evaluation = field(default_factory=Evaluation)  # the one that goes on, or went on last
    is_evaluating: bool = False  # the host has begun an evaluation and not ended it
    asked_about: Callable[[], Tensor | None] = lambda: None  # the latent of that evaluation, as long as it lives
    others_seen: int = 0  # calls about another latent than the step before
    began: float | None = None  # by the clock, with the first evaluation: the weights are loaded by then
    was_called: bool = False  # whether the model was, in this evaluation
    why_computed: str = ""  # why strategies stepped aside, in a few words

    def begin_evaluation(self, sigma: SigmaReading | None = None, latent: Tensor | None = None) -> None:
        """One more. What branches keep that were away in the last one is dropped."""
        self.is_evaluating = True
        self.began = time.perf_counter() if self.began is None else self.began
        if latent is not None:
            self.asked_about = weakref.ref(latent)
            if self.paths.are_followed:
                self.paths.whole.reaches(latent)
        self.evaluation, self.was_called = self.evaluation.following(sigma), False
        before = self.evaluation.before
        if before is not None:
            self.paths.forget_all_but(before.contexts)
        if before is not None and not before.without_unconditional:
            self.memories.forget_all_but(before.contexts)

    def end_evaluation(self, predictions: Sequence[Tensor] = ()) -> None:
        """The sampler is given these."""
        self.is_evaluating = False
        self.paths.whole.predicted(*predictions)
        if self.terms.stand_in_for_calls and not self.was_called:
            self.step_aside()

    def sampler_adds_noise(self, sigma: SigmaReading) -> bool:
        """Whether it was seen to by now. Waits for the device the first time in an evaluation.

        From then on something else is kept at level output, so what was kept there is dropped.
        """
        sigma.read()
        if self.paths.whole.notice_noise():
            self.memories.forget_at("output")
        return self.paths.whole.has_noise

    def step_aside(self) -> None:
        """Someone else answers model calls: from now on no strategy stands in for any."""
        self.why_computed = "another node answers model calls too"
        self.report.note(ANSWERED_ELSEWHERE)
        aside = [strategy for strategy in self.terms.strategies if strategy.stands_in_for_calls]
        left = tuple(strategy for strategy in self.terms.strategies if strategy not in aside)
        self.terms = replace(self.terms, strategies=left)
        self.memories.forget_strategies(aside)

    def free(self) -> None:
        """Drop everything that is kept. The report stays."""
        self.memories.clear()
        self.models.forget()
        self.paths.forget()
        self.evaluation = Evaluation()


@dataclass(frozen=True)
class CallState:
    """One forward pass of the model, for one branch or several joined in a batch."""

    run: RunState
    model: KnownModel
    sigma: SigmaReading
    contexts: tuple[Hashable, ...]  # the branches' keys
    evaluation: Evaluation
    watch: Stopwatch
