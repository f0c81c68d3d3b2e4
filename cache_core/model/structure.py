"""Tensors in whatever structure carries them: taken out of it, and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..strategy.tensors import Features

Path = tuple[Any, ...]
SMALLEST_NORM = 1e-12  # two outputs of zeros are alike


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


def relative_error(some: Any, reference: Any) -> float:
    """|some - reference| / |reference|, the largest of all features of two outputs alike. Waits for the device.

    NaN, and outputs without features, count as infinite.
    """
    errors = [
        (a.detach().float() - b.detach().float()).norm() / b.detach().float().norm().clamp_min(SMALLEST_NORM)
        for a, b in zip(flattened(some)[0], flattened(reference)[0], strict=True)
    ]
    error = torch.stack(errors).max().item() if errors else float("inf")
    return error if error == error else float("inf")


def all_finite(value: Any) -> bool:
    """Whether no feature of a value holds NaN or infinity. Waits for the device."""
    return all(bool(torch.isfinite(feature).all()) for feature in flattened(value)[0])
