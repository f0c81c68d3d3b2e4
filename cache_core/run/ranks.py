"""Ranks of torch.distributed that share one model call, each with a part of the tokens: they must decide alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor


class Ranks:
    """The processes of one group of torch.distributed; without a group, this one alone.

    If one of them left out blocks that another computes, the model's own exchange of tokens would never end. So what a
    decision rests on is summed over all, or is the largest of all: a few numbers, once a model call where a strategy
    measures, and a few times in the first call of a run.
    """

    def __init__(self, group: Any = None) -> None:
        if group is not None and not torch.distributed.is_initialized():
            raise ValueError(
                "A group of ranks was given, but torch.distributed is not initialised. Call "
                "torch.distributed.init_process_group first, or leave out group."
            )
        self.group = group

    def total(self, part: Tensor) -> Tensor:
        """The sum over all ranks of a small tensor."""
        if self.group is None:
            return part
        whole = part.clone()
        torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.SUM, self.group)
        return whole

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each of these numbers among all ranks; NaN counts as infinite. Waits for the device."""
        numbers = [inf if value != value else float(value) for value in values]
        if self.group is None or not numbers:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.float32, device=device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, self.group)
        return largest.tolist()
