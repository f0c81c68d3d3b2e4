"""What ranks tell each other through the store of torch.distributed: what they decided in a run, and why one failed.

Nobody waits: a rank writes, and reads what others have written by then. The last of them sees all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from zlib import crc32

import torch

from ..model.failures import is_out_of_memory
from ..report.report import Report
from .ranks import Ranks

logger = logging.getLogger(__name__)
APART = (
    "ranks that share this picture decided apart: each looked at its own branch of the prompt. Put the cache on with "
    "group= the process group of all of them"
)
GROUP_APART = "the ranks of the group decided apart: what one reused, another computed"
FAILED = "Refrain: the run can't go on, for another rank of its group has failed. {}"


class Decisions:
    """What this rank and the others decide in one run. Made when the run begins."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.began, self.number = ranks, time.time(), 0
        if ranks.group is not None:
            with suppress(RuntimeError):  # the process that holds the store may be gone
                self.number = _count_run(ranks.group)
                _write("failed", ranks.group, "")

    def fail(self, error: BaseException) -> None:
        """The run ends with this error. Tells the others, who may be waiting for this rank in the model's exchange.

        Raises RuntimeError with the cause if another rank has failed before, and this one has waited for it.
        """
        if self.ranks.group is None:
            return
        causes, told = [], f"Rank {torch.distributed.get_rank()}: {type(error).__name__}: {error}"
        with suppress(RuntimeError):
            causes = [cause for cause in _read("failed", self.ranks.group) if cause]
            if not causes:
                _write("failed", self.ranks.group, told)
        if causes and isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise RuntimeError(FAILED.format(causes[0])) from error

    def tell(self, report: Report) -> None:
        """The run is over. Notes in the report, and logs, if another rank that has told by now decided otherwise.

        Ranks in no group may have pictures of their own. They share one if some have the prompt only and others the
        negative prompt only.
        """
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if is_alone or not report.calls:
            return
        group = torch.distributed.group.WORLD if self.ranks.group is None else self.ranks.group
        side, decided = self._side_of(report), str(crc32(bytes(call.action == "computed" for call in report.calls)))
        _write("decided", group, f"{self.number} {self.began} {time.time()} {side} {decided}")
        for told in _read("decided", group):
            number, *times, their_side, theirs = told.split()
            share = self.ranks.group is not None or {side, their_side} == {"leads", "follows"}
            if share and self._is_this_run(int(number), *map(float, times)) and decided != theirs:
                report.note(APART if self.ranks.group is None else GROUP_APART)
                logger.warning("Refrain: %s", report.notes[-1])
                return

    def _side_of(self, report: Report) -> str:
        branches, follow = {branch for call in report.calls for branch in call.branches}, set(self.ranks.follow)
        return "follows" if branches <= follow else "both" if branches & follow else "leads"

    def _is_this_run(self, number: int, began: float, ended: float) -> bool:
        """Whether another rank's run is this one: the group's with this number, in one that begins all runs together.

        Without a group, if by its clock it was at the same time: each was on in the other's middle. What ranks tell is
        written over by their next run.
        """
        now = time.time()
        if self.ranks.group is not None:
            return number == self.number and began < now and self.began < ended
        return began < (self.began + now) / 2 < ended and self.began < (began + ended) / 2 < now


def _count_run(group: Any) -> int:
    """How many runs this rank has begun in the group, this one too."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return store.add(_key("runs", group, torch.distributed.get_rank()), 1)


def _write(kind: str, group: Any, text: str) -> None:
    """What this rank tells the others, in place of what it told before."""
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(_key(kind, group, torch.distributed.get_rank()), text)


def _read(kind: str, group: Any) -> Iterator[str]:
    """What each of the others has told last, of those that have."""
    store = torch.distributed.distributed_c10d._get_default_store()
    others = set(torch.distributed.get_process_group_ranks(group)) - {torch.distributed.get_rank()}
    for key in (_key(kind, group, other) for other in sorted(others)):
        if store.check([key]):
            yield store.get(key).decode()


def _key(kind: str, group: Any, rank: int) -> str:
    return f"refrain/{kind}/{group.group_name}/{rank}"
