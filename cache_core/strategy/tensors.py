"""Tensors as strategies see them: what a site of the model takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Features = tuple[Tensor, ...]
ENOUGH_TOKENS = 1024  # times channels: a mean of millions of values


def copied(features: Sequence[Tensor]) -> Features:
    """Tensors of our own: blocks write in place into those they are given."""
    return tuple(tensor.detach().clone() for tensor in features)


def same_layout(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether both have the same number of tensors, of the same shapes."""
    return [tensor.shape for tensor in some] == [tensor.shape for tensor in others]


def sampled_tokens(tensor: Tensor) -> Tensor:
    """About a thousand of the tokens, evenly spread, (rows, tokens, channels): enough to tell how far two are apart."""
    stride = tensor.shape[1] // ENOUGH_TOKENS if tensor.ndim == 3 else 1
    return tensor[:, ::stride].contiguous() if stride > 1 else tensor


def relative_change(now: Tensor, before: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """sum|now - before| / sum|before| as a scalar tensor: 0 for no change, NaN or infinite where nothing can be said.

    A batch counts as its most changed row, (rows, tokens, channels), so that a picture's decisions do not depend on
    calmer pictures beside it. Where tokens are spread over ranks, `total` sums a small tensor over these.
    """
    axes = tuple(range(1, now.ndim)) if now.ndim > 2 else tuple(range(now.ndim))
    change = (now - before).abs().sum(axes, dtype=torch.float32)
    change, size = total(torch.stack((change, before.abs().sum(axes, dtype=torch.float32))))
    return (change / size).max()
