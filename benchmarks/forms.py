"""What it costs in dB to keep attention's outputs in fewer bits, on the trained demo in ComfyUI.

    ~/comfy/ComfyUI/.venv/bin/python benchmarks/forms.py

16 pictures, 20 Euler steps, cfg 3. For each cache the closeness to the uncached pictures as computed and in each form
and, in brackets, that to the cache's own pictures.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import torch
from demo_models import InComfyUI
from repair import sampled

PICTURES = 16


def caches() -> dict[str, Any]:
    """Strategies that reuse attention and nothing else, by name."""
    from cache_core.strategies.faster_cache import FasterCache
    from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast

    always = dict(spatial_attention_timestep_skip_start=-1, spatial_attention_timestep_skip_end=1001)
    return {
        "Pyramid Attention Broadcast": PyramidAttentionBroadcast(),
        "the same in all timesteps": PyramidAttentionBroadcast(**always),
        "FasterCache": FasterCache(unconditional_batch_skip_range=1),
    }


def pictures(demo: InComfyUI, strategy: Any, shift: float) -> list[torch.Tensor]:
    """Each (3, 128, 128); uncached where the strategy is None."""
    from quality_rows import Row

    return [picture for picture, _ in sampled(demo, Row("", strategy=strategy), shift, PICTURES)]


def main() -> None:
    torch.set_num_threads(1)
    demo = InComfyUI()
    from cache_core.compare.quality import psnr
    from cache_core.strategy.packed import AS_COMPUTED, FORMS

    def closeness(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        return median(map(psnr, some, others))

    for shift in demo.subject.shifts:
        plain = pictures(demo, None, shift)
        for name, strategy in caches().items():
            own = pictures(demo, strategy, shift)
            said = [f"{AS_COMPUTED} {closeness(own, plain):.1f}"]
            for form in FORMS[1:]:
                less = pictures(demo, replace(strategy, cache_dtype=form), shift)
                said.append(f"{form} {closeness(less, plain):.1f} ({closeness(less, own):.0f})")
            print(f"shift {shift:g}, {name}: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
