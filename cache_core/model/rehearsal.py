"""The rehearsal: a plan is put to the test before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..strategy.tensors import copied, same_layout
from .chains import BlockPlan
from .hooks import Forward
from .lesson import ChainStreams


class Rehearsal:
    """Passes through the chains without computing anything: each gives what it gave in the call learned from."""

    def __init__(
        self, plan: BlockPlan, passages: Sequence[ChainStreams], on_blocks_left_out: Callable[[], None]
    ) -> None:
        self.plan, self.passages, self.on_blocks_left_out = plan, passages, on_blocks_left_out
        self.entered: Tensor | None = None  # main stream that entered the chain that leads
        self.running: set[int] = set()  # chains that have begun and not ended
        self.misled: set[int] = set()  # chains that begin amid another, with what its skipped blocks did not make
        self.is_as_learned = True

    @property
    def saw_the_same(self) -> bool:
        """Whether the chain that leads was given what it was given in the call learned from. Waits for the device."""
        return self.entered is not None and torch.equal(
            self.entered, self.passages[0].entered[self.plan.chains[0].main]
        )

    def block(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Stands in for one block's forward."""
        members = self.plan.chains[chain]
        streams = members.wirings[index].streams_in(args, kwargs)
        if index == 0:
            self.is_as_learned &= same_layout(streams, self.passages[chain].entered)
            if self.running and not all(map(torch.equal, streams, self.passages[chain].entered)):
                self.misled.add(chain)
            self.running.add(chain)
            streams = list(copied(streams))
            if chain == 0 and self.plan.runs_first:
                forward(*args, **kwargs)
            if chain == 0:
                self.entered = streams[members.main].clone()
                self.on_blocks_left_out()
        if index == len(members.blocks) - 1:
            self.running.discard(chain)
            for stream, value in zip(members.ends, copied(self.passages[chain].left)):
                streams[stream] = value
        return members.wirings[index].returned(streams)
