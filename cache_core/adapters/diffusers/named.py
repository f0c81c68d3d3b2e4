"""Strategies at modules that are chosen by name, as diffusers' configs choose them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...strategies.faster_cache import FasterCache
from ...strategies.pyramid_attention import PyramidAttentionBroadcast
from ...strategies.taylorseer import TaylorSeerCache
from ...strategy.step import Schedule, Step
from ...strategy.strategy import Site

Names = Mapping[str, Sequence[str]]  # kind of attention -> regular expressions, for the kinds whose names were chosen
Weight = Callable[[nn.Module], float]


@dataclass(frozen=True)
class NamedPyramidAttentionBroadcast(PyramidAttentionBroadcast):
    """At attention modules that are chosen by name."""

    names: Names = field(default_factory=dict, hash=False)

    def steps_in_at(self, site: Site) -> bool:
        return super().steps_in_at(site) and _is_chosen(site, self.names)


@dataclass(frozen=True)
class NamedFasterCache(FasterCache):
    """At attention modules that are chosen by name, with weights that are asked for at every use."""

    names: Names = field(default_factory=dict, hash=False)
    model: nn.Module | None = None
    attention_weight_of: Weight | None = None
    low_frequency_weight_of: Weight | None = None
    high_frequency_weight_of: Weight | None = None

    def steps_in_at(self, site: Site) -> bool:
        return super().steps_in_at(site) and (site.level == "guidance" or _is_chosen(site, self.names))

    def _attention_weight(self, site: Site) -> float:
        if self.attention_weight_of is None:
            return super()._attention_weight(site)
        return float(self.attention_weight_of(self.model.get_submodule(site.name)))

    def _low_weight(self, step: Step) -> float:
        weight = self.low_frequency_weight_of
        return super()._low_weight(step) if weight is None else float(weight(self.model))

    def _high_weight(self, step: Step) -> float:
        weight = self.high_frequency_weight_of
        return super()._high_weight(step) if weight is None else float(weight(self.model))


@dataclass(frozen=True)
class NamedTaylorSeerCache(TaylorSeerCache):
    """At modules that are chosen by name, whole blocks among them, in the steps that diffusers computes."""

    def computed_steps(self, schedule: Schedule) -> tuple[int, ...]:
        """As diffusers counts: the first after the warm-up is forecast, the next computed, then one an interval."""
        after_warm_up = self.disable_cache_before_step + 1
        return tuple(
            step
            for step in range(schedule.count)
            if step in (0, *range(self.disable_cache_before_step)) or (step - after_warm_up) % self.cache_interval == 0
        )

    def modules_in(self, block: str, modules: list[str]) -> list[str]:
        return super().modules_in(block, [block, *modules])


def _is_chosen(site: Site, names: Names) -> bool:
    return site.kind not in names or fits(site.name, names[site.kind], re.search)


def fits(name: str, expressions: Sequence[str], match: Callable[..., Any]) -> bool:
    """Whether a dotted name fits one of the regular expressions."""
    return any(match(expression, name) for expression in expressions)
