"""What branches remember between model calls."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.structure import Structure
from .rows import Layout


def bytes_held(state: Any) -> int:
    """Bytes of all tensors reachable from a state through dataclasses and containers, each storage once."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(state)}.values())


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        return [value.untyped_storage()]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) or hasattr(value, "popleft"):
        return [storage for item in value for storage in _storages(item)]
    return []


BlocksRan = set[tuple[int, int]]  # (chain, index of the block)


@dataclass
class Memory:
    """What one branch keeps at one site."""

    state: Any
    layout: Layout | None = None  # shapes of the inputs of the call that was kept last; None before the first
    structure: Structure | None = None  # what its output held besides tensors, at a module
    ran: BlocksRan | None = None  # which blocks ran in that call, along the stack
