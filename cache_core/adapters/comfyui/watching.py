"""One sampling run under the eyes of a watcher: told when it begins, of every model call, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from ...report.report import Report


class Watcher(Protocol):
    """Told of one sampling run as it happens. The sampler waits for what these do: nothing in them may wait."""

    def called(self) -> None:
        """One more model call is in the report."""

    def ended(self, latent: Any) -> None:
        """The run is over; `latent` is its result as the sampler returns it, None if it was cancelled or failed."""


Watch = Callable[[Report], Watcher]  # called when a run begins, with a report that fills up


def watched(sample: Callable[[], Any], report: Report, watch: Watch | None) -> Any:
    """What `sample` returns. The report is closed and the watcher told, however the run ends."""
    watcher = None if watch is None else watch(report)
    report.on_call = None if watcher is None else watcher.called
    began, latent = time.perf_counter(), None
    try:
        latent = sample()
        report.seconds = time.perf_counter() - began
        report.close()
    except BaseException:
        report.seconds = time.perf_counter() - began
        report.stop()
        raise
    finally:
        if watcher is not None:
            watcher.ended(latent if report.state == "finished" else None)
    return latent
