"""How a strategy steps in along the stack of blocks, in the model's own loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.chains import BlockPlan
from ..model.hooks import Forward
from ..model.lesson import ChainStreams
from ..model.structure import tensors_in
from ..strategy.strategy import COMPUTE, FIRST_BLOCK, Request
from ..strategy.tensors import Features, copied, same_layout
from .memory import BlocksRan
from .rows import has_rows, join_rows, rows_layout, split_rows
from .visit import Branches

if TYPE_CHECKING:
    from .visit import Visit

OTHER_BLOCKS = "some model calls ran other blocks than the first call, another node's perhaps; they were all computed"
ONLY_BLOCK = "the first block is the only one, so what enters it is tested instead"


class BlockStack:
    """One passage of a model call through the chains of blocks, in the model's own loop.

    Computing, it takes from each chain the residual: what leaves the chain minus what entered it (for the chain that
    leads, what left the first block if the strategy asked for that). Reusing, blocks hand on what they are given, and
    the last of each chain returns its anchor plus the residual. It overwrites: what the model adds between blocks, a
    ControlNet's signal say, is part of the residual and must not be counted twice. For the same reason blocks between
    the first and the last may be left out (skip layer guidance), by all calls of a branch or by none.
    """

    def __init__(self, visit: Visit, plan: BlockPlan) -> None:
        self.plan = plan
        self.visit = visit
        self.branches: Branches | None = None
        self.answers: Features | None = None  # residuals that stand in, for all chains in order; None while computing
        self.anchors: dict[int, list[Tensor]] = {}  # computing: what entered each chain
        self.finished: dict[int, list[Tensor]] = {}  # what leaves a chain: the residual, or the answer
        self.expected = [0] * len(plan.chains)  # which block of each chain runs next, if none is left out
        self.ran: BlocksRan = set()
        self.as_learned = True  # False once the model runs its blocks unlike the call that was learned from

    def block(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Stands in for one block's forward."""
        is_next = index == 0 if self.expected[chain] == 0 else index >= self.expected[chain]
        self.as_learned &= is_next and (self.branches is not None or chain == 0)
        if not self.as_learned:
            self.visit.unit_computed()
            return forward(*args, **kwargs)
        self.expected[chain] = index + 1
        self.ran.add((chain, index))
        if index == 0 and not self._is_given_as_learned(chain, args, kwargs):
            self.as_learned = False
            return forward(*args, **kwargs)
        try:
            streams = self.plan.chains[chain].wirings[index].streams_in(args, kwargs)
        except (LookupError, TypeError):
            self.as_learned = False
            return forward(*args, **kwargs)
        if self.branches is None:
            return self._lead(streams, forward, args, kwargs)
        if index == 0:
            streams = self._enter(chain, streams)
        return self._pass(chain, index, streams, forward, args, kwargs)

    def end(self) -> bool:
        """The model call is over. Whether every chain ran as it should; if not, nothing is kept."""
        complete = self.as_learned and self.expected == [len(chain.blocks) for chain in self.plan.chains]
        if complete and not self.visit.ran_alike(self.ran):
            self.visit.forget()
            return False
        if not complete and self.answers is None and self.expected != [0] * len(self.expected):
            self.visit.note(OTHER_BLOCKS)
        if complete and self.answers is None:
            residuals = [tensor for chain in sorted(self.finished) for tensor in self.finished[chain]]
            parts = split_rows(residuals, self.visit.branch_count)
            if parts is not None:
                self.branches.keep(parts)
                self.visit.kept(ran=self.ran)
        return complete

    def _lead(self, streams: list[Tensor], forward: Forward, args: tuple, kwargs: dict) -> Any:
        """The first block of all: here the strategy decides."""
        chain = self.plan.chains[0]
        if not has_rows([streams[stream] for stream in chain.ends], self.visit.branch_count):
            self.visit.take_as_one()
        self.branches = self.visit.branches(rows_layout(streams, self.visit.branch_count))
        decision = self.branches.decide()
        if decision is FIRST_BLOCK and self.plan.block_count == 1:
            parts = split_rows(copied([streams[chain.main]]), self.visit.branch_count)
            decision = self.branches.decide(parts) if parts is not None else COMPUTE
            self.visit.note(ONLY_BLOCK)
        if decision is not FIRST_BLOCK:
            self._take(decision)
            if self.answers is not None and self.plan.runs_first:
                streams = list(copied(streams))
                forward(*args, **kwargs)
                self.visit.unit_computed()
            return self._pass(0, 0, self._enter(0, streams), forward, args, kwargs)
        (before,) = copied([streams[chain.main]])
        output = forward(*args, **kwargs)
        self.visit.unit_computed()
        streams = chain.wirings[0].streams_out(output)
        residual = torch.sub(streams[chain.main].detach(), before, out=before)
        parts = split_rows([residual], self.visit.branch_count)
        if parts is not None:
            self._take(self.branches.decide(parts))
        self._enter(0, streams)
        return output

    def _is_given_as_learned(self, chain: int, args: tuple, kwargs: dict) -> bool:
        """Blocks that return more than they pass on fill a cache of the model's own if they are given none."""
        members = self.plan.chains[chain]
        return not members.has_extras or members.wirings[0].arguments == set(tensors_in((args, kwargs)))

    def _take(self, decision: Request | list[Features]) -> None:
        if isinstance(decision, list) and all(same_layout(part, decision[0]) for part in decision):
            self.answers = join_rows(decision)
            self.visit.answered()

    def _enter(self, chain: int, streams: list[Tensor]) -> list[Tensor]:
        """A chain begins with these streams. What its first block shall pass on if it is not computed."""
        ends = self.plan.chains[chain].ends
        entering = [streams[stream] for stream in ends]
        if self.answers is None:
            self.anchors[chain] = list(copied(entering))
            return streams
        first = sum(len(before.ends) for before in self.plan.chains[:chain])
        residuals = self.answers[first : first + len(ends)]
        self.as_learned &= same_layout(residuals, entering)
        if self.as_learned:
            self.finished[chain] = [stream + residual for stream, residual in zip(entering, residuals, strict=True)]
        return list(copied(streams))  # a computed block would not hand on the very tensors that it was given

    def _pass(
        self, chain: int, index: int, streams: list[Tensor], forward: Forward, args: tuple, kwargs: dict
    ) -> Any:  # fmt: skip
        members = self.plan.chains[chain]
        wiring, is_last = members.wirings[index], index == len(members.blocks) - 1
        if self.answers is None or not self.as_learned:
            output = forward(*args, **kwargs)
            self.visit.unit_computed()
            if is_last and self.answers is None:
                leaving = wiring.streams_out(output)
                self.finished[chain] = [
                    torch.sub(leaving[stream].detach(), anchor, out=anchor)
                    for stream, anchor in zip(members.ends, self.anchors.pop(chain))
                ]
            return output
        if is_last:
            for stream, value in zip(members.ends, self.finished[chain]):
                streams[stream] = value
        return wiring.returned(streams)


def keep_passages(visit: Visit, plan: BlockPlan, passages: Sequence[ChainStreams]) -> None:
    """Give the strategy what the call that was learned from computed along the stack."""
    first, chain = passages[0], plan.chains[0]
    if not has_rows([first.entered[stream] for stream in chain.ends], visit.branch_count):
        visit.take_as_one()
    branches, anchors = visit.branches(rows_layout(first.entered, visit.branch_count)), first.entered
    visit.units_computed = visit.units
    if branches.decide() is FIRST_BLOCK:
        tested = first.entered[chain.main]
        if plan.block_count > 1:
            tested, anchors = first.after_first[chain.main] - tested, first.after_first
        parts = split_rows([tested], visit.branch_count)
        if parts is None:
            return
        branches.decide(parts)
    entering = [anchors, *(passage.entered for passage in passages[1:])]
    residuals = [
        left - anchors[stream]
        for members, passage, anchors in zip(plan.chains, passages, entering)
        for stream, left in zip(members.ends, passage.left)
    ]
    parts = split_rows(residuals, visit.branch_count)
    if parts is not None:
        branches.keep(parts)
        visit.kept(
            ran={(chain, index) for chain, members in enumerate(plan.chains) for index in range(len(members.blocks))}
        )
