"""How a strategy steps in along the stack of blocks, in the model's own loop.

Streams are the tensors that flow along a chain, such as the picture's tokens and the text's, each (rows, tokens,
channels). What leaves a chain minus what entered it is its residual, of the same shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import BlockPlan, Chain, ChainStreams, Forward, parts_in, tensors_in
from ..strategy import FIRST_BLOCK, Features, Request, copied, same_layout, sampled_tokens
from .memory import BlocksRan
from .visit import Visit

OTHER_BLOCKS = "some model calls ran other blocks than the first call, another node's perhaps; they were all computed"
ONLY_BLOCK = "the first block is the only one, so what enters it is tested instead"


class BlockStack:
    """One passage of a model call through the chains of blocks.

    Computing, it takes from each chain the residual (for the chain that leads from what left the first block, if the
    strategy asked for that). Reusing, blocks hand on what they are given, and the last of each chain returns what
    entered plus the residual. It overwrites: what the model adds between blocks, a ControlNet's signal say, is part of
    the residual and must not be counted twice. For the same reason blocks between the first and the last may be left
    out (skip layer guidance), by all calls of a branch or by none.
    """

    def __init__(self, visit: Visit, plan: BlockPlan) -> None:
        self.plan, self.visit = plan, visit
        self.parts = plan.parts and (plan.parts if visit.strategy.tests_parts else ())  # that are tested by themselves
        self.is_decided = False  # whether the strategy was asked: at the first block of all
        self.answers: Features | None = None  # residuals that stand in, for all chains in order; None while computing
        self.entered: dict[int, Features] = {}  # computing: the streams that entered each chain
        self.finished: dict[int, list[Tensor]] = {}  # what leaves a chain: the residuals, or what stands in
        self.expected = [0] * len(plan.chains)  # which block of each chain runs next, if none is left out
        self.ran: BlocksRan = set()
        self.is_as_learned = True  # False once the model runs its blocks unlike the call that was learned from

    def block(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        """Stands in for one block's forward."""
        members = self.plan.chains[chain]
        is_next = index == 0 if self.expected[chain] == 0 else index >= self.expected[chain]
        self.is_as_learned &= is_next and (self.is_decided or chain == 0)
        if not self.is_as_learned:
            self.visit.units_computed += 1
            return forward(*args, **kwargs)
        self.expected[chain] = index + 1
        self.ran.add((chain, index))
        streams = self._streams_in(members, index, args, kwargs)
        if streams is None:
            self.is_as_learned = False
            return forward(*args, **kwargs)
        if not self.is_decided:
            is_computed, output = self._decided(streams, forward, args, kwargs)
            if is_computed:
                return output
        elif index == 0:
            self._enter(chain, streams)
        if self.answers is None or not self.is_as_learned:
            return self._computed(chain, index, forward, args, kwargs)
        if index == 0:  # a computed block would not hand on the very tensors that it was given
            streams = list(copied(streams))
        if index == len(members.blocks) - 1:
            for stream, value in zip(members.ends, self.finished[chain]):
                streams[stream] = value
        return members.wirings[index].returned(streams)

    def end(self) -> bool:
        """The model call is over. Whether every chain ran as it should; if not, nothing is kept."""
        is_complete = self.is_as_learned and self.expected == [len(chain.blocks) for chain in self.plan.chains]
        if is_complete and not all(memory.ran in (None, self.ran) for memory in self.visit.memories):
            self.visit.call.run.memories.forget(self.visit.contexts)
            return False
        if not is_complete and self.answers is None and any(self.expected):
            self.visit.note(OTHER_BLOCKS)
        if is_complete and self.answers is None and self.visit.is_kept:
            residuals = [residual for chain in sorted(self.finished) for residual in self.finished[chain]]
            parts = self.visit.split(residuals)
            if self.visit.wants(parts):
                self.visit.keep(parts, ran=self.ran)
        return is_complete

    def _streams_in(self, members: Chain, index: int, args: tuple, kwargs: dict) -> list[Tensor] | None:
        """The streams that a block is given; None where it is given something else than in the call learned from."""
        # Blocks that return more than they pass on fill a cache of the model's own if they are given none.
        if index == 0 and members.has_extras and members.wirings[0].arguments != set(tensors_in((args, kwargs))):
            return None
        try:
            return members.wirings[index].streams_in(args, kwargs)
        except (LookupError, TypeError):
            return None

    def _decided(self, streams: list[Tensor], forward: Forward, args: tuple, kwargs: dict) -> tuple[bool, Any]:
        """At the first block of all the strategy decides. Whether that block was computed for it, and its output."""
        chain, self.is_decided = self.plan.chains[0], True
        decision = self.visit.decide(streams, in_rows=[streams[stream] for stream in chain.ends])
        if decision is FIRST_BLOCK and self.plan.block_count > 1:
            tested = copied([sampled_tokens(streams[chain.main]), *(self.parts and self._parts_of(streams))])
            output = forward(*args, **kwargs)
            self.visit.units_computed += 1
            streams = chain.wirings[0].streams_out(output)
            after = [sampled_tokens(streams[chain.main].detach()), *(self.parts and self._parts_of(streams))]
            for now, was in zip(after, tested):
                torch.sub(now, was, out=was)
            decision = self.visit.decide_with(tested)
            self.answers = None if isinstance(decision, Request) else decision
            self._enter(0, streams)
            if len(chain.blocks) == 1:  # all of it has run
                self._leave(0, streams)
            return True, output
        if decision is FIRST_BLOCK:
            tested = copied([sampled_tokens(streams[chain.main]), *(self.parts and self._parts_of(streams))])
            decision = self.visit.decide_with(tested)
            self.visit.note(ONLY_BLOCK)
        self.answers = None if isinstance(decision, Request) else decision
        if self.answers is not None and self.plan.runs_first:
            streams[:] = copied(streams)  # the block may write into what it is given
            forward(*args, **kwargs)
            self.visit.units_computed += 1
        self._enter(0, streams)
        return False, None

    def _parts_of(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Some tokens of the latent's parts."""
        return [part.detach() for part in parts_in(streams, self.parts, len(self.visit.contexts))]

    def _enter(self, chain: int, streams: list[Tensor]) -> None:
        """A chain begins with these streams."""
        ends = self.plan.chains[chain].ends
        entering = [streams[stream] for stream in ends]
        if self.answers is None:
            self.entered[chain] = copied(entering) if self.visit.is_kept else ()
            return
        first = sum(len(before.ends) for before in self.plan.chains[:chain])
        residuals = self.answers[first : first + len(ends)]
        self.is_as_learned &= same_layout(residuals, entering)
        if self.is_as_learned:
            self.finished[chain] = [stream + residual for stream, residual in zip(entering, residuals, strict=True)]

    def _computed(self, chain: int, index: int, forward: Forward, args: tuple, kwargs: dict) -> Any:
        output = forward(*args, **kwargs)
        self.visit.units_computed += 1
        members = self.plan.chains[chain]
        if index == len(members.blocks) - 1:
            self._leave(chain, members.wirings[index].streams_out(output))
        return output

    def _leave(self, chain: int, streams: Sequence[Tensor]) -> None:
        """A chain has ended with these streams, which it computed."""
        if self.answers is None:
            ends, entered = self.plan.chains[chain].ends, self.entered.pop(chain)
            self.finished[chain] = [
                torch.sub(streams[stream].detach(), before, out=before) for stream, before in zip(ends, entered)
            ]


def keep_learned(visit: Visit, plan: BlockPlan, learned: Sequence[ChainStreams]) -> None:
    """Give the strategy what the call that was learned from computed along the stack."""
    first, chain = learned[0], plan.chains[0]
    decision = visit.decide(first.given, in_rows=[first.given[stream] for stream in chain.ends])
    visit.units_computed, entered = visit.units, first.entered
    if decision is FIRST_BLOCK:
        parts, branches = plan.parts if visit.strategy.tests_parts else (), len(visit.contexts)
        tested = [first.seen[chain.main], *parts_in(first.entered, parts, branches)]
        if plan.block_count > 1:
            entered = first.after_first
            if entered[chain.main] is None:
                raise RuntimeError(
                    f"{visit.strategy.title}: around() asks for FIRST_BLOCK. Set tests_first_block = True."
                )
            after = [sampled_tokens(entered[chain.main]), *parts_in(entered, parts, branches)]
            tested = [now - was for now, was in zip(after, tested)]
        visit.decide_with(tested)
    residuals = [
        left - entered[stream]
        for members, streams, entered in zip(
            plan.chains, learned, [entered, *(streams.entered for streams in learned[1:])]
        )
        for stream, left in zip(members.ends, streams.left)
    ]
    ran = {(chain, index) for chain, members in enumerate(plan.chains) for index in range(len(members.blocks))}
    parts = visit.split(residuals)
    if visit.wants(parts):
        visit.keep(parts, ran=ran)
