"""Chains of blocks: how streams flow through them, and which lists of modules may be some."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import own_name, uncompiled
from .structure import Path, Structure, at_path

TensorKind = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True)
class Wiring:
    """Where one block takes the streams from and where it gives them."""

    takes: tuple[Path, ...]  # to each stream in (args, kwargs)
    gives: tuple[Path | None, ...]  # to it in the return value; None where it ends here
    extras: dict[Path, TensorKind]  # tensors that it returns besides the streams
    order: tuple[Path, ...]  # in which the return value holds all of them
    returns: Structure
    arguments: frozenset[Path]  # the tensors it is given

    def streams_in(self, args: tuple, kwargs: dict) -> list[Tensor]:
        """The streams as the block is given them."""
        return [at_path((args, kwargs), path) for path in self.takes]

    def streams_out(self, output: Any) -> list[Tensor | None]:
        """The streams as the block returned them; None for one that ends in it."""
        return [None if path is None else at_path(output, path) for path in self.gives]

    def returned(self, streams: list[Tensor]) -> Any:
        """What the block would return if it left the streams at these values; all it returns besides is zeros."""
        given = dict(zip(self.gives, streams))
        zeros = {
            path: streams[0].new_zeros((), dtype=dtype).expand(shape) for path, (shape, dtype) in self.extras.items()
        }
        return self.returns.filled_with([given[path] if path in given else zeros[path] for path in self.order])


@dataclass(frozen=True)
class Chain:
    """A list of blocks that feed each other."""

    name: str
    blocks: tuple[nn.Module, ...]
    names: tuple[str, ...]
    wirings: tuple[Wiring, ...]
    main: int  # the stream with the most elements: the image's
    main_size: int  # its elements in the call that was learned from

    ends: tuple[int, ...]  # the streams of features that leave the chain
    methods: tuple[str, ...]  # by which the model runs each block

    @property
    def has_extras(self) -> bool:
        """Whether blocks return more than they pass on."""
        return any(wiring.extras for wiring in self.wirings)


@dataclass(frozen=True)
class BlockPlan:
    """The chains of one model in the order they run, the first of which leads."""

    chains: tuple[Chain, ...] = ()
    notes: tuple[str, ...] = ()
    runs_first: bool = False  # the first block always runs: it prepares something that the model needs further on

    def without(self, chains: Collection[Chain], why: str) -> BlockPlan:
        """The plan in which these always run."""
        left = tuple(chain for chain in self.chains if chain not in chains)
        return replace(
            self, chains=left, notes=(*self.notes, *(f"{chain.name} always runs: {why}" for chain in chains))
        )

    @property
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
