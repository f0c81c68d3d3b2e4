"""Which lists of modules are chains of blocks, and how streams flow through them, learned from one ordinary call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .features import Structure, is_feature, leaves_of, taken_apart
from .hooks import Around, HookRegistry

SMALLEST_SHARE = (
    0.08  # of the parameters in all chains: refiners and heads below it always run, they cost next to nothing
)


@dataclass(frozen=True)
class Wiring:
    """Where one block takes the streams from and where it gives them."""

    takes: tuple[int, ...]  # leaf of (args, kwargs) that holds each stream
    gives: tuple[int | None, ...]  # leaf of the return value that holds it; None where it ends here
    returns: Structure

    def streams_in(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """The streams as the block is given them."""
        leaves = leaves_of((args, kwargs))
        return [leaves[leaf] for leaf in self.takes]

    def streams_out(self, output: Any) -> list[Tensor | None]:
        """The streams as the block returned them; None for one that ends in it."""
        leaves = leaves_of(output)
        return [None if leaf is None else leaves[leaf] for leaf in self.gives]

    def returned(self, streams: list[Tensor]) -> Any:
        """What the block would return if it left the streams at these values."""
        given = {leaf: stream for leaf, stream in zip(self.gives, streams) if leaf is not None}
        return self.returns.filled_with([given[leaf] for leaf in sorted(given)])


@dataclass(frozen=True)
class Chain:
    """A list of blocks that feed each other."""

    name: str
    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    wirings: tuple[Wiring, ...]
    main: int  # the stream with the most elements: the image's

    @property
    def ends(self) -> tuple[int, ...]:
        """The streams that leave the chain."""
        return tuple(stream for stream, leaf in enumerate(self.wirings[-1].gives) if leaf is not None)


@dataclass(frozen=True)
class BlockPlan:
    """The chains of one model in the order they run, the first of which leads."""

    chains: tuple[Chain, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def block_count(self) -> int:
        return sum(len(chain.blocks) for chain in self.chains)

    def __str__(self) -> str:
        return " + ".join(f"{len(chain.blocks)} {chain.name}" for chain in self.chains) or "no chain of blocks"


@dataclass
class _Ran:
    """One block's run, as far as linking it to the next needs it."""

    index: int
    began: int
    inside: str | None  # the candidate list whose block was running
    took: dict[int, torch.Size]  # shapes of the tensors among the leaves of its inputs
    links: list[tuple[int, int]] = field(default_factory=list)  # (leaf the block before gave, leaf of our inputs)
    gave: dict[int, Tensor] = field(default_factory=dict)  # dropped once the next block has run
    sizes: dict[int, torch.Size] = field(default_factory=dict)
    returns: Structure | None = None


class Lesson:
    """Watches one ordinary call of a model. Use `with lesson.watching():` around it, then `lesson.plan()`."""

    def __init__(self, model: nn.Module) -> None:
        self.lists = dict(_candidates(model))
        self.runs: dict[str, list[_Ran]] = {name: [] for name in self.lists}
        self._running: list[str] = []
        self._clock = 0

    def watching(self) -> HookRegistry:
        """Hooks that watch; they change nothing."""
        hooks = HookRegistry()
        for name, blocks in self.lists.items():
            for index, block in enumerate(blocks.values()):
                hooks.add(block, self._watch(name, index))
        return hooks

    def plan(self) -> BlockPlan:
        """What the call taught."""
        chains, notes = [], []
        for name, blocks in sorted(self.lists.items(), key=lambda item: [ran.began for ran in self.runs[item[0]]][:1]):
            chain = self._chain(name, blocks)
            if isinstance(chain, Chain):
                chains.append(chain)
            elif self.runs[name]:
                notes.append(f"{name} always runs: {chain}")
        sizes = {chain.name: sum(weights_in(block) for block in chain.blocks) for chain in chains}
        large = tuple(chain for chain in chains if sizes[chain.name] >= SMALLEST_SHARE * sum(sizes.values()))
        notes += [f"{chain.name} always runs: it is small" for chain in chains if chain not in large]
        return BlockPlan(large, tuple(notes))

    def _watch(self, name: str, index: int) -> Around:
        def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            leaves = _tensors_among(leaves_of((args, kwargs)))
            ran = _Ran(index, self._clock, self._running[-1] if self._running else None, _shapes(leaves))
            self._clock += 1
            if self.runs[name]:
                ran.links = _links(self.runs[name][-1].gave, leaves)
            self._running.append(name)
            try:
                output = forward(*args, **kwargs)
            finally:
                self._running.pop()
            if self.runs[name]:
                self.runs[name][-1].gave = {}
            ran.gave, ran.returns = _tensors_among(leaves_of(output)), taken_apart(output)[1]
            ran.sizes = _shapes(ran.gave)
            self.runs[name].append(ran)
            return output

        return watch

    def _chain(self, name: str, blocks: dict[str, nn.Module]) -> Chain | str:
        """The list as a chain, or why it is none."""
        runs = self.runs[name]
        if [ran.index for ran in runs] != list(range(len(blocks))):
            return "its blocks do not each run once, in order"
        if any(ran.inside for ran in runs):
            return "it runs inside another block"
        votes = Counter(link for ran in runs[1:] for link in ran.links)
        streams = sorted(
            (gives, takes)
            for (gives, takes), count in votes.items()
            if 2 * count >= len(runs) - 1 and all(takes in ran.took for ran in runs)
        )
        if not streams or len({takes for _, takes in streams}) < len(streams):
            return "its blocks do not feed each other"
        if any(ran.sizes.get(gives, ran.took[takes]) != ran.took[takes] for ran in runs for gives, takes in streams):
            return "its blocks change the shape of what they pass on"
        if any(set(ran.sizes) - {gives for gives, _ in streams} for ran in runs):
            return "its blocks return more than they pass on"
        wirings = tuple(
            Wiring(
                takes=tuple(takes for _, takes in streams),
                gives=tuple(gives if gives in ran.sizes else None for gives, _ in streams),
                returns=ran.returns,
            )
            for ran in runs
        )
        main = max(range(len(streams)), key=lambda stream: runs[0].took[streams[stream][1]].numel())
        return Chain(name, tuple(blocks.values()), tuple(f"{name}.{key}" for key in blocks), wirings, main)


def _tensors_among(leaves: list[Any]) -> dict[int, Tensor]:
    return {index: leaf for index, leaf in enumerate(leaves) if is_feature(leaf)}


def _shapes(tensors: dict[int, Tensor]) -> dict[int, torch.Size]:
    return {leaf: tensor.shape for leaf, tensor in tensors.items()}


def _links(given: dict[int, Tensor], taken: dict[int, Tensor]) -> list[tuple[int, int]]:
    """Which input leaf each tensor given by the block before arrives at: the same object, else the only one alike."""
    links: list[tuple[int, int]] = []
    for gives, tensor in given.items():
        free = [leaf for leaf in taken if leaf not in {arrived for _, arrived in links}]
        same = [leaf for leaf in free if taken[leaf] is tensor]
        alike = [leaf for leaf in free if taken[leaf].shape == tensor.shape and taken[leaf].dtype == tensor.dtype]
        if same or len(alike) == 1:
            links.append((gives, (same or alike)[0]))
    return links


def _candidates(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Lists of at least two modules of one class that own parameters."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            blocks = dict(module.named_children())
            if (
                len(blocks) > 1
                and len({type(block) for block in blocks.values()}) == 1
                and all(map(weights_in, blocks.values()))
            ):
                yield name, blocks


def weights_in(module: nn.Module) -> int:
    """How many parameters a module owns."""
    return sum(parameter.numel() for parameter in module.parameters())
