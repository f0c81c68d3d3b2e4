"""Pyramid Attention Broadcast: what attention gives changes so slowly that it serves several steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..strategy.few_steps import few_steps
from ..strategy.packed import cache_device, cache_dtype
from ..strategy.setting import counted, memory_limit, setting
from ..strategy.spacing import Broadcast
from ..strategy.step import Schedule, Step
from ..strategy.strategy import COMPUTE, COMPUTE_ONLY, Around, Call, Site, Strategy
from ..strategy.tensors import Features
from ..strategy.windows import closed_windows, ends_at, is_open, may_open, obstacle_in, starts_at

KINDS = ("spatial", "temporal", "cross")


@dataclass
class BroadcastState:
    """What one branch keeps of one attention."""

    output: Features = ()
    broadcast: Broadcast = field(default_factory=Broadcast)


def _skip_range(default: int, kind: str, where: str, usual: str, is_first: bool = False) -> int:
    return setting(
        default,
        f"Higher is faster and less faithful. Compute {kind}attention once in this many steps and reuse its output in "
        f"between. {where} Usual: {usual}; 1 is off.",
        minimum=1,
        maximum=20,
        is_first=is_first,
    )


@dataclass(frozen=True)
class PyramidAttentionBroadcast(Strategy):
    """In the middle of the sampling, compute each kind of attention once in some steps and reuse its output in between.

    Pyramid Attention Broadcast, arXiv 2408.12588. What attention gives moves in the first and the last steps and hardly
    in between: spatial attention most, temporal less, cross-attention least, hence a range for each. Norms, gates and
    feed-forward always run, so it saves no more than attention's share of the work. Each branch of the prompt has its
    own output. Holds one output of each attention for each branch: attentions * tokens * channels * bytes * branches.
    """

    title = "Pyramid Attention Broadcast"
    summary = "Makes long videos faster. Reuses the output of attention for a few steps in the middle of the sampling."
    source = "Pyramid Attention Broadcast, arXiv 2408.12588"
    aliases = ("PAB", "VideoSys", "attention cache")
    levels = ("attention",)

    def new_state(self, site: Site) -> BroadcastState:
        return BroadcastState()

    def around(self, call: Call, state: BroadcastState) -> Around:
        kind, skip_range = call.site.kind, self._range_of(call.site.kind)
        if call.may_reuse and not is_open(self, f"{kind}_attention_timestep_skip", call.step):
            call.reason = f"outside the timesteps of {kind} attention"
        elif call.may_reuse and state.output and self._goes_on(call.step, state.broadcast, skip_range):
            call.reason = f"{kind} attention is computed once in {skip_range} steps"
            return state.output
        elif call.may_reuse:
            call.reason = f"{kind} attention was reused in {counted(skip_range - 1, 'step')}"
        state.output = ()  # gigabytes on large models
        if may_open(self, f"{kind}_attention_timestep_skip", call.schedule, call.step, 1):
            state.output = yield COMPUTE
            state.broadcast.begin(call.step)
        else:
            yield COMPUTE_ONLY

    def _goes_on(self, step: Step, broadcast: Broadcast, skip_range: int) -> bool:
        """Whether what is kept of an attention serves this step too."""
        return broadcast.goes_on(step, skip_range)

    def _range_of(self, kind: str) -> int:
        return getattr(self, f"{kind}_attention_block_skip_range")

    def steps_in_at(self, site: Site) -> bool:
        return self._range_of(site.kind) > 1

    @property
    def is_off(self) -> bool:
        return max(self._range_of(kind) for kind in KINDS) == 1

    def obstacle(self, schedule: Schedule) -> str:
        return obstacle_in(self, self._windows, schedule)

    @property
    def contradiction(self) -> str:
        return closed_windows(self, self._windows)

    @property
    def _windows(self) -> list[str]:
        """Those of the kinds of attention that are reused."""
        return [f"{kind}_attention_timestep_skip" for kind in KINDS if self._range_of(kind) > 1]

    # The settings, and what a user reads of them

    spatial_attention_block_skip_range: int = _skip_range(
        2, "self-", "Also that of text and picture jointly, as in Flux, Qwen-Image, SD3 and HunyuanVideo.", "2", True
    )
    temporal_attention_block_skip_range: int = _skip_range(
        1, "temporal ", "Few models have it apart from spatial attention.", "3 to 4 where there is some"
    )
    cross_attention_block_skip_range: int = _skip_range(
        1, "cross-", "That is attention to the text in Wan, LTX, Cosmos and PixArt.", "3 to 6"
    )
    spatial_attention_timestep_skip_start: int = starts_at(100, "Reuse self-attention")
    spatial_attention_timestep_skip_end: int = ends_at(800, "Reuse self-attention")
    temporal_attention_timestep_skip_start: int = starts_at(100, "Reuse temporal attention")
    temporal_attention_timestep_skip_end: int = ends_at(800, "Reuse temporal attention")
    cross_attention_timestep_skip_start: int = starts_at(100, "Reuse cross-attention")
    cross_attention_timestep_skip_end: int = ends_at(800, "Reuse cross-attention")
    memory_limit_gb: float = memory_limit("attentions", 1, "1.5", "3", "25", "58", "19")
    few_steps: str = few_steps()
    cache_device: str = cache_device("attentions")
    cache_dtype: str = cache_dtype()
