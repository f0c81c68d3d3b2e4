"""How a strategy steps in: at one module, or along a stack of blocks that the model's own loop runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .discovery import BlockPlan
from .features import Features, copied, join_rows, split_rows, taken_apart
from .strategy import COMPUTE, FIRST_BLOCK, Around, Request

if TYPE_CHECKING:
    from .run import Visit

Forward = Callable[..., Any]


class Branches:
    """A strategy's `around` at one site in one model call, run for every branch of the batch at the same pace."""

    def __init__(self, arounds: Sequence[Around], may_reuse: bool) -> None:
        self._asking: dict[int, Around] = dict(enumerate(arounds))
        self._answers: list[Features | None] = [None] * len(arounds)
        self._may_reuse = may_reuse

    def decide(self, computed: list[Features] | None = None) -> Request | list[Features]:
        """What to compute next or, if every branch gave an answer and none is new here, the answers.

        `computed` is what the branches asked for last, one for each.
        """
        requests = set()
        for branch, around in list(self._asking.items()):
            try:
                requests.add(around.send(computed[branch] if computed else None))
            except StopIteration as stop:
                self._answers[branch] = stop.value
                del self._asking[branch]
        if not requests and self._may_reuse and all(answer is not None for answer in self._answers):
            return self._answers
        return FIRST_BLOCK if requests == {FIRST_BLOCK} else COMPUTE

    def keep(self, computed: list[Features]) -> None:
        """Hand the branches what was computed, the last thing they asked for."""
        self.decide(computed)
        if self._asking:
            raise RuntimeError("A strategy asked again after the whole site was computed. Yield COMPUTE once, last.")


def at_module(visit: Visit, forward: Forward, args: tuple, kwargs: dict) -> Any:
    """One module's output: the strategy's, or the module's own."""
    branches = visit.branches()
    known = visit.returned_before()
    decision = branches.decide()
    if isinstance(decision, list) and known is not None:
        visit.answered()
        return known.filled_with(copied(join_rows(decision)))  # a copy: the model may write into what it is given
    output = forward(*args, **kwargs)
    visit.unit_computed()
    if decision is FIRST_BLOCK:
        visit.note("no chain of blocks was found in this model, so there is no first block to test: always computed")
        return output
    features, structure = taken_apart(output)
    parts = split_rows(copied(features), visit.branch_count)
    if parts is not None:
        branches.keep(parts)
        visit.kept(structure)
    return output


class BlockStack:
    """One passage of a model call through the chains of blocks, in the model's own loop.

    Computing, it takes from each chain the residual: what leaves the chain minus what entered it (for the chain that
    leads, what left the first block if the strategy asked for that). Reusing, blocks hand on what they are given, and
    the last of each chain returns its anchor plus the residual. It overwrites: what the model adds between blocks, a
    ControlNet's signal say, is part of the residual and must not be counted twice.
    """

    def __init__(self, visit: Visit, plan: BlockPlan) -> None:
        self.plan = plan
        self.visit = visit
        self.branches: Branches | None = None
        self.answers: Features | None = None  # residuals that stand in, for all chains in order; None while computing
        self.anchors: dict[int, list[Tensor]] = {}  # computing: what entered each chain
        self.finished: dict[int, list[Tensor]] = {}  # what leaves a chain: the residual, or the answer
        self.entered: set[int] = set()
        self.left: set[int] = set()
        self.in_order = True  # False once the model ran its blocks unlike the call that was learned from

    def block(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Stands in for one block's forward."""
        self.in_order &= (index == 0) != (chain in self.entered)
        if not self.in_order:
            return forward(*args, **kwargs)
        if index == 0:
            self.entered.add(chain)
            if self.branches is None:
                return self._first(forward, args, kwargs)
            self._enter(chain, self.plan.chains[chain].wirings[0].streams_in(args, kwargs))
        return self._pass(chain, index, forward, args, kwargs)

    def end(self) -> bool:
        """The model call is over. Whether every chain ran as it should; if not, nothing is kept."""
        complete = self.in_order and self.left == set(range(len(self.plan.chains)))
        if complete and self.answers is None and self.branches is not None:
            residuals = [tensor for chain in sorted(self.finished) for tensor in self.finished[chain]]
            parts = split_rows(residuals, self.visit.branch_count)
            if parts is not None:
                self.branches.keep(parts)
                self.visit.kept()
        return complete

    def _first(self, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """The first block of the chain that leads: here the strategy decides."""
        chain = self.plan.chains[0]
        self.branches = self.visit.branches()
        decision = self.branches.decide()
        if decision is not FIRST_BLOCK:
            self._take(decision)
            self._enter(0, chain.wirings[0].streams_in(args, kwargs))
            return self._pass(0, 0, forward, args, kwargs)
        (before,) = copied([chain.wirings[0].streams_in(args, kwargs)[chain.main]])
        output = forward(*args, **kwargs)
        self.visit.unit_computed()
        streams = chain.wirings[0].streams_out(output)
        residual = torch.sub(streams[chain.main], before, out=before)
        parts = split_rows([residual], self.visit.branch_count)
        if parts is not None:
            self._take(self.branches.decide(parts))
        self._enter(0, streams)
        return output

    def _take(self, decision: Request | list[Features]) -> None:
        if isinstance(decision, list):
            self.answers = join_rows(decision)
            self.visit.answered()

    def _enter(self, chain: int, streams: list[Tensor]) -> None:
        ends = self.plan.chains[chain].ends
        if self.answers is None:
            self.anchors[chain] = list(copied([streams[stream] for stream in ends]))
            return
        first = sum(len(before.ends) for before in self.plan.chains[:chain])
        residuals = self.answers[first : first + len(ends)]
        self.finished[chain] = [streams[stream] + residual for stream, residual in zip(ends, residuals, strict=True)]

    def _pass(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        wiring, is_last = self.plan.chains[chain].wirings[index], index == len(self.plan.chains[chain].blocks) - 1
        if self.answers is None:
            output = forward(*args, **kwargs)
            self.visit.unit_computed()
            if is_last:
                self._leave(chain, wiring.streams_out(output))
            return output
        streams = wiring.streams_in(args, kwargs)
        if is_last:
            self.left.add(chain)
            for stream, value in zip(self.plan.chains[chain].ends, self.finished[chain]):
                streams[stream] = value
        return wiring.returned(streams)

    def _leave(self, chain: int, streams: list[Tensor | None]) -> None:
        ending = [streams[stream] for stream in self.plan.chains[chain].ends]
        self.finished[chain] = [
            torch.sub(out, anchor, out=anchor) for out, anchor in zip(ending, self.anchors.pop(chain))
        ]
        self.left.add(chain)
