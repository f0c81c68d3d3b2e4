"""Which branch a call is whose loop does not say so: told by the memory that its conditioning lies in."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Origin:
    """What a tensor shows, without keeping it alive: which memory, which part of it, and how often it was written.

    Two views made by the same slicing of one tensor have the same origin.
    """

    def __init__(self, tensor: Tensor) -> None:
        try:
            self._storage = StorageWeakRef(tensor.untyped_storage())
            view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            self._view = (*view, None if tensor.is_inference() else tensor._version)
        except (
            RuntimeError,
            NotImplementedError,
        ):  # it has no memory of its own
            self._storage, self._view = weakref.ref(tensor), id(tensor)

    @property
    def is_gone(self) -> bool:
        """Whether that memory was freed."""
        storage = self._storage
        return storage.expired() if isinstance(storage, StorageWeakRef) else storage() is None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Origin) or self.is_gone or other.is_gone:
            return False
        return self._view == other._view and self._storage == other._storage

    __hash__ = None


class Prompts:
    """Names for the branches of calls without a context."""

    def __init__(self) -> None:
        self._known: dict[str, Origin] = {}

    def take_gone(self) -> list[str]:
        """Forget the branches whose conditioning is gone. Their names."""
        gone = [branch for branch, origin in self._known.items() if origin.is_gone]
        for branch in gone:
            del self._known[branch]
        return gone

    def name_of(self, origin: Origin | None) -> tuple[str, bool]:
        """The name of the branch with this conditioning, and whether it is new."""
        if origin is None:
            return "prompt", False
        for branch, known in self._known.items():
            if known == origin:
                return branch, False
        numbers = (f"prompt {number}" for number in range(1, len(self._known) + 2))
        branch = next(name for name in numbers if name not in self._known)
        self._known[branch] = origin
        return branch, True

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
