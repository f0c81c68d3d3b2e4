"""What a sampling run is, and what one model call of it is: plain data that knows nothing of what drives it."""

import time
import weakref
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ..model.failures import is_of_the_device, is_out_of_memory
from ..report.record import Stopwatch
from ..report.report import Report
from ..strategy import Level, Schedule, Strategy
from .budget import Budget
from .evaluation import Evaluation
from .memory import Memories
from .models import KnownModel, Models
from .path import Paths
from .ranks import Ranks
from .reading import AnotherStep, SigmaReading
from .repair import Repair

ANSWERED_ELSEWHERE = (
    "another node answers model calls without running the model's blocks, as a cache does: since the first of them no "
    "call is reused here, for each would take the other's guesses for the model's. Remove one of the two"
)
ALL_PROMPTS = (
    "the negative prompt runs in every step from here on: another node answers model calls, as a cache does, and may "
    "keep one output for both prompts"
)
NO_MEMORY = "memory ran out, so what was kept is dropped, and {} computes everything from here on"


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

    def go_on_after(self, error: Exception) -> bool:
        """Whether it says that memory ran out which strategies can give back.

        Ranks that share a call wait in it for each other: one that made it again alone would never be met.
        """
        if self.ranks.group is not None:
            return False
        return bool(self.strategies) and not isinstance(error, self.cancels) and is_out_of_memory(error)

    def may_ask_again_after(self, error: Exception) -> bool:
        """Whether it says something of what was asked: no cancel does, and no failure of the device."""
        passes = (*self.cancels, AnotherStep)
        return self.ranks.group is None and not isinstance(error, passes) and not is_of_the_device(error)

    @cached_property
    def trust_schedule(self) -> tuple[Strategy, ...]:
        """The strategies that decide without a look at what is sampled."""
        return tuple(strategy for strategy in self.strategies if strategy.trusts_schedule)

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
    budget: Budget = field(default_factory=Budget)  # how much that may be
    evaluation: Evaluation = field(default_factory=Evaluation)  # the one that goes on, or went on last
    is_evaluating: bool = False  # the host has begun an evaluation and not ended it
    asked_about: Callable[[], Tensor | None] = lambda: None  # the latent of that evaluation, as long as it lives
    has_left_out: bool = False  # a prompt was left out in an evaluation
    why_all_prompts: str = ""  # why none is any more
    computed_for: tuple[bool, ...] = ()  # of which prompts the last predictions were that nobody else gave
    others_seen: int = 0  # calls about another latent than the step before
    began: float | None = None  # by the clock, with the first evaluation: the weights are loaded by then
    was_called: bool = False  # whether the model was, in this evaluation
    attends: bool = False  # whether the host has sent an attention operation
    why_computed: str = ""  # why strategies stepped aside, in a few words
    repair: Repair | None = None  # of gaps between computed steps, while that is on
    denoised_of: Callable[..., Tensor] | None = None  # the clean latent, of a sigma, a model output and a latent

    def begin_evaluation(self, sigma: SigmaReading | None = None, latent: Tensor | None = None) -> None:
        """One more. What branches keep that were away in the last one is dropped."""
        self.is_evaluating = True
        self.began = time.perf_counter() if self.began is None else self.began
        if latent is not None:
            self.asked_about = weakref.ref(latent)
            if self.paths.whole_is_followed:
                self.paths.whole.reaches(latent)
        self.evaluation, self.was_called = self.evaluation.following(sigma), False
        before = self.evaluation.before
        if before is not None:
            self.budget.agree(self.memories, self.terms.ranks)
            self.budget.tell(self.memories, self.report)
            self.paths.forget_all_but(before.contexts)
        if before is not None and not before.without_unconditional:
            self.memories.forget_all_but(before.contexts)

    def end_evaluation(self, predictions: Sequence[Tensor] = ()) -> None:
        """The sampler is given these."""
        self.is_evaluating = False
        self.paths.whole.predicted(*predictions)
        if self.terms.stand_in_for_calls and not self.was_called:
            self.step_aside()

    def leave_unrepaired(self, why: str = "") -> None:
        """From now on no gap is repaired. The report says why, if something was still to come."""
        if self.repair is not None:
            self.report.unrepaired = why
        self.repair, self.paths.whole_is_followed = None, self.paths.are_followed

    def sampler_adds_noise(self, sigma: SigmaReading) -> bool:
        """Whether it was seen to by now. Waits for the device the first time in an evaluation.

        From then on something else is kept at level output, so what was kept there is dropped.
        """
        sigma.read()
        if self.paths.whole.notice_noise():
            self.memories.forget_at("output")
        return self.paths.whole.has_noise

    def begin_again(self, contexts: set[tuple[Hashable, int]], why: str) -> None:
        """A prompt was left out, and a call went wrong: the evaluation goes on from where it had called these branches.

        What was kept may be half made, so all of it is dropped. No prompt is left out any more.
        """
        self.why_all_prompts = self.why_all_prompts or why
        self.memories.clear()
        self.budget.close_lanes()
        self.evaluation.begin_again(contexts)

    def someone_else_answered(self) -> None:
        """A model call, or all that should have arrived."""
        self.evaluation.is_answered = True
        if self.terms.stand_in_for_calls:
            self.step_aside()
        self.why_all_prompts = self.why_all_prompts or ALL_PROMPTS

    def step_aside(self) -> None:
        """Someone else answers model calls: from now on no strategy stands in for any."""
        self.report.note(ANSWERED_ELSEWHERE)
        aside = [strategy for strategy in self.terms.strategies if strategy.stands_in_for_calls]
        self._go_on_without(aside, "another node answers model calls too")

    def memory_ran_out(self) -> None:
        """Drop all that is kept, and go on without the strategy that reserved most of it; if none did, without any."""
        held = {strategy: self.memories.bytes_reserved(strategy, is_away=None) for strategy in self.terms.strategies}
        most = [strategy for strategy in held if 0 < held[strategy] == max(held.values())][:1]
        aside = most or list(self.terms.strategies)
        self.report.note(NO_MEMORY.format(" and ".join(strategy.title for strategy in aside)))
        self.memories.clear()
        self.budget.close_lanes()
        self._go_on_without(aside, "memory ran out")
        self.budget.give_back()

    def _go_on_without(self, aside: Collection[Strategy], why: str) -> None:
        self.why_computed = why
        self.terms = replace(self.terms, strategies=tuple(each for each in self.terms.strategies if each not in aside))
        self.paths.are_followed = bool(self.terms.trust_schedule)
        self.memories.forget_strategies(aside)
        self.leave_unrepaired()

    def free(self) -> None:
        """Drop everything that is kept. The report stays."""
        self.memories.clear()
        self.budget.close_lanes()
        self.models.forget()
        self.paths.forget()
        self.leave_unrepaired()
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
    labels: tuple[str, ...]  # what the report calls the branches
