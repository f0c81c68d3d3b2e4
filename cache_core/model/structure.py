"""Tensors in whatever structure carries them: taken out of it, and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..strategy.tensors import Features

Path = tuple[Any, ...]  # the keys on the way to a tensor in nested tuples, lists and dicts
TensorKind = tuple[torch.Size, torch.dtype]


def tensors_in(value: Any, path: Path = ()) -> dict[Path, Tensor]:
    """All tensors of nested tuples and lists, and of dicts of arguments, by the way to them.

    Not those inside a dict that is an argument itself, such as ComfyUI's transformer options: nothing flows there.
    """
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif isinstance(value, dict) and len(path) <= 1:
        items = value.items()
    else:
        return {}
    return {way: tensor for key, item in items for way, tensor in tensors_in(item, (*path, key)).items()}


def at_path(value: Any, path: Path) -> Any:
    """The item that `tensors_in` found there. Raises LookupError or TypeError where there is none."""
    for key in path:
        value = value[key]
    return value


def is_feature(leaf: Any) -> bool:
    """Whether a leaf is a tensor that can be subtracted and forecast."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def is_tensor(leaf: Any) -> bool:
    """Whether a leaf is a tensor of any type."""
    return isinstance(leaf, Tensor)


def flattened(value: Any, belongs: Callable[[Any], bool] = is_feature) -> tuple[Features, Structure]:
    """The floating-point tensors of a value (or those that belong), and the structure to put others in their place."""
    leaves, spec = tree_flatten(value)
    taken = tuple(leaf for leaf in leaves if belongs(leaf))
    return taken, Structure(spec, tuple(_TENSOR if belongs(leaf) else leaf for leaf in leaves))


@dataclass(frozen=True)
class Structure:
    """What a call returned besides some of its tensors: the nesting, and the other leaves."""

    spec: TreeSpec
    constants: tuple[Any, ...]  # a leaf, or _TENSOR where one of those tensors goes

    def filled_with(self, features: Sequence[Tensor]) -> Any:
        """The same structure around other tensors."""
        tensors = iter(features)
        leaves = [next(tensors) if constant is _TENSOR else constant for constant in self.constants]
        return tree_unflatten(leaves, self.spec)

    @property
    def tensor_count(self) -> int:
        """How many tensors it takes."""
        return sum(constant is _TENSOR for constant in self.constants)

    @property
    def has_other_tensors(self) -> bool:
        """Whether there are tensors that are not features, a mask say: what they hold belongs to one call."""
        return any(isinstance(constant, Tensor) for constant in self.constants)


_TENSOR = object()


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
