"""What branches remember between model calls."""

import threading
from collections.abc import Callable, Collection, Hashable, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from ..model import Structure
from ..strategy import Level, Site, Strategy

BlocksRan = set[tuple[int, int]]  # (chain, index of the block)
Layout = tuple[tuple[int, ...], ...]  # shapes
Key = tuple[Hashable, Strategy, Site]  # the branch's context, and who keeps it where


@dataclass
class Memory:
    """What one branch keeps at one site."""

    state: Any
    layout: Layout | None = None  # shapes of the inputs of the call that was kept last; None before the first
    structure: Structure | None = None  # what its output held besides tensors, at a module
    ran: BlocksRan | None = None  # which blocks ran in that call, along the stack


class Memories(dict[Key, Memory]):
    """All of them. This is where what a run holds is freed."""

    def __init__(self) -> None:
        self.excluded: set[tuple[Strategy, Site]] = set()  # where a strategy can't keep what it needs
        self._lock = threading.Lock()

    def of(self, context: Hashable, strategy: Strategy, site: Site) -> Memory:
        """What this branch keeps at this site for this strategy."""
        key = (context, strategy, site)
        with self._lock:
            if key not in self:
                self[key] = Memory(strategy.new_state(site))
            return self[key]

    def forget(self, contexts: Collection[Hashable]) -> None:
        """Drop what these branches keep: it was made of streams that are given up."""
        self._drop(lambda context, site: context in contexts)

    def forget_all_but(self, contexts: Set[Hashable]) -> None:
        """Drop what other branches keep: they were away for an evaluation, and it is too old when they are back."""
        self._drop(lambda context, site: context not in contexts and not contexts.issuperset(context))

    def forget_at(self, level: Level) -> None:
        """Drop what is kept at this level."""
        self._drop(lambda context, site: site.level == level)

    def forget_strategies(self, strategies: Collection[Strategy]) -> None:
        """Drop what is kept for these strategies."""
        with self._lock:
            for key in [key for key in self if key[1] in strategies]:
                del self[key]

    def forget_outside(self, blocks: Collection[str]) -> None:
        """Drop what is kept at and inside other blocks than these."""
        inside = tuple(f"{block}." for block in blocks)
        levels = ("block", "module", "attention")
        kept = lambda site: site.level not in levels or site.name in blocks or site.name.startswith(inside)  # noqa: E731
        self._drop(lambda context, site: not kept(site))

    @property
    def bytes_held(self) -> int:
        """Bytes of everything that is kept."""
        with self._lock:
            return bytes_held([memory.state for memory in self.values()])

    def _drop(self, is_dropped: Callable[[Hashable, Site], bool]) -> None:
        with self._lock:
            for key in [key for key in self if is_dropped(key[0], key[2])]:
                del self[key]


def bytes_held(state: Any) -> int:
    """Bytes of all tensors reachable from a state through dataclasses and containers, each storage once.

    A tensor whose storage can't be looked at, as on DirectML, counts with its elements.
    """
    return sum(dict(map(_address_and_bytes, _tensors(state))).values())


def _address_and_bytes(tensor: torch.Tensor) -> tuple[Hashable, int]:
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr() or (id(tensor),), storage.nbytes()
    except RuntimeError:  # NotImplementedError is one
        return (id(tensor),), tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) or hasattr(value, "popleft"):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
