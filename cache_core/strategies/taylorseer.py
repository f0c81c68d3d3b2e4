"""TaylorSeer: compute some steps, forecast the others from those."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..strategy.few_steps import few_steps
from ..strategy.forecast import History, recursion_weights, safe_weights
from ..strategy.packed import cache_device
from ..strategy.repairing import LONGEST_GAPS, repair, why_too_long
from ..strategy.setting import as_expressions, check_dtype, fits, memory_limit, setting
from ..strategy.spacing import is_due, nothing_between, spacing, steps_at_interval, too_few
from ..strategy.step import Schedule, Step
from ..strategy.strategy import COMPUTE, COMPUTE_ONLY, Around, Call, Level, Site, Strategy
from ..strategy.tensors import Features
from ..strategy.wish import contradiction_of, is_wished, planned_steps, target_speedup, why_nothing_left

NOISE_IS_ADDED = (
    "the sampler moves the latent in ways that the model's predictions do not explain (it adds noise, say), so "
    "TaylorSeer reuses the last output as it is and continues no trend"
)
# Attention and feed-forward modules by the names that models give them, wherever they are in a block.
ATTENTION_OR_FEED_FORWARD = r".*\.\d+\.(.*\.)?(\w+_)?(attn\d?|attention|mlp|ff|ffn|feed_forward)(_context)?"


@dataclass
class TaylorSeerState:
    """What one branch keeps at one site."""

    outputs: History
    step: int = -1  # the last one that was computed, by its index


@dataclass(frozen=True)
class TaylorSeerCache(Strategy):
    """Compute about one in `cache_interval` steps and forecast the others from the last few computed.

    TaylorSeer, arXiv 2503.06923. The published forecast is a Taylor series in the step index whose differences do not
    fit the real distances; ours is the polynomial through the stored outputs at their real sigmas, of an order that
    drops by itself where it would magnify errors (`weights="recursion"` is the published one). A step is computed once
    for each sigma (Heun's method asks twice). Of a sampler that adds noise no trend is continued: the last output is
    reused. Holds `max_order + 1` outputs of each site for each branch; at level model, of each stream.
    """

    title = "TaylorSeer Cache"
    summary = "Makes sampling faster. Computes some steps in full and forecasts the others from them."
    source = "TaylorSeer, arXiv 2503.06923"
    aliases = ("Taylor", "forecast", "skip steps", "Spectrum", "HiCache", "cache-dit")

    def new_state(self, site: Site) -> TaylorSeerState:
        return TaylorSeerState(History(capacity=self.max_order + 1))

    def around(self, call: Call, state: TaylorSeerState) -> Around:
        if 0 <= self.disable_cache_after_step <= call.step.index:
            call.reason = f"from disable_cache_after_step {self.disable_cache_after_step} on"
            state.outputs = History(capacity=self.max_order + 1)
            yield COMPUTE_ONLY
            return
        computes = self._computes(call, state)
        if call.may_reuse and not computes:
            weights = self._weights(call, state.outputs.nodes)
            call.order = len(weights) - 1
            return state.outputs.combined(weights)
        state.outputs.make_room(self._node(call.step))
        state.outputs.add(self._node(call.step), (yield COMPUTE))
        state.step = call.step.index

    def will_hold(self, site: Site, features: Features, tested: Features = ()) -> int:
        return (self.max_order + 1) * super().will_hold(site, features)

    def stored_as(self, site: Site) -> torch.dtype | None:
        return self.taylor_factors_dtype

    def _computes(self, call: Call, state: TaylorSeerState) -> bool:
        step = call.step
        if self.target_speedup:
            return is_wished(self, call, state.step)
        is_planned = is_due(self.computed_steps(call.schedule), step.index, state.step)
        if is_planned and not state.outputs.has(self._node(step)):
            call.reason = f"planned by warm-up {self.disable_cache_before_step} and interval {self.cache_interval}"
            return True
        if call.may_reuse:
            between = f"between computed steps, interval {self.cache_interval}"
            call.reason = "computed at this sigma already" if is_planned else between
        return False

    def _weights(self, call: Call, nodes: list[float]) -> list[float]:
        order = 0 if call.adds_noise else self.max_order
        if order < self.max_order:
            call.note(NOISE_IS_ADDED)
        forecast = safe_weights if self.weights == "sigma" else recursion_weights
        return forecast(nodes, self._node(call.step), order)

    def _node(self, step: Step) -> float:
        return step.time if self.weights == "sigma" else float(step.index)

    def computed_steps(self, schedule: Schedule, cost: float = 0.0) -> tuple[int, ...]:
        """The steps computed because of warm-up and interval, or of the wish."""
        before, along = self.disable_cache_before_step, self.spacing
        if self.target_speedup:
            return planned_steps(schedule, self.target_speedup, cost, before, self._late(schedule), spacing=along)
        return steps_at_interval(schedule, before, self.cache_interval, along)

    @property
    def levels(self) -> tuple[Level, ...]:
        return (self.cache_level,)

    def modules_in(self, block: str, modules: list[str]) -> list[str]:
        wanted = self.cache_identifiers or (ATTENTION_OR_FEED_FORWARD,)
        fitting = [name for name in modules if fits(name, wanted)]
        if not fitting and self.cache_identifiers is None:
            fitting = [block]  # as published for single blocks: what the whole block gives
        return [name for name in fitting if not fits(name, self.skip_predict_identifiers or ())]

    @property
    def is_off(self) -> bool:
        return self.target_speedup == 1 if self.target_speedup else self.cache_interval == 1

    def obstacle(self, schedule: Schedule) -> str:
        before, after = self.disable_cache_before_step, self.disable_cache_after_step
        if self.target_speedup or len(self._computed(schedule)) < schedule.count:
            return why_nothing_left(self, schedule)
        if len(self.computed_steps(schedule)) < schedule.count:
            return nothing_between(before, after)
        return too_few(schedule.count, before, self.cache_interval)

    def _late(self, schedule: Schedule) -> range:
        late, count = self.disable_cache_after_step, schedule.expected_count or schedule.count
        return range(late, count) if late >= 0 else range(0)

    def _computed(self, schedule: Schedule, cost: float = 0.0) -> set[int]:
        return {*self.computed_steps(schedule, cost), *self._late(schedule)}

    def why_unrepaired(self, schedule: Schedule, cost: float = 0.0) -> str:
        told = "" if self.cache_level in LONGEST_GAPS else f"cache_level is {self.cache_level}"
        return told or why_too_long(schedule, self._computed(schedule, cost), self.cache_level)

    def forecast_from(self, state: TaylorSeerState) -> History:
        return state.outputs

    @property
    def contradiction(self) -> str:
        before, after = self.disable_cache_before_step, self.disable_cache_after_step
        told = nothing_between(before, after) if 0 <= after <= before else ""
        return contradiction_of(self.target_speedup) or told

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cache_identifiers", "skip_predict_identifiers"):
            object.__setattr__(self, name, as_expressions(self.title, name, getattr(self, name)))
        check_dtype(self.title, "taylor_factors_dtype", self.taylor_factors_dtype)

    # The settings, and what a user reads of them

    cache_interval: int = setting(
        2,
        "Higher is faster and less faithful. Compute about one in this many steps and forecast the others. Usual: 2 "
        "balanced, 3 fast, 4 to 5 for drafts; with 50 steps 3 to 4. 1 computes every step.",
        minimum=1,
        maximum=20,
        is_first=True,
    )
    max_order: int = setting(
        1,
        "Higher holds more memory and needs more computed steps. Highest order of the forecast: 0 reuses the last "
        "output, 1 follows a straight line, 2 and 3 a curve. Usual: 1.",
        minimum=0,
        maximum=3,
    )
    disable_cache_before_step: int = setting(
        3,
        "Higher is slower and more faithful. Warm-up: compute this many steps at the start, where the picture's "
        "composition is decided. With spacing 'sigma' and fewer than 10 computed steps they are spread over the noise "
        "that these steps would cover on an even schedule; with 10 or more they are at least about 5. Usual: 2 to 5.",
        minimum=0,
        maximum=1000,
    )
    disable_cache_after_step: int = setting(
        -1,
        "Lower is slower and more faithful. Compute every step from this one on, to render fine detail in full. Usual: "
        "-1, which is never.",
        minimum=-1,
        maximum=1000,
    )
    cache_level: str = setting(
        "output",
        "What is forecast. 'output': the model's output; skips everything, holds a few latents, works for every model. "
        "'model': what the stack of blocks adds, so embedding and head still run. 'block' and 'module': the output of "
        "each block, or of each attention and feed-forward module, as published; they hold gigabytes on large models. "
        "Usual: 'output'.",
        choices=("output", "model", "block", "module"),
    )
    spacing: str = spacing()
    memory_limit_gb: float = memory_limit("blocks or modules", 2, "3/3", "6/12", "50/150", "115/346", "38/77")
    few_steps: str = few_steps()
    cache_device: str = cache_device("blocks or modules")
    repair: str = repair()
    target_speedup: float = target_speedup("cache_interval")
    weights: str = setting(
        "sigma",
        "'sigma': the polynomial through the stored outputs at their real sigmas. 'recursion': as published, in steps.",
        choices=("sigma", "recursion"),
        shown=False,
    )
    cache_identifiers: tuple[str, ...] | None = setting(
        None, "Level module: regular expressions; only modules whose whole dotted name fits one.", shown=False
    )
    skip_predict_identifiers: tuple[str, ...] | None = setting(
        None, "Level module: modules never cached, as regular expressions on the whole dotted name.", shown=False
    )
    taylor_factors_dtype: torch.dtype | None = setting(  # noqa: RUF009 - it makes a dataclass field
        None, "What to store outputs in; None keeps their own, and torch.bfloat16 halves float32's memory.", shown=False
    )
