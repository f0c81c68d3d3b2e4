"""One sampling run under the eyes of a watcher: told when it begins, of every model call, and when it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from comfy import model_management

from ...report.report import Report
from ...run.run import CacheRun
from ...run.telling import telling
from ...strategy.setting import counted
from ...strategy.strategy import Strategy
from .guidance import ONE_BY_ONE
from .seams import wrapper_type
from .weights import FETCHED_ALL_THE_SAME, are_fetched_all_the_same

logger = logging.getLogger(__name__)
INTERRUPTED = getattr(model_management, "InterruptProcessingException", None)  # in ComfyUI 0.8 an ordinary exception
CANCELS = (INTERRUPTED,) if INTERRUPTED else ()
NOT_ASKED = (
    "the caches on this model did nothing: its guider samples with the settings of another of its models. Put them on "
    "that one (of Dual Model CFG Guider, on `model`), where they work for both"
)
NO_ATTENTION = "no attention of this model was found: none came through the option optimized_attention_override"
NOT_CALLED = (
    "no model call was seen, so nothing is reused: the model is called in a way that docs/seams.md does not have"
)
OTHER_STEPS = (
    "the cache was chosen for {}, but this run has {}: set steps to 0 on Faster Sampling to take them from the run"
)


class Watcher(Protocol):
    """Told of one sampling run as it happens. The sampler waits for what these do: nothing in them may wait."""

    def called(self) -> None:
        """One more model call is in the report."""

    def ended(self, latent: Any) -> None:
        """The run is over; `latent` is its result as the sampler returns it, None if it was cancelled or failed."""


Watch = Callable[[Report], Watcher]  # called when a run begins, with a report that fills up


def watched(sample: Callable[[], Any], run: CacheRun, watch: Watch | None) -> Any:
    """What `sample` returns. The report is closed and the watcher told, however the run ends.

    Errors in telling do not end the run.
    """
    report, watcher = run.report, None
    if watch is not None:
        with run.telling():
            watcher = watch(report)
            report.on_call = watcher.called
    latent = None
    try:
        latent = sample()
        with run.telling():
            _note_what_it_was_like(run)
    finally:
        report.seconds = 0.0 if run.state.began is None else time.perf_counter() - run.state.began
        with run.telling():
            if latent is None:
                report.stop()
            else:
                report.close()
        if watcher is not None:
            with run.telling():
                watcher.ended(latent)
    return latent


def tell_of_no_run(parts: Sequence[tuple[Strategy, str]], watch: Watch | None, why: str) -> None:
    """A model is sampled from, and its strategies, each with its owner, are not asked."""
    report = Report(tuple(strategy for strategy, _ in parts), 0, owners=tuple(owner for _, owner in parts))
    report.note(why)
    report.close()
    logger.warning(report.line())
    if watch is not None:
        with telling(report, CANCELS):
            watch(report).ended(None)


def note_at_start(report: Report, notes: Sequence[str], expected: int) -> None:
    """What is known of a run when it begins. Its caches were chosen for so many steps, 0 for any."""
    for note in notes:
        report.note(note)
    if expected not in (0, report.steps):
        report.note(OTHER_STEPS.format(counted(expected, "step"), counted(report.steps, "step")))


def _note_what_it_was_like(run: CacheRun) -> None:
    """What is known only once a run was sampled."""
    if are_fetched_all_the_same(run.state.terms.strategies):
        run.report.note(FETCHED_ALL_THE_SAME)
    if run.state.terms.steps_in_at("guidance") and not run.asked_together and wrapper_type("CALC_COND_BATCH"):
        run.report.note(ONE_BY_ONE)
    is_idle = bool(run.report.calls) and not run.report.count("reused", "forecast")
    if run.state.terms.steps_in_at("attention") and is_idle and not run.state.attends:
        run.report.note(NO_ATTENTION)
    if run.state.evaluation.number and not run.report.calls and not run.report.notes:
        run.report.note(NOT_CALLED)
