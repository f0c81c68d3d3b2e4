"""For who writes a strategy: what it is, its settings, the step, spacing, forecasts, and a few tensor functions."""

from .forecast import History, newton_weights, recursion_weights, safe_weights, safe_weights_on_device
from .setting import setting
from .spacing import Broadcast, published_steps, sigma_spaced_steps
from .step import Schedule, Step
from .strategy import COMPUTE, CONDITIONAL, FIRST_BLOCK, Around, Call, Level, Site, Strategy
from .tensors import Features, relative_change, sampled_tokens
from .windows import check_windows, ends_at, has_step, is_open, starts_at

__all__ = [
    "COMPUTE", "CONDITIONAL", "FIRST_BLOCK", "Around", "Call", "Level", "Site", "Strategy", "setting",
    "Schedule", "Step", "Features", "History", "Broadcast",
    "newton_weights", "recursion_weights", "safe_weights", "safe_weights_on_device",
    "published_steps", "sigma_spaced_steps", "relative_change", "sampled_tokens",
    "check_windows", "ends_at", "has_step", "is_open", "starts_at",
]  # fmt: skip
