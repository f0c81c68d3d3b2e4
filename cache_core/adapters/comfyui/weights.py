"""Weights that ComfyUI streams to the device: those of blocks that are left out need not come.

Most layers fetch their own weights when they run, so a block that does not run fetches none. Two models (LTX-2,
MiniMax-H3) have a queue besides, from which each block is fetched as a whole right before the model calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from ...strategy.strategy import Strategy

LEVELS_BLOCK_BY_BLOCK = {"block", "module"}  # where it is decided of each block, when it would run, to leave it out
FETCHED_ALL_THE_SAME = (
    "this model fetches each block's weights before it is known whether the block runs, so a block that is left out "
    "still costs that time; TaylorSeer's cache_level output or model saves it"
)


def fetch_no_more_blocks() -> None:
    """The blocks still to come in this model call won't run: empty what is left of its queue."""
    if are_fetched_ahead():
        queue = _queues()[-1]  # the newest is this call's
        queue[:] = [[] if isinstance(entry, nn.Module) else entry for entry in queue]  # []: nothing to fetch


def are_fetched_all_the_same(strategies: Iterable[Strategy]) -> bool:
    """Whether the weights of blocks that one of these strategies leaves out came too: it decided too late for them."""
    return are_fetched_ahead() and any(set(strategy.levels) & LEVELS_BLOCK_BY_BLOCK for strategy in strategies)


def are_fetched_ahead() -> bool:
    """Whether a model has made such a queue since this node began."""
    return bool(_queues())


def _queues() -> list[list]:
    """One for each model call; ComfyUI 0.8 has none."""
    return getattr(sys.modules.get("comfy.model_prefetch"), "PREFETCH_QUEUES", [])
