"""`with_cache`: a MODEL that samples through a CacheRun.

Four of ComfyUI's wrappers, and nothing else: OUTER_SAMPLE opens a run and frees it, PREDICT_NOISE begins an evaluation,
CALC_COND_BATCH leaves out the negative prompt, APPLY_MODEL sends one forward pass through the run. The run travels in
the transformer options of one sampling run, which ComfyUI copies for it and drops after it, so nothing is left on the
model, whatever happens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP

from ...report import Report
from ...run import CacheRun
from ...step import Schedule
from ...strategy import Strategy
from .exceptions import METHODS, SWAPPING, why_computed

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

KEY = "refrain"
ATTENTION = "optimized_attention_override"  # the transformer option through which attention operations are sent
BRANCHES = ("positive", "negative")  # what ComfyUI's guiders number 0 and 1
NO_NEGATIVE = "the negative prompt is not run at all (cfg 1, or a distilled model), so there is none to skip"
CHANGING_PROMPTS = "the negative prompt always runs: LoRA hooks or default prompts may change it from step to step"


def with_cache(
    model: ModelPatcher, strategy: Strategy, on_report: Callable[[Report, Any], None] | None = None
) -> ModelPatcher:
    """A clone of the model that samples with this strategy, beside those it has on other levels.

    Of two strategies that share a level the later replaces the earlier. `on_report(report, latent)` is called after
    each sampling run that ended by itself, with the run's result as the sampler returns it.
    """
    replaced = [other for other in strategies_of(model) if set(other.levels) & set(strategy.levels)]
    for other in replaced:
        logger.info("Refrain: %s replaces %s, which works at the same places.", strategy.title, other.title)
    strategies = (*(other for other in strategies_of(model) if other not in replaced), strategy)
    cached = model.clone()
    wrappers = _Wrappers(strategies, on_report)
    cached.set_attachments(KEY, wrappers)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
        (WrappersMP.PREDICT_NOISE, begin_evaluation),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        cached.remove_wrappers_with_key(kind, KEY)
        cached.add_wrapper_with_key(kind, KEY, wrapper)
    return cached


def strategies_of(model: ModelPatcher) -> tuple[Strategy, ...]:
    """The strategies that a MODEL samples with."""
    wrappers = model.get_attachment(KEY)
    return wrappers.strategies if wrappers else ()


class _Wrappers:
    """What a cached MODEL carries: its strategies, and the wrapper that opens a run with them."""

    def __init__(self, strategies: tuple[Strategy, ...], on_report: Callable[[Report, Any], None] | None) -> None:
        self.strategies, self.on_report = strategies, on_report

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one sampling run: guider.outer_sample(noise, latent_image, sampler, sigmas, ...)."""
        guider = executor.class_obj
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        run = CacheRun(self.strategies, schedule_of(guider.model_patcher, sigmas), METHODS)
        options = guider.model_options.setdefault("transformer_options", {})  # this run's own copy
        options[KEY] = run
        began = time.perf_counter()
        try:
            latent = executor(*args, **kwargs)
            run.report.seconds = time.perf_counter() - began
            run.report.close()
        finally:
            options.pop(KEY, None)
            run.free()
        logger.info(run.report.line())
        if self.on_report is not None:
            self.on_report(run.report, latent)
        return latent


def schedule_of(model: ModelPatcher, sigmas: torch.Tensor) -> Schedule:
    """The sigmas of one sampling run, and how this model counts them."""
    sampling = model.get_model_object("model_sampling")
    timestep_of = None  # of a flow model: its sigma in thousandths
    if isinstance(sampling, ModelSamplingDiscrete):
        timestep_of = lambda sigma: float(sampling.timestep(torch.tensor(sigma)))  # noqa: E731
    return Schedule(sigmas.tolist(), sampling.percent_to_sigma, timestep_of)


def begin_evaluation(executor: Any, x: Any, timestep: Any, model_options: dict = {}, seed: Any = None) -> Any:
    """Around one evaluation of the noise prediction: guider.predict_noise(x, timestep, model_options, seed)."""
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is not None:
        run.begin_evaluation()
    return executor(x, timestep, model_options, seed)


def apply_model(
    executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict = {}, **conds: Any,
) -> Any:  # fmt: skip
    """Around one forward pass: BaseModel._apply_model(x, sigma, ...)."""

    def forward() -> Any:
        return executor(x, t, c_concat, c_crossattn, _of_its_own(control), options, **conds)

    run, options = transformer_options.get(KEY), transformer_options
    if run is None:
        return forward()
    if why := why_computed(options):
        run.report.note(why)
        return forward()
    if run.steps_in_at("attention"):
        options = options | {ATTENTION: partial(attention, run, options.get(ATTENTION))}
    model = executor.class_obj.diffusion_model
    contexts = contexts_of(model, x, control, transformer_options)
    if type(model).__name__ in SWAPPING:
        contexts = [tuple(contexts)]
    numbers = transformer_options.get("cond_or_uncond", [])
    labels = [BRANCHES[number] if number < len(BRANCHES) else f"branch {number}" for number in numbers]
    return run.call_model(model, forward, t, contexts, labels)


def _of_its_own(control: Any) -> Any:
    """A ControlNet's signal that the model may take apart: HunyuanDiT empties its lists, and may be run again."""
    if not isinstance(control, dict):
        return control
    return {part: list(members) if isinstance(members, list) else members for part, members in control.items()}


def attention(
    run: CacheRun, other: Callable[..., Any] | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Around one attention operation: function(q, k, v, heads, ...), or another node's override of it."""
    return run.call_attention(function if other is None else partial(other, function), *args, **kwargs)


def calc_cond_batch(
    executor: Any, model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict
) -> Any:
    """Around one evaluation of all branches: calc_cond_batch(model, [positive, negative], x, sigma, model_options).

    It returns denoised latents. Strategies are handed what was taken away, as a share of sigma: the noise prediction.
    """

    def compute(branches: list) -> Any:
        return executor(model, branches, x_in, timestep, model_options)

    options = model_options.get("transformer_options", {})
    run = options.get(KEY)
    if run is None or not run.steps_in_at("guidance") or len(conds) != len(BRANCHES):
        return compute(conds)
    if not all(conds):
        run.report.note(NO_NEGATIVE)
        return compute(conds)
    if any("hooks" in cond or "default" in cond for branch in conds for cond in branch):
        run.report.note(CHANGING_PROMPTS)
        return compute(conds)
    sigma = timestep.reshape(-1, *[1] * (x_in.ndim - 1))  # (rows, 1, ...)
    denoised: list[Any] = [None, None]  # by branch, as far as computed

    def predict(*wanted: bool) -> list[torch.Tensor | None]:
        computed = compute([branch if is_wanted else None for branch, is_wanted in zip(conds, wanted)])
        for branch, is_wanted in enumerate(wanted):
            if is_wanted:
                denoised[branch] = computed[branch]
        return [(x_in - denoised[branch]) / sigma if is_wanted else None for branch, is_wanted in enumerate(wanted)]

    diffusion_model = model.diffusion_model
    context = (prompts_at(conds, timestep), _frames_in(options), tuple(x_in.shape), id(diffusion_model))
    _, unconditional = run.call_guidance(diffusion_model, predict, timestep, context, BRANCHES[1])
    if denoised[1] is None:
        denoised[1] = (x_in - sigma * unconditional).to(denoised[0].dtype)
    return denoised


def prompts_at(conds: list[list[dict]], sigma: torch.Tensor) -> Hashable:
    """Which entries of the prompts count at this sigma. Reads it only if some have a range of their own."""
    ranges = any("timestep_start" in cond or "timestep_end" in cond for branch in conds for cond in branch)
    now = float(sigma[0]) if ranges else 0.0
    return tuple(
        tuple(
            cond["uuid"] for cond in branch if cond.get("timestep_end", now) <= now <= cond.get("timestep_start", now)
        )
        for branch in conds
    )


def _frames_in(options: dict) -> tuple[int, ...] | None:
    """The frames of the context window that is sampled; None without one."""
    window = options.get("context_window")
    return None if window is None else tuple(window.index_list)


def contexts_of(model: Any, x: Any, control: Any, options: dict) -> list[Hashable]:
    """Whose forward pass a model call is, one key for each branch joined along the batch axis.

    A branch's features serve only the same entry of the prompt, window, shape and model, with a ControlNet and with
    other nodes' replaced blocks as before.
    """
    uuids, frames = options.get("uuids") or [None], _frames_in(options)
    rows, odd = divmod(x.shape[0], len(uuids))
    if odd:
        uuids, rows = [tuple(uuids)], x.shape[0]
    patched = frozenset(
        (kind, str(key)) for kind, patches in options.get("patches_replace", {}).items() for key in patches
    )
    return [(uuid, frames, rows, tuple(x.shape[1:]), id(model), control is not None, patched) for uuid in uuids]
