"""What a caching strategy is: settings, a state per branch, and one method.

    @dataclass(frozen=True)
    class EverySecondStep(Strategy):
        title = "Every Second Step"
        levels = ("output",)

        def new_state(self, site):
            return History(capacity=1)

        def around(self, call, state):
            if call.may_reuse and call.step.index % 2:
                return state.combined([1.0])
            output = yield COMPUTE
            state.add(call.step.time, output)

`around` is a generator. What it yields is computed and handed back to it as `Features`, its own to keep; if it returns
features instead of asking for a computation, they stand in for it. At the level `model` a site is the whole stack of
blocks and its features are *residuals*: what the blocks add to the streams, one tensor for each chain and stream.
What the first block alone adds is handed over for about a thousand tokens of the main stream (`sampled_tokens`). At
the level `guidance` it is the noise prediction without the prompt; its features are both, with the prompt and without.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from .few_steps import COMPUTE_ALL, DRAFT, are_few, why_few
from .forecast import History
from .packed import AS_COMPUTED, DTYPES, GPU, bytes_packed
from .repairing import OFF
from .setting import check
from .step import Schedule, Step
from .tensors import Features

Level = Literal["output", "model", "block", "module", "attention", "guidance"]
# "spatial" is self-attention: of the picture, or of text and picture jointly.
AttentionKind = Literal["spatial", "temporal", "cross"]


class Request(Enum):
    """What `Strategy.around` can ask to be computed."""

    FIRST_BLOCK = "first block"
    CONDITIONAL = "conditional"
    COMPUTE = "compute"
    COMPUTE_ONLY = "compute only"


FIRST_BLOCK = Request.FIRST_BLOCK  # level model: answered with what it adds to some tokens, see also `tests_parts`
CONDITIONAL = Request.CONDITIONAL  # level guidance only: the prediction with the prompt; answered with it
COMPUTE = Request.COMPUTE  # all of the site that is not computed yet; answered with its features
COMPUTE_ONLY = Request.COMPUTE_ONLY  # the same where none of it can be reused: no copy is made, and there is no answer
Around = Generator[Request, Features, Features | None]


@dataclass(frozen=True)
class Site:
    """A place in the model where a strategy steps in."""

    level: Level
    name: str  # of the module, dotted; "" is the whole model; of its block for an attention that is no module
    turn: int = 0  # which of the module's runs within one model call
    kind: AttentionKind | None = None  # of attention


GUIDANCE = Site("guidance", "")  # the prediction without the prompt; one in a model


class Call(Protocol):
    """One site in one model call, as one branch of the prompt sees it."""

    site: Site
    schedule: Schedule
    may_reuse: bool  # False while nothing can be reused: first evaluation, or another branch of the batch is new
    may_be_left_out: bool  # whether this is the branch for whose prediction a strategy stands in at level guidance
    serves_until: int | None  # the last step that may reuse what this branch keeps here; set by the strategy, if known
    is_of_no_use: bool  # whether that step is over: then there is nothing to keep
    reason: str  # why, in a few plain words for the report; set by the strategy
    measure: float | None  # what was compared with a threshold, for the report; set by the strategy
    threshold: float | None  # what it was compared with, likewise
    order: int  # of the forecast that stands in, for the report; 0 is reuse; set by the strategy
    cost_of_reuse: float | None  # work of a call that reuses, of a computed one; None until the model's is counted

    @property
    def step(self) -> Step:
        """Where this call is in the schedule. Reading it waits for the device, unless a measure was read before."""

    @property
    def adds_noise(self) -> bool:
        """Whether the sampler was seen to add noise between its steps by now: then trends lead astray."""

    def measured(self, measure: Callable[[Tensor], Tensor]) -> float:
        """One number for all branches of an evaluation: the first branch measures, the others take its number.

        So that all decide alike. `measure` is given the call's time and returns a scalar, both float32 tensors on the
        device; reading the result waits for the device.
        """

    def total(self, part: Tensor) -> Tensor:
        """A small tensor, for use in `measured`, summed over all ranks that share the tokens; itself without ranks."""

    def note(self, text: str) -> None:
        """Say something in the report, once."""


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies: a frozen dataclass of settings. See this module's text for the contract."""

    title: ClassVar[str]  # the method's name as its paper writes it
    summary: ClassVar[str] = ""  # one sentence for the node's description
    source: ClassVar[str] = ""  # paper or code it comes from
    aliases: ClassVar[tuple[str, ...]] = ()  # other names under which people look for it
    trusts_schedule: ClassVar[bool] = True  # decides without a look at what is sampled, which is then looked at for it
    tests_first_block: ClassVar[bool] = False  # asks for FIRST_BLOCK
    memory_limit_gb = 0.0  # GiB that it may hold; not annotated, for strategies that can hold much make a setting of it
    cache_device, cache_dtype = GPU, AS_COMPUTED  # where what it keeps lives, and in which form; likewise
    few_steps = DRAFT  # what to do in runs of few steps; a setting where it matters
    target_speedup = 0.0  # how many times faster a run is to be; 0: nobody says; a setting where plans can be made
    repair = OFF  # whether gaps between computed steps are repaired; a setting where that is known to help

    @property
    def levels(self) -> tuple[Level, ...]:
        """What kinds of site it steps in at."""
        raise NotImplementedError

    @property
    def stands_in_for_calls(self) -> bool:
        """Whether it stands in for the model or its blocks: two that do take each other's guesses for the model's."""
        return not self.is_off and not {"output", "model", "block", "module"}.isdisjoint(self.levels)

    @property
    def tests_parts(self) -> bool:
        """Whether FIRST_BLOCK is also answered with what it adds to each part of the latent: sound, frames."""
        return False

    @property
    def is_off(self) -> bool:
        """Whether these settings never reuse anything; then nothing is installed."""
        return False

    @property
    def contradiction(self) -> str:
        """Settings that leave no step between them, and what to do, to follow "0 reused: "; "" if there are none."""
        return ""

    def obstacle(self, schedule: Schedule) -> str:
        """Why these settings can reuse nothing on this schedule, in words to follow "0 reused: "; "" if they can."""
        return ""

    def computed_steps(self, schedule: Schedule, cost: float = 0.0) -> tuple[int, ...]:
        """The steps that are computed whatever is measured; with `target_speedup` the others are not.

        `cost` is that of a reused call (`Call.cost_of_reuse`).
        """
        return ()

    def why_resting(self, schedule: Schedule) -> str:
        """Why it is left out of a run on this schedule: its settings, or that there are few steps; "" if it is not."""
        if self.contradiction:
            return self.contradiction
        if self.few_steps != COMPUTE_ALL or not are_few(schedule):
            return ""
        shown = {each.name for each in fields(self) if each.metadata.get("shown")}
        return why_few(self.title, schedule, "few_steps" in shown)

    def why_unrepaired(self, schedule: Schedule, cost: float = 0.0) -> str:
        """Why gaps between computed steps are not repaired, in a few words; "" if they are. `cost` as above."""
        return ""

    def forecast_from(self, state: Any) -> History | None:
        """Of a state at level output: the outputs that go on in forecasts, which a repair moves; None without any."""
        return None

    def modules_in(self, block: str, modules: list[str]) -> list[str]:
        """Level module only: where to step in inside a block, given the dotted names of the block and its modules."""
        return [block]

    def steps_in_at(self, site: Site) -> bool:
        """Levels attention and guidance: whether its settings ever reuse anything at this site."""
        return True

    def works_at(self, level: Level) -> bool:
        """Whether its settings ever reuse anything at sites of this level."""
        kinds = get_args(AttentionKind) if level == "attention" else (None,)
        return level in self.levels and any(self.steps_in_at(Site(level, "", kind=kind)) for kind in kinds)

    def will_hold(self, site: Site, features: Features, tested: Features = ()) -> int:
        """Bytes that one branch will hold at a site that gives these features, `tested` being those of FIRST_BLOCK."""
        return bytes_packed(features, self.stored_as(site))

    def stored_as(self, site: Site) -> torch.dtype | None:
        """The type in which what this site gives is kept; None is its own."""
        return DTYPES[self.cache_dtype] if site.level == "attention" else None

    def new_state(self, site: Site) -> Any:
        """What one branch keeps at one site: a dataclass, made for the run and thrown away."""
        raise NotImplementedError

    def around(self, call: Call, state: Any) -> Around:
        """Compute, reuse or forecast one site."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for setting_field in fields(self):
            if "help" in setting_field.metadata:
                value, default = getattr(self, setting_field.name), setting_field.default
                check(self.title, setting_field.name, value, default, setting_field.metadata)
