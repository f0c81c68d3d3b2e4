"""How streams flow from block to block, read off the runs of the blocks of one list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..strategy.tensors import copied
from .structure import Path, Structure, TensorKind, Wiring, flattened, is_tensor, tensors_in

Stream = tuple[Path, Path]  # where a block gives it, where the next block takes it


class Unlinked(Exception):
    """The blocks of a list are no chain, and why."""


@dataclass
class BlockRun:
    """One block's run. Tensors are dropped once the next block has run; what is known of them stays."""

    index: int
    inside: str | None  # the list whose block was running
    took: dict[Path, Tensor]
    gave: dict[Path, Tensor] = field(default_factory=dict)
    links: list[Stream] = field(default_factory=list)  # between the block before and this one
    kinds_taken: dict[Path, TensorKind] = field(default_factory=dict)
    kinds_given: dict[Path, TensorKind] = field(default_factory=dict)
    returns: Structure | None = None

    def __post_init__(self) -> None:
        self.kinds_taken = _kinds(self.took)

    def give(self, output: Any) -> None:
        """It returned this."""
        self.gave, self.returns = tensors_in(output), flattened(output, is_tensor)[1]
        self.kinds_given = _kinds(self.gave)

    def link(self, before: BlockRun) -> None:
        """Find out which input each tensor given by the block before arrives at."""
        not_passed_on = {id(tensor) for tensor in before.took.values()} - {
            id(tensor) for tensor in before.gave.values()
        }
        self.links = _links(before.gave, self.took, not_passed_on)

    def forget(self) -> None:
        """Let go of the tensors."""
        self.took, self.gave = {}, {}

    def wiring(self, streams: Sequence[Stream]) -> Wiring:
        """Where this block takes and gives these streams."""
        passed_on = {gives for gives, _ in streams}
        return Wiring(
            takes=tuple(takes for _, takes in streams),
            gives=tuple(gives if gives in self.kinds_given else None for gives, _ in streams),
            extras={path: kind for path, kind in self.kinds_given.items() if path not in passed_on},
            order=tuple(self.kinds_given),
            returns=self.returns,
            arguments=frozenset(self.kinds_taken),
        )


def streams_through(runs: Sequence[BlockRun], block_count: int) -> list[Stream]:
    """The streams that flow through all blocks of a list. Raises `Unlinked` if it is no chain."""
    if [run.index for run in runs] != list(range(block_count)):
        raise Unlinked("its blocks do not each run once, in order")
    if any(run.inside for run in runs):
        raise Unlinked("it runs inside another block")
    if len(runs) == 1:  # a single block: it would feed another one like itself
        runs[0].links = _links(runs[0].gave, runs[0].took, not_passed_on=set(), takes_first=True)
    linked = runs[1:] or runs
    votes = Counter(link for run in linked for link in run.links)
    streams = sorted(
        (link for link, count in votes.items() if 2 * count >= len(linked)),
        key=lambda link: [str(key) for key in link[0]],
    )
    streams = [(gives, takes) for gives, takes in streams if all(takes in run.kinds_taken for run in runs)]
    if not features_of(streams, runs[0]) or len({takes for _, takes in streams}) < len(streams):
        raise Unlinked("its blocks do not feed each other")
    kinds = [(run.kinds_taken[takes], run.kinds_given.get(gives)) for run in runs for gives, takes in streams]
    if any(given not in (None, taken) for taken, given in kinds):
        raise Unlinked("its blocks change the shape or the type of what they pass on")
    if any(len(run.kinds_given) != run.returns.tensor_count for run in runs):
        raise Unlinked("its blocks return something that can't be read")
    return streams


def features_of(streams: Sequence[Stream], first: BlockRun) -> dict[int, int]:
    """The streams that can be subtracted and forecast, and the elements of each."""
    kinds = {number: first.kinds_taken[takes] for number, (_, takes) in enumerate(streams)}
    return {number: shape.numel() for number, (shape, dtype) in kinds.items() if dtype.is_floating_point}


def copies_of(tensors: dict[Path, Tensor]) -> dict[Path, Tensor]:
    """Tensors of our own, by the same paths."""
    return {path: copied([tensor])[0] for path, tensor in tensors.items()}


def _kinds(tensors: dict[Path, Tensor]) -> dict[Path, TensorKind]:
    return {path: (tensor.shape, tensor.dtype) for path, tensor in tensors.items()}


def _links(
    given: dict[Path, Tensor], taken: dict[Path, Tensor], not_passed_on: set[int], takes_first: bool = False
) -> list[Stream]:
    """Which input each tensor given by the block before arrives at: the same object, else the only one alike.

    `not_passed_on` are the ids of those that have not come from it. With `takes_first`, of several alike it is the
    first.
    """
    ways = {id(tensor): path for path, tensor in reversed(taken.items())}
    links = {gives: ways[id(tensor)] for gives, tensor in given.items() if id(tensor) in ways}
    for gives, tensor in given.items():
        alike = [
            path
            for path, other in taken.items()
            if (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
            and path not in links.values()
            and id(other) not in not_passed_on
        ]
        if gives not in links and (len(alike) == 1 or (alike and takes_first)):  # LTX's positions look like its tokens
            links[gives] = alike[0]
    return list(links.items())
