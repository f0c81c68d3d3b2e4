"""diffusers 0.42.1's caching, bit for bit, with its defects: what strict_parity=True means.

Every engine here decides and computes as diffusers' hooks do, in the same order of operations and the same dtypes, so
that outputs are equal to the last bit (`tests/parity`). What is better about our own strategies is left out on purpose.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..root import Engine
from .faster_cache import FasterCache
from .first_block import FirstBlockCache
from .pyramid import PyramidAttentionBroadcast
from .taylorseer import TaylorSeer


def engine_for(model: nn.Module, config: Any) -> Engine:
    """The engine that does to the model what diffusers does with this config. Raises where diffusers raises."""
    import diffusers.hooks

    engines = {
        diffusers.hooks.FirstBlockCacheConfig: FirstBlockCache,
        diffusers.hooks.TaylorSeerCacheConfig: TaylorSeer,
        diffusers.hooks.PyramidAttentionBroadcastConfig: PyramidAttentionBroadcast,
        diffusers.hooks.FasterCacheConfig: FasterCache,
    }
    for known, engine in engines.items():
        if isinstance(config, known):
            return engine(model, config)
    raise ValueError(
        f"strict_parity reproduces diffusers' own caching, and {type(config).__name__} is none of its configs. Pass "
        f"one of {', '.join(known.__name__ for known in engines)}, or leave strict_parity out."
    )
