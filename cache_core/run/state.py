"""What a sampling run is, and what one model call of it is: plain data that knows nothing of what drives it."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from ..report.record import Stopwatch
from ..report.report import Report
from ..strategy import Level, Schedule, Strategy
from .evaluation import Evaluation
from .memory import Memories
from .models import KnownModel, Models
from .noise import LatentPath
from .ranks import Ranks
from .reading import SigmaReading


@dataclass(frozen=True)
class Terms:
    """What a run began with. Nothing of it changes."""

    strategies: tuple[Strategy, ...]  # those that are on
    schedule: Schedule
    ranks: Ranks
    methods: Mapping[str, str]  # by which a model runs blocks of a class where that is not `forward`
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


@dataclass
class RunState:
    """One sampling run."""

    terms: Terms
    models: Models  # what is known of those it calls
    path: LatentPath  # the latent's way so far
    report: Report  # what was done
    memories: Memories = field(default_factory=Memories)  # what branches keep from call to call
    evaluation: Evaluation = field(default_factory=Evaluation)  # the one that goes on

    def sampler_adds_noise(self, sigma: SigmaReading) -> bool:
        """Whether it was seen to by now. Waits for the device the first time in an evaluation.

        From then on something else is kept at level output, so what was kept there is dropped.
        """
        if sigma.may_show_noise and self.path.notice(sigma.noise_share):
            self.memories.forget_at("output")
        return self.path.has_noise

    def free(self) -> None:
        """Drop everything that is kept. The report stays."""
        self.memories.clear()
        self.models.forget()
        self.path.forget()
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
