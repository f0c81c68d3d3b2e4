"""FasterCache: attention from the last two steps, and the prediction without the prompt from the one with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..strategy.forecast import History
from ..strategy.setting import counted, setting
from ..strategy.spacing import Broadcast
from ..strategy.step import Schedule, Step
from ..strategy.strategy import COMPUTE, CONDITIONAL, Around, Call, Site, Strategy
from ..strategy.windows import check_windows, ends_at, is_open, obstacle_in, starts_at

WINDOWS = (
    "spatial_attention_timestep_skip",
    "temporal_attention_timestep_skip",
    "unconditional_batch_timestep_skip",
    "low_frequency_weight_update",
    "high_frequency_weight_update",
)


@dataclass
class AttentionState:
    """What one branch keeps of one attention."""

    outputs: History = field(default_factory=lambda: History(capacity=2))
    broadcast: Broadcast = field(default_factory=Broadcast)


@dataclass
class GuidanceState:
    """How the prediction without the prompt differed from the one with it, when both were computed last."""

    low: Tensor | None = None  # low frequencies of the difference, float32, the latent's shape
    high: Tensor | None = None  # the others
    broadcast: Broadcast = field(default_factory=Broadcast)


@dataclass(frozen=True)
class FasterCache(Strategy):
    """Skip every other attention, and most of the model calls without the prompt.

    FasterCache, arXiv 2410.19355. A skipped attention gives its last output and, times `attention_weight`, what that
    changed since the one before. A skipped prediction without the prompt is the one with it plus how the two differed
    last, low and high frequencies apart: early steps decide large shapes, late ones detail, and that part of the
    difference is raised a little. The published code raises the stored difference again in each skipped step; here it
    stays as it was measured. Holds two outputs of each attention for each branch, and two float32 latents.
    """

    title = "FasterCache"
    summary = "Extrapolates every other attention and estimates most predictions for the negative prompt."
    source = "FasterCache, arXiv 2410.19355"
    aliases = ("CFG cache", "negative prompt", "skip CFG", "attention cache")
    levels = ("attention", "guidance")

    def new_state(self, site: Site) -> AttentionState | GuidanceState:
        return GuidanceState() if site.level == "guidance" else AttentionState()

    def around(self, call: Call, state: AttentionState | GuidanceState) -> Around:
        return self._unconditional(call, state) if call.site.level == "guidance" else self._attention(call, state)

    def _attention(self, call: Call, state: AttentionState) -> Around:
        kind, skip_range = call.site.kind, self._range_of(call.site)
        if call.may_reuse and not is_open(self, f"{kind}_attention_timestep_skip", call.step):
            call.reason = f"outside the timesteps of {kind} attention"
        elif call.may_reuse and state.broadcast.goes_on(call.step, skip_range):
            call.reason = f"{kind} attention is computed once in {skip_range} steps"
            call.order = len(state.outputs) - 1
            change = self._attention_weight(call.site) if call.order else 0.0
            return state.outputs.combined([1 + change, -change][: call.order + 1])
        elif call.may_reuse:
            call.reason = f"{kind} attention was extrapolated in {counted(skip_range - 1, 'step')}"
        state.outputs.add(call.step.time, (yield COMPUTE))
        state.broadcast.begin(call.step)

    def _unconditional(self, call: Call, state: GuidanceState) -> Around:
        if call.may_reuse and state.low is not None and self._skips_unconditional(call.step, state):
            call.reason = f"the negative prompt is computed once in {self.unconditional_batch_skip_range} steps"
            (conditional,) = yield CONDITIONAL
            estimate = conditional + self._low_weight(call.step) * state.low + self._high_weight(call.step) * state.high
            return (estimate.to(conditional.dtype),)
        conditional, unconditional = yield COMPUTE
        if conditional.ndim not in (4, 5):
            call.note(
                f"the negative prompt is not estimated: the model's output has {conditional.ndim} dimensions, and only "
                f"pictures (4) and videos (5) have frequencies along height and width"
            )
            return
        state.low, state.high = split_frequencies(unconditional.float() - conditional.float())
        state.broadcast.begin(call.step)

    def _skips_unconditional(self, step: Step, state: GuidanceState) -> bool:
        within = is_open(self, "unconditional_batch_timestep_skip", step)
        return within and state.broadcast.goes_on(step, self.unconditional_batch_skip_range)

    def _attention_weight(self, site: Site) -> float:
        return self.attention_weight

    def _low_weight(self, step: Step) -> float:
        return self.alpha_low_frequency if is_open(self, "low_frequency_weight_update", step) else 1.0

    def _high_weight(self, step: Step) -> float:
        return self.alpha_high_frequency if is_open(self, "high_frequency_weight_update", step) else 1.0

    def _range_of(self, site: Site) -> int:
        return getattr(self, f"{site.kind}_attention_block_skip_range")

    def steps_in_at(self, site: Site) -> bool:
        if site.level == "guidance":
            return self.unconditional_batch_skip_range > 1
        return site.kind != "cross" and self._range_of(site) > 1

    @property
    def is_off(self) -> bool:
        ranges = (self.spatial_attention_block_skip_range, self.temporal_attention_block_skip_range)
        return max(*ranges, self.unconditional_batch_skip_range) == 1

    def obstacle(self, schedule: Schedule) -> str:
        ranges = {
            "spatial_attention": self.spatial_attention_block_skip_range,
            "temporal_attention": self.temporal_attention_block_skip_range,
            "unconditional_batch": self.unconditional_batch_skip_range,
        }
        wanted = [f"{name}_timestep_skip" for name, skip_range in ranges.items() if skip_range > 1]
        return obstacle_in(self, wanted, schedule)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_windows(self, *WINDOWS)

    # The settings, and what a user reads of them

    spatial_attention_block_skip_range: int = setting(
        2,
        "Compute self-attention once in this many steps and extrapolate it in between. Higher is faster and less "
        "faithful. Usual: 2; 1 is off and holds much less memory.",
        minimum=1,
        maximum=20,
    )
    temporal_attention_block_skip_range: int = setting(
        1,
        "The same for temporal attention, in the few models that have it apart from spatial attention. Higher is "
        "faster and less faithful. Usual: 1, which is off, or 2 where there is some.",
        minimum=1,
        maximum=20,
    )
    spatial_attention_timestep_skip_start: int = starts_at(-1, "Skip self-attention")
    spatial_attention_timestep_skip_end: int = ends_at(681, "Skip self-attention")
    temporal_attention_timestep_skip_start: int = starts_at(-1, "Skip temporal attention")
    temporal_attention_timestep_skip_end: int = ends_at(681, "Skip temporal attention")
    attention_weight: float = setting(
        0.5,
        "How much of the last change of an attention's output is expected again in a skipped step. Higher continues "
        "it further; 0 reuses the last output as it is. Usual: 0.5.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
    )
    unconditional_batch_skip_range: int = setting(
        5,
        "Run the model for the negative prompt once in this many steps and estimate its prediction in between. With "
        "guidance this nearly halves the work. Higher is faster and less faithful. Usual: 2 to 5; 1 is off.",
        minimum=1,
        maximum=20,
    )
    unconditional_batch_timestep_skip_start: int = starts_at(-1, "Skip the negative prompt")
    unconditional_batch_timestep_skip_end: int = ends_at(641, "Skip the negative prompt")
    alpha_low_frequency: float = setting(
        1.1,
        "Weight of the low frequencies (large shapes) of the difference between the prompts, within their window of "
        "timesteps. Higher strengthens the prompt there. Usual: 1 to 1.2; 1 leaves them as they were measured.",
        minimum=0.0,
        maximum=2.0,
        step=0.05,
    )
    alpha_high_frequency: float = setting(
        1.1,
        "Weight of the high frequencies (detail) of the difference between the prompts, within their window of "
        "timesteps. Higher strengthens the prompt there. Usual: 1 to 1.2; 1 leaves them as they were measured.",
        minimum=0.0,
        maximum=2.0,
        step=0.05,
    )
    low_frequency_weight_update_start: int = starts_at(99, "Weigh the low frequencies")
    low_frequency_weight_update_end: int = ends_at(901, "Weigh the low frequencies")
    high_frequency_weight_update_start: int = starts_at(-1, "Weigh the high frequencies")
    high_frequency_weight_update_end: int = ends_at(301, "Weigh the high frequencies")


def split_frequencies(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high frequencies along the last two axes, (..., height, width); their sum is the latent.

    Low is what lies within a fifth of the shorter side around frequency zero, as published. Kept as pictures, not as
    spectra: weighing and adding them needs no transform, as the transform is linear.
    """
    height, width = latent.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=latent.device)
    columns = torch.fft.rfftfreq(width, 1 / width, device=latent.device)
    is_low = rows[:, None] ** 2 + columns[None] ** 2 <= (min(height, width) // 5) ** 2  # (height, width // 2 + 1)
    low = torch.fft.irfft2(torch.fft.rfft2(latent) * is_low, s=(height, width))
    return low, latent - low
