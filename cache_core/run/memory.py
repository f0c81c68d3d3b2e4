"""What branches remember between model calls."""

import threading
from collections.abc import Callable, Collection, Hashable, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch

from ..model import Structure
from ..strategy import Level, Site, Strategy
from ..strategy.lane import Away

BlocksRan = set[tuple[int, int]]  # (chain, index of the block)
Layout = tuple[tuple[int, ...], ...]  # shapes
Key = tuple[Hashable, Strategy, Site]  # the branch's context, and who keeps it where
Place = tuple[Strategy, Site]
T = TypeVar("T")


@dataclass
class Memory:
    """What one branch keeps at one site."""

    state: Any
    layout: Layout | None = None  # shapes of the inputs of the call that was kept last; None before the first
    structure: Structure | None = None  # what its output held besides tensors, at a module
    ran: BlocksRan | None = None  # which blocks ran in that call, along the stack
    reserved: int = 0  # bytes that the state may take
    device: torch.device | None = None  # where it is computed
    is_away: bool = False  # whether the bytes are in main memory instead
    serves_until: int | None = None  # the last step that may reuse it; None: nobody knows

    def serves(self, step: int) -> bool:
        """Whether this step, or one that follows, may reuse it."""
        return self.serves_until is None or self.serves_until >= step

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether this very tensor, or one that shares its memory, is kept."""
        address, _ = _address_and_bytes(tensor)
        return any(_address_and_bytes(kept)[0] == address for kept in _tensors(self.state))


class Memories(dict[Key, Memory]):
    """All of them. This is where what a run holds is freed."""

    def __init__(self) -> None:
        self.excluded: set[Place] = set()  # where a strategy can't keep what it needs
        self._lock = threading.Lock()

    def of(self, context: Hashable, strategy: Strategy, site: Site) -> Memory:
        """What this branch keeps at this site for this strategy."""
        key = (context, strategy, site)
        with self._lock:
            if key not in self:
                self[key] = Memory(strategy.new_state(site))
            return self[key]

    def exclude(self, strategy: Strategy, site: Site) -> None:
        """Keep the strategy out of this site from now on, and drop what it keeps there."""
        with self._lock:
            self.excluded.add((strategy, site))
            for key in [key for key in self if key[1:] == (strategy, site)]:
                del self[key]

    def drop_but(self, place: Place, own: Sequence[Memory]) -> None:
        """Drop what is kept at this place by others than these."""
        with self._lock:
            for key in [key for key in self if key[1:] == place and not any(self[key] is each for each in own)]:
                del self[key]

    def reserved_at(
        self, strategy: Strategy | None = None, device: torch.device | None = None, is_away: bool | None = False
    ) -> dict[Place, int]:
        """Where bytes are reserved and how many, for this strategy or any, in the order of the first call.

        On this device or any, or `is_away`, in main memory; None is both.
        """
        with self._lock:
            reserved: dict[Place, int] = {}
            for key, memory in self._matching(strategy, device, is_away):
                if memory.reserved:
                    reserved[key[1:]] = reserved.get(key[1:], 0) + memory.reserved
            return reserved

    def bytes_reserved(
        self, strategy: Strategy | None = None, device: torch.device | None = None, is_away: bool | None = False
    ) -> int:
        """How many bytes those are."""
        with self._lock:
            return sum(memory.reserved for _, memory in self._matching(strategy, device, is_away))

    def forget(self, contexts: Collection[Hashable]) -> None:
        """Drop what these branches keep: it was made of streams that are given up."""
        self._drop(lambda context, site: context in contexts)

    def forget_all_but(self, contexts: Set[Hashable]) -> None:
        """Drop what other branches keep: they were away for an evaluation, and it is too old when they are back."""
        self._drop(lambda context, site: context not in contexts and not contexts.issuperset(context))

    def forget_unusable(self, step: int) -> None:
        """Drop what neither this step nor one that follows may reuse."""
        with self._lock:
            for key in [key for key, memory in self.items() if not memory.serves(step)]:
                del self[key]

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
        """Bytes of everything that is kept, but for what is in main memory instead of the device."""
        with self._lock:
            return bytes_held([memory.state for memory in self.values()]) - self.bytes_away

    @property
    def bytes_away(self) -> int:
        """Bytes in main memory instead."""
        states = [memory.state for memory in list(self.values()) if memory.is_away]
        return bytes_held([each.parts for each in away_in(states)])

    def _matching(
        self, strategy: Strategy | None, device: torch.device | None, is_away: bool | None
    ) -> list[tuple[Key, Memory]]:
        return [
            (key, memory)
            for key, memory in self.items()
            if strategy in (None, key[1]) and device in (None, memory.device) and is_away in (None, memory.is_away)
        ]

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


def away_in(state: Any) -> list[Away]:
    """What a state keeps in main memory instead of on the device."""
    return _found(Away, state)


def _tensors(value: Any) -> list[torch.Tensor]:
    return _found(torch.Tensor, value)


def _found(kind: type[T], value: Any) -> list[T]:
    """All of this kind that are reachable through dataclasses and containers."""
    if isinstance(value, kind):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) or hasattr(value, "popleft"):
        return [found for item in value for found in _found(kind, item)]
    return []
