"""Strategies as diffusers' configs mean them: at modules chosen by name, in the steps that diffusers computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...strategies.faster_cache import AttentionState, FasterCache
from ...strategies.first_block import FirstBlockCache
from ...strategies.pyramid_attention import PyramidAttentionBroadcast
from ...strategies.taylorseer import TaylorSeerCache
from ...strategy.spacing import Broadcast
from ...strategy.step import Schedule, Step
from ...strategy.strategy import Around, Call, Site
from ...strategy.tensors import copied

Names = Mapping[str, Sequence[str]]  # kind of attention -> regular expressions, for the kinds whose names were chosen
Weight = Callable[[nn.Module], float]


@dataclass(frozen=True)
class PublishedFirstBlockCache(FirstBlockCache):
    """Reuses in the steps in which diffusers does: where the first block is as it was in the last computed one."""

    adds_up = False


@dataclass(frozen=True)
class NamedPyramidAttentionBroadcast(PyramidAttentionBroadcast):
    """At attention modules that are chosen by name, in the steps that diffusers computes."""

    names: Names = field(default_factory=dict, hash=False)

    def _goes_on(self, step: Step, broadcast: Broadcast, skip_range: int) -> bool:
        return _goes_on(step, skip_range)

    def steps_in_at(self, site: Site) -> bool:
        return super().steps_in_at(site) and _is_chosen(site, self.names)


@dataclass(frozen=True)
class NamedFasterCache(FasterCache):
    """At attention modules that are chosen by name, with weights that are asked for at every use.

    Attention alone is computed in the steps in which diffusers does, and continued from what was extrapolated before.
    With estimates of the negative prompt it begins anew with each pair that is computed, as both prompts' outputs are
    then new: closer at no more work.
    """

    names: Names = field(default_factory=dict, hash=False)
    model: nn.Module | None = None
    attention_weight_of: Weight | None = None
    low_frequency_weight_of: Weight | None = None
    high_frequency_weight_of: Weight | None = None

    def steps_in_at(self, site: Site) -> bool:
        return super().steps_in_at(site) and (site.level == "guidance" or _is_chosen(site, self.names))

    def _goes_on(self, step: Step, broadcast: Broadcast, skip_range: int) -> bool:
        if self.unconditional_batch_skip_range > 1:
            return super()._goes_on(step, broadcast, skip_range)
        return _goes_on(step, skip_range)

    def _attention(self, call: Call, state: AttentionState) -> Around:
        extrapolated = yield from super()._attention(call, state)
        if extrapolated is not None and self.unconditional_batch_skip_range == 1:
            state.outputs.make_room(call.step.time)
            state.outputs.add(call.step.time, copied(extrapolated))
        return extrapolated

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

    def computed_steps(self, schedule: Schedule, cost: float = 0.0) -> tuple[int, ...]:
        """As diffusers counts: the first after the warm-up is forecast, the next computed, then one an interval."""
        after_warm_up = self.disable_cache_before_step + 1
        return tuple(
            step
            for step in range(schedule.count)
            if step in (0, *range(self.disable_cache_before_step)) or (step - after_warm_up) % self.cache_interval == 0
        )

    def modules_in(self, block: str, modules: list[str]) -> list[str]:
        return super().modules_in(block, [block, *modules])


def _goes_on(step: Step, skip_range: int) -> bool:
    """As diffusers counts: one step in `skip_range` is computed, counted from the run's first, not the window's."""
    return step.index % skip_range != 0


def _is_chosen(site: Site, names: Names) -> bool:
    return site.kind not in names or fits(site.name, names[site.kind], re.search)


def fits(name: str, expressions: Sequence[str], match: Callable[..., Any]) -> bool:
    """Whether a dotted name fits one of the regular expressions."""
    return any(match(expression, name) for expression in expressions)
