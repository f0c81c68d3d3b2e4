"""FasterCache: attention from the last two steps, and the prediction without the prompt from the one with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..strategy.few_steps import few_steps
from ..strategy.forecast import History
from ..strategy.packed import bytes_packed, cache_device, cache_dtype
from ..strategy.setting import counted, memory_limit, setting
from ..strategy.spacing import Broadcast
from ..strategy.step import Schedule, Step
from ..strategy.strategy import COMPUTE, COMPUTE_ONLY, CONDITIONAL, Around, Call, Site, Strategy
from ..strategy.tensors import Features, split_frequencies
from ..strategy.windows import closed_windows, ends_at, is_open, last_beside, may_open, obstacle_in, starts_at

UNCONDITIONAL = "unconditional_batch_timestep_skip"  # a window
STRENGTHENS = "strengthens the prompt"
WEIGHED = ("low_frequency_weight_update", "high_frequency_weight_update")  # windows
PICTURES = (4, 5)  # dimensions of what has frequencies: pictures and videos


def _weight(frequencies: str) -> float:
    return setting(
        1.1,
        f"Higher strengthens the prompt. Weight of the {frequencies} of the difference between the prompts, within "
        "their window of timesteps. Usual: 1 to 1.2; 1 leaves them as they were measured.",
        minimum=0.0,
        maximum=2.0,
        step=0.05,
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
    """Skip every other attention, and every other model call without the prompt.

    FasterCache, arXiv 2410.19355. A skipped attention gives its last output and, times `attention_weight`, what that
    changed since the one before. A skipped prediction without the prompt is the one with it plus how the two differed
    last, low and high frequencies apart: early steps decide large shapes, late ones detail, and that part of the
    difference is raised a little; the published code raises it again in each skipped step. Holds two float32 latents
    and two outputs of each attention: twice attentions * tokens * channels * bytes. As much again for the negative
    prompt, only where a step that may reuse attention runs both prompts, as the one before did.
    """

    title = "FasterCache"
    summary = (
        "Makes sampling with a negative prompt faster. Extrapolates every other attention and estimates "
        "every other prediction for the negative prompt."
    )
    source = "FasterCache, arXiv 2410.19355"
    aliases = ("CFG cache", "negative prompt", "skip CFG", "attention cache")
    levels = ("attention", "guidance")

    def new_state(self, site: Site) -> AttentionState | GuidanceState:
        return GuidanceState() if site.level == "guidance" else AttentionState()

    def will_hold(self, site: Site, features: Features, tested: Features = ()) -> int:
        if site.level == "attention":
            return 2 * bytes_packed(features, self.stored_as(site))
        return 8 * features[0].numel() if features[0].ndim in PICTURES else 0  # low and high frequencies in float32

    def around(self, call: Call, state: AttentionState | GuidanceState) -> Around:
        return self._unconditional(call, state) if call.site.level == "guidance" else self._attention(call, state)

    def _attention(self, call: Call, state: AttentionState) -> Around:
        kind, skip_range = call.site.kind, self._range_of(call.site)
        window, unconditional = f"{kind}_attention_timestep_skip", (UNCONDITIONAL, self.unconditional_batch_skip_range)
        if call.may_be_left_out:
            call.serves_until = last_beside(self, (window, skip_range), unconditional, call.schedule)
        if call.may_reuse and not is_open(self, window, call.step):
            call.reason = f"outside the timesteps of {kind} attention"
        elif call.may_reuse and len(state.outputs) and self._goes_on(call.step, state.broadcast, skip_range):
            call.reason = f"{kind} attention is computed once in {skip_range} steps"
            call.order = len(state.outputs) - 1
            change = self._attention_weight(call.site) if call.order else 0.0
            return state.outputs.combined([1 + change, -change][: call.order + 1])
        elif call.may_reuse:
            call.reason = f"{kind} attention was extrapolated in {counted(skip_range - 1, 'step')}"
        if may_open(self, window, call.schedule, call.step, 2) and not call.is_of_no_use:
            state.outputs.make_room(call.step.time)
            state.outputs.add(call.step.time, (yield COMPUTE))
            state.broadcast.begin(call.step)
        else:
            state.outputs = History(capacity=2)
            yield COMPUTE_ONLY

    def _unconditional(self, call: Call, state: GuidanceState) -> Around:
        if call.may_reuse and state.low is not None and self._skips_unconditional(call.step, state):
            call.reason = f"the negative prompt is computed once in {self.unconditional_batch_skip_range} steps"
            (conditional,) = yield CONDITIONAL
            estimate = conditional + self._low_weight(call.step) * state.low + self._high_weight(call.step) * state.high
            return (estimate.to(conditional.dtype),)
        conditional, unconditional = yield COMPUTE
        if conditional.ndim not in PICTURES:
            call.note(
                f"the negative prompt is not estimated: the model's output has {conditional.ndim} dimensions, and only "
                f"pictures (4) and videos (5) have frequencies along height and width"
            )
            return
        state.low, state.high = split_frequencies(unconditional.float() - conditional.float())
        state.broadcast.begin(call.step)

    def _skips_unconditional(self, step: Step, state: GuidanceState) -> bool:
        return is_open(self, UNCONDITIONAL, step) and state.broadcast.goes_on(step, self.unconditional_batch_skip_range)

    def _goes_on(self, step: Step, broadcast: Broadcast, skip_range: int) -> bool:
        """Whether what is kept of an attention serves this step too."""
        return broadcast.goes_on(step, skip_range)

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
        return not self._windows

    def obstacle(self, schedule: Schedule) -> str:
        return obstacle_in(self, self._windows, schedule)

    @property
    def contradiction(self) -> str:
        return closed_windows(self, [*self._windows, *(WEIGHED if self.unconditional_batch_skip_range > 1 else ())])

    @property
    def _windows(self) -> list[str]:
        """Those in which something is skipped."""
        ranges = {
            "spatial_attention": self.spatial_attention_block_skip_range,
            "temporal_attention": self.temporal_attention_block_skip_range,
            "unconditional_batch": self.unconditional_batch_skip_range,
        }
        return [f"{name}_timestep_skip" for name, skip_range in ranges.items() if skip_range > 1]

    # The settings, and what a user reads of them

    spatial_attention_block_skip_range: int = setting(
        2,
        "Higher is faster and less faithful. Compute self-attention once in this many steps and extrapolate it in "
        "between. Usual: 2; 1 is off and holds much less memory.",
        minimum=1,
        maximum=20,
    )
    temporal_attention_block_skip_range: int = setting(
        1,
        "Higher is faster and less faithful. The same for temporal attention, in the few models that have it apart "
        "from spatial attention. Usual: 1, which is off, or 2 where there is some.",
        minimum=1,
        maximum=20,
    )
    spatial_attention_timestep_skip_start: int = starts_at(-1, "Skip self-attention")
    spatial_attention_timestep_skip_end: int = ends_at(950, "Skip self-attention")
    temporal_attention_timestep_skip_start: int = starts_at(-1, "Skip temporal attention")
    temporal_attention_timestep_skip_end: int = ends_at(950, "Skip temporal attention")
    attention_weight: float = setting(
        0.5,
        "Higher continues the last change further; 0 reuses the last output as it is. How much of the last change of "
        "an attention's output is expected again in a skipped step. Usual: 0.5.",
        minimum=0.0,
        maximum=1.0,
        step=0.05,
    )
    unconditional_batch_skip_range: int = setting(
        2,
        "Higher is faster and less faithful. Run the model for the negative prompt once in this many steps and "
        "estimate its prediction in between. Usual: 2, which saves up to a quarter of the work; 1 is off.",
        minimum=1,
        maximum=20,
        is_first=True,
    )
    unconditional_batch_timestep_skip_start: int = starts_at(-1, "Skip the negative prompt")
    unconditional_batch_timestep_skip_end: int = ends_at(950, "Skip the negative prompt")
    alpha_low_frequency: float = _weight("low frequencies (large shapes)")
    alpha_high_frequency: float = _weight("high frequencies (detail)")
    low_frequency_weight_update_start: int = starts_at(99, "Weigh the low frequencies", STRENGTHENS)
    low_frequency_weight_update_end: int = ends_at(901, "Weigh the low frequencies", STRENGTHENS)
    high_frequency_weight_update_start: int = starts_at(-1, "Weigh the high frequencies", STRENGTHENS)
    high_frequency_weight_update_end: int = ends_at(301, "Weigh the high frequencies", STRENGTHENS)
    memory_limit_gb: float = memory_limit("attentions", 2, "3", "3", "25", "58", "38", skips_negative=True)
    few_steps: str = few_steps()
    cache_device: str = cache_device("attentions")
    cache_dtype: str = cache_dtype()
