"""Chains of blocks: how streams flow through them, and which lists of modules may be some."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from .compiled import own_name, uncompiled
from .hooks import Hook, handing_over
from .structure import Wiring


@dataclass(frozen=True)
class Chain:
    """A list of blocks that feed each other."""

    name: str
    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    wirings: tuple[Wiring, ...]
    main: int  # the stream to measure: the image's. Until the rehearsal, the one with the most elements
    main_size: int  # the most elements of a stream in the call that was learned from
    ends: tuple[int, ...]  # the streams of features that leave the chain
    methods: tuple[str, ...]  # by which the model runs each block

    @cached_property
    def has_extras(self) -> bool:
        """Whether blocks return more than they pass on."""
        return any(wiring.extras for wiring in self.wirings)


@dataclass(frozen=True)
class BlockPlan:
    """The chains of one model in the order they run, the first of which leads."""

    chains: tuple[Chain, ...] = ()
    notes: tuple[str, ...] = ()
    runs_first: bool = False  # the first block always runs: it prepares something that the model needs further on
    parts: tuple[Any, ...] = ()  # `Part`s of the latent that are tested by themselves, where a strategy asks for it

    def without(self, chains: Collection[Chain], why: str) -> BlockPlan:
        """The plan in which these always run."""
        left = tuple(chain for chain in self.chains if chain not in chains)
        return replace(
            self, chains=left, notes=(*self.notes, *(f"{chain.name} always runs: {why}" for chain in chains))
        )

    def along(self, stand_in: Callable[..., Any]) -> list[Hook]:
        """Hooks by which `stand_in(chain, index, forward, args, kwargs)` runs in place of every block's forward."""
        return [
            Hook(block, partial(handing_over, partial(stand_in, chain, index)), members.methods[index])
            for chain, members in enumerate(self.chains)
            for index, block in enumerate(members.blocks)
        ]

    @cached_property
    def block_count(self) -> int:
        return sum(len(chain.blocks) for chain in self.chains)

    def __str__(self) -> str:
        return " + ".join(f"{len(chain.blocks)} {chain.name}" for chain in self.chains) or "no chain of blocks"


def block_lists(model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Lists of modules of one class that own parameters: what may be a chain of blocks, by dotted name.

    Lists inside them are not among them: the transformers inside a U-Net's blocks, say, are no chain of its own.
    """
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not name.startswith(tuple(outer)):
            blocks = dict(module.named_children())
            classes = {type(uncompiled(block)) for block in blocks.values()}
            if len(classes) == 1 and all(map(weights_in, blocks.values())):
                outer.append(f"{name}.")
                yield own_name(name), blocks


def weights_in(module: nn.Module) -> int:
    """How many parameters a module owns, and buffers: some quantised layers keep their weights in those."""
    return sum(weights.numel() for weights in (*module.parameters(), *module.buffers()))
