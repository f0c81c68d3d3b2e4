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

from ...run.alike import Decisions
from ...run.ranks import Ranks
from ...run.repairing import allow_repair
from ...run.run import CacheRun
from ...strategy.repairing import OFF
from ...strategy.strategy import Strategy
from .calls import apply_model, calc_cond_batch, predict_noise
from .exceptions import METHODS, OTHER_CACHES, refuse_other_caches
from .room import Room, free_away
from .schedules import UNORDERED, denoised_by, schedule_for
from .seams import KEY, MOVED, NO_GUIDANCE, ON_PRE_RUN, WHY_NOTHING_WORKS, ModelPatcher, otherwise, wrapper_type
from .watching import CANCELS, NOT_ASKED, Watch, note_at_start, tell_of_no_run, watched
from .weights import fetch_no_more_blocks

logger = logging.getLogger(__name__)

NO_EFFECT = "the {} node before {} has no effect: both leave out the same work, and the later counts"
GIVEN = ("noise", "latent_image", "sampler", "sigmas", "denoise_mask")  # to one sampling run, in this order
IN_WINDOWS = "the latent is sampled in context windows"  # on the demo one in two came further away by repair
NO_REPAIR = "skipped steps are not repaired: this ComfyUI has no ModelSampling.calculate_denoised"
NO_RUN = "the caches on this model did nothing"
OTHER_CACHE = "{} is on this model too; the calls that it leaves out count as computed here"

WRAPPERS = {"PREDICT_NOISE": predict_noise, "CALC_COND_BATCH": calc_cond_batch, "APPLY_MODEL": apply_model}


def with_cache(
    model: ModelPatcher, strategy: Strategy, *, watch: Watch | None = None, owner: str = "", steps: int = 0,
    group: Any = None,
) -> ModelPatcher:  # fmt: skip
    """A clone of the model that samples with this strategy, beside those it has on other levels.

    Of two strategies that share a level, or both stand in for model calls, the later replaces the earlier, and reports
    say so. `watch(report)` is called when a run begins, with a report that fills up; what it returns is told of every
    model call and of the end. `owner` is what the caller knows the strategy by, for the report. It was chosen for so
    many `steps` (0: any). `group` is a process group of torch.distributed whose ranks all sample at the same time and
    share each model call, so that they decide alike. Raises ValueError for what is no MODEL, where another node caches
    the same calls, and for a group without torch.distributed.
    In a ComfyUI that lacks what every cache needs the model stays as it is, and a report says so.
    """
    if WHY_NOTHING_WORKS:
        tell_of_no_run([(strategy, owner)], watch, WHY_NOTHING_WORKS)
        return model
    if not hasattr(model, "add_wrapper_with_key"):
        told = f"{strategy.title}: model is {reprlib.repr(model)}, which is no MODEL"
        raise ValueError(f"{told}. Connect the model output of a loader, or of a node that changes its model.")
    refuse_other_caches([strategy], model.model_options.get("transformer_options", {}))
    ranks = Ranks(group)  # complains now, not in the first model call
    before = model.get_attachment(KEY)
    parts = before.parts if before else ()
    replaced = [part for part in parts if _replaces(strategy, part[0])]
    notes = [NO_EFFECT.format(other.title, strategy.title) for other, _ in replaced if not other.is_off]
    parts = (*(part for part in parts if part not in replaced), (strategy, owner))
    cached = model.clone()
    wrappers = _Wrappers(parts, watch, (*(before.notes if before else ()), *notes))
    wrappers.steps = steps or (before.steps if before else 0)
    wrappers.ranks = before.ranks if before and group is None else ranks
    cached.set_attachments(KEY, wrappers)
    take_off(cached)
    for name, wrapper in (*WRAPPERS.items(), ("OUTER_SAMPLE", wrappers.outer_sample)):
        if kind := wrapper_type(name):
            cached.add_wrapper_with_key(kind, KEY, wrapper)
    if ON_PRE_RUN:
        cached.add_callback_with_key(ON_PRE_RUN, KEY, wrappers.pre_run)
    return cached


def take_off(model: ModelPatcher) -> None:
    """Leave this MODEL, a clone, without a cache."""
    for kind in filter(None, map(wrapper_type, (*WRAPPERS, "OUTER_SAMPLE"))):
        model.remove_wrappers_with_key(kind, KEY)
    if ON_PRE_RUN:
        model.remove_callbacks_with_key(ON_PRE_RUN, KEY)


def _replaces(later: Strategy, earlier: Strategy) -> bool:
    """Whether two caches share a place, or each would take the other's guesses for what the model computes."""
    is_shared = not set(later.levels).isdisjoint(earlier.levels)
    return is_shared or (later.stands_in_for_calls and earlier.stands_in_for_calls)


def strategies_of(model: ModelPatcher) -> tuple[Strategy, ...]:
    """The strategies that a MODEL samples with."""
    wrappers = None if WHY_NOTHING_WORKS else model.get_attachment(KEY)
    return wrappers.strategies if wrappers else ()


class _Wrappers:
    """What a cached MODEL carries: its strategies, each with its owner, and the wrapper that opens a run with them."""

    def __init__(self, parts: Sequence[tuple[Strategy, str]], watch: Watch | None, notes: tuple[str, ...]) -> None:
        self.parts, self.watch, self.notes, self.steps = parts, watch, notes, 0  # for every report of its runs
        self.strategies, self.room = tuple(strategy for strategy, _ in parts), Room()
        self.ranks = Ranks()
        self._here = threading.local()  # .runs: how many runs with them go on in this thread

    def __deepcopy__(self, memo: Any) -> _Wrappers:
        return self  # one MODEL's, whoever copies its options

    def pre_run(self, model: ModelPatcher) -> None:
        """A model that carries them is about to be sampled from; outside of a run, if a guider has two models."""
        if not getattr(self._here, "runs", 0) and not all(strategy.is_off for strategy in self.strategies):
            tell_of_no_run(self.parts, self.watch, NOT_ASKED)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one sampling run: guider.outer_sample(noise, latent_image, sampler, sigmas, denoise_mask, ...)."""
        try:
            options = executor.class_obj.model_options.setdefault("transformer_options", {})  # this run's own copy
            refuse_other_caches(self.strategies, options)  # a node may have been added since
            given = dict(zip(GIVEN, args)) | kwargs
            run = self._begun(executor.class_obj.model_patcher, given, options)
        except MOVED as error:
            run, why = None, otherwise(NO_RUN, error)
        if run is None:
            tell_of_no_run(self.parts, self.watch, why)
            return self._within(partial(executor, *args, **kwargs))
        decisions = Decisions(self.ranks)

        def sample() -> Any:
            self.ranks.require_alike(run.state.terms.strategies, executor.class_obj.model_patcher.load_device)
            return executor(*args, **kwargs)

        try:
            latent = self._within(partial(watched, sample, run, self.watch))
        except BaseException as error:
            decisions.fail(error)
            raise
        finally:
            options.pop(KEY, None)
            self.room.remember(given["noise"].shape, run.report.bytes_foretold)
            run.free()
        with run.telling():
            decisions.tell(run.report)
            logger.info(run.report.line())
        return latent

    def _begun(self, model: ModelPatcher, given: dict[str, Any], options: dict[str, Any]) -> CacheRun:
        """The run of what the guider is given, in these transformer options."""
        sigmas, mask = given["sigmas"], given.get("denoise_mask")
        schedule, free = schedule_for(model, sigmas), self.room.beside(model, given["noise"].shape, options)
        run = CacheRun(
            self.strategies, schedule, METHODS, fetch_no_more_blocks, mask, self.ranks, CANCELS, free, free_away
        )
        if denoised := denoised_by(model):
            in_windows = model.model_options.get("context_handler") is not None
            allow_repair(run.state, mask, denoised, IN_WINDOWS if in_windows else "")
        elif any(strategy.repair != OFF for strategy in run.state.terms.strategies):
            run.report.note(NO_REPAIR)
        run.report.owners = tuple(owner for _, owner in self.parts)
        if schedule.is_open:
            run.report.steps = len(sigmas) - 1
        note_at_start(run.report, (*[UNORDERED] * schedule.is_open, *self.notes), self.steps)
        if wrapper_type("CALC_COND_BATCH") is None and run.state.terms.steps_in_at("guidance"):
            run.report.note(NO_GUIDANCE)
        for option in OTHER_CACHES.keys() & options:
            run.report.note(OTHER_CACHE.format(OTHER_CACHES[option]))
        options[KEY] = run
        _place(options)
        return run

    def _within(self, sample: Callable[[], Any]) -> Any:
        """What `sample` returns, which samples with them."""
        self._here.runs = getattr(self._here, "runs", 0) + 1
        try:
            return sample()
        finally:
            self._here.runs -= 1


def _place(options: dict) -> None:
    """Let our wrapper around a forward pass run last, and that around an evaluation first, wherever the node stands.

    TorchCompileModel swaps compiled modules in by a wrapper around a forward pass: ours then finds them, instead of
    hooking what they were compiled from. And an evaluation that another node answers is seen.
    """
    wrappers = dict(options.get("wrappers", {}))
    for kind, is_last in ((wrapper_type("APPLY_MODEL"), True), (wrapper_type("PREDICT_NOISE"), False)):
        others = dict(wrappers.get(kind, {}))
        if KEY in others:
            ours = {KEY: others.pop(KEY)}
            wrappers[kind] = others | ours if is_last else ours | others
    options["wrappers"] = wrappers
