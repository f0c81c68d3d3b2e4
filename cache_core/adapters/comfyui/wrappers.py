"""`with_cache`: a MODEL that samples through a CacheRun.

Three of ComfyUI's wrappers, and nothing else: OUTER_SAMPLE opens a run and frees it, PREDICT_NOISE begins an
evaluation, APPLY_MODEL sends one forward pass through the run. The run travels in the transformer options of one
sampling run, which ComfyUI copies for it and drops after it, so nothing is left on the model, whatever happens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from ...report import Report
from ...run import CacheRun
from ...step import Schedule
from ...strategy import Strategy

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

logger = logging.getLogger(__name__)

KEY = "refrain"
BRANCHES = ("positive", "negative")  # what ComfyUI's guiders number 0 and 1


def with_cache(
    model: ModelPatcher, strategy: Strategy, on_report: Callable[[Report, Any], None] | None = None
) -> ModelPatcher:
    """A clone of the model that samples with this strategy, beside those it has on other levels.

    Of two strategies on one level the later replaces the earlier. `on_report(report, latent)` is called after each
    sampling run that ended by itself, with the run's result as the sampler returns it.
    """
    replaced = [other for other in strategies_of(model) if other.level == strategy.level]
    for other in replaced:
        logger.info("Refrain: %s replaces %s, which works on the same level.", strategy.title, other.title)
    strategies = (*(other for other in strategies_of(model) if other not in replaced), strategy)
    cached = model.clone()
    wrappers = _Wrappers(strategies, on_report)
    cached.set_attachments(KEY, wrappers)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
        (WrappersMP.PREDICT_NOISE, begin_evaluation),
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
        percent_to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
        run = CacheRun(self.strategies, Schedule(sigmas.tolist(), percent_to_sigma))
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
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)

    run = transformer_options.get(KEY)
    if run is None:
        return forward()
    model = executor.class_obj.diffusion_model
    contexts = contexts_of(model, x, control, transformer_options)
    numbers = transformer_options.get("cond_or_uncond", [])
    labels = [BRANCHES[number] if number < len(BRANCHES) else f"branch {number}" for number in numbers]
    return run.call_model(model, forward, t, contexts, labels if len(labels) == len(contexts) else ())


def contexts_of(model: Any, x: Any, control: Any, options: dict) -> list[Hashable]:
    """Whose forward pass a model call is, one key for each branch joined along the batch axis.

    A branch's features serve only the same entry of the prompt, window, shape and model, with a ControlNet and with
    other nodes' replaced blocks as before.
    """
    uuids = options.get("uuids") or [None]
    window = options.get("context_window")
    frames = tuple(window.index_list) if window is not None else None
    rows, odd = divmod(x.shape[0], len(uuids))
    if odd:
        uuids, rows = [tuple(uuids)], x.shape[0]
    patched = frozenset(
        (kind, str(key)) for kind, patches in options.get("patches_replace", {}).items() for key in patches
    )
    return [(uuid, frames, rows, tuple(x.shape[1:]), id(model), control is not None, patched) for uuid in uuids]
