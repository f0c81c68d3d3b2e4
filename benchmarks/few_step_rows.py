"""What `quality.py --model few-steps` compares, in runs of 8, 6 or 4 steps: caches at every level, told to reuse."""

from __future__ import annotations

from quality_rows import FEWER_STEPS, Row

from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache

ALL_TIMESTEPS = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)


def rows(steps: int) -> list[Row]:
    """All that is compared with the uncached run of so many steps, method by method, each from careful to fast."""
    return [
        *(Row(FEWER_STEPS, f"{fewer} steps", steps=fewer) for fewer in range(steps - 1, max(steps - 5, 1), -1)),
        *(
            Row("Fewer steps, dpmpp_2m", f"{fewer} steps", fewer, sampler="dpmpp_2m")
            for fewer in range(steps - 1, steps // 2, -1)
        ),
        *(
            Row("First Block Cache", f"threshold {value:g}", steps, FirstBlockCache(value))
            for value in (0.12, 0.2, 0.3, 0.5, 0.8)
        ),
        *(
            Row(
                f"TaylorSeer, level {level}, order {order}",
                f"warm-up 2, interval {interval}",
                steps,
                TaylorSeerCache(interval, order, disable_cache_before_step=2, cache_level=level, few_steps="draft"),
            )
            for level in ("output", "model", "module")
            for order in (0, 1)
            for interval in (2, 3)
        ),
        *(
            Row(
                "Pyramid Attention Broadcast in all timesteps",
                f"range {skip_range}",
                steps,
                PyramidAttentionBroadcast(skip_range, few_steps="draft", **ALL_TIMESTEPS),
            )
            for skip_range in (2, 3)
        ),
    ]
