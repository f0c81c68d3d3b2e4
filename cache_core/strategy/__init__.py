"""For who writes a strategy: what it is, its settings, the step, spacing, forecasts, and a few tensor functions."""

from .few_steps import MOST_FEW, few_steps
from .forecast import History, recursion_weights, safe_weights, safe_weights_on_device
from .setting import setting
from .spacing import Broadcast, published_steps, sigma_spaced_steps, steps_between_turns
from .step import OpenSchedule, Schedule, Step, is_same, schedule_of
from .strategy import (
    COMPUTE,
    COMPUTE_ONLY,
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
from .tensors import Features, bytes_of, copied, relative_change, relative_sums, same_layout, sampled_tokens
from .windows import closed_windows, ends_at, is_open, may_open, obstacle_in, starts_at

__all__ = [
    "Around", "AttentionKind", "Broadcast", "COMPUTE", "COMPUTE_ONLY", "CONDITIONAL", "Call", "FIRST_BLOCK",
    "Features", "GUIDANCE", "History", "Level", "MOST_FEW", "OpenSchedule", "Request", "Schedule", "Site", "Step",
    "Strategy", "bytes_of", "closed_windows", "copied", "ends_at", "few_steps", "is_open", "is_same", "may_open",
    "obstacle_in", "published_steps", "recursion_weights", "relative_change", "relative_sums", "safe_weights",
    "safe_weights_on_device", "same_layout", "sampled_tokens", "schedule_of", "setting", "sigma_spaced_steps",
    "starts_at", "steps_between_turns",
]  # fmt: skip
