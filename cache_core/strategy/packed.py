"""Tensors that are kept in another form than they were computed in: in fewer bits, in main memory, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .lane import Away, Lane
from .setting import setting
from .tensors import bytes_of

AUTO, GPU, CPU = DEVICES = ("auto", "gpu", "cpu")
AS_COMPUTED, BFLOAT16, EIGHT_BIT = FORMS = ("as computed", "bfloat16", "8 bit")
DTYPES = {AS_COMPUTED: None, BFLOAT16: torch.bfloat16, EIGHT_BIT: torch.int8}
LARGEST = 127  # of int8, on both sides of 0
AT_ONCE = 2**24  # values that are made 8 bit together: 64 MiB in float32


@dataclass(eq=False)
class Packed:
    """Stands for a tensor among what a strategy keeps; what it hands back is restored before the model sees it.

    8 bit is int8 and a float32 scale for each row of the last dimension, which is a token, (..., channels). int8 rather
    than float8: its steps are even, and a token's channels are of one size, so that rounding takes less (10 to 14 dB on
    the demo, see docs/benchmarks); and every device has it.
    """

    kept: Away | tuple[Tensor, ...]  # the values; of 8 bit also the scales, (..., 1)
    shape: torch.Size
    dtype: torch.dtype  # of the tensor that this stands for

    def restored(self) -> Tensor:
        """The tensor, new: the caller may write into it. Its last bits are lost where it is kept in fewer."""
        is_away = isinstance(self.kept, Away)
        values, *scales = self.kept.back() if is_away else self.kept
        return torch.mul(values, *scales).to(self.dtype) if scales else values.to(self.dtype, copy=not is_away)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What is kept of it."""
        return self.kept.parts if isinstance(self.kept, Away) else self.kept


Kept = Tensor | Packed


def packed(tensor: Kept, dtype: torch.dtype | None, copy: bool = False) -> Kept:
    """The tensor stored in this type, if that makes it smaller; itself if not, a copy where one is asked for."""
    if isinstance(tensor, Packed):
        return tensor
    tensor = tensor.detach()
    if dtype is None or not gets_smaller(tensor, dtype):
        return tensor.clone() if copy else tensor
    parts = _in_8_bits(tensor) if dtype is torch.int8 else (tensor.to(dtype),)
    return Packed(parts, tensor.shape, tensor.dtype)


def away(tensor: Kept, lane: Lane) -> Packed:
    """The same in main memory. The tensor is given away."""
    parts = tensor.parts if isinstance(tensor, Packed) else (tensor,)
    return Packed(lane.away(parts), tensor.shape, tensor.dtype)


def bytes_packed(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> int:
    """How many bytes they take when stored in this type."""
    return bytes_of(tensors) if dtype is None else sum(_bytes_of(tensor, dtype) for tensor in tensors)


def gets_smaller(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether it takes less memory in this type."""
    return _bytes_of(tensor, dtype) < tensor.numel() * tensor.element_size()


def _bytes_of(tensor: Tensor, dtype: torch.dtype) -> int:
    own = tensor.numel() * tensor.element_size()
    if tensor.ndim == 0 or not tensor.is_floating_point():
        return own
    scales = 4 * tensor.numel() // max(tensor.shape[-1], 1) if dtype is torch.int8 else 0
    return min(own, tensor.numel() * dtype.itemsize + scales)


def _in_8_bits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    least, most = tensor.aminmax(dim=-1, keepdim=True)
    scales = torch.maximum(most, -least).float() / LARGEST  # NaN and infinite stay so
    values = torch.empty(tensor.shape, dtype=torch.int8, device=tensor.device)
    rows = max(AT_ONCE // tensor.shape[-1], 1)
    flat = (each.reshape(-1, each.shape[-1]).split(rows) for each in (tensor, scales, values))
    for some, scale, into in zip(*flat):
        into.copy_(torch.div(some, scale.clamp_min(torch.finfo(torch.float32).tiny)).round_())
    return values, scales


def cache_device(sites: str) -> Any:
    """The setting `cache_device`."""
    return setting(
        AUTO,
        f"Where what is kept lives. 'auto': on the GPU as far as it fits; {sites} that do not fit wait in main memory "
        f"where fetching them is faster than computing them, else they always run. 'gpu': on the GPU only. 'cpu': all "
        f"in main memory, which memory_limit_gb then limits. Usual: 'auto'.",
        choices=DEVICES,
        is_optional=True,
    )


def cache_dtype() -> Any:
    """The setting `cache_dtype`."""
    return setting(
        AS_COMPUTED,
        "How precisely the outputs of attention are kept. 'as computed': exactly. 'bfloat16': in 16 bits, half of what "
        "float32 takes. '8 bit': in half of that, with a scale for each token. Both change pictures much less than the "
        "cache itself does. Usual: 'as computed', or '8 bit' where memory is short.",
        choices=FORMS,
        is_optional=True,
    )
