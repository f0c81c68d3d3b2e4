"""TaylorSeer: compute some steps, forecast the others from those."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..strategy.forecast import History, recursion_weights, safe_weights
from ..strategy.setting import check_expressions, counted, setting
from ..strategy.spacing import published_steps, sigma_spaced_steps, steps_between_turns
from ..strategy.step import OpenSchedule, Schedule, Step
from ..strategy.strategy import COMPUTE, Around, Call, Level, Site, Strategy

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
    drops by itself where it would magnify errors (`weights="recursion"` is the published one). What is forecast is by
    default one tensor, the model's output, not one per module. A step that is computed is so once for each sigma: what
    Heun's method asks for at the next step's sigma is that step's computation. Of a sampler that adds noise no trend is
    continued: the last output is reused.
    """

    title = "TaylorSeer Cache"
    summary = "Computes some steps in full and forecasts the others from them."
    source = "TaylorSeer, arXiv 2503.06923"
    aliases = ("Taylor", "forecast", "skip steps", "Spectrum", "HiCache", "cache-dit")

    def new_state(self, site: Site) -> TaylorSeerState:
        return TaylorSeerState(History(capacity=self.max_order + 1, dtype=self.taylor_factors_dtype))

    def around(self, call: Call, state: TaylorSeerState) -> Around:
        computes = self._computes(call, state)
        if call.may_reuse and not computes:
            weights = self._weights(call, state.outputs.nodes)
            call.order = len(weights) - 1
            return state.outputs.combined(weights)
        state.outputs.add(self._node(call.step), (yield COMPUTE))
        state.step = call.step.index

    def _computes(self, call: Call, state: TaylorSeerState) -> bool:
        step, schedule = call.step, call.schedule
        if 0 <= self.disable_cache_after_step <= step.index:
            call.reason = f"from disable_cache_after_step {self.disable_cache_after_step} on"
            return True
        planned = self.computed_steps(schedule)
        is_planned = step.index in planned or any(state.step < index < step.index for index in planned)  # or overdue
        if is_planned and not state.outputs.has(self._node(step)):
            call.reason = "planned"
            return True
        if is_planned and call.may_reuse:
            call.reason = "computed at this sigma already"
            return False
        if call.may_reuse:
            call.reason = f"between computed steps, interval {self.cache_interval}"
        return False

    def _weights(self, call: Call, nodes: list[float]) -> list[float]:
        order = self.max_order
        if call.adds_noise and order > 0:
            order = 0
            call.note(NOISE_IS_ADDED)
        if self.weights == "sigma":
            return safe_weights(nodes, call.step.time, order)
        return recursion_weights(nodes, float(call.step.index), order)

    def _node(self, step: Step) -> float:
        return step.time if self.weights == "sigma" else float(step.index)

    def computed_steps(self, schedule: Schedule) -> tuple[int, ...]:
        """The steps computed because of warm-up and interval."""
        warm_up, interval = self.disable_cache_before_step, self.cache_interval
        if isinstance(schedule, OpenSchedule):
            return steps_between_turns(schedule.count, schedule.turns, warm_up, interval)
        if self.spacing == "steps":
            return published_steps(schedule.count, warm_up, interval)
        return sigma_spaced_steps(schedule.times, warm_up, interval)

    @property
    def levels(self) -> tuple[Level, ...]:
        return (self.cache_level,)

    def modules_in(self, block: str, modules: list[str]) -> list[str]:
        wanted = self.cache_identifiers or (ATTENTION_OR_FEED_FORWARD,)
        fitting = [name for name in modules if _fits(name, wanted)]
        if not fitting and self.cache_identifiers is None:
            fitting = [block]  # as published for single blocks: what the whole block gives
        return [name for name in fitting if not _fits(name, self.skip_predict_identifiers or ())]

    @property
    def is_off(self) -> bool:
        return self.cache_interval == 1

    def obstacle(self, schedule: Schedule) -> str:
        computed = set(self.computed_steps(schedule))
        if self.disable_cache_after_step >= 0:
            computed |= set(range(self.disable_cache_after_step, schedule.count))
        if len(computed) < schedule.count:
            return ""
        warm_up = f"warm-up {self.disable_cache_before_step} and interval {self.cache_interval}"
        return f"{counted(schedule.count, 'step')} {'is' if schedule.count == 1 else 'are'} too few for {warm_up}"

    def __post_init__(self) -> None:
        super().__post_init__()
        before, after = self.disable_cache_before_step, self.disable_cache_after_step
        if 0 <= after <= before:
            raise ValueError(
                f"{self.title}: disable_cache_after_step is {after} and disable_cache_before_step is {before}, so "
                f"every step would be computed. Set disable_cache_after_step above {before}, or to -1 for never."
            )
        for name in ("cache_identifiers", "skip_predict_identifiers"):
            expressions = getattr(self, name)
            check_expressions(self.title, name, expressions)
            object.__setattr__(self, name, None if expressions is None else tuple(expressions))
        dtype = self.taylor_factors_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"{self.title}: taylor_factors_dtype is {dtype!r}. Set it to a floating-point torch.dtype, or to None."
            )

    # The settings, and what a user reads of them

    cache_interval: int = setting(
        4,
        "Compute about one in this many steps and forecast the others. Higher is faster and less faithful. Usual: 2 "
        "careful, 3 balanced, 4 to 5 fast; 1 computes every step.",
        minimum=1,
        maximum=20,
    )
    max_order: int = setting(
        1,
        "Highest order of the forecast: 0 reuses the last output, 1 follows a straight line, 2 and 3 a curve. Higher "
        "holds more memory and needs more computed steps. Usual: 1.",
        minimum=0,
        maximum=3,
    )
    disable_cache_before_step: int = setting(
        3,
        "Warm-up: compute this many steps at the start, where the picture's composition is decided. Higher is slower "
        "and more faithful. With spacing 'sigma' they are spread over the noise that these steps would cover on an "
        "evenly spaced schedule. Usual: 2 to 5.",
        minimum=0,
        maximum=1000,
    )
    disable_cache_after_step: int = setting(
        -1,
        "Compute every step from this one on, to render fine detail in full. Lower is slower and more faithful. Usual: "
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
    spacing: str = setting(
        "sigma",
        "Where the computed steps are. 'sigma': evenly along the noise level, right for schedules with a shift. "
        "'steps': every so many steps, as published. Usual: 'sigma'.",
        choices=("sigma", "steps"),
    )
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


def _fits(name: str, expressions: tuple[str, ...]) -> bool:
    return any(re.fullmatch(expression, name) for expression in expressions)
