"""diffusers' config objects as strategies of ours, every field honoured; they know no difference for few steps."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import diffusers.hooks
from torch import nn

from ...model.chains import block_lists
from ...strategies.taylorseer import TaylorSeerCache
from ...strategy.few_steps import DRAFT
from ...strategy.packed import GPU
from ...strategy.strategy import Strategy
from .named import (
    NamedFasterCache,
    NamedPyramidAttentionBroadcast,
    NamedTaylorSeerCache,
    Names,
    PublishedFirstBlockCache,
    fits,
)

logger = logging.getLogger(__name__)

LOWEST_TIMESTEP, HIGHEST_TIMESTEP = -1, 1001  # no timestep lies outside
ATTENTION = r".*\.\d+\.(.*\.)?(\w+_)?(attn\d?|attention)"  # modules in blocks, by whatever name
TENSOR_FORMATS = ("BCFHW", "BFCHW", "BCHW")


@dataclass(frozen=True)
class Wanted:
    """What to do with a model. Raises ValueError for settings that contradict each other."""

    strategies: tuple[Strategy, ...]
    timestep: Callable[[], Any] | None = None  # asks the pipeline where it is
    is_joined: bool = False  # a batch is the branches [uncond, cond], whatever its context says
    joined_arguments: tuple[str, ...] = ()  # names of those known to hold both

    def __post_init__(self) -> None:
        for strategy in self.strategies:
            if strategy.contradiction:
                raise ValueError(f"{strategy.title}: {strategy.contradiction}.")


def settings_of(model: nn.Module, given: Any) -> Wanted:
    """The strategies that `given` asks for: strategies of ours, one or several, or a config of diffusers'."""
    if isinstance(given, Wanted):  # for another model
        return replace(given, strategies=tuple(_for_model(strategy, model) for strategy in given.strategies))
    if isinstance(given, Strategy):
        given = (given,)
    if isinstance(given, (tuple, list)):
        return Wanted(tuple(given))
    for known, converted in _CONVERTED.items():
        if isinstance(given, getattr(diffusers.hooks, known)):
            return converted(model, given)
    raise ValueError(
        f"{type(given).__name__} is not supported. Pass one of {', '.join(_CONVERTED)}, or our strategies."
    )


def _pyramid_attention_broadcast(model: nn.Module, config: Any) -> Wanted:
    kinds = ("spatial", "temporal", "cross")
    ranges = {kind: getattr(config, f"{kind}_attention_block_skip_range") for kind in kinds}
    if not any(ranges.values()):
        logger.info("Refrain: no skip range is set, so self-attention is computed every second step.")
        ranges["spatial"] = 2
    options: dict[str, Any] = {}
    for kind, skip_range in ranges.items():
        window = getattr(config, f"{kind}_attention_timestep_skip_range")
        options |= _skipping(f"{kind}_attention_block", f"{kind}_attention_timestep", skip_range, window)
    strategy = NamedPyramidAttentionBroadcast(names=_names(model, config, kinds), few_steps=DRAFT, **options)
    return Wanted((strategy,), config.current_timestep_callback)


def _faster_cache(model: nn.Module, config: Any) -> Wanted:
    if config.tensor_format not in TENSOR_FORMATS:
        raise ValueError(
            f"FasterCache: tensor_format is {config.tensor_format!r}. Set it to {' or '.join(TENSOR_FORMATS)}."
        )
    options: dict[str, Any] = {}
    for kind in ("spatial", "temporal"):
        skip_range = getattr(config, f"{kind}_attention_block_skip_range")
        window = getattr(config, f"{kind}_attention_timestep_skip_range")
        options |= _skipping(f"{kind}_attention_block", f"{kind}_attention_timestep", skip_range, window)
    skip_range = 1 if config.is_guidance_distilled else config.unconditional_batch_skip_range
    window = config.unconditional_batch_timestep_skip_range
    options |= _skipping("unconditional_batch", "unconditional_batch_timestep", skip_range, window)
    for band in ("low_frequency", "high_frequency"):
        window = _window(getattr(config, f"{band}_weight_update_timestep_range"))
        options[f"alpha_{band}"] = getattr(config, f"alpha_{band}") if window else 1.0
        if window:
            options |= {f"{band}_weight_update_start": window[0], f"{band}_weight_update_end": window[1]}
    strategy = NamedFasterCache(
        names=_names(model, config, ("spatial", "temporal")),
        model=model,
        attention_weight_of=config.attention_weight_callback,
        low_frequency_weight_of=config.low_frequency_weight_callback,
        high_frequency_weight_of=config.high_frequency_weight_callback,
        few_steps=DRAFT,
        cache_device=GPU,
        **options,
    )
    arguments = tuple(config._unconditional_conditional_input_kwargs_identifiers)
    return Wanted((strategy,), config.current_timestep_callback, not config.is_guidance_distilled, arguments)


def _first_block_cache(model: nn.Module, config: Any) -> Wanted:
    """Any threshold below 0 never reuses, and one above 1 is lowered to 1, where next to everything is reused."""
    threshold = min(max(config.threshold, 0.0), 1.0)
    return Wanted((PublishedFirstBlockCache(residual_diff_threshold=threshold, max_order=0),))


def _taylorseer(model: nn.Module, config: Any) -> Wanted:
    """Without names the attentions are forecast, as diffusers means it, on every model: its own names miss many.

    Up to order 1 its forecast is the polynomial in steps, and taken as it is; above it is none (W1), and ours is.

    Names that are to return zeros in a forecast step, because what they feed is forecast, are forecast as well: what
    else they feed then still has them. If they are whole blocks, what leaves the blocks is forecast instead.
    """
    after = config.disable_cache_after_step
    options: dict[str, Any] = dict(
        cache_interval=config.cache_interval,
        disable_cache_before_step=config.disable_cache_before_step,
        max_order=config.max_order,
        taylor_factors_dtype=config.taylor_factors_dtype,
        few_steps=DRAFT,
    )
    if after is not None and after <= config.disable_cache_before_step:
        options["cache_interval"] = 1  # every step lies before or after
    elif after is not None:
        options["disable_cache_after_step"] = after
    forecast, silent = tuple(config.cache_identifiers or ()), tuple(config.skip_predict_identifiers or ())
    _check_names(model, "cache_identifiers", forecast, re.fullmatch)
    _check_names(model, "skip_predict_identifiers", silent, re.fullmatch)
    blocks = {f"{name}.{key}" for name, blocks in block_lists(model) for key in blocks}
    if config.use_lite_mode or any(fits(name, silent, re.fullmatch) for name in blocks):
        return Wanted((TaylorSeerCache(cache_level="model", **options),))
    names = (forecast or (ATTENTION,)) + silent
    options["weights"] = "recursion" if config.max_order <= 1 else "sigma"
    return Wanted((NamedTaylorSeerCache(cache_level="module", cache_identifiers=names, **options),))


def _for_model(strategy: Strategy, model: nn.Module) -> Strategy:
    return replace(strategy, model=model) if isinstance(strategy, NamedFasterCache) else strategy


_CONVERTED = {
    "PyramidAttentionBroadcastConfig": _pyramid_attention_broadcast,
    "FasterCacheConfig": _faster_cache,
    "FirstBlockCacheConfig": _first_block_cache,
    "TaylorSeerCacheConfig": _taylorseer,
}


def _skipping(what: str, when: str, skip_range: int | None, window: Sequence[float] | None) -> dict[str, Any]:
    """The settings that skip something within a window of timesteps; none of both is off."""
    window = _window(window)
    if skip_range is None or window is None:
        return {f"{what}_skip_range": 1}
    return {f"{what}_skip_range": skip_range, f"{when}_skip_start": window[0], f"{when}_skip_end": window[1]}


def _window(given: Sequence[float] | None) -> tuple[float, float] | None:
    """A window of timesteps, both ends outside, as ours; None where no timestep lies in it."""
    if given is None:
        return None
    start, end = max(given[0], LOWEST_TIMESTEP), min(given[1], HIGHEST_TIMESTEP)
    whole = tuple(int(value) if value == int(value) else value for value in (start, end))
    return whole if start < end else None


def _names(model: nn.Module, config: Any, kinds: Sequence[str]) -> Names:
    """The names that were chosen for each kind of attention. diffusers' own are not a choice: ours fit more models."""
    defaults = {item.name: item.default for item in fields(config)}
    names = {}
    for kind in kinds:
        name = f"{kind}_attention_block_identifiers"
        chosen = tuple(getattr(config, name))
        if chosen != tuple(defaults[name]):
            _check_names(model, name, chosen, re.search)
            names[kind] = chosen
    return names


def _check_names(model: nn.Module, setting: str, expressions: Sequence[str], match: Callable[..., Any]) -> None:
    for expression in expressions:
        if not any(match(expression, name) for name, _ in model.named_modules()):
            some = ", ".join(name for name, _ in model.named_modules() if name.count(".") == 2) or "none"
            raise ValueError(
                f"{setting} holds {expression!r}, which fits no module of {type(model).__name__}, so nothing would be "
                f"cached. Some of its modules: {some[:200]}."
            )
