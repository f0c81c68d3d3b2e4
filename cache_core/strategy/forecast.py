"""Forecasts: weighted sums of stored tensors, and where the weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import factorial, hypot
from typing import Any

import torch
from torch import Tensor

from .packed import Kept, Packed
from .step import is_same
from .tensors import Features, same_layout

WEIGHT_LIMIT = (
    3.0  # 2-norm: above it a forecast magnifies the roughness of what it is made of (measured on a trained model)
)


def newton_weights(nodes: Sequence[float], at: Any) -> list[Any]:
    """Weights of the polynomial through values at `nodes`, evaluated at `at` (Newton's and Lagrange's are the same).

    `at` is a number, or a scalar tensor for weights on its device.

    >>> newton_weights([1.0, 2.0], 0.0)
    [2.0, -1.0]
    """
    weights = []
    for own in nodes:
        weight = 1.0
        for other in nodes:
            if other != own:
                weight *= (at - other) / (own - other)
        weights.append(weight)
    return weights


def safe_weights(nodes: Sequence[float], at: float, order: int, limit: float = WEIGHT_LIMIT) -> list[float]:
    """Newton weights through the newest nodes (newest first), the order dropping while their 2-norm exceeds `limit`."""
    for used in range(min(order + 1, len(nodes)), 1, -1):
        weights = newton_weights(nodes[:used], at)
        if hypot(*weights) <= limit:
            return weights
    return [1.0]


def safe_weights_on_device(nodes: Sequence[float], at: Tensor, order: int, limit: float = WEIGHT_LIMIT) -> list[Tensor]:
    """The same for a scalar tensor, without waiting for its device: one weight for each node that may be used."""
    used = min(order + 1, len(nodes))
    safe = torch.eye(max(used, 1), dtype=at.dtype, device=at.device)[0]
    for count in range(2, used + 1):
        weights = torch.stack(newton_weights(nodes[:count], at))
        weights = torch.nn.functional.pad(weights, (0, used - count))
        safe = torch.where(weights.norm() <= limit, weights, safe)
    return list(safe)


def recursion_weights(nodes: Sequence[float], at: float, order: int) -> list[float]:
    """The published TaylorSeer forecast (arXiv 2503.06923) as weights of the stored outputs, newest first.

    Factor i + 1 is the difference of two factors i over the newer one's gap; the forecast is their Taylor series. From
    order 2 up this is not the polynomial through the nodes, which is why it is not the default.
    """
    factors = [[float(row == column) for column in range(len(nodes))] for row in range(len(nodes))]
    weights = list(factors[0])
    for i in range(1, min(order + 1, len(nodes))):
        gaps = [newer - older for newer, older in pairwise(nodes)]
        factors = [
            [(a - b) / gap for a, b in zip(newer, older)] for newer, older, gap in zip(factors, factors[1:], gaps)
        ]
        power = (at - nodes[0]) ** i / factorial(i)
        weights = [weight + power * factor for weight, factor in zip(weights, factors[0])]
    return weights


def weighted_sum(tensors: Sequence[Kept], weights: Sequence[float | Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of weight * tensor, accumulated in float32 and rounded once. Always a new tensor."""
    tensors = (each.restored() if isinstance(each, Packed) else each for each in tensors)  # one at a time
    newest = next(tensors)
    accumulator = newest.to(torch.promote_types(newest.dtype, torch.float32), copy=True).mul_(weights[0])
    for tensor, weight in zip(tensors, weights[1:]):
        if isinstance(weight, Tensor):
            accumulator.addcmul_(tensor, weight)
        else:
            accumulator.add_(tensor, alpha=weight)
    return accumulator.to(dtype)


@dataclass
class History:
    """The last few outputs of one site and where they belong on an axis (sigma or step index), newest first."""

    capacity: int
    nodes: list[float] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)
    _dtypes: tuple[torch.dtype, ...] = ()

    def __len__(self) -> int:
        return len(self.nodes)

    def has(self, node: float) -> bool:
        """Whether the newest value is that of this node."""
        return bool(self.nodes) and is_same(self.nodes[0], node)

    def make_room(self, node: float) -> None:
        """Drop what the value of this node, which is about to be computed, will replace."""
        kept = [(known, value) for known, value in zip(self.nodes, self.features) if not is_same(known, node)]
        kept = kept[: self.capacity - 1]
        self.nodes, self.features = [known for known, _ in kept], [value for _, value in kept]

    def add(self, node: float, features: Features) -> None:
        """Keep these outputs, which the caller gives away. One node has one value; other shapes start anew."""
        if self.features and not same_layout(features, self.features[0]):
            self.nodes, self.features = [], []
        self._dtypes = tuple(tensor.dtype for tensor in features)
        self.make_room(node)
        self.nodes, self.features = [node, *self.nodes], [features, *self.features]

    def newest_moved(self, by: Tensor, times: float) -> Features:
        """The newest outputs with so many times this tensor added; none where they are not just one like it."""
        newest = self.features[0] if self.features else ()
        if len(newest) != 1 or not isinstance(newest[0], Tensor) or newest[0].shape != by.shape:
            return ()
        moved = newest[0].to(torch.promote_types(newest[0].dtype, torch.float32))
        return (moved.add(by.to(moved.device), alpha=times).to(newest[0].dtype),)

    def combined(self, weights: Sequence[float | Tensor]) -> Features:
        """Weighted sums of the newest outputs, as many as there are weights."""
        stored = self.features[: len(weights)]
        return tuple(
            weighted_sum(tensors, weights, dtype) for tensors, dtype in zip(zip(*stored), self._dtypes, strict=True)
        )
