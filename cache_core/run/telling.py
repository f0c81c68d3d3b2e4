"""What only tells of a run must not end it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ..model.failures import is_of_the_device, is_out_of_memory
from ..report.report import Report

logger = logging.getLogger(__name__)
NOT_TOLD = "the report of this run is not complete, the result is: "


@contextmanager
def telling(report: Report, cancels: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Around what only tells of a run: an error in it is noted, logged once with its traceback, and goes no further.

    Cancels do, and failures of the device. Where memory ran out in telling, the run may still have enough.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, cancels) or (is_of_the_device(error) and not is_out_of_memory(error)):
            raise
        told = f"{NOT_TOLD}{type(error).__name__}: {error}"
        if told not in report.notes:
            logger.warning("Refrain: an error while telling of a run", exc_info=True)
        report.note(told)
