"""One sampling run under the eyes of a watcher: told when it begins, of every model call, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from ...report.report import Report
from ...run.run import CacheRun


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
    began, latent = time.perf_counter(), None
    try:
        latent = sample()
    finally:
        report.seconds = time.perf_counter() - began
        with run.telling():
            if latent is None:
                report.stop()
            else:
                report.close()
        if watcher is not None:
            with run.telling():
                watcher.ended(latent)
    return latent
