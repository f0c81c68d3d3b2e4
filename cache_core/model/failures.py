"""What an exception that a model raises means."""

from __future__ import annotations

import torch

SHAPES_DO_NOT_FIT = (RuntimeError, ValueError, LookupError, TypeError)  # what a misread plan makes a model raise
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # in the messages of devices that raise a RuntimeError
_OF_THE_DEVICE = getattr(torch, "AcceleratorError", ())  # torch before 2.8 has none


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the request that raised this found no memory; what is asked next may find some."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, _OF_THE_DEVICE)
    return is_plain and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_of_the_device(error: BaseException) -> bool:
    """Whether memory ran out or the device itself failed, then perhaps in something it was asked long before."""
    return isinstance(error, _OF_THE_DEVICE) or is_out_of_memory(error)
