"""For who writes a strategy: what it is, its settings, the step, spacing, forecasts, and a few tensor functions."""

from .forecast import History, recursion_weights, safe_weights, safe_weights_on_device
from .setting import setting
from .spacing import Broadcast, published_steps, sigma_spaced_steps, steps_between_turns
from .step import OpenSchedule, Schedule, Step, is_same, schedule_of
from .strategy import (
    COMPUTE,
    CONDITIONAL,
    FIRST_BLOCK,
    GUIDANCE,
    Around,
    AttentionKind,
    Call,
    Level,
    Request,
    Site,
    Strategy,
)  # fmt: skip
from .tensors import Features, copied, relative_change, same_layout, sampled_tokens
from .windows import check_windows, ends_at, is_open, may_open, obstacle_in, starts_at

__all__ = [
    "COMPUTE", "CONDITIONAL", "FIRST_BLOCK", "GUIDANCE", "Around", "AttentionKind", "Broadcast", "Call", "Features",
    "History", "Level", "OpenSchedule", "Request", "Schedule", "Site", "Step", "Strategy", "check_windows", "copied",
    "ends_at", "obstacle_in", "is_open", "is_same", "may_open", "published_steps", "recursion_weights",
    "relative_change", "safe_weights", "safe_weights_on_device", "same_layout", "sampled_tokens", "schedule_of",
    "setting", "sigma_spaced_steps", "starts_at", "steps_between_turns",
]  # fmt: skip
