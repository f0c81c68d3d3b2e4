"""Whether the ranks of a run decided alike, told when it is over, through the store of torch.distributed.

Nobody waits: a rank writes what it decided, and reads what others have written by then. The last of them sees all.
"""

from __future__ import annotations

import logging
import time
from zlib import crc32

import torch

from ..report.report import Report
from .ranks import Ranks

logger = logging.getLogger(__name__)
APART = (
    "ranks that share this picture decided apart: each looked at its own branch of the prompt. Put the cache on with "
    "group= the process group of all of them"
)
GROUP_APART = "the ranks of the group decided apart: what one reused, another computed"


class Decisions:
    """What this rank and the others decide in one run. Made when the run begins."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.began = ranks, time.time()

    def tell(self, report: Report) -> None:
        """The run is over. Notes in the report, and logs, if another rank that has told by now decided otherwise.

        Ranks in no group may have pictures of their own. They share one if some have the prompt only and others the
        negative prompt only.
        """
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if is_alone or not report.calls:
            return
        group = torch.distributed.group.WORLD if self.ranks.group is None else self.ranks.group
        store, me = torch.distributed.distributed_c10d._get_default_store(), torch.distributed.get_rank()
        key = f"refrain/{group.group_name}/{{}}".format
        side, decided = self._side_of(report), str(crc32(bytes(call.action == "computed" for call in report.calls)))
        store.set(key(me), f"{self.began} {time.time()} {side} {decided}")
        for other in map(key, set(torch.distributed.get_process_group_ranks(group)) - {me}):
            if not store.check([other]):
                continue
            *times, their_side, theirs = store.get(other).decode().split()
            share = self.ranks.group is not None or {side, their_side} == {"leads", "follows"}
            if share and self._is_this_run(*map(float, times)) and decided != theirs:
                report.note(APART if self.ranks.group is None else GROUP_APART)
                logger.warning("Refrain: %s", report.notes[-1])
                return

    def _side_of(self, report: Report) -> str:
        branches, follow = {branch for call in report.calls for branch in call.branches}, set(self.ranks.follow)
        return "follows" if branches <= follow else "both" if branches & follow else "leads"

    def _is_this_run(self, began: float, ended: float) -> bool:
        """Whether another rank's run, by its clock, was at the same time as this one: each was on in the other's
        middle. What ranks tell is written over by their next run.
        """
        now = time.time()
        return began < (self.began + now) / 2 < ended and self.began < (began + ended) / 2 < now
