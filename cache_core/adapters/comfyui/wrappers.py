"""`with_cache`: a MODEL that samples through a CacheRun.

Four of ComfyUI's wrappers, and nothing else: OUTER_SAMPLE opens a run and frees it, PREDICT_NOISE begins an evaluation,
CALC_COND_BATCH leaves out the negative prompt, APPLY_MODEL sends one forward pass through the run. The run travels in
the transformer options of one sampling run, which ComfyUI copies for it and drops after it, so nothing is left on the
model, whatever happens.
"""

from __future__ import annotations

import logging
import reprlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...run.repairing import allow_repair
from ...run.run import CacheRun
from ...strategy.strategy import Strategy
from .contexts import contexts_of, labels_of
from .exceptions import METHODS, OTHER_CACHES, of_its_own, refuse_other_caches, why_computed
from .guidance import denoised_of_branches
from .room import Room, free_away
from .schedules import UNORDERED, denoised_by, schedule_for
from .watching import CANCELS, Watch, note_at_start, tell_of_no_run, watched
from .weights import fetch_no_more_blocks

logger = logging.getLogger(__name__)

KEY = "refrain"
ATTENTION = "optimized_attention_override"  # the transformer option through which attention operations are sent
CONTROLNET = "the ControlNet still runs at every step; only the model's own blocks are saved"
NO_EFFECT = "the {} node before {} has no effect: both leave out the same work, and the later counts"
OTHER_CACHE = "{} is on this model too; the calls that it leaves out count as computed here"


def with_cache(
    model: ModelPatcher, strategy: Strategy, *, watch: Watch | None = None, owner: str = "", steps: int = 0
) -> ModelPatcher:
    """A clone of the model that samples with this strategy, beside those it has on other levels.

    Of two strategies that share a level, or both stand in for model calls, the later replaces the earlier, and reports
    say so. `watch(report)` is called when a run begins, with a report that fills up; what it returns is told of every
    model call and of the end. `owner` is what the caller knows the strategy by, for the report. It was chosen for so
    many `steps` (0: any). Raises ValueError for what is no MODEL, and where another node caches the same calls.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        told = f"{strategy.title}: model is {reprlib.repr(model)}, which is no MODEL"
        raise ValueError(f"{told}. Connect the model output of a loader, or of a node that changes its model.")
    refuse_other_caches([strategy], model.model_options.get("transformer_options", {}))
    before = model.get_attachment(KEY)
    parts = before.parts if before else ()
    replaced = [part for part in parts if _replaces(strategy, part[0])]
    notes = [NO_EFFECT.format(other.title, strategy.title) for other, _ in replaced if not other.is_off]
    parts = (*(part for part in parts if part not in replaced), (strategy, owner))
    cached = model.clone()
    wrappers = _Wrappers(parts, watch, (*(before.notes if before else ()), *notes))
    wrappers.steps = steps or (before.steps if before else 0)
    cached.set_attachments(KEY, wrappers)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, wrappers.outer_sample),
        (WrappersMP.PREDICT_NOISE, predict_noise),
        (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
        (WrappersMP.APPLY_MODEL, apply_model),
    ):
        cached.remove_wrappers_with_key(kind, KEY)
        cached.add_wrapper_with_key(kind, KEY, wrapper)
    cached.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    cached.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, wrappers.pre_run)
    return cached


def _replaces(later: Strategy, earlier: Strategy) -> bool:
    """Whether two caches share a place, or each would take the other's guesses for what the model computes."""
    is_shared = not set(later.levels).isdisjoint(earlier.levels)
    return is_shared or (later.stands_in_for_calls and earlier.stands_in_for_calls)


def strategies_of(model: ModelPatcher) -> tuple[Strategy, ...]:
    """The strategies that a MODEL samples with."""
    wrappers = model.get_attachment(KEY)
    return wrappers.strategies if wrappers else ()


class _Wrappers:
    """What a cached MODEL carries: its strategies, each with its owner, and the wrapper that opens a run with them."""

    def __init__(self, parts: Sequence[tuple[Strategy, str]], watch: Watch | None, notes: tuple[str, ...]) -> None:
        self.parts, self.watch, self.notes, self.steps = parts, watch, notes, 0  # for every report of its runs
        self.strategies, self.room = tuple(strategy for strategy, _ in parts), Room()
        self._here = threading.local()  # .runs: how many runs with them go on in this thread

    def __deepcopy__(self, memo: Any) -> _Wrappers:
        return self  # one MODEL's, whoever copies its options

    def pre_run(self, model: ModelPatcher) -> None:
        """A model that carries them is about to be sampled from; outside of a run, if a guider has two models."""
        if not getattr(self._here, "runs", 0) and not all(strategy.is_off for strategy in self.strategies):
            tell_of_no_run(self.parts, self.watch)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one sampling run: guider.outer_sample(noise, latent_image, sampler, sigmas, ...)."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})  # this run's own copy
        refuse_other_caches(self.strategies, options)  # a node may have been added since
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        mask = kwargs["denoise_mask"] if "denoise_mask" in kwargs else args[4] if len(args) > 4 else None
        schedule = schedule_for(guider.model_patcher, sigmas)
        noise = kwargs["noise"] if "noise" in kwargs else args[0]
        free = self.room.beside(guider.model_patcher, noise.shape, options)
        run = CacheRun(self.strategies, schedule, METHODS, fetch_no_more_blocks, mask, None, CANCELS, free, free_away)
        allow_repair(run.state, mask, denoised_by(guider.model_patcher))
        run.report.owners = tuple(owner for _, owner in self.parts)
        if schedule.is_open:
            run.report.steps = len(sigmas) - 1
        note_at_start(run.report, (*[UNORDERED] * schedule.is_open, *self.notes), self.steps)
        options[KEY] = run
        _place(options)
        for option in OTHER_CACHES.keys() & options:
            run.report.note(OTHER_CACHE.format(OTHER_CACHES[option]))

        self._here.runs = getattr(self._here, "runs", 0) + 1
        try:
            latent = watched(partial(executor, *args, **kwargs), run, self.watch)
        finally:
            self._here.runs -= 1
            options.pop(KEY, None)
            self.room.remember(noise.shape, run.report.bytes_foretold)
            run.free()
        with run.telling():
            logger.info(run.report.line())
        return latent


def _place(options: dict) -> None:
    """Let our wrapper around a forward pass run last, and that around an evaluation first, wherever the node stands.

    TorchCompileModel swaps compiled modules in by a wrapper around a forward pass: ours then finds them, instead of
    hooking what they were compiled from. And an evaluation that another node answers is seen.
    """
    wrappers = dict(options.get("wrappers", {}))
    for kind, is_last in ((WrappersMP.APPLY_MODEL, True), (WrappersMP.PREDICT_NOISE, False)):
        others = dict(wrappers.get(kind, {}))
        if KEY in others:
            ours = {KEY: others.pop(KEY)}
            wrappers[kind] = others | ours if is_last else ours | others
    options["wrappers"] = wrappers


def predict_noise(executor: Any, x: Any, timestep: Any, model_options: dict = {}, seed: Any = None) -> Any:
    """Around one evaluation of the noise prediction: guider.predict_noise(x, timestep, model_options, seed).

    It returns the denoised latent.
    """
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is None:
        return executor(x, timestep, model_options, seed)
    run.begin_evaluation(latent=x)
    return run.end_evaluation(executor(x, timestep, model_options, seed))


def apply_model(
    executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
    transformer_options: dict = {}, **conds: Any,
) -> Any:  # fmt: skip
    """Around one forward pass: BaseModel._apply_model(x, sigma, ...). It returns the branches' denoised latents."""

    def forward() -> Any:
        return executor(x, t, c_concat, c_crossattn, of_its_own(control), options, **conds)

    run, options = transformer_options.get(KEY), transformer_options
    if run is None:
        return forward()
    if why := why_computed(options):
        run.pass_over(why)
        return forward()
    if control is not None:
        run.report.note(CONTROLNET)
    if run.state.terms.steps_in_at("attention"):
        options = options | {ATTENTION: partial(attention, run, options.get(ATTENTION))}
    model = executor.class_obj.diffusion_model
    contexts, labels = contexts_of(executor.class_obj, x, control, transformer_options), labels_of(transformer_options)
    inputs = (x, c_concat, c_crossattn, control, conds)
    latent = None if "context_window" in transformer_options else x  # which frames a window has is in the key
    return run.call_model(model, forward, t, contexts, labels, inputs, latent)


def attention(
    run: CacheRun, other: Callable[..., Any] | None, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Around one attention operation: function(q, k, v, heads, ...), or another node's override of it."""
    return run.call_attention(function if other is None else partial(other, function), *args, **kwargs)


def calc_cond_batch(
    executor: Any, model: Any, conds: list, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict
) -> Any:
    """Around one evaluation of all branches: calc_cond_batch(model, [positive, negative], x, sigma, model_options).

    It returns denoised latents.
    """
    run = model_options.get("transformer_options", {}).get(KEY)
    if run is None:
        return executor(model, conds, x_in, timestep, model_options)
    if run.state.is_evaluating:
        return denoised_of_branches(run, executor, model, conds, x_in, timestep, model_options)
    run.begin_evaluation_of(x_in)  # the guider goes past PREDICT_NOISE
    denoised = denoised_of_branches(run, executor, model, conds, x_in, timestep, model_options)
    run.end_evaluation(*(branch for branch in denoised if branch is not None))
    return denoised
