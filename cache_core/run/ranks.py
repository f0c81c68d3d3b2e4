"""Ranks of torch.distributed that share one evaluation, by its tokens or by its prompts: they must decide alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from math import inf, nan
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ..model.hooks import Hook
from ..strategy import Strategy

NEXT_TO_NOTHING = 2.0**-20  # how much a branch that follows counts beside one that leads
GONE = (
    "Refrain: the ranks of the group that the cache was put on with did not all take part in a model call. Either one "
    "has failed: its own error says why. Or one does not call the model at every step: such a rank must not be in the "
    "group."
)
UNLIKE = (
    "Refrain: the ranks that share a picture have caches with other settings than each other, so each would wait for "
    "blocks that another leaves out. Give all of them the same. This rank has {}."
)


class Ranks:
    """The processes of one group of torch.distributed; without a group, this one alone.

    If one of them left out blocks that another computes, the model's own exchange of tokens would never end. So what a
    decision rests on is summed over all, or is the largest of all: a few numbers, once an evaluation where a strategy
    measures, and a few times in the first two of a run. A rank that can reuse nothing takes part too: then none does.

    Where ranks have different branches of the prompt, those named in `follow` decide by what the others measure, as in
    one process, where the first branch measures. `splits` are hooks that split or gather the tokens at some of the
    model's blocks. They run around all others: what strategies see of a block is this rank's tokens.
    """

    def __init__(self, group: Any = None, splits: Sequence[Hook] = (), follow: Collection[Hashable] = ()) -> None:
        if group is not None and not torch.distributed.is_initialized():
            raise ValueError(
                "A group of ranks was given, but torch.distributed is not initialised. Call "
                "torch.distributed.init_process_group first, or leave out group."
            )
        self.group, self.splits, self.follow = group, splits, follow

    def total(self, part: Tensor, branches: Collection[tuple[Hashable, int]] = ()) -> Tensor:
        """The sum over all ranks of a small tensor that was measured in these branches."""
        if self.group is None:
            return part
        follows = bool(branches) and all(name in self.follow for name, _ in branches)
        return self._reduced(part * NEXT_TO_NOTHING if follows else part.clone(), torch.distributed.ReduceOp.SUM)

    def abstained(self, part: Tensor) -> Tensor:
        """NaN, on all ranks: this one has nothing to reuse, so none may. `part` is like what others sum up."""
        return self.total(torch.full_like(part, nan))

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each of these numbers among all ranks; NaN counts as infinite. Waits for the device."""
        numbers = [inf if value != value else float(value) for value in values]
        if self.group is None or not numbers:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.float32, device=device)
        return self._reduced(largest, torch.distributed.ReduceOp.MAX).tolist()

    def least(self, free: Callable[[torch.device], float | None], device: torch.device) -> float | None:
        """The least that any rank has free; None where no rank knows."""
        own = free(device)
        if self.group is None:
            return own
        (most_wanting,) = self.largest([-inf if own is None else -own], device)
        return None if most_wanting == -inf else -most_wanting

    def are_alike(self, what: object, device: torch.device) -> bool:
        """Whether all ranks have something that reads the same. Waits for the device."""
        number = crc32(repr(what).encode()) % 2**24  # a whole number that float32 holds
        least, most = self.largest([-number, number], device)
        return -least == most

    def require_alike(self, strategies: Sequence[Strategy], device: torch.device) -> None:
        """Raises ValueError, on all ranks, where one has other strategies or settings. Waits for the device."""
        told = ", ".join(map(_told, strategies))
        if self.group is not None and not self.are_alike(told, device):
            raise ValueError(UNLIKE.format(told))

    def _reduced(self, numbers: Tensor, operation: Any) -> Tensor:
        try:
            torch.distributed.all_reduce(numbers, operation, self.group)
        except RuntimeError as error:
            raise RuntimeError(GONE) from error
        return numbers


def _told(strategy: Strategy) -> str:
    """Its settings; not the functions among them, whose names have an address of this process in them."""
    settings = [f"{name}={value}" for name, value in vars(strategy).items() if isinstance(value, (int, float, str))]
    return f"{type(strategy).__name__}({', '.join(settings)})"
