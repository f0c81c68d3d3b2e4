"""Branches joined along the first axis of tensors: their rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..strategy.tensors import Features

Layout = tuple[tuple[int, ...], ...]


def rows_layout(tensors: Sequence[Tensor], branches: int) -> Layout:
    """Shapes of one branch's share of these tensors; whole shapes where the first axis does not divide."""
    return tuple(
        (tensor.shape[0] // branches, *tensor.shape[1:]) if has_rows([tensor], branches) else (branches, *tensor.shape)
        for tensor in tensors
    )


def has_rows(tensors: Sequence[Tensor], branches: int) -> bool:
    """Whether the first axis of each may be rows of so many branches."""
    return all(tensor.ndim and tensor.shape[0] % branches == 0 for tensor in tensors)


def split_rows(features: Sequence[Tensor], branches: int) -> list[Features] | None:
    """One branch's share of each tensor, for each of the branches joined along the first axis.

    None where the first axis does not divide: the branches can't be told apart.
    """
    if branches == 1:
        return [tuple(features)]
    if not has_rows(features, branches):
        return None
    return list(zip(*(tensor.chunk(branches) for tensor in features), strict=True))


def join_rows(parts: Sequence[Sequence[Tensor]]) -> Features:
    """The opposite of `split_rows`."""
    if len(parts) == 1:
        return tuple(parts[0])
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
