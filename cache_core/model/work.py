"""Whether a model's own blocks ran in a call. If they did not, someone else answered it."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from torch import nn

from .chains import block_lists
from .compiled import method_of

FEW = 0.5  # of what usually runs: caches leave out all blocks, or all but the first few


class Work:
    """What of a model is watched in the calls that are to be computed, and how much of it usually runs.

    That is its blocks. Of a list of one, which may be another node's and hold the blocks, it is the first and the last
    module that have weights.
    """

    def __init__(self, model: nn.Module, methods: Mapping[str, str]) -> None:
        lists = [list(blocks.values()) for _, blocks in block_lists(model)]
        watched = [module for blocks in lists for module in (blocks if len(blocks) > 1 else _ends_of(*blocks))]
        self.watched = {module: method_of(module, methods) for module in watched}  # and how the model runs it
        self._usual: dict[Hashable, int] = {}  # how many of them run, by whose call it is

    def is_little(self, ran: Collection[nn.Module], whose: Hashable) -> bool:
        """Whether so little ran in a call that was to be computed that someone else must have answered it.

        It is compared with the first call of the same branches in which any ran: one of skip layer guidance always
        leaves out blocks, and someone else may have answered the very first.
        """
        self._usual[whose] = self._usual.get(whose) or len(ran)
        known = self._usual[whose] or max(self._usual.values())
        return known > 0 and len(ran) <= FEW * known


def _ends_of(block: nn.Module) -> list[nn.Module]:
    leaves = [module for module in block.modules() if any(True for _ in module.parameters(recurse=False))]
    return [leaves[0], leaves[-1]] if leaves else [block]
