"""FasterCache as diffusers publishes it: the negative prompt is left out several times in a row, and late."""

from __future__ import annotations

from typing import Any

from cache_core.strategies.faster_cache import FasterCache


def as_published(**settings: Any) -> FasterCache:
    """With the windows and the range of diffusers' defaults, but for these settings."""
    return FasterCache(
        **dict(
            spatial_attention_timestep_skip_end=681,
            temporal_attention_timestep_skip_end=681,
            unconditional_batch_timestep_skip_end=641,
            unconditional_batch_skip_range=5,
        )
        | settings
    )
