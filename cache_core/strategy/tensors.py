"""Tensors as strategies see them: what a site of the model takes and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

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


def bytes_of(features: Sequence[Tensor]) -> int:
    """How many bytes tensors of these shapes and types take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in features)


def sampled_tokens(tensor: Tensor) -> Tensor:
    """About a thousand of the tokens, evenly spread, (rows, ..., channels): enough to tell how far two are apart.

    Where there are more, (rows, tokens, channels), however many axes they lay along; a view where there is one. Of
    (tokens, channels) a number that divides by that of a few branches.
    """
    if tensor.ndim == 2 and len(tensor) >= 2 * ENOUGH_TOKENS:
        chosen = tensor[:: len(tensor) // ENOUGH_TOKENS]
        return chosen[: len(chosen) // 12 * 12]
    places = tensor.shape[1:-1]
    stride = prod(places) // ENOUGH_TOKENS if places else 1
    if stride <= 1:
        return tensor
    if len(places) == 1:
        return tensor[:, ::stride]
    chosen = torch.arange(0, prod(places), stride, device=tensor.device)  # a view of all tokens as one axis may be none
    return tensor[(slice(None), *torch.unravel_index(chosen, places))]


def relative_change(now: Tensor, before: Tensor, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """sum|now - before| / sum|before| as a scalar tensor: 0 for no change, NaN or infinite where nothing can be said.

    A batch counts as its most changed row, (rows, tokens, channels), so that a picture's decisions do not depend on
    calmer pictures beside it. Where tokens are spread over ranks, `total` sums a small tensor over these.
    """
    change, size = total(relative_sums(now, before))
    return (change / size).max()


def worst_change(now: Features, before: Features, total: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """`relative_change` of the first of these, or of whichever of the others changed more; NaN where it is NaN or 0.

    Of the others, (parts, tokens, channels) each, what was and is zero has not changed: sound that is silent, say.
    """
    sums = [relative_sums(*pair).reshape(2, -1) for pair in zip(now, before, strict=True)]
    change, size = total(torch.cat(sums, 1))
    count = sums[0].shape[1]
    main = (change / size)[:count].max()
    others = torch.where(change == 0, change, change / size)[count:]
    worst = torch.cat((main[None], others)).max()
    return torch.where(main > 0, worst, torch.full_like(worst, torch.nan))


def relative_sums(now: Tensor, before: Tensor) -> Tensor:
    """sum|now - before| and sum|before| of each row of (rows, tokens, channels): (2, rows), float32."""
    axes = tuple(range(1, now.ndim)) if now.ndim > 2 else tuple(range(now.ndim))
    change = (now - before).abs().sum(axes, dtype=torch.float32)
    return torch.stack((change, before.abs().sum(axes, dtype=torch.float32)))


def split_frequencies(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high frequencies along the last two axes, (..., height, width); their sum is the latent.

    Low is what lies within a fifth of the shorter side around frequency zero, as published. Kept as pictures, not as
    spectra: weighing and adding them needs no transform, as the transform is linear.
    """
    height, width = latent.shape[-2:]
    rows = torch.fft.fftfreq(height, 1 / height, device=latent.device)
    columns = torch.fft.rfftfreq(width, 1 / width, device=latent.device)
    is_low = rows[:, None] ** 2 + columns[None] ** 2 <= (min(height, width) // 5) ** 2  # (height, width // 2 + 1)
    low = torch.fft.irfft2(torch.fft.rfft2(latent) * is_low, s=(height, width))
    return low, latent - low
