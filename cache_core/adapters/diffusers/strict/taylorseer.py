"""TaylorSeer as diffusers 0.42.1 does it (arXiv 2503.06923).

Modules are computed every few calls; in between their outputs are extrapolated with repeated backward differences.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.hooks.hooks import CacheContext
from diffusers.hooks.taylorseer_cache import (
    _BLOCK_IDENTIFIERS,
    _PROJ_OUT_IDENTIFIERS,
    _TRANSFORMER_BLOCK_IDENTIFIERS,
)
from torch import Tensor, nn

from .parts import States, run_with

logger = logging.getLogger(__name__)


@dataclass
class Series:
    """What one module keeps of one context."""

    calls: int = 0
    computed_at: int | None = None  # number of the last call that was computed
    factors: list[list[Tensor]] = field(default_factory=list)  # of each output, by order
    like: list[tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=list)  # of each output


class TaylorSeer:
    """Forecasts the outputs of modules. Each module counts its own calls, in each context from zero."""

    def __init__(self, model: nn.Module, config: TaylorSeerCacheConfig) -> None:
        self.model, self.config = model, config
        forecast, silent = _patterns(config)
        self.is_silent = {
            module: _fits(silent, name)
            for name, module in model.named_modules()
            if _fits(silent, name) or _fits(forecast, name)
        }
        self.series = {module: States(Series) for module in self.is_silent}

    def call(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: CacheContext | None
    ) -> Any:
        """One pass of the model."""
        arounds = {module: partial(self._around, context, module) for module in self.is_silent}
        return run_with(arounds, self.model, forward, args, kwargs)

    def reset(self) -> None:
        """Forget all contexts."""
        for states in self.series.values():
            states.clear()

    def _around(
        self, context: CacheContext | None, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        series, is_silent = self.series[module].of(context), self.is_silent[module]
        number = series.calls
        series.calls += 1
        if not self._computes(number):
            if series.computed_at is None:
                raise ValueError(
                    "TaylorSeer has nothing to forecast from yet. Set disable_cache_before_step to 1 or more."
                )
            outputs = _zeros(series) if is_silent else _forecast(series, number)
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        output = forward(*args, **kwargs)
        outputs = (output,) if isinstance(output, Tensor) else output
        if not is_silent:
            series.factors = [self._factors(series, number, index, value) for index, value in enumerate(outputs)]
        series.like = [(value.shape, value.dtype, outputs[0].device) for value in outputs]
        series.computed_at = number
        return output

    def _computes(self, number: int) -> bool:
        """Warm-up, then one call in `cache_interval`, the first of them one call late, and all at the end."""
        start, stop = self.config.disable_cache_before_step, self.config.disable_cache_after_step
        is_due = (number - start - 1) % self.config.cache_interval == 0
        return number < start or is_due or (stop is not None and number >= stop)

    def _factors(self, series: Series, number: int, index: int, value: Tensor) -> list[Tensor]:
        """Differences of rising order: taken in the output's dtype, kept in the config's.

        Each divides by the last gap only, whatever the gap before it was (W1).
        """
        before = series.factors[index] if index < len(series.factors) else []
        factors = [value]
        for earlier in before[: self.config.max_order]:
            if earlier.shape != factors[-1].shape:
                break
            factors.append((factors[-1] - earlier.to(value.dtype)) / (number - series.computed_at))
        dtype = self.config.taylor_factors_dtype
        return factors if dtype is None else [factor.to(dtype) for factor in factors]


def _forecast(series: Series, number: int) -> list[Tensor]:
    """Each output's factors times elapsed^order / order!, summed by rising order in the output's dtype."""
    elapsed = number - series.computed_at
    outputs = []
    for factors, (_, dtype, _) in zip(series.factors, series.like):
        total = torch.zeros_like(factors[0], dtype=dtype)
        for order in range(len(series.factors[0])):
            total = total + factors[order].to(dtype) * (elapsed**order / math.factorial(order))
        outputs.append(total)
    return outputs


def _zeros(series: Series) -> list[Tensor]:
    """What stands in for a silent module."""
    return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in series.like]


def _patterns(config: TaylorSeerCacheConfig) -> tuple[Sequence[str], Sequence[str]]:
    """Names of modules to forecast, and of modules that return zeros instead. The second wins where both fit."""
    if not config.use_lite_mode:
        return config.cache_identifiers or _TRANSFORMER_BLOCK_IDENTIFIERS, config.skip_predict_identifiers or ()
    if config.cache_identifiers or config.skip_predict_identifiers:
        logger.warning("TaylorSeer: use_lite_mode chooses the modules itself; the identifiers given are not used.")
    return _PROJ_OUT_IDENTIFIERS, _BLOCK_IDENTIFIERS


def _fits(patterns: Sequence[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
