"""Pyramid Attention Broadcast as diffusers 0.42.1 does it.

Inside a window of timesteps every n-th output of an attention is computed and stands in for the next ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.hooks import PyramidAttentionBroadcastConfig
from diffusers.hooks._common import _ATTENTION_CLASSES
from diffusers.hooks.hooks import CacheContext
from torch import nn

from .parts import run_with


@dataclass
class Attention:
    """One attention module: how often it runs where, and its last output, shared by all branches (W8)."""

    interval: int
    window: tuple[float, float]  # timesteps, both ends excluded
    calls: int = 0
    output: Any = None  # (batch, tokens, channels), or a tuple of image and text


class PyramidAttentionBroadcast:
    """Reuses outputs of attentions. Calls are counted from the last reset, whatever branch they are of."""

    def __init__(self, model: nn.Module, config: PyramidAttentionBroadcastConfig) -> None:
        if config.current_timestep_callback is None:
            raise ValueError("Pyramid Attention Broadcast needs to know the timestep: set current_timestep_callback.")
        self.model, self.timestep = model, config.current_timestep_callback
        self.plan = {module: found for name, module in model.named_modules() if (found := _rule(name, module, config))}
        self.attentions: dict[nn.Module, Attention] = {}
        self.reset()

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One pass of the model. Which branch it is makes no difference."""
        arounds = {module: partial(self._around, attention) for module, attention in self.attentions.items()}
        return run_with(arounds, self.model, forward, args, kwargs)

    def reset(self) -> None:
        """Forget all outputs and count from zero."""
        self.attentions = {module: Attention(interval, window) for module, (interval, window) in self.plan.items()}

    def _around(self, attention: Attention, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        low, high = attention.window
        is_outside = not low < self.timestep() < high
        is_first = attention.output is None or attention.calls == 0
        if is_first or is_outside or attention.calls % attention.interval == 0:
            attention.output = forward(*args, **kwargs)
        attention.calls += 1
        return attention.output


def _rule(
    name: str, module: nn.Module, config: PyramidAttentionBroadcastConfig
) -> tuple[int, tuple[float, float]] | None:
    """Interval and window of one module, by the first kind whose names fit: spatial, then temporal (W9), then cross."""
    if not isinstance(module, _ATTENTION_CLASSES):
        return None
    is_cross = getattr(module, "is_cross_attention", False)
    spatial, temporal, cross = (
        config.spatial_attention_block_skip_range,
        config.temporal_attention_block_skip_range,
        config.cross_attention_block_skip_range,
    )
    if spatial is None and temporal is None and cross is None:
        spatial = 2  # diffusers' choice when nothing was chosen
    if spatial is not None and not is_cross and _fits(config.spatial_attention_block_identifiers, name):
        return _unless_open(spatial, config.spatial_attention_timestep_skip_range)
    if temporal is not None and not is_cross and _fits(config.temporal_attention_block_identifiers, name):
        return _unless_open(temporal, config.temporal_attention_timestep_skip_range)
    if cross is not None and is_cross and _fits(config.cross_attention_block_identifiers, name):
        return _unless_open(cross, config.cross_attention_timestep_skip_range)
    return None


def _unless_open(interval: int, window: tuple[float, float] | None) -> tuple[int, tuple[float, float]] | None:
    return None if window is None else (interval, window)


def _fits(identifiers: Sequence[str], name: str) -> bool:
    return any(re.search(identifier, name) for identifier in identifiers)
